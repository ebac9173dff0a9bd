#!/usr/bin/env python3
"""Train a network, or distil one from a teacher (Mirzadeh et al., AAAI 2020, through a teacher assistant or not).

  python3 train.py --student plane10 --dataset digits --epochs 10               cross-entropy only, the paper's NOKD
  python3 train.py --teacher plane10 --student plane2 --dataset digits --epochs 10
  python3 train.py --teacher resnet110 --teacher-checkpoint FILE --student resnet20 --dataset cifar100 --cuda 1

Without --teacher-checkpoint the teacher is trained first, with its own recipe, and its run kept. The same command again continues
an interrupted run, or says that it is finished. Everything lands in --run-dir: see runlog.py.
"""

import hashlib
import json
import sys
from pathlib import Path

import arguments
import tuner
from names import UserError
from settings import DEFAULT_SEED, given_settings, identity_of, resolve


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
def run(given, origins, device, console, signals, wait=False):
    """One training, begun or continued, with its teacher's before it where that is needed. Returns its summary (a dict).

    Raises UserError for what the user can mend, engine.Diverged where the loss is no longer finite, checkpoint.Stopped on a signal.
    """
    # torch and what imports it come here, after the arguments are known to be good.
    import runlog
    import training

    settings, origins = resolve(given, origins)
    if "without_effect" in settings:
        proposed = ", ".join(f"{key} {value:g}" for key, value in settings["without_effect"].items())
        console.say(f"note: the tuner's {proposed} have no effect without --teacher")
    if "teacher" in settings and "teacher_checkpoint" not in settings:
        if "run_dir" in settings:  # refused now, not after a teacher was trained for it
            runlog.RunDirectory(run_path(settings, {})).check(identity_of(settings))
        console.say(f"The teacher {settings['teacher']} first:")
        made = run(*teacher_settings(given, origins), device, console, signals, wait=True)
        settings["teacher_checkpoint"], origins["teacher_checkpoint"] = made["checkpoint"], "its own run"
        console.say(f"Now the student {settings['student']}:")
    identity = identity_of(settings)
    if "teacher" in settings:
        identity["teacher_weights"] = training.weights_digest(settings["teacher_checkpoint"])
    directory = runlog.RunDirectory(run_path(settings, identity))
    recorded = directory.check(identity)
    if (summary := directory.read(directory.summary_file)) is not None:
        console.say(f"finished  {directory.path} (best {training.closing(summary)})")
        return summary
    session = training.Session(settings, recorded, device, console)
    with directory.claim(wait=wait, say=console.say):
        if (summary := directory.read(directory.summary_file)) is not None:  # whoever held the lock has finished it
            return summary
        recorded = directory.check(identity)  # whoever held the lock may have been stopped half-way
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
    given, origins, device = given_settings(argv, __doc__)
    import checkpoint
    import engine
    import runlog

    console = runlog.Console(sys.stderr if given.get("json") else sys.stdout)
    try:
        with checkpoint.StopSignals() as signals:
            summary = run(given, origins, device, console, signals)
    except UserError as error:
        sys.exit(arguments.fail("train.py", error, 2))
    except (engine.Diverged, OSError, MemoryError) as error:
        sys.exit(arguments.fail("train.py", error, 1))
    if "trial" in given:
        tuner.report_final(summary["best"]["accuracy_percent"])
    if given.get("json"):
        print(json.dumps(summary), file=stdout)


if __name__ == "__main__":
    main()
