"""A path study's plan: which networks are trained from which, under which settings, where, and what that will take.

A path is a tuple of networks, teacher first; a path of one is a network alone (the paper's NOKD). Every prefix of a path is a
training of its own and made once, so that five sizes need 16 distilled networks and teachers and 4 more alone. Each training is
one run folder of `train.py` under the study's folder. Standard library only.
"""

import itertools
import json
import platform
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from takd import files
from takd.config import names
from takd.config import run_config as settings
from takd.config.names import UserError
from takd.run import run_directory as runlog

FAMILIES = {
    "plane": ("plane10", "plane8", "plane6", "plane4", "plane2"),
    "resnet": ("resnet110", "resnet56", "resnet32", "resnet20", "resnet8"),
}
OWNED = ("student", "teacher", "teacher_checkpoint", "seed", "repeat", "run_dir", "json")  # settings that the plan gives
STUDY_FILE = "study.json"  # what was planned in a folder: the report tells from it what is still to come


def arrows(path):
    return " > ".join(path)


# --------------------------------------------------------------------------------------------- sizes and paths
def check_sizes(sizes):
    """Refuse sizes that are no study; returns a note for the user where one is due, else None."""
    if len(sizes) < 2:
        raise UserError(
            f"a study needs two or more sizes, the teacher first and the student last; given: {' '.join(sizes) or 'none'}"
        )
    if repeated := [name for name in dict.fromkeys(sizes) if sizes.count(name) > 1]:
        raise UserError(f"{', '.join(repeated)} is among the sizes more than once; name each size once, the teacher first")
    for family in dict.fromkeys(map(names.family, sizes)).keys() - {"other"}:  # whose numbers say nothing of size
        members = [name for name in sizes if names.family(name) == family]
        if members != (descending := sorted(members, key=size, reverse=True)):
            raise UserError(f"sizes go from the teacher down to the student: {' '.join(descending)}, not {' '.join(members)}")
    families = list(dict.fromkeys(map(names.family, sizes)))
    return (
        f"note: sizes of {len(families)} families ({', '.join(families)}), taken in the order given" if len(families) > 1 else None
    )


def size(network):
    """The number in a network's name, 0 where there is none."""
    return int((re.search(r"\d+", network) or "0")[0])


def one_family(sizes):
    """Whether the numbers alone tell the sizes apart, and which is the larger."""
    families = set(map(names.family, sizes))
    return len(families) == 1 and families != {"other"} and len(set(map(size, sizes))) == len(sizes)


def named(word, sizes):
    """One of `sizes` by its name or its bare number."""
    if word.strip().isdigit():
        fitting = [name for name in sizes if size(name) == int(word)]
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            raise UserError(f"size {word} may be {' or '.join(fitting)}; write its whole name")
    else:
        network = names.network(word)
        if not sizes or network in sizes:
            return network
    raise UserError(f"size {word.strip()} is not among the sizes: {' '.join(sizes) or 'none are given; write whole names'}")


def split_path(text, sizes):
    return tuple(named(word, sizes) for word in re.split(r"[,>]", text))


def sizes_among(texts):
    """The sizes of paths in whole names: one family's from the top down, else as the longest path has them, then the others."""
    paths = sorted((split_path(text, ()) for text in texts), key=len, reverse=True)
    sizes = list(dict.fromkeys(itertools.chain.from_iterable(paths)))
    return [sizes[0], *sorted(sizes[1:], key=size, reverse=True)] if one_family(sizes) else sizes


def choose_paths(sizes, texts):
    """The paths of a study: those written, or all from the first size to the last."""
    if not texts:
        between = sizes[1:-1]
        chosen = itertools.chain.from_iterable(itertools.combinations(between, n) for n in range(len(between), -1, -1))
        return [(sizes[0], *assistants, sizes[-1]) for assistants in chosen]
    paths = [split_path(text, sizes) for text in texts]
    for text, path in zip(texts, paths, strict=True):
        if path[0] != sizes[0]:
            raise UserError(f"path {text} skips the teacher: every path begins with {sizes[0]}")
        if len(path) < 2:
            raise UserError(f"path {text} has no student: a path is two or more sizes, such as {sizes[0]},{sizes[-1]}")
        places = [sizes.index(network) for network in path]
        if repeated := [network for network in dict.fromkeys(path) if path.count(network) > 1]:
            raise UserError(f"path {text} visits {', '.join(repeated)} more than once")
        if places != sorted(places):
            raise UserError(f"path {text} is in the wrong order: the sizes go {arrows(sizes)}")
    return list(dict.fromkeys(paths))


def tree(paths):
    """Every prefix of the paths once, each teacher's students together: its table of logits is filled once and stays hot."""
    prefixes = dict.fromkeys(path[:length] for path in paths for length in range(1, len(path) + 1))
    ordered = [path for path in prefixes if len(path) == 1]
    for parent in ordered:  # grows while it is walked
        ordered += [path for path in prefixes if path[:-1] == parent]
    return ordered


# ----------------------------------------------------------------------------------------- settings of a step
@dataclass(frozen=True)
class Step:
    """Settings of the trainings whose path ends like `ending`, such as 8 or 20,8 or the whole of 110,20,8."""

    text: str
    ending: tuple
    given: dict

    def applies_to(self, path):
        return path[-len(self.ending) :] == self.ending


def parse_step(text, sizes, parser):
    """`8:temperature=5,lambda=.15` as a Step; `parser` is train.py's, so that keys and values are checked as its flags are."""
    ending, colon, pairs = text.rpartition(":")
    if not colon or not pairs:
        raise UserError(f"--set {text}: write size:setting=value,setting=value, such as {size(sizes[-1])}:temperature=5,lambda=.15")
    words = []
    for pair in pairs.split(","):
        key, equals, value = pair.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or key not in parser.actions or key in OWNED or parser.actions[key].nargs == 0:
            allowed = [name for name, action in parser.actions.items() if name not in OWNED and action.nargs != 0]
            raise UserError(f"--set {text}: '{pair.strip()}' is not setting=value; settings: {' '.join(allowed)}")
        words += [f"--{key.replace('_', '-')}", *shlex.split(value)]
    given = {key: value for key, value in vars(parser.parse_args(words)).items() if value is not None}
    return Step(text, split_path(ending, sizes), given)


def settings_of(path, common, steps):
    """What a training is given: the study's own, then steps' from the least to the most specific."""
    given = dict(common)
    for step in sorted(steps, key=lambda step: len(step.ending)):
        if step.applies_to(path):
            given |= step.given
    return given if len(path) > 1 else {key: value for key, value in given.items() if key not in settings.NEED_TEACHER}


# ------------------------------------------------------------------------------------------------- the trainings
class Training:
    """One run of train.py in the plan: where it is, what it is given, how far it is."""

    def __init__(self, folder, path, seed, given, teacher=None):
        self.path, self.seed, self.teacher = path, seed, teacher
        self.name = "-".join((*map(names.file_name, path), f"seed{seed}"))
        self.run = runlog.RunDirectory(Path(folder) / self.name)
        self.log = Path(folder) / "logs" / f"{self.name}.log"
        self._given = given

    @property
    def finished(self):
        return self.run.summary_file.exists()

    @property
    def checkpoint(self):
        """The best network's file: as the run's summary names it, or before there is one, as train.py will."""
        summary = self.run.read(self.run.summary_file)
        expected = f"{names.file_name(self.path[-1])}_seed{self.seed}_best.pth.tar"
        return self.run.path / (Path(summary["checkpoint"]).name if summary else expected)  # the folder may have been moved

    @property
    def arguments(self):
        """For train.py."""
        learn = {"teacher": self.teacher.path[-1], "teacher_checkpoint": self.teacher.checkpoint} if self.teacher else {}
        return settings.flags({"student": self.path[-1], **learn, **self._given, "seed": self.seed, "run_dir": self.run.path})

    def resolve(self, elsewhere):
        """Every setting it will have. Ends with a usage error, or a UserError where its folder holds another run."""
        resolved, _ = settings.resolve(*settings.given_settings(self.arguments, elsewhere=elsewhere)[:2])
        try:
            self.run.check(settings.identity_of(resolved))
        except UserError as error:
            raise UserError(str(error).replace("--run-dir", "--runs")) from None
        return resolved


def plan(folder, sizes, paths, seeds, common, steps):
    """All trainings of a study, teachers before their students; per seed the tree, then the other sizes alone."""
    in_tree = tree(paths)
    alone = [(network,) for network in sizes[1:] if any(network in path for path in paths)]
    trainings = {}
    for seed in seeds:
        for path in (*in_tree, *alone):
            given = settings_of(path, common, steps)
            trainings[path, seed] = Training(folder, path, seed, given, trainings.get((path[:-1], seed)))
    for step in steps:
        if not any(step.applies_to(path) for path, _ in trainings):
            raise UserError(f"--set {step.text}: no training of the plan ends with {','.join(step.ending)}")
    return list(trainings.values())


def record(folder, trainings):
    """Note in the study's folder what is planned there, beside what was planned there before."""
    file = Path(folder) / STUDY_FILE
    planned = read(folder) | {training.name: {"path": training.path, "seed": training.seed} for training in trainings}
    Path(folder, "logs").mkdir(parents=True, exist_ok=True)
    files.save_json({"trainings": planned}, file)


def read(folder):
    """{training name: {"path", "seed"}} planned in a folder; empty where no study was."""
    file = Path(folder) / STUDY_FILE
    try:
        return json.loads(file.read_text(encoding="utf-8"))["trainings"]
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} cannot be read ({error}); delete it, and the study's command writes it anew") from None


# --------------------------------------------------------------------------------------------------- estimates
@dataclass(frozen=True)
class Cost:
    """What one network takes on this machine."""

    epoch_seconds: float
    parameters: int


def measured_cost(line, resolved):
    """A line of calibrate.py as a Cost on this data set."""
    data = names.DATASETS[resolved["dataset"]]
    training = resolved.get("train_images", data.train_images) / line["train_images_per_second"]
    return Cost(training + data.test_images / line["evaluation_images_per_second"], line["parameters"])


def earlier_costs(folders, resolved, device):
    """{network: Cost} from finished runs on the same data set, batch size, machine and kind of device."""
    found = {}
    for file in itertools.chain.from_iterable(Path(folder).glob(depth) for folder in folders for depth in ("*/", "*/*/")):
        run = runlog.RunDirectory(file)
        try:
            config, summary = run.read(run.config_file), run.read(run.summary_file)
        except UserError:
            continue
        if config and summary:
            environment = config["environment"]
            same = all(config.get(key) == resolved.get(key) for key in ("dataset", "batch_size", "image_size", "train_images"))
            kind = "cpu" if environment["device"] == runlog.processor() else "cuda"
            if same and environment["host"] == platform.node() and kind == device:
                found.setdefault(summary["model"], []).append(Cost(summary["seconds"] / summary["epochs"], summary["parameters"]))
    return {
        network: Cost(sum(c.epoch_seconds for c in costs) / len(costs), costs[0].parameters) for network, costs in found.items()
    }


def estimate(trainings, resolved, costs, jobs):
    """(seconds of each training, seconds of all with `jobs` at once, bytes on disk at the end).

    A teacher answers each image once a view and seed, whoever of its students asks first: about a third of its training step.
    """
    seconds, disk = {}, 0
    teachers = {training.teacher for training in trainings if training.teacher}
    for training in trainings:
        have, cost = resolved[training], costs[training.path[-1]]
        seconds[training] = have["epochs"] * cost.epoch_seconds
        disk += 2 * 8 * cost.parameters  # best and last, each weights and momentum in float32
    for teacher in teachers:
        student = next(training for training in trainings if training.teacher is teacher)
        have, data = resolved[student], names.DATASETS[resolved[student]["dataset"]]
        views = names.VIEWS[have["augment"]]
        seconds[student] += min(have["epochs"], views or have["epochs"]) * costs[teacher.path[-1]].epoch_seconds / 3
        if views:  # those that an image will have had are kept
            disk += 2 * data.train_images * data.classes * views * (1 - (1 - 1 / views) ** have["epochs"])
    longest = {}
    for training in trainings:
        longest[training] = (0 if training.finished else seconds[training]) + longest.get(training.teacher, 0)
    left = [training for training in trainings if not training.finished]
    total = sum(seconds[training] for training in left)
    return seconds, max(total / jobs, max((longest[training] for training in left), default=0) if jobs > 1 else 0), disk
