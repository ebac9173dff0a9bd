"""Inside an NNI trial, without the experiment around it: the files and variables of NNI's local platform, and NNI itself.

What the tuner proposes, what is refused, what it is told, and where things land. tests/test_nni.py runs a real experiment.
"""

import contextlib
import fcntl
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import train
from takd.config import names
from takd.config import nni_trial as tuner
from takd.config import run_config as settings

ROOT = Path(train.__file__).resolve().parent
needs_nni = pytest.mark.skipif(not importlib.util.find_spec("nni"), reason="nni is not installed (requirements.txt has it)")
TINY = ("--student", "plane2", "--dataset", "digits", "--epochs", "2", "--cuda", "0", "--precision", "fp32")


def in_trial(folder, proposed, trial="a1"):
    """The environment of a trial as NNI's local platform makes it, and its file of proposed parameters."""
    system = folder / "nni" / trial
    system.mkdir(parents=True)
    proposal = {"parameter_id": 7, "parameter_source": "algorithm", "parameters": proposed, "parameter_index": 0}
    (system / "parameter.cfg").write_text(json.dumps(proposal))
    return {
        "NNI_PLATFORM": "local",
        "NNI_EXP_ID": "exp",
        "NNI_TRIAL_JOB_ID": trial,
        "NNI_SYS_DIR": str(system),
        "NNI_OUTPUT_DIR": str(system),
        "NNI_TRIAL_SEQ_ID": "0",
    }


def log(folder, trial="a1"):
    """What the trial printed: NNI turns its standard output into this file."""
    with contextlib.suppress(FileNotFoundError):
        return (folder / "nni" / trial / "trial.log").read_text()
    return ""


def told(folder, trial="a1"):
    """[(type, parameter id, sequence, value)] that the trial told the tuner."""
    text = (folder / "nni" / trial / ".nni" / "metrics").read_text()
    messages = [json.loads(line) for line in re.findall(r"ME\d{6}(\{.*\})", text)]
    return [(word["type"], word["parameter_id"], word["sequence"], json.loads(word["value"])) for word in messages]


def read(run):
    """A run's config, epochs and summary."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return (
        json.loads((run / "config.json").read_text()),
        list(map(json.loads, lines)),
        json.loads((run / "summary.json").read_text()),
    )


def module_that_raises(folder, name, error):
    """A folder for PYTHONPATH in which importing `name` raises."""
    (folder / "stub").mkdir()
    (folder / "stub" / f"{name}.py").write_text(f"raise {error}('{name} was imported')\n")
    return str(folder / "stub")


# ------------------------------------------------------------------------------------------------ refused
REFUSED = {
    "unknown": ({"T_student": 4, "alpha": 0.5}, ["alpha", "T_student T lambda_student lambda seed"]),
    "twice": ({"T_student": 4, "T": 4}, ["temperature", "T_student T"]),
    "bounds": ({"T_student": 0}, ["temperature 0", "above 0"]),
    "share": ({"lambda_student": 1.5}, ["lambda 1.5", "at most 1"]),
    "whole": ({"seed": 20.5}, ["seed 20.5", "whole"]),
    "given": ({"T": 4, "lambda": 0.5}, ["--lambda", "also proposed by the tuner"]),
}


@needs_nni
@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_proposal_is_refused_in_one_line_before_torch_is_imported(run_command, tmp_path, case):
    proposed, expected = REFUSED[case]
    given = ("--lambda", "0.5") if case == "given" else ()
    path = module_that_raises(tmp_path, "torch", "RuntimeError")
    outcome = run_command(
        "train.py", *TINY, "--teacher", "plane4", *given, cwd=tmp_path, PYTHONPATH=path, **in_trial(tmp_path, proposed)
    )
    assert outcome.status == 2
    assert len(outcome.err.splitlines()) == 1
    assert all(words in outcome.err for words in expected), outcome.err
    assert not (tmp_path / "runs").exists()


def test_a_trial_whose_python_lacks_nni_says_so_in_one_line(run_command, tmp_path):
    path = module_that_raises(tmp_path, "nni", "ImportError")
    outcome = run_command("train.py", *TINY, cwd=tmp_path, PYTHONPATH=path, **in_trial(tmp_path, {"seed": 20}))
    assert outcome.status == 2
    assert len(outcome.err.splitlines()) == 1
    assert sys.executable in outcome.err and "activated" in outcome.err


def test_outside_a_trial_nni_is_not_imported(call, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "nni", raising=False)
    monkeypatch.syspath_prepend(module_that_raises(tmp_path, "nni", "RuntimeError"))
    outcome = call(train, *TINY, "--epochs", "1", "--run-dir", tmp_path / "run")
    assert outcome.status == 0, outcome.err
    config, _, _ = read(tmp_path / "run")
    assert "trial" not in config
    assert (tmp_path / "run" / "plane2_seed1_best.pth.tar").is_file()


# ------------------------------------------------------------------------------------------------ accepted
@needs_nni
def test_two_trials_at_once_share_one_teacher_and_keep_the_rest_apart(start_command, tmp_path):
    """The released keys in one, the shorter ones in the other, whole numbers as floats. The teacher's folder is held
    until both wait for it, so that they do meet there."""
    proposals = {"a1": {"T_student": 5, "lambda_student": 0.15, "seed": 20.0}, "b2": {"T": 2.0, "lambda": 1, "seed": 31}}
    teacher = tmp_path / "all" / "teacher"
    teacher.mkdir(parents=True)
    with open(teacher / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        started = {
            trial: start_command(
                "train.py",
                *TINY,
                "--teacher",
                "plane4",
                "--json",
                "--run-dir",
                "all",
                cwd=tmp_path,
                **in_trial(tmp_path, proposed, trial),
            )
            for trial, proposed in proposals.items()
        }
        for process in started.values():
            assert any("waiting for" in line for line in process.stderr), "it ended without waiting for the teacher"
    summaries = {}
    for trial, process in started.items():
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        summaries[trial] = json.loads(out)  # one JSON object on standard output, although NNI takes it for its log

    about, epochs, _ = read(teacher)
    assert len(epochs) == 2
    assert about["seed"] == train.DEFAULT_SEED and "trial" not in about
    assert [file.name for file in teacher.glob("*_best.pth.tar")] == ["plane4_seed1_best.pth.tar"]
    assert {entry.name for entry in (tmp_path / "all").iterdir()} == {"teacher", "a1", "b2"}
    assert not (tmp_path / "runs").exists()
    wanted = {"a1": (5.0, 0.15, 20), "b2": (2.0, 1.0, 31)}
    for trial, values in wanted.items():
        config, epochs, summary = read(tmp_path / "all" / trial)
        assert summary == summaries[trial]
        assert (config["temperature"], config["lambda"], config["seed"]) == values
        assert isinstance(config["seed"], int)
        assert {config["origins"][key] for key in ("temperature", "lambda", "seed")} == {"tuner"}
        assert config["trial"] == trial
        assert (tmp_path / "all" / trial / f"plane2_{trial}_best.pth.tar").is_file()
        accuracies = [line["test_accuracy_percent"] for line in epochs]
        assert told(tmp_path, trial) == [
            *[("PERIODICAL", 7, epoch, accuracy) for epoch, accuracy in enumerate(accuracies)],
            ("FINAL", 7, 0, max(accuracies)),
        ]


@needs_nni
def test_a_network_alone_says_that_temperature_and_lambda_have_no_effect(run_command, tmp_path):
    """And with a validation split, the tuner is told the accuracy on it. Without --run-dir the folder is named after the experiment."""
    proposed = {"T_student": 5, "lambda_student": 0.5, "seed": 55}
    outcome = run_command("train.py", *TINY, "--validation-split", "0.2", cwd=tmp_path, **in_trial(tmp_path, proposed))
    assert outcome.status == 0, outcome.err
    notes = [line for line in log(tmp_path).splitlines() if "note:" in line]
    assert len(notes) == 1
    assert notes[0].endswith("note: the tuner's temperature 5, lambda 0.5 have no effect without --teacher")
    config, epochs, summary = read(tmp_path / "runs" / "nni-exp" / "a1")
    assert config["without_effect"] == {"temperature": 5.0, "lambda": 0.5}
    assert "temperature" not in config and "lambda" not in config
    assert config["seed"] == summary["seed"] == 55
    assert told(tmp_path)[-1] == ("FINAL", 7, 0, max(line["validation_accuracy_percent"] for line in epochs))


# ----------------------------------------------------------------------------------------- the shipped files
def test_the_shipped_space_is_the_papers_and_within_the_flags_bounds():
    space = json.loads((ROOT / "search_space.json").read_text())
    assert space == {
        "T_student": {"_type": "choice", "_value": [1, 2, 5, 10, 15, 20]},
        "lambda_student": {"_type": "quniform", "_value": [0.05, 1, 0.05]},
        "seed": {"_type": "choice", "_value": [20, 31, 55]},
    }
    parser = settings.build_parser()
    for key, values in space.items():
        for value in values["_value"]:
            assert settings.proposed_value(parser, tuner.PARAMETERS[key], value) == value


@needs_nni
def test_the_shipped_config_is_valid_for_nni_and_its_command_for_train():
    """NNI checks what `nnictl create` would check, the search space and the folders included."""
    check = (
        "import json, sys; from nni.experiment.config import ExperimentConfig; "
        "print(json.dumps(ExperimentConfig.load(sys.argv[1]).canonical_copy().json()))"
    )
    checked = subprocess.run([sys.executable, "-c", check, str(ROOT / "config.yml")], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    config = json.loads(checked.stdout)
    assert config["maxTrialNumber"] == 120
    assert config["tuner"] == {"name": "TPE", "classArgs": {"optimize_mode": "maximize"}}
    assert config["searchSpace"] == json.loads((ROOT / "search_space.json").read_text())
    assert config["trainingService"]["trialGpuNumber"] == 1
    assert os.path.samefile(config["trainingService"]["trialCodeDirectory"], ROOT)
    python, script, *argv = shlex.split(config["trainingService"]["trialCommand"])
    assert (python, script) == ("python3", "train.py")
    given = settings.build_parser().parse_args(argv)
    assert (given.teacher, given.student, given.dataset, given.epochs, given.cuda) == ("resnet110", "resnet8", "cifar100", 160, 1)
    assert {given.temperature, vars(given)["lambda"], given.seed} == {None}  # these are the tuner's
    assert given.student in names.NETWORKS
