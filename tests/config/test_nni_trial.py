"""An NNI trial without an experiment, in the environment and with the files of NNI's local platform.

What the tuner proposes, what is refused, which results are reported, and where files are. tests/test_nni.py runs a real
experiment.
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

import pytest
from conftest import ROOT, read_json, read_lines

import train
from takd.config import flags, names, nni_trial, run_config

needs_nni = pytest.mark.skipif(
    not importlib.util.find_spec("nni"), reason="nni is not installed (requirements.txt has it)"
)
TINY = ("--student", "plane2", "--dataset", "digits", "--epochs", "2", "--cuda", "0", "--precision", "fp32")


def in_trial(folder, proposed, trial="a1"):
    """The environment of a trial as NNI's local platform sets it, and its file of proposed parameters."""
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


def trial_log(folder, trial="a1"):
    """What the trial printed: NNI redirects its standard output to this file."""
    with contextlib.suppress(FileNotFoundError):
        return (folder / "nni" / trial / "trial.log").read_text()
    return ""


def reported(folder, trial="a1"):
    """[(type, parameter id, sequence, value)] that the trial reported to the tuner."""
    text = (folder / "nni" / trial / ".nni" / "metrics").read_text()
    messages = [json.loads(line) for line in re.findall(r"ME\d{6}(\{.*\})", text)]
    return [(each["type"], each["parameter_id"], each["sequence"], json.loads(each["value"])) for each in messages]


def records(run):
    """A run's config, epochs and summary."""
    return read_json(run / "config.json"), read_lines(run / "metrics.jsonl"), read_json(run / "summary.json")


def module_that_raises(folder, name, error):
    """A folder for PYTHONPATH in which importing `name` raises."""
    (folder / "stub").mkdir()
    (folder / "stub" / f"{name}.py").write_text(f"raise {error}('{name} was imported')\n")
    return str(folder / "stub")


# ------------------------------------------------------------------------------------------------ refused
REFUSED = {
    "unknown": (
        {"T_student": 4, "alpha": 0.5},
        ["alpha", "T_student lambda_student T lambda seed schedule warmup_epochs label_smoothing"],
    ),
    "twice": ({"T_student": 4, "T": 4}, ["temperature", "T_student T"]),
    "bounds": ({"T_student": 0}, ["temperature 0", "above 0"]),
    "share": ({"lambda_student": 1.5}, ["lambda 1.5", "at most 1"]),
    "whole": ({"seed": 20.5}, ["seed 20.5", "whole"]),
    "word": ({"schedule": "cos"}, ["schedule cos", "'cos' is not steps or cosine"]),
    "given": ({"T": 4, "lambda": 0.5}, ["--lambda", "also proposed by the tuner"]),
    "method": ({"dkd.beta": 8}, ["dkd.beta", "the method is kd; add --method dkd"]),
    "option": ({"kd.beta": 8}, ["method kd has no option 'beta'", "options of kd: temperature lambda"]),
    "alone": ({"kd.reduction": "mean"}, ["--method-option needs --teacher"]),
    "object": ([4, 0.5], ["the tuner proposes [4, 0.5], not an object"]),
    "repeat": ({"seed": 20}, ["--repeat is not for a tuner's trials"]),
}
MORE_FLAGS = {"given": ("--lambda", "0.5"), "repeat": ("--repeat", "2")}


@needs_nni
@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_proposal_is_refused_in_one_line_before_torch_is_imported(run_command, tmp_path, case):
    proposed, expected = REFUSED[case]
    teacher = () if case == "alone" else ("--teacher", "plane4")
    command = (*TINY, *teacher, *MORE_FLAGS.get(case, ()))
    path = module_that_raises(tmp_path, "torch", "RuntimeError")
    outcome = run_command("train.py", *command, cwd=tmp_path, PYTHONPATH=path, **in_trial(tmp_path, proposed))
    assert (outcome.status, len(outcome.err.splitlines())) == (2, 1)
    assert all(words in outcome.err for words in expected), outcome.err
    assert not (tmp_path / "runs").exists()


def test_a_trial_whose_python_lacks_nni_is_one_line(run_command, tmp_path):
    path = module_that_raises(tmp_path, "nni", "ImportError")
    outcome = run_command("train.py", *TINY, cwd=tmp_path, PYTHONPATH=path, **in_trial(tmp_path, {"seed": 20}))
    assert (outcome.status, len(outcome.err.splitlines())) == (2, 1)
    assert sys.executable in outcome.err and "activated" in outcome.err


def test_outside_a_trial_nni_is_not_imported(call, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "nni", raising=False)
    monkeypatch.syspath_prepend(module_that_raises(tmp_path, "nni", "RuntimeError"))
    outcome = call(train, *TINY, "--epochs", "1", "--run-dir", tmp_path / "run")
    assert outcome.status == 0, outcome.err
    assert "trial" not in read_json(tmp_path / "run/config.json")
    assert (tmp_path / "run" / "plane2_seed1_best.pth.tar").is_file()


# ------------------------------------------------------------------------------------------------ accepted
@needs_nni
@pytest.mark.slow
def test_two_trials_at_once_share_one_teacher_and_keep_the_rest_apart(start_command, tmp_path):
    """The released keys in one, the shorter ones in the other, whole numbers as floats.

    The teacher's folder is locked until both wait for it, so that they do meet there.
    """
    proposals = {
        "a1": {"T_student": 5, "lambda_student": 0.15, "seed": 20.0},
        "b2": {"T": 2.0, "lambda": 1, "seed": 31},
    }
    command = ("train.py", *TINY, "--teacher", "plane4", "--json", "--run-dir", "all")
    teacher = tmp_path / "all" / "teacher"
    teacher.mkdir(parents=True)
    with open(teacher / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        started = {
            trial: start_command(*command, cwd=tmp_path, **in_trial(tmp_path, proposed, trial))
            for trial, proposed in proposals.items()
        }
        for process in started.values():
            assert any("waiting for" in line for line in process.stderr), "it ended without waiting for the teacher"
    summaries = {}
    for trial, process in started.items():
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        summaries[trial] = json.loads(out)  # one JSON object on standard output, although NNI takes it for its log

    config, epochs, _ = records(teacher)
    assert len(epochs) == 2 and "trial" not in config and config["seed"] == flags.DEFAULT_SEED
    assert [file.name for file in teacher.glob("*_best.pth.tar")] == ["plane4_seed1_best.pth.tar"]
    assert {entry.name for entry in (tmp_path / "all").iterdir()} == {"teacher", "a1", "b2"}
    assert not (tmp_path / "runs").exists()
    for trial, values in {"a1": (5.0, 0.15, 20), "b2": (2.0, 1.0, 31)}.items():
        config, epochs, summary = records(tmp_path / "all" / trial)
        assert summary == summaries[trial]
        assert (config["temperature"], config["lambda"], config["seed"]) == values and type(config["seed"]) is int
        assert {config["origins"][key] for key in ("temperature", "lambda", "seed")} == {"tuner"}
        assert config["trial"] == trial
        assert (tmp_path / "all" / trial / f"plane2_{trial}_best.pth.tar").is_file()
        accuracies = [line["test_accuracy_percent"] for line in epochs]
        periodical = [("PERIODICAL", 7, epoch, accuracy) for epoch, accuracy in enumerate(accuracies)]
        assert reported(tmp_path, trial) == [*periodical, ("FINAL", 7, 0, max(accuracies))]


@needs_nni
def test_options_of_the_method_may_be_searched(run_command, tmp_path):
    command = [*TINY, "--teacher", "plane4", "--method", "dkd", "--method-option", "warmup=3"]
    code = (
        f"import sys; from takd.config import run_config; config = run_config.parse({command!r}); "
        "print(*run_config.command(config.record(), config.origins), file=sys.stderr)"  # nni takes standard output
    )
    proposed = {"dkd.beta": 8.0, "T": 2}
    outcome = run_command("-c", code, cwd=ROOT, **in_trial(tmp_path, proposed))
    assert outcome.status == 0, outcome.err
    again = run_config.parse(outcome.err.split(), elsewhere=True)
    options = {"alpha": 1.0, "beta": 8.0, "temperature": 2.0, "warmup": 3}
    assert again.method == "dkd" and again.method_options == options


@needs_nni
def test_temperature_and_lambda_of_a_network_without_teacher_are_noted_as_without_effect(run_command, tmp_path):
    """With a validation split, the accuracy on it is reported. Without --run-dir the folder is the experiment's."""
    proposed = {"T_student": 5, "lambda_student": 0.5, "seed": 55}
    command = (*TINY, "--validation-split", "0.2")
    outcome = run_command("train.py", *command, cwd=tmp_path, **in_trial(tmp_path, proposed))
    assert outcome.status == 0, outcome.err
    (note,) = [line for line in trial_log(tmp_path).splitlines() if "note:" in line]
    assert note.endswith("note: the tuner's temperature 5, lambda 0.5 have no effect without --teacher")
    config, epochs, summary = records(tmp_path / "runs" / "nni-exp" / "a1")
    assert config["without_effect"] == {"temperature": 5.0, "lambda": 0.5}
    assert "temperature" not in config and "lambda" not in config
    assert config["seed"] == summary["seed"] == 55
    assert reported(tmp_path)[-1] == ("FINAL", 7, 0, max(line["validation_accuracy_percent"] for line in epochs))


# ----------------------------------------------------------------------------------------- the shipped files
def test_the_shipped_search_space_is_the_papers_and_within_the_flags_bounds():
    space = read_json(ROOT / "search_space.json")
    assert space == {
        "T_student": {"_type": "choice", "_value": [1, 2, 5, 10, 15, 20]},
        "lambda_student": {"_type": "quniform", "_value": [0.05, 1, 0.05]},
        "seed": {"_type": "choice", "_value": [20, 31, 55]},
    }
    parser = flags.train_parser()
    for key, values in space.items():
        for value in values["_value"]:
            settings = nni_trial.settings({key: value})
            assert run_config.proposed_settings(parser, {}, settings) == settings


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
    assert config["searchSpace"] == read_json(ROOT / "search_space.json")
    assert config["trainingService"]["trialGpuNumber"] == 1
    assert os.path.samefile(config["trainingService"]["trialCodeDirectory"], ROOT)
    python, script, *argv = shlex.split(config["trainingService"]["trialCommand"])
    assert (python, script) == ("python3", "train.py")
    given, _ = flags.train_parser().given(argv)
    expected = {"teacher": "resnet110", "student": "resnet8", "dataset": "cifar100", "epochs": 160, "cuda": 1}
    assert {key: given[key] for key in expected} == expected
    assert not given.keys() & {"temperature", "lambda", "seed"}  # these are the tuner's
    assert given["student"] in names.NETWORKS
