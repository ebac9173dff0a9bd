#!/usr/bin/env python3
"""Train a network, or distil one from a teacher (Mirzadeh et al., AAAI 2020, through a teacher assistant or not).

  python3 train.py --student plane10 --dataset digits --epochs 10               cross-entropy only, the paper's NOKD
  python3 train.py --teacher plane10 --student plane2 --dataset digits --epochs 10
  python3 train.py --teacher resnet110 --teacher-checkpoint FILE --student resnet20 --dataset cifar100 --cuda 1
  torchrun --nproc-per-node 2 train.py --student resnet20                       as --cuda 2: two GPUs share each batch

Without --teacher-checkpoint the teacher is trained first, with its own recipe, and its run kept. The same command again continues
an interrupted run, or says that it is finished. Everything lands in --run-dir: see runlog.py.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import sys
from pathlib import Path

import arguments
import launcher
import names
import recipes
import tuner
from arguments import number
from names import UserError

# Settings that change where or how fast a run is made, not what comes out of it: a run may continue under other ones.
INCIDENTAL = ("cuda", "dataset_dir", "download", "run_dir", "save_minutes", "teacher_cache", "teacher_checkpoint", "json")
DEFAULT_SEED = 1
ECHO_SECONDS = 5  # within which a second signal to a process of a group is the first one again


# ------------------------------------------------------------------------------------------------ arguments
def build_parser():
    parser = arguments.Parser(__doc__)
    group = parser.add_argument_group("networks")
    parser.flag(group, "--student", "--model", type=arguments.network, default="resnet8", metavar="NAME",
                help=f"network to train: {' '.join(names.NETWORKS)}")
    parser.flag(group, "--teacher", type=arguments.network, metavar="NAME", help="network to learn from (without one: labels only)")
    parser.flag(group, "--teacher-checkpoint", metavar="FILE", help="the teacher's weights (without: it is trained first)")
    group = parser.add_argument_group("data")
    parser.flag(group, "--dataset", type=arguments.dataset, default="cifar100", metavar="NAME", help=" ".join(names.DATASETS))
    parser.flag(group, "--dataset-dir", default="./data", metavar="DIR",
                help="where cifar-100-python or cifar100/{train,test}/<class>/ is, or is downloaded to")
    parser.flag(group, "--download", action="store_const", const=True, help="fetch an absent data set (the default)")
    group.add_argument("--no-download", dest="download", action="store_const", const=False, help="never touch the network")
    parser.flag(group, "--validation-split", type=number(float, minimum=0), default=0.0, metavar="SHARE",
                help="hold out this share (or number) of the training images and select the best epoch on them, not on the test set")
    parser.flag(group, "--augment", choices=("auto", "none", "crop-flip"), default="auto", help="auto takes the recipe's")
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


def given_settings(argv):
    """({setting: value}, {setting: origin}) of what the user and a tuner gave. Ends with a usage error where it is wrong."""
    parser = build_parser()
    parsed = vars(parser.parse_args(argv))
    direct = vars(parser.parse_args(arguments.given_directly(argv)))
    given = {key: value for key, value in parsed.items() if value is not None}
    origins = {key: "command line" if direct[key] is not None else "arguments file" for key in given}
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
        device = training_device(given)
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
        for key in ("teacher_checkpoint", "method", "temperature", "lambda", "teacher_cache"):
            if key in given and origins[key] != "tuner":
                raise UserError(f"--{key.replace('_', '-')} needs --teacher")
    if given.get("nesterov") and given.get("momentum") == 0:
        raise UserError("--nesterov needs a --momentum above 0")


def resolve(given, origins):
    """Every setting a run has, from what was given and the recipe: ({setting: value}, {setting: origin}), plain JSON values."""
    settings, origins = dict(given), dict(origins)
    recipe = recipes.recipe(given["recipe"], given["student"])
    from_recipe = dataclasses.asdict(recipe)
    if settings.get("momentum") == 0:
        from_recipe["nesterov"] = False
    from_recipe["milestones"] = recipes.milestone_epochs(recipe.milestones, given["epochs"])
    if settings["augment"] == "auto":
        del settings["augment"]
    for key, value in from_recipe.items():
        if key not in settings and key != "kd_reduction":
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


def teacher_settings(given, origins):
    """What the teacher's own run is given: the student's data, length, seed and recipe, but none of its optimiser flags."""
    passed_on = ("dataset", "dataset_dir", "download", "validation_split", "augment", "recipe", "epochs", "batch_size", "cuda",
                 "precision", "save_minutes")  # fmt: skip
    settings = {key: given[key] for key in passed_on if key in given}
    settings["student"] = given["teacher"]
    # A tuner's seed is the student's: all of an experiment's trials learn from one teacher.
    settings["seed"] = given["seed"] if origins["seed"] != "tuner" else DEFAULT_SEED
    if "run_dir" in given:
        settings["run_dir"] = str(Path(given["run_dir"]) / "teacher")
    return settings, {key: origins.get(key, "default") for key in settings}


# ---------------------------------------------------------------------------------------------------- a run
def run(given, origins, device, console, signals, wait=False, world=None):
    """One training, begun or continued, with its teacher's before it where that is needed. Returns its summary (a dict).

    In a group of processes (`world`, a parallel.World) all call this and get the same summary.

    Raises UserError for what the user can mend, engine.Diverged where the loss is no longer finite, checkpoint.Stopped on a signal.
    """
    # torch and what imports it come here, after the arguments are known to be good.
    import parallel
    import runlog
    import training

    world = world or parallel.World()
    settings, origins = resolve(given, origins)
    if "without_effect" in settings:
        proposed = ", ".join(f"{key} {value:g}" for key, value in settings["without_effect"].items())
        console.say(f"note: the tuner's {proposed} have no effect without --teacher")
    if "teacher" in settings and "teacher_checkpoint" not in settings:
        console.say(f"The teacher {settings['teacher']} first:")
        made = run(*teacher_settings(given, origins), device, console, signals, wait=True, world=world)
        settings["teacher_checkpoint"], origins["teacher_checkpoint"] = made["checkpoint"], "its own run"
        console.say(f"Now the student {settings['student']}:")
    identity = {key: value for key, value in settings.items() if key not in INCIDENTAL}
    if "teacher" in settings:
        identity["teacher_weights"] = world.shared(lambda: training.weights_digest(settings["teacher_checkpoint"]))
    directory = runlog.RunDirectory(run_path(settings, identity))

    def found():
        return directory.check(identity), directory.read(directory.summary_file)

    recorded, summary = world.shared(found)
    if summary is not None:
        console.say(f"finished  {directory.path} (best {training.closing(summary)})")
        return summary
    session = world.in_turn(lambda: training.Session(settings, recorded, device, console, world))
    with directory.claim(wait=wait, say=console.say) if world.first else contextlib.nullcontext():
        recorded, summary = world.shared(found)  # whoever held the lock may have finished it, or was stopped half-way
        if summary is not None:
            return summary
        return training.fit(session, directory, recorded, origins, identity, signals)


def run_path(settings, identity):
    """The run's folder: as given (in a trial: a folder of the trial's own inside it), or named after what makes the run."""
    if "trial" in settings:
        return Path(settings.get("run_dir", f"runs/nni-{tuner.experiment()}")) / settings["trial"]
    if "run_dir" in settings:
        return Path(settings["run_dir"])
    chain = [settings["dataset"], *([settings["teacher"]] if "teacher" in settings else []), settings["student"]]
    digest = hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=3).hexdigest()
    return Path("runs") / f"{'-'.join(chain)}-seed{settings['seed']}-{digest}"


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    stdout = sys.stdout  # importing nni in a trial makes sys.stdout its trial.log
    with launcher.one_voice():
        given, origins, device = given_settings(argv)
    if given.get("cuda", 0) > 1 and launcher.place().size == 1:
        command = [sys.executable, str(Path(__file__).resolve()), *argv]
        sys.exit(launcher.launch(given["cuda"], command, lambda line: arguments.fail("train.py", line, 1)))
    import checkpoint
    import engine
    import parallel
    import runlog

    try:
        world = parallel.join(device)
    except ConnectionError as error:
        sys.exit(arguments.fail("train.py", error, 1))
    stream = sys.stderr if given.get("json") else sys.stdout
    console = runlog.Console(stream if world.first else open(os.devnull, "w"))
    try:
        with checkpoint.StopSignals(ECHO_SECONDS if world.size > 1 else 0) as signals:
            summary = run(given, origins, device, console, signals, world=world)
    except checkpoint.Stopped as stop:
        world.end(stop.code)
    except UserError as error:
        world.end(failed(world, error, 2))
    except (engine.Diverged, OSError, MemoryError) as error:
        world.end(failed(world, error, 1))
    except RuntimeError as error:
        if not world.lost(error):
            raise
        world.end(launcher.LOST)  # the process that failed says why
    world.leave()
    if "trial" in given and world.first:
        tuner.report_final(summary["best"]["accuracy_percent"])
    if given.get("json") and world.first:
        print(json.dumps(summary), file=stdout)


def failed(world, error, status):
    """The exit status. An error that several processes meet is printed by one."""
    return arguments.fail("train.py", error, status) if world.speaks() else status


if __name__ == "__main__":
    main()
