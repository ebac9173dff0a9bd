"""A run's settings: train.py's flags, what an NNI trial proposes, and what the recipe adds, down to plain JSON values.

Standard library only: the commands that plan trainings (distill_paths.py) read and check flags here without importing torch.
"""

import argparse
import dataclasses

import arguments
import launcher
import names
import recipes
import tuner
from arguments import number
from names import UserError

# Settings that change where or how fast a run is made, not what comes out of it: a run may continue under other ones.
INCIDENTAL = ("cuda", "dataset_dir", "download", "run_dir", "save_minutes", "teacher_cache", "teacher_checkpoint", "json", "workers")
NEED_TEACHER = ("teacher_checkpoint", "method", "temperature", "lambda", "teacher_cache")
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
    parser.flag(group, "--method", type=arguments.method, default="kd", metavar="NAME", help=" ".join(names.methods()))
    parser.flag(group, "--temperature", type=number(float, above=0), metavar="T",
                help=f"of eq. 2 (default: {names.methods()['kd']['temperature']:g})")
    parser.flag(group, "--lambda", dest="lambda", type=number(float, minimum=0, maximum=1), metavar="L",
                help=f"share of the teacher's term in eq. 3 (default: {names.methods()['kd']['lambda']:g})")
    parser.flag(group, "--teacher-cache", choices=("auto", "live", "lazy", "full"), default="auto",
                help="the teacher's logits: asked each time, or a table filled as batches ask, or filled at once")
    group = parser.add_argument_group("optimisation (what is not given comes from the recipe)")
    parser.flag(group, "--recipe", choices=tuple(recipes.RECIPES), default="paper", help="paper, or the released code's faults and all")
    parser.flag(group, "--epochs", type=number(int, minimum=1), default=160, metavar="N", help="passes over the training images")
    parser.flag(group, "--batch-size", type=number(int, minimum=1), default=128, metavar="N", help="images a step, over all GPUs")
    parser.flag(group, "--learning-rate", type=number(float, above=0), metavar="RATE", help="of the first epoch")
    parser.flag(group, "--milestones", type=number(int, minimum=0), nargs="*", metavar="EPOCH", help="epochs at which the rate falls")
    parser.flag(group, "--learning-rate-decay", type=number(float, above=0), metavar="F", help="factor at each milestone")
    parser.flag(group, "--momentum", type=number(float, minimum=0, below=1), metavar="M", help="of SGD")
    parser.flag(group, "--nesterov", action="store_const", const=True, help="Nesterov momentum")
    group.add_argument("--no-nesterov", dest="nesterov", action="store_const", const=False, help="plain momentum")
    parser.flag(group, "--weight-decay", type=number(float, minimum=0), metavar="W", help="of SGD")
    parser.flag(group, "--seed", type=number(int, minimum=0, maximum=2**63 - 1), default=DEFAULT_SEED, metavar="N",
                help="of weights, order and views")
    group = parser.add_argument_group("machine")
    parser.flag(group, "--cuda", type=arguments.cuda, metavar="N", help="GPUs: 1 or yes, 0 or no, or a number, a process each "
                "(without the flag: a GPU if there is one); under torchrun: 0, or a GPU for each of its processes")
    parser.flag(group, "--precision", choices=("auto", "fp32", "bf16"), default="auto",
                help="arithmetic of the networks; auto takes bf16 where the hardware has it")
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
    if given["batch_size"] < processes:
        raise UserError(f"--batch-size {given['batch_size']}: {processes} processes share a batch, and each needs an image of it")
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
            if key in given and origins[key] != "tuner":
                raise UserError(f"--{key.replace('_', '-')} needs --teacher")
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


def resolve(given, origins):
    """Every setting a run has, from what was given and the recipe: ({setting: value}, {setting: origin}), plain JSON values."""
    settings, origins = dict(given), dict(origins)
    if settings.get("image_size") == names.DATASETS[given["dataset"]].image_size:  # the same run as without the flag
        del settings["image_size"], origins["image_size"]
    recipe = recipes.recipe(given["recipe"], given["student"])
    from_recipe = dataclasses.asdict(recipe)
    if settings.get("momentum") == 0:
        from_recipe["nesterov"] = False
    from_recipe["milestones"] = recipes.milestone_epochs(recipe, given["epochs"])
    for key in ("augment", "precision"):
        if settings[key] == "auto":
            del settings[key]
    for key, value in from_recipe.items():
        if key not in settings and key not in ("kd_reduction", "round_down"):
            settings[key], origins[key] = value, f"recipe {given['recipe']}"
    if origins["augment"].startswith("recipe") and not names.DATASETS[given["dataset"]].flips:
        settings["augment"], origins["augment"] = "none", f"data set {given['dataset']}"
    if "teacher" in settings:
        options = names.methods()[settings["method"]]
        for key in ("temperature", "lambda"):
            origins[key] = origins.get(key, f"default of {settings['method']}")
            options[key] = settings[key] = settings.get(key, options[key])
        options["reduction"] = recipe.kd_reduction
        settings["method_options"], origins["method_options"] = options, "resolved"
    else:
        if unused := [key for key in ("temperature", "lambda") if key in settings]:  # a tuner's: a user's were refused
            settings["without_effect"] = {key: settings[key] for key in unused}
            origins["without_effect"] = "tuner, but no --teacher"
        for key in ("method", "temperature", "lambda", "teacher_cache"):
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
