#!/usr/bin/env python3
"""Train a network, or distil one from a teacher (Mirzadeh et al., AAAI 2020, through a teacher assistant or not).

  python3 train.py --student plane10 --dataset digits --epochs 10               cross-entropy only, the paper's NOKD
  python3 train.py --teacher plane10 --student plane2 --dataset digits --epochs 10
  python3 train.py --teacher resnet110 --teacher-checkpoint FILE --student resnet20 --dataset cifar100 --cuda 1
  torchrun --nproc-per-node 2 train.py --student resnet20                       as --cuda 2: two GPUs share each batch

Without --teacher-checkpoint the teacher is trained first, with its own recipe, and its run kept. The same command again continues
an interrupted run, or says that it is finished. Everything lands in --run-dir: see runlog.py. --help-methods lists the methods.
"""

import contextlib
import hashlib
import json
import os
import statistics
import sys
from pathlib import Path

from takd.config import flags as arguments
from takd.config import names
from takd.config import nni_trial as tuner
from takd.config.names import UserError
from takd.config.run_config import DEFAULT_SEED, given_settings, identity_of, resolve
from takd.run import launch as launcher


def teacher_settings(given, origins):
    """What the teacher's own run is given: the student's data, length, seed and recipe, but none of its optimiser flags."""
    passed_on = ("dataset", "dataset_dir", "download", "image_size", "train_images", "validation_split", "augment", "workers",
                 "recipe", "epochs", "batch_size", "cuda", "precision", "save_minutes")  # fmt: skip
    settings = {key: given[key] for key in passed_on if key in given}
    settings["student"] = given["teacher"]
    if "pretrained" in given and names.torchvision_name(given["teacher"]):
        settings["pretrained"] = True
    # A tuner's seed is the student's: all of an experiment's trials learn from one teacher.
    settings["seed"] = given["seed"] if origins["seed"] != "tuner" else DEFAULT_SEED
    if "run_dir" in given:
        settings["run_dir"] = str(Path(given["run_dir"]) / "teacher")
    return settings, {key: origins.get(key, "default") for key in settings}


# ---------------------------------------------------------------------------------------------------- a run
def run(given, origins, device, console, signals, wait=False, world=None, whole=None):
    """One training, begun or continued, with its teacher's before it where that is needed. Returns its summary (a dict).

    In a group of processes (`world`, a parallel.World) all call this and get the same summary. Where it is one of several runs,
    `whole` is what all were given: the teacher that they share is made of that.

    Raises UserError for what the user can mend, engine.Diverged where the loss is no longer finite, checkpoint.Stopped on a signal.
    """
    # torch and what imports it come here, after the arguments are known to be good.
    import data_loader
    from takd.run import distributed as parallel
    from takd.run import run_directory as runlog
    from takd.run import trainer as training

    world = world or parallel.World()
    settings, origins = resolve(given, origins)
    if "without_effect" in settings:
        proposed = ", ".join(f"{key} {value:g}" for key, value in settings["without_effect"].items())
        console.say(f"note: the tuner's {proposed} have no effect without --teacher")
    if "teacher" in settings and "teacher_checkpoint" not in settings:
        if "run_dir" in settings:  # refused now, not after a teacher was trained for it
            runlog.RunDirectory(run_path(settings, {})).check(identity_of(settings))
        training.check_method(settings)
        console.say(f"The teacher {settings['teacher']} first:")
        made = run(*teacher_settings(whole or given, origins), device, console, signals, wait=True, world=world)
        settings["teacher_checkpoint"], origins["teacher_checkpoint"] = made["checkpoint"], "its own run"
        console.say(f"Now the student {settings['student']}:")
    identity = identity_of(settings)
    if settings["dataset"] == "folder":  # its name says nothing
        identity["images"] = world.shared(lambda: data_loader.folder_digest(settings["dataset_dir"]))
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


def repetitions(given):
    """What each run of --repeat is given: a seed and, inside --run-dir, a folder of its own. Without it: what was given, once."""
    if "repeat" not in given:
        return [given]
    common = {key: value for key, value in given.items() if key != "repeat"}
    folders = Path(given.get("run_dir", ""))
    return [
        common | {"seed": seed} | ({"run_dir": str(folders / f"seed{seed}")} if "run_dir" in given else {})
        for seed in range(given["seed"], given["seed"] + given["repeat"])
    ]


def agreement(summaries):
    """One line on several runs: their mean and deviation."""
    said = []
    for which in ("best", "last"):
        values = [summary[which]["test_accuracy_percent"] for summary in summaries]
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        said.append(f"{statistics.fmean(values):.2f}{spread} % at the {which} epoch")
    seeds = " ".join(str(summary["seed"]) for summary in summaries)
    return f"repeated  {len(summaries)} run{'s' * (len(summaries) > 1)}, seeds {seeds}: test {', '.join(said)}"


def run_path(settings, identity):
    """The run's folder: as given (in a trial: a folder of the trial's own inside it), or named after what makes the run."""
    if "trial" in settings:
        return Path(settings.get("run_dir", f"runs/nni-{tuner.experiment()}")) / settings["trial"]
    if "run_dir" in settings:
        return Path(settings["run_dir"])
    chain = [settings["dataset"], *([settings["teacher"]] if "teacher" in settings else []), settings["student"]]
    digest = hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=3).hexdigest()
    return Path("runs") / f"{'-'.join(map(names.file_name, chain))}-seed{settings['seed']}-{digest}"


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    stdout = sys.stdout  # importing nni in a trial makes sys.stdout its trial.log
    with launcher.one_voice():
        given, origins, device = given_settings(argv, __doc__)
    if given.get("cuda", 0) > 1 and launcher.place().size == 1:
        command = [sys.executable, str(Path(__file__).resolve()), *argv]
        sys.exit(launcher.launch(given["cuda"], command, lambda line: arguments.fail("train.py", line, 1)))
    with arguments.requirements("train.py"):
        from takd.run import checkpoint, engine
        from takd.run import distributed as parallel
        from takd.run import run_directory as runlog

    try:
        world = parallel.join(device)
    except ConnectionError as error:
        sys.exit(arguments.fail("train.py", error, 1))
    stream = sys.stderr if given.get("json") else sys.stdout
    console = runlog.Console(stream if world.first else open(os.devnull, "w"))
    try:
        with checkpoint.StopSignals() as signals:
            summaries = [run(each, origins, device, console, signals, world=world, whole=given) for each in repetitions(given)]
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
        tuner.report_final(summaries[0]["best"]["accuracy_percent"])
    if "repeat" in given:
        console.say(agreement(summaries))
    if given.get("json") and world.first:
        for summary in summaries:
            print(json.dumps(summary), file=stdout)


def failed(world, error, status):
    """The exit status. An error that several processes meet is printed by one."""
    return arguments.fail("train.py", error, status) if world.speaks() else status


if __name__ == "__main__":
    main()
