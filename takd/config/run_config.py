"""A run's settings: train.py's flags, what an NNI trial proposes, and what the recipe adds, down to plain JSON values.

Standard library only: the commands that plan trainings (distill_paths.py) read and check flags here without importing torch.
"""

import argparse
import dataclasses
import hashlib
from pathlib import Path

from takd.config import flags as arguments
from takd.config import names, recipes
from takd.config import nni_trial as tuner
from takd.config.flags import number
from takd.config.names import UserError
from takd.run import launch as launcher

# Settings that change where or how fast a run is made, not what comes out of it: a run may continue under other ones.
INCIDENTAL = ("cuda", "dataset_dir", "download", "run_dir", "save_minutes", "teacher_cache", "teacher_checkpoint", "json", "workers",
              "cuda_graph")
NEED_TEACHER = ("teacher_checkpoint", "method", "method_option", "temperature", "lambda", "teacher_cache")
OF_METHODS = ("temperature", "lambda")  # flags of their own for options that a method may have
DEFAULT_SEED = 1


def build_parser(description=""):
    """train.py's flags. What is not given stays None, its default in `parser.defaults`."""
    parser = arguments.Parser(description)
    group = parser.add_argument_group("networks")
    parser.flag(group, "--student", "--model", type=arguments.network, default="resnet8", metavar="NAME",
                help=f"network to train: {' '.join(names.NETWORKS)}, {names.MORE_NETWORKS}")
    parser.flag(group, "--teacher", type=arguments.network, metavar="NAME", help="network to learn from (without one: labels only)")
    parser.flag(group, "--teacher-checkpoint", metavar="FILE", help="the teacher's weights (without: it is trained first)")
    parser.flag(group, "--pretrained", action="store_const", const=True,
                help="begin with torchvision's weights, the last layer new: a student, and a teacher trained first, of torchvision's")
    group = parser.add_argument_group("data")
    parser.flag(group, "--dataset", type=arguments.dataset, default="cifar100", metavar="NAME", help=" ".join(names.DATASETS))
    parser.flag(group, "--dataset-dir", default="./data", metavar="DIR",
                help="where cifar-100-python or cifar100/{train,test}/<class>/ is, or is downloaded to; of --dataset folder, where "
                "train/<class>/ and val or test are")
    parser.flag(group, "--image-size", type=number(int, minimum=8, maximum=1024), metavar="N",
                help="height and width that the networks get (default: 32, of a folder 224)")
    parser.flag(group, "--train-images", type=number(int, minimum=1), metavar="N", help="only so many of them, evenly from the classes")
    parser.flag(group, "--download", action="store_const", const=True, help="fetch an absent data set (the default)")
    group.add_argument("--no-download", dest="download", action="store_const", const=False, help="never touch the network")
    parser.flag(group, "--validation-split", type=number(float, minimum=0), default=0.0, metavar="SHARE",
                help="hold out this share (or number) of the training images and select the best epoch on them, not on the test set")
    parser.flag(group, "--augment", choices=("auto", *names.VIEWS), default="auto", help="auto takes the recipe's")
    parser.flag(group, "--workers", type=number(int, minimum=0), metavar="N",
                help="processes that make the views of rotate-crop-flip (default: one a core, at most 8)")
    group = parser.add_argument_group("distillation")
    parser.flag(group, "--method", type=arguments.method, default="kd", metavar="NAME",
                help=f"{' '.join(names.methods())}, or a class of your own: my_file.py:MyClass")
    parser.flag(group, "--method-option", nargs="+", action="extend", metavar="KEY=VALUE", help="options of the method")
    parser.flag(group, "--temperature", type=number(float, above=0), metavar="T",
                help=f"the method's option (default of kd: {names.methods()['kd'].options['temperature'].default:g})")
    parser.flag(group, "--lambda", dest="lambda", type=number(float, minimum=0, maximum=1), metavar="L",
                help="the method's option: share of the teacher's term in eq. 3 "
                f"(default of kd: {names.methods()['kd'].options['lambda'].default:g})")
    group.add_argument("--help-methods", action=arguments.Show, text=names.help_methods, help="list the methods and their options")
    parser.flag(group, "--teacher-cache", choices=("auto", "live", "lazy", "full"), default="auto",
                help="the teacher's logits: asked each time, or a table filled as batches ask, or filled at once")
    group = parser.add_argument_group("optimisation (what is not given comes from the recipe)")
    parser.flag(group, "--recipe", choices=tuple(recipes.RECIPES), default="paper",
                help="see docs/recipes.md; released-code is that code's faults and all")
    parser.flag(group, "--epochs", type=number(int, minimum=1), metavar="N", help="passes over the training images (paper: 160)")
    parser.flag(group, "--batch-size", type=number(int, minimum=1), metavar="N", help="images a step, over all GPUs (paper: 128)")
    parser.flag(group, "--learning-rate", type=number(float, above=0), metavar="RATE", help="of the first epoch")
    parser.flag(group, "--milestones", type=number(int, minimum=0), nargs="*", metavar="EPOCH", help="epochs at which the rate falls")
    parser.flag(group, "--learning-rate-decay", type=number(float, above=0), metavar="F", help="factor at each milestone")
    parser.flag(group, "--momentum", type=number(float, minimum=0, below=1), metavar="M", help="of SGD")
    parser.flag(group, "--nesterov", action="store_const", const=True, help="Nesterov momentum")
    group.add_argument("--no-nesterov", dest="nesterov", action="store_const", const=False, help="plain momentum")
    parser.flag(group, "--weight-decay", type=number(float, minimum=0), metavar="W", help="of SGD")
    parser.flag(group, "--seed", type=number(int, minimum=0, maximum=2**63 - 1), default=DEFAULT_SEED, metavar="N",
                help="of weights, order and views")
    parser.flag(group, "--repeat", type=number(int, minimum=1), metavar="N",
                help="N runs with seeds from --seed on and one teacher, each in a folder of its own; their mean at the end")
    group = parser.add_argument_group("machine")
    parser.flag(group, "--cuda", type=arguments.cuda, metavar="N", help="GPUs: 1 or yes, 0 or no, or a number, a process each "
                "(without the flag: a GPU if there is one); under torchrun: 0, or a GPU for each of its processes")
    parser.flag(group, "--precision", choices=("auto", "fp32", "bf16"), default="auto",
                help="arithmetic of the networks; auto takes bf16 where the hardware has it")
    group.add_argument("--no-cuda-graph", dest="cuda_graph", action="store_const", const=False,
                       help="launch a step's kernels one by one (without the flag: as one CUDA graph where that is possible)")
    group = parser.add_argument_group("records")
    parser.flag(group, "--run-dir", metavar="DIR", help="the run's folder (default: runs/<a name made of the settings>)")
    parser.flag(group, "--save-minutes", type=number(float, above=0), default=10.0, metavar="M",
                help="save inside an epoch this often; every epoch's end and SIGTERM, SIGINT, SIGUSR1 save as well")
    parser.flag(group, "--json", action="store_const", const=True, help="print the summary as JSON; other lines go to standard error")
    return parser  # fmt: skip


def given_settings(argv, description="", elsewhere=False):
    """({setting: value}, {setting: origin}, device) of what the user and a tuner gave. Ends with a usage error where it is wrong.

    A run that is to be made `elsewhere` has no device yet.
    """
    parser = build_parser(description)
    parsed = vars(parser.parse_args(argv))
    direct = parser.named_in(argv)
    given = {key: value for key, value in parsed.items() if value is not None}
    origins = {key: "command line" if key in direct else "arguments file" for key in given}
    try:
        if trial := tuner.trial():
            given["trial"], origins["trial"] = trial, "NNI"
            for key, value in tuner.parameters().items():
                if key in given:
                    raise UserError(f"--{key} is given and also proposed by the tuner; remove one of them")
                given[key], origins[key] = proposed_value(parser, key, value), "tuner"
        check_combinations(given, origins)
        for key, default in parser.defaults.items():
            if key not in given and default is not None:
                given[key], origins[key] = default, "default"
        device = None if elsewhere else training_device(given)
        if device == "cpu" and "cuda_graph" in given:
            raise UserError("--no-cuda-graph is about GPUs, and this run is on the CPU")
    except UserError as error:
        parser.error(str(error))
    return given, origins, device


def training_device(given):
    """'cuda' or 'cpu', where this machine's processes (torchrun's, or --cuda's own) have a GPU and an image each."""
    wanted, place = given.get("cuda"), launcher.place()
    if place.size > 1 and wanted not in (None, 0, 1, place.local_size):
        raise UserError(f"--cuda {wanted}: torchrun started {place.local_size} processes here, and each takes one GPU")
    device = arguments.device_name(wanted)
    if place.size > 1 and device == "cuda":
        arguments.device_name(place.local_size)
    processes = place.size if place.size > 1 else wanted or 1
    batch_size = given.get("batch_size", recipes.recipe(given["recipe"], given["student"]).batch_size)
    if batch_size < processes:
        raise UserError(f"--batch-size {batch_size}: {processes} processes share a batch, and each needs an image of it")
    if processes > 1 and "teacher" in given and names.method_of(given["method"]).one_process:
        raise UserError(f"--method {given['method']} compares images with each other, which {processes} processes do not share; use one GPU")
    return device


def proposed_value(parser, key, value):
    """A tuner's value under the same bounds as the flag's. Some samplers give whole numbers as 20.0."""
    convert = parser.actions[key].type
    whole = isinstance(value, float) and value.is_integer()
    try:
        return convert(str(int(value) if whole else value))
    except argparse.ArgumentTypeError as error:
        raise UserError(f"the tuner proposes {key} {value}: {error}; correct search_space.json") from None


def check_combinations(given, origins):
    """Flags that would have no effect are refused, so that nobody believes they had one."""
    if "teacher" not in given:
        for key in NEED_TEACHER:
            if key in given and origins[key] != "tuner" and (key, given[key]) != ("method", "base"):
                raise UserError(f"--{key.replace('_', '-')} needs --teacher")
    else:
        method_options(given)
    if "repeat" in given and "trial" in given:
        raise UserError("--repeat is not for a tuner's trials: each is one run; let the search space choose seeds")
    if given.get("seed", DEFAULT_SEED) + given.get("repeat", 1) > 2**63:
        raise UserError(f"--repeat {given['repeat']}: seeds end at {2**63 - 1}")
    if given.get("pretrained"):
        trained_first = given.get("teacher") if "teacher_checkpoint" not in given else None
        networks = [name for name in (given.get("student", "resnet8"), trained_first) if name]
        if not any(map(names.torchvision_name, networks)):
            raise UserError(f"--pretrained needs a network of torchvision's to train (resnet50, torchvision:NAME), not {' or '.join(networks)}")
    endless = names.VIEWS.get(given.get("augment"), 1) is None
    if "workers" in given and not endless:
        raise UserError("--workers needs --augment rotate-crop-flip: no other augmentation asks for any")
    if endless and given.get("teacher_cache", "auto") not in ("auto", "live"):
        raise UserError(f"--teacher-cache {given['teacher_cache']}: {given['augment']} has no end of views to keep; use live")
    if given.get("nesterov") and given.get("momentum") == 0:
        raise UserError("--nesterov needs a --momentum above 0")


def method_options(given):
    """{option: value} that was given for the method, by --method-option and by flags of their own, checked."""
    name = given.get("method", "kd")
    known = names.method_of(name).options
    words = [(f"--{key}", key, str(given[key])) for key in OF_METHODS if key in given]
    for word in given.get("method_option", ()):
        key, equals, value = word.partition("=")
        if not equals:
            raise UserError(f"--method-option {word}: write key=value; options of {name}: {' '.join(known) or 'none'}")
        words.append((f"--method-option {word}", key.strip().replace("-", "_"), value.strip()))
    chosen = {}
    for spelled, key, value in words:
        if key not in known:
            listed = f"{names.nearest(key, known)}; options of {name}: {' '.join(known)}" if known else ", nor any other"
            raise UserError(f"{spelled}: method {name} has no option '{key}'{listed}")
        if key in chosen:
            raise UserError(f"{spelled}: {key} is given twice")
        try:
            chosen[key] = arguments.method_option(known[key])(value)
        except argparse.ArgumentTypeError as error:
            raise UserError(f"{spelled}: {error}") from None
    return chosen


def resolve(given, origins):
    """Every setting a run has, from what was given and the recipe: ({setting: value}, {setting: origin}), plain JSON values."""
    settings, origins = dict(given), dict(origins)
    if settings.get("image_size") == names.DATASETS[given["dataset"]].image_size:  # the same run as without the flag
        del settings["image_size"], origins["image_size"]
    recipe = recipes.recipe(given["recipe"], given["student"])
    from_recipe = dataclasses.asdict(recipe)
    if settings.get("momentum") == 0:
        from_recipe["nesterov"] = False
    from_recipe["milestones"] = recipes.milestone_epochs(recipe, given.get("epochs", recipe.epochs))
    for key in ("augment", "precision"):
        if settings[key] == "auto":
            del settings[key]
    for key, value in from_recipe.items():
        if key not in settings and key not in ("method_options", "round_down") and value is not None:
            settings[key], origins[key] = value, f"recipe {given['recipe']}"
    if origins["augment"].startswith("recipe") and not names.DATASETS[given["dataset"]].flips:
        settings["augment"], origins["augment"] = "none", f"data set {given['dataset']}"
    if "teacher" in settings:
        name, chosen = settings["method"], method_options(settings)
        own = {key: option.default for key, option in names.method_of(name).options.items()}
        settings["method_options"] = options = own | recipe.method_options.get(name, {}) | chosen
        for key in OF_METHODS:
            if key in options:
                by_recipe = f"recipe {given['recipe']}" if key in recipe.method_options.get(name, {}) else f"default of {name}"
                settings[key] = options[key]
                origins[key] = origins.get(key, origins.get("method_option") if key in chosen else by_recipe)
        settings.pop("method_option", None), origins.pop("method_option", None)
        origins["method_options"] = "resolved"
        if ":" in name:  # another file is another run
            content = Path(name.rpartition(":")[0]).read_bytes()
            settings["method_file"], origins["method_file"] = hashlib.blake2b(content, digest_size=8).hexdigest(), "its content"
    else:
        if unused := [key for key in OF_METHODS if key in settings]:  # a tuner's: a user's were refused
            settings["without_effect"] = {key: settings[key] for key in unused}
            origins["without_effect"] = "tuner, but no --teacher"
        for key in ("method", "method_option", *OF_METHODS, "teacher_cache"):
            settings.pop(key, None), origins.pop(key, None)
    return settings, origins


def identity_of(settings):
    """What makes the run: another identity is another run and belongs into another folder."""
    return {key: value for key, value in settings.items() if key not in INCIDENTAL}


def flags(given):
    """The arguments that give these settings to train.py."""
    words = []
    for key, value in given.items():
        name = key.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        else:
            words += [f"--{name}", str(value)]
    return words
