"""RunConfig: every setting of one run and its origin, from the command line to the record in config.json.

config = parse(["--teacher", "plane10", "--student", "plane2"])      exits with a usage error if an argument is wrong
config.teacher_config()      the run that trains the teacher first     config.repetitions()     the runs of --repeat
"""

import argparse
import dataclasses
import hashlib
import json
import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from takd import files, process
from takd.config import flags, methods, names, nni_trial, recipes
from takd.errors import UserError

# fmt: off
NEED_TEACHER = (
    "teacher_checkpoint", "method", "method_option", "temperature", "lambda", "teacher_cache", "any_teacher",
)
OPTION_FLAGS = ("temperature", "lambda")  # method options that have flags of their own
LEARNING = ("method", "method_option", *OPTION_FLAGS)
PASSED_TO_TEACHER = (
    "dataset", "dataset_dir", "download", "image_size", "train_images", "test_images", "validation_split", "augment",
    "workers", "recipe", "epochs", "batch_size", "cuda", "precision", "save_minutes",
)
# These change where or how fast a run is made, not its outcome: it may continue with other values.
INCIDENTAL = (
    "teacher_checkpoint", "teacher_cache", "any_teacher", "init_from", "dataset_dir", "download", "workers", "cuda",
    "cuda_graph",
    "run_dir", "save_minutes", "json",
)
DIGESTS = {"images": "dataset_dir", "teacher_weights": "teacher", "init_weights": "init_from"}  # of what files hold
MEASURED = ("dataset", "image_size", "batch_size", "precision", "cuda", "cuda_graph")  # what --measure depends on
UNRECORDED = ("device", "repeat", "measure", "learning", "origins")  # config.json has origins separately
DERIVED = ("recipe", "default of", "data set", "resolved", "its")  # beginnings of the origins of values not given
# fmt: on


@dataclass(frozen=True)
class RunConfig:
    """The settings of one run, plain JSON values. None: a setting that does not apply to this run."""

    student: str
    dataset: str
    recipe: str
    epochs: int
    batch_size: int
    learning_rate: float
    milestones: list[int]
    learning_rate_decay: float
    momentum: float
    nesterov: bool
    weight_decay: float
    augment: str
    precision: str  # "auto": bf16 where the hardware has it
    seed: int
    validation_split: float = 0.0
    initialisation: str | None = None
    image_size: int | None = None  # None: the data set's usual one
    train_images: int | None = None
    test_images: int | None = None
    pretrained: bool | None = None
    schedule: str | None = None  # "cosine"; None: steps, at the milestones
    warmup_epochs: int | None = None
    label_smoothing: float | None = None
    trial: str | None = None  # NNI's
    # With a teacher; of several, lists:
    teacher: str | list[str] | None = None
    method: str | None = None
    method_options: dict[str, Any] | None = None  # all of the method's
    temperature: float | None = None  # two of these options again, if the method has them
    lambda_: float | None = None
    method_file: str | None = None  # digest of the user's own file
    without_effect: dict[str, Any] | None = None  # a tuner's values that need a teacher, in a run without one
    # Digests of the files that the outcome depends on, known when they are read:
    images: str | None = None  # of --dataset folder
    teacher_weights: str | list[str] | None = None
    init_weights: str | None = None  # of the student before its first step
    # INCIDENTAL:
    teacher_checkpoint: str | list[str] | None = None
    teacher_cache: str | None = None
    any_teacher: bool | None = None
    init_from: str | None = None
    dataset_dir: str | None = None
    download: bool | None = None
    workers: int | None = None
    cuda: int | None = None
    cuda_graph: bool | None = None
    run_dir: str | None = None
    save_minutes: float | None = None
    json: bool | None = None
    # UNRECORDED:
    device: str | None = None  # "cuda" or "cpu"; None for a run that is made elsewhere
    repeat: int | None = None
    measure: list[str] | None = None
    learning: dict[str, Any] = field(default_factory=dict)  # of LEARNING, what was given, but not by a tuner
    origins: dict[str, str] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """{setting: value} as config.json has them."""
        present = {key: value for key, value in vars(self).items() if value is not None and key not in UNRECORDED}
        return {key.rstrip("_"): value for key, value in present.items()}

    def identity(self) -> dict[str, Any]:
        """The settings that determine the outcome: another identity is another run, in another folder."""
        return settings_of(self.record())

    def learning_rate_at(self, epoch: int) -> float:
        """The rate of one epoch, counted from 0. Stateless: a continued run has no scheduler to restore.

        As of PyTorch's schedulers, stepped once an epoch: MultiStepLR, times LinearLR (from a third of the rate, its
        default) in the warm-up; or, with a cosine, LinearLR and after it CosineAnnealingLR down to 0.
        """
        warmup = self.warmup_epochs or 0
        if self.schedule == "cosine" and epoch >= warmup:
            progress = (epoch - warmup) / (self.epochs - warmup)
            return self.learning_rate * (1 + math.cos(math.pi * progress)) / 2
        rate = self.learning_rate * self.learning_rate_decay ** sum(epoch >= each for each in self.milestones)
        return rate * (1 + 2 * epoch / warmup) / 3 if epoch < warmup else rate

    def replace(self, origin: str | None = None, **changes: Any) -> "RunConfig":
        """A copy with other values; `origin` is recorded as their origin."""
        origins = self.origins | dict.fromkeys(changes, origin) if origin else self.origins
        return dataclasses.replace(self, **changes, origins=origins)

    @property
    def teachers(self) -> list[str]:
        return one_or_more(self.teacher)

    @property
    def teacher_checkpoints(self) -> list[str]:
        return one_or_more(self.teacher_checkpoint)

    # ------------------------------------------------------------------------------------------- other runs
    def teacher_config(self) -> "RunConfig":
        """The run that trains the last teacher, from those before it: the same data, length and recipe, the method as
        given, but not the student's optimiser flags."""
        settings, (*above, network) = self.record(), self.teachers
        passed = (*PASSED_TO_TEACHER, "method", "teacher_cache", "any_teacher") if above else PASSED_TO_TEACHER
        present = [key for key in passed if key in settings]
        given = {key: settings[key] for key in present if not self.origins[key].startswith(DERIVED)}
        given["student"] = network
        if above:
            given |= self.learning | {"teacher": above if len(above) > 1 else above[0]}
            given = given if len(above) > 1 else of_one_teacher(given)
        if self.pretrained and any(map(names.has_pretrained, self.teachers)):
            given["pretrained"] = True
        given["seed"] = self.seed
        if self.run_dir:
            given["run_dir"] = str(Path(self.run_dir) / "teacher")
        renamed = {"student": "teacher", "method_option": "method_options"}
        origins = {key: self.origins.get(renamed.get(key, key), "default") for key in given}
        if origins["seed"] == "tuner":  # the student's alone: all trials of an experiment learn from one teacher
            given["seed"], origins["seed"] = flags.DEFAULT_SEED, "default"
        return dataclasses.replace(resolve(given, origins), device=self.device, learning=self.learning)

    def repetitions(self) -> list["RunConfig"]:
        """The runs of --repeat: one per seed, each in its own folder inside --run-dir. Without --repeat: this run."""
        if self.repeat is None:
            return [self]
        runs = [dataclasses.replace(self, seed=seed) for seed in range(self.seed, self.seed + self.repeat)]
        if self.run_dir:
            runs = [dataclasses.replace(run, run_dir=str(Path(self.run_dir) / f"seed{run.seed}")) for run in runs]
        return runs

    def command(self, run_dir: str) -> str:
        """What a user types to make the run in another folder."""
        return shlex.join(["python3", "train.py", *command(self.record(), self.origins), "--run-dir", run_dir])

    # ------------------------------------------------------------------------------------------- names of files
    @property
    def run_path(self) -> Path:
        """The run's folder: as given (a trial's inside it), or named after the run's settings."""
        if self.trial:
            return Path(self.run_dir or f"runs/nni-{nni_trial.experiment()}") / self.trial
        if self.run_dir:
            return Path(self.run_dir)
        chain = [names.file_name(name) for name in (self.dataset, *self.teachers, self.student)]
        digest = hashlib.blake2b(json.dumps(self.identity(), sort_keys=True).encode(), digest_size=3).hexdigest()
        return Path("runs") / f"{'-'.join(chain)}-seed{self.seed}-{digest}"

    @property
    def best_file(self) -> Path:
        """The best epoch's checkpoint."""
        return self.run_path / f"{names.file_name(self.student)}_{self.trial or f'seed{self.seed}'}_best.pth.tar"


def settings_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """Of what config.json has, the settings that determine the outcome."""
    fields = {key.rstrip("_") for key in RunConfig.__dataclass_fields__} - {*INCIDENTAL, *UNRECORDED}
    return {key: value for key, value in record.items() if key in fields and value is not None}


def one_or_more(value: Any) -> list[Any]:
    """A setting's values: of a teacher, its name or its file, or those of several."""
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]


def of_one_teacher(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a network of a chain that has one teacher: its dgkd is kd, and so the same run in every chain."""
    settings = dict(settings)
    if settings["method"] == "dgkd":
        settings["method"] = "kd"
        words = settings.pop("method_option", ())
        if kept := [word for word in words if word.partition("=")[0].strip() != "drop"]:
            settings["method_option"] = kept
    return settings


def command(record: Mapping[str, Any], origins: Mapping[str, str]) -> list[str]:
    """The arguments of train.py that make a run again, from what config.json has of it: settings that were given, by a
    tuner too, and where its data and its teacher are."""
    given = {
        key: record[key]
        for key, origin in origins.items()
        if key in record and origin != "default" and not origin.startswith(DERIVED)
        if key not in ("trial", "run_dir", "json", "without_effect")
    }
    options = given.pop("method_options", {}).items()
    if words := [f"{key}={value}" for key, value in options if key not in OPTION_FLAGS]:
        given["method_option"] = words
    return flags.words(given | {key: record[key] for key in ("teacher_checkpoint",) if key in record})


# ---------------------------------------------------------------------------------------------------- parsing
def parse(argv: list[str], description: str = "", elsewhere: bool = False) -> RunConfig:
    """The run of a command line and, in a trial, of NNI's proposal. Exits with a usage error if they are wrong.

    A run that will be made `elsewhere` has no device yet.
    """
    parser = flags.train_parser(description)
    given, origins = parser.given(argv)
    learning = {key: given[key] for key in LEARNING if key in given}
    try:
        if trial := nni_trial.trial():
            given["trial"], origins["trial"] = trial, "NNI"
            proposed = proposed_settings(parser, given, nni_trial.proposal())
            given, origins = given | proposed, origins | dict.fromkeys(proposed, "tuner")
        _check_combinations(given, origins)
        for key, default in parser.defaults.items():
            if key not in given and default is not None:
                given[key], origins[key] = default, "default"
        config = dataclasses.replace(resolve(given, origins), learning=learning)
        return config if elsewhere else dataclasses.replace(config, device=_training_device(config))
    except UserError as error:
        parser.error(str(error))


def proposed_settings(parser: flags.Parser, given: Mapping[str, Any], proposal: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a tuner's proposal adds to the given ones, under the same bounds as the flags'."""
    settings: dict[str, Any] = {}
    for key, value in proposal.items():
        whole = isinstance(value, float) and value.is_integer()  # some samplers give 20 as 20.0
        text, (method, dot, option) = str(int(value) if whole else value), key.rpartition(".")
        if key in given:
            raise UserError(f"--{key} is given and also proposed by the tuner; remove one of them")
        if dot and method != (used := given.get("method", parser.defaults["method"])):
            raise UserError(f"the tuner proposes {key}, and the method is {used}; add --method {method} or remove it")
        try:
            if dot:
                words = settings.setdefault("method_option", list(given.get("method_option", ())))
                words.append(f"{option}={text}")
            else:
                settings[key] = parser.value(key, text)
        except argparse.ArgumentTypeError as error:
            raise UserError(f"the tuner proposes {key} {value}: {error}; correct search_space.json") from None
    return settings


def _check_combinations(given: Mapping[str, Any], origins: Mapping[str, str]) -> None:
    """Refuse flags that would have no effect, so that nobody assumes they had one."""
    if "teacher" not in given:
        for key in NEED_TEACHER:
            excused = key in OPTION_FLAGS and origins.get(key) == "tuner"  # noted in the run's record
            if key in given and not excused and (key, given[key]) != ("method", "base"):
                raise UserError(f"--{key.replace('_', '-')} needs --teacher")
    teachers, files = one_or_more(given.get("teacher")), one_or_more(given.get("teacher_checkpoint"))
    if files and len(files) != len(teachers):
        counts = f"{len(files)} file{'s' * (len(files) > 1)} for {len(teachers)} teacher{'s' * (len(teachers) > 1)}"
        raise UserError(f"--teacher-checkpoint: {counts} ({' '.join(teachers)}); give one for each, in the same order")
    if "measure" in given and (unused := sorted(given.keys() - {"measure", *MEASURED})):
        raise UserError(f"--measure trains nothing: --{unused[0].replace('_', '-')} has no effect on it; leave it out")
    if "measure" in given and (process.place().size > 1 or (given.get("cuda") or 0) > 1):
        raise UserError("--measure measures one process on one GPU or the CPU; use --cuda 1 or 0, and no torchrun")
    if "repeat" in given and "trial" in given:
        raise UserError("--repeat is not for a tuner's trials: each is one run; let the search space choose seeds")
    if given.get("seed", flags.DEFAULT_SEED) + given.get("repeat", 1) > 2**63:
        raise UserError(f"--repeat {given['repeat']}: seeds end at {2**63 - 1}")
    if given.get("pretrained"):
        networks = [given.get("student", "resnet8"), *([] if files else teachers)]
        if not any(map(names.has_pretrained, networks)):
            known = "a network of torchvision's to train (resnet50, torchvision:NAME), or a class with `pretrained`"
            raise UserError(f"--pretrained needs {known}, not {' or '.join(networks)}")
        if "init_from" in given and names.torchvision_name(given.get("student", "resnet8")):
            raise UserError("--pretrained and --init-from both give the student's first weights; leave one out")
    augment, cache = given.get("augment", "auto"), given.get("teacher_cache", "auto")
    random = names.VIEWS.get(augment, 1) is None
    if "workers" in given and not random:
        raise UserError("--workers needs --augment rotate-crop-flip: every other augmentation runs in the step itself")
    if random and cache not in ("auto", "live"):
        raise UserError(f"--teacher-cache {cache}: random augmentation ({augment}) cannot be cached; use live")
    for key in ("milestones", "learning_rate_decay"):
        if key in given and given.get("schedule") == "cosine":
            raise UserError(f"--{key.replace('_', '-')} has no effect with --schedule cosine; leave it out")
    if given.get("nesterov") and given.get("momentum") == 0:
        raise UserError("--nesterov needs a --momentum above 0")


def _training_device(config: RunConfig) -> str:
    """'cuda' or 'cpu'. A UserError unless every process here (torchrun's or --cuda's) has a GPU and part of a batch."""
    if (tasks := process.srun_tasks()) > 1:
        fix = f"have srun start torchrun (docs/slurm.md), or one task with --cuda {tasks}"
        raise UserError(f"srun started this command {tasks} times, and each would be a run of its own: {fix}")
    place, cuda = process.place(), config.cuda
    if place.size > 1 and cuda not in (None, 0, 1, place.local_size):
        raise UserError(f"--cuda {cuda}: torchrun started {place.local_size} processes here, and each takes one GPU")
    device = flags.device_name(cuda)
    if place.size > 1 and device == "cuda":
        flags.device_name(place.local_size)
    count = place.size if place.size > 1 else cuda or 1
    if config.batch_size < count:
        raise UserError(
            f"--batch-size {config.batch_size}: {count} processes share a batch, and each needs an image of it"
        )
    if count > 1 and config.method and not methods.find(config.method).data_parallel:
        why = f"compares images with each other, which {count} processes do not share"
        raise UserError(f"--method {config.method} {why}; use one GPU")
    if device == "cpu" and config.precision == "tf32":
        raise UserError("--precision tf32 is for GPUs only, and this run is on the CPU; use auto, bf16 or fp32")
    if device == "cpu" and config.cuda_graph is not None:
        raise UserError("--no-cuda-graph is for GPUs only, and this run is on the CPU")
    return device


# -------------------------------------------------------------------------------------------------- resolving
def resolve(given: Mapping[str, Any], origins: Mapping[str, str]) -> RunConfig:
    """Every setting of a run, from the given ones and the recipe."""
    auto = [key for key in ("augment", "precision") if given.get(key) == "auto"]
    data, network = names.DATASETS[given["dataset"]], given["student"]
    if "image_size" not in given and (size := names.declared_input(network).get("image_size")):
        given, origins = {**given, "image_size": size}, {**origins, "image_size": "its class"}
    usual = {"image_size": data.image_size} | recipes.OFF  # given, they make the same run as without the flag
    settings = {key: value for key, value in given.items() if key not in auto and value != usual.get(key)}
    origins = {key: origins[key] for key in settings}
    recipe = recipes.recipe(given["recipe"], network)
    derived = dataclasses.asdict(recipe)
    derived["milestones"] = recipes.milestone_epochs(recipe, given.get("epochs", recipe.epochs))
    if settings.get("momentum") == 0:
        derived["nesterov"] = False
    if settings.get("schedule"):
        settings["milestones"], origins["milestones"] = [], "its schedule"
    for key, value in derived.items():
        if key in RunConfig.__dataclass_fields__ and key not in (*settings, "method_options") and value is not None:
            settings[key], origins[key] = value, f"recipe {given['recipe']}"
    if (warmup := settings.get("warmup_epochs", 0)) >= settings["epochs"]:
        raise UserError(f"--warmup-epochs {warmup}: fewer than the run's {settings['epochs']} epochs are allowed")
    if origins["augment"].startswith("recipe") and not data.flips:
        settings["augment"], origins["augment"] = "none", f"data set {given['dataset']}"
    if "teacher" in settings:
        _resolve_method(settings, origins, recipe)
    else:
        unused = {key: settings.pop(key) for key in OPTION_FLAGS if key in settings}  # a tuner's: a user's were refused
        if unused:
            settings["without_effect"], origins["without_effect"] = unused, "tuner, but no --teacher"
        settings = {key: value for key, value in settings.items() if key not in ("method", "teacher_cache")}
    fields = {"lambda_" if key == "lambda" else key: value for key, value in settings.items()}
    return RunConfig(**fields, origins={key: origins[key] for key in settings})


def _resolve_method(settings: dict[str, Any], origins: dict[str, str], recipe: recipes.Recipe) -> None:
    """All options of the method; given values override the recipe's, which override the method's defaults."""
    name, method, teachers = settings["method"], methods.find(settings["method"]), one_or_more(settings["teacher"])
    if "label_smoothing" in settings and not method.label_smoothing:
        fix = "give its class a label_smoothing (docs/adding_a_method.md)"
        raise UserError(f"--label-smoothing has no effect on --method {name}; {fix}, or leave it out")
    if len(teachers) > 1 and not method.several_teachers:
        several = " ".join(key for key, each in methods.METHODS.items() if each.several_teachers)
        what = f"learns from one teacher, and {len(teachers)} are given ({' '.join(teachers)})"
        raise UserError(f"--method {name} {what}; methods for several: {several}")
    known, like = method.options, "kd" if name == "dgkd" else name  # with one teacher dgkd is kd, whatever the recipe
    chosen, from_recipe = _given_options(settings, known), recipe.method_options.get(like, {})
    options = {key: option.default for key, option in known.items()} | from_recipe | chosen
    settings["method_options"], origins["method_options"] = options, origins.get("method_option", "resolved")
    for key in OPTION_FLAGS:
        if key in options:
            unchosen = f"recipe {settings['recipe']}" if key in from_recipe else f"default of {name}"
            origins[key] = origins.get(key) or (origins["method_option"] if key in chosen else unchosen)
            settings[key] = options[key]
    settings.pop("method_option", None)
    if ":" in name:  # another file is another run
        content = files.read_bytes(name.rpartition(":")[0])
        settings["method_file"] = hashlib.blake2b(content, digest_size=8).hexdigest()
        origins["method_file"] = "its content"


def _given_options(settings: Mapping[str, Any], known: Mapping[str, methods.Option]) -> dict[str, Any]:
    """{option: value} given for the method by --method-option and by the options' own flags, checked."""
    name, listed = settings["method"], " ".join(known) or "none"
    given = [(f"--{key}", key, str(settings[key])) for key in OPTION_FLAGS if key in settings]
    for word in settings.get("method_option", ()):
        key, equals, text = word.partition("=")
        if not equals:
            raise UserError(f"--method-option {word}: write key=value; options of {name}: {listed}")
        given.append((f"--method-option {word}", key.strip().replace("-", "_"), text.strip()))
    chosen: dict[str, Any] = {}
    for spelling, key, text in given:
        if key not in known:
            hint = names.nearest(key, known) if known else ""
            raise UserError(f"{spelling}: method {name} has no option '{key}'{hint}; options of {name}: {listed}")
        if key in chosen:
            raise UserError(f"{spelling}: {key} is given twice")
        try:
            chosen[key] = flags.option_value(known[key], text)
        except argparse.ArgumentTypeError as error:
            raise UserError(f"{spelling}: {error}") from None
    return chosen
