"""The commands with several teachers: records, continuing, what is refused, studies, reports and searches."""

import os
import shutil
import signal
from pathlib import Path

import pytest
from conftest import last_weights, read_json, read_lines, same_weights
from torch import nn

import distill_paths
import model_factory
import report
import sweep
import train
from takd.config import nni_trial, run_config
from takd.run import checkpoint
from takd.run.engine import TrainStep
from takd.study import collect

PAIR = ("--teacher", "plane2", "plane4")
DROP = ("--method", "dgkd", "--method-option", "drop=0.5")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, call, tiny):
    """The folder of a run of plane2 whose two teachers were trained first, with dgkd."""
    folder = tmp_path_factory.mktemp("several") / "run"
    command = (*tiny, "--learning-rate", "0.003", *PAIR, *DROP, "--lambda", "0.3", "--run-dir", folder)
    outcome = call(train, *command)
    assert outcome.status == 0, outcome.err
    again = call(train, *command)
    assert again.out.count("finished ") == 3 and "done" not in again.out
    return folder


@pytest.fixture
def files(trained, tmp_path):
    """Copies of the two teachers' checkpoints, without their tables."""
    found = [next((trained / place).glob("*_best.pth.tar")) for place in ("teacher/teacher", "teacher")]
    return [Path(shutil.copy(file, tmp_path / file.name)) for file in found]


# ----------------------------------------------------------------------------------------------------- records
def test_teachers_are_trained_first_each_from_those_before_it(trained):
    first, second, student = (
        read_json(trained / place / "config.json") for place in ("teacher/teacher", "teacher", "")
    )
    assert "teacher" not in first and first["path"] == ["plane2"]
    assert (second["teacher"], second["method"], second["path"]) == ("plane2", "kd", ["plane2", "plane4"])
    assert second["lambda"] == student["lambda"] == 0.3, "the method's options are the student's"
    assert second["learning_rate"] == 0.01, "its optimiser's settings are not"
    assert (student["teacher"], student["method"]) == (["plane2", "plane4"], "dgkd")
    assert student["path"] == ["plane2", "plane2 + plane4", "plane2"]
    files = [next((trained / place).glob("*_best.pth.tar")) for place in ("teacher/teacher", "teacher")]
    assert student["teacher_checkpoint"] == list(map(str, files))
    assert student["teacher_weights"] == list(map(checkpoint.weights_digest, files))
    scores = read_json(trained / "summary.json")["teacher_test_accuracy_percent"]
    own = [read_json(file.parent / "summary.json")["best"]["test_accuracy_percent"] for file in files]
    assert scores == pytest.approx(own, abs=0.3)
    command = run_config.command(student, student["origins"])
    again = run_config.parse(command)
    assert again.identity() == {
        key: value for key, value in run_config.settings_of(student).items() if key != "teacher_weights"
    }
    assert again.teacher_checkpoints == list(map(str, files))


def test_each_teacher_has_its_table_and_its_own_normalisation(files, tmp_path, call, tiny):
    contents = checkpoint.read(files[1])
    checkpoint.save(contents | {"mean": [0.3] * 3, "std": [0.4] * 3}, files[1])
    command = (*tiny, *PAIR, "--teacher-checkpoint", *files)
    outcome = call(train, *command, "--run-dir", tmp_path / "run")
    assert outcome.status == 0, outcome.err
    tables = [list(Path(f"{file}.logits").glob("*.float32")) for file in files]
    assert list(map(len, tables)) == [1, 1] and tables[0][0].read_bytes() != tables[1][0].read_bytes()
    for name in ("plane2", "plane4"):
        assert f"teacher   {name}: " in outcome.out and f"logits    {name}: table" in outcome.out
    live = call(train, *command, "--teacher-cache", "live", "--run-dir", tmp_path / "live")
    assert live.status == 0, live.err
    losses = [read_lines(tmp_path / run / "metrics.jsonl")[0]["train_kd"] for run in ("run", "live")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_a_stopped_run_leaves_out_the_same_terms(files, tmp_path, call, tiny, monkeypatch):
    command = (*tiny, *PAIR, "--teacher-checkpoint", *files, *DROP, "--batch-size", "256", "--epochs", "2")
    assert call(train, *command, "--run-dir", tmp_path / "whole").status == 0
    take, steps = TrainStep.__call__, []

    def stopping(step, batch, part):
        steps.append(part)
        if len(steps) == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        return take(step, batch, part)

    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "__call__", stopping)
        assert call(train, *command, "--run-dir", tmp_path / "run").status == 128 + signal.SIGTERM
    again = call(train, *command, "--run-dir", tmp_path / "run")
    assert again.status == 0 and "continuing at epoch 2, step 2" in again.out
    assert same_weights(last_weights(tmp_path / "run"), last_weights(tmp_path / "whole"))


def test_one_teacher_given_twice_is_the_run_with_it_once(files, tmp_path, call, tiny):
    command = (*tiny, "--batch-size", "256", "--run-dir")
    once = ("--teacher", "plane4", "--teacher-checkpoint", files[1])
    twice = ("--teacher", "plane4", "plane4", "--teacher-checkpoint", files[1], files[1])
    for name, more in {"once": once, "twice": twice, "dgkd": (*twice, "--method", "dgkd")}.items():
        assert call(train, *command, tmp_path / name, *more).status == 0
    for name in ("twice", "dgkd"):
        assert same_weights(last_weights(tmp_path / name), last_weights(tmp_path / "once")), name


# ----------------------------------------------------------------------------------------------------- refused
OWN = """
from torch import nn
class Own(nn.Module):
    needs_features = False
    def forward(self, student, teacher, labels):
        return {"loss": (student.logits - teacher.logits.mean(0)).square().mean()}
class Several(Own):
    several_teachers = True
class Again(Several):
    pass
"""


@pytest.mark.parametrize("method", ["at", "fitnet", "crd", "own.py:Own", "own.py:Again"])
def test_a_method_of_one_teacher_is_refused(method, call, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(OWN)
    outcome = call(train, *tiny, *PAIR, "--method", method, "--run-dir", "run")
    assert outcome.status == 2 and outcome.err.count("\n") == 1 and not Path("run").exists()
    assert f"--method {method} learns from one teacher, and 2 are given (plane2 plane4)" in outcome.err


def test_a_users_method_may_take_several(call, tiny, files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(OWN)
    several = (*PAIR, "--teacher-checkpoint", *files, "--method", "own.py:Several", "--run-dir", "run")
    assert call(train, *tiny, *several).status == 0


def test_the_files_must_be_as_many_as_the_teachers(call, tiny, files):
    outcome = call(train, *tiny, *PAIR, "--teacher-checkpoint", files[0])
    assert outcome.status == 2 and "1 file for 2 teachers (plane2 plane4); give one for each" in outcome.err


def test_a_teacher_that_only_guesses_is_named(call, tiny, files, tmp_path):
    network: nn.Module = model_factory.create("plane4", 10)
    checkpoint.save({"model_state_dict": network.state_dict()}, files[1])
    outcome = call(train, *tiny, *PAIR, "--teacher-checkpoint", *files, "--run-dir", tmp_path / "run")
    assert outcome.status == 2 and f"the teacher {files[1]} scores" in outcome.err and not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------- studies and searches
CHAIN = ("--sizes", "plane6", "plane4", "plane2", "--dataset", "digits", "--cuda", "0")


def planned(call, *argv):
    """{run: its configuration} of a dry run on SLURM."""
    outcome = call(distill_paths, *CHAIN, *argv, "--slurm", "--dry-run")
    assert outcome.status == 0, outcome.err
    lines = [line.split("train.py ")[1].rstrip(")").split() for line in outcome.out.splitlines() if "train.py " in line]
    configs = [run_config.parse(words, elsewhere=True) for words in lines]
    return {config.run_path.name: config for config in configs}


def test_guidance_all_teaches_each_network_by_all_above_it(call):
    last, every = planned(call), planned(call, "--guidance", "all", "--method-option", "drop=0.5")
    shared = {"plane6-seed1", "plane4-seed1", "plane2-seed1", "plane6-plane4-seed1", "plane6-plane2-seed1"}
    assert every.keys() == shared | {"plane6-plane4-plane2-all-seed1"} and not shared - last.keys()
    for name in shared:
        assert last[name].identity() == every[name].identity(), "one training for both"
    guided = every["plane6-plane4-plane2-all-seed1"]
    assert guided.teachers == ["plane6", "plane4"] and guided.method == "dgkd" and guided.method_options["drop"] == 0.5
    folders = [Path(file).parent.name for file in guided.teacher_checkpoints]
    assert folders == ["plane6-seed1", "plane6-plane4-seed1"]
    other = planned(call, "--guidance", "all", "--method", "kd")["plane6-plane4-plane2-all-seed1"]
    assert other.method == "kd" and other.teachers == guided.teachers


@pytest.mark.parametrize(
    "more, message",
    [
        (("--method", "at"), "--method at learns from one teacher, and 2 are given (plane6 plane4)"),
        (("--paths", "6,2"), "--guidance all: no path has an assistant"),
    ],
)
def test_guidance_all_without_sense_is_refused(more, message, call, tmp_path):
    outcome = call(distill_paths, *CHAIN, "--guidance", "all", *more, "--runs", tmp_path / "runs")
    assert outcome.status == 2 and message in outcome.err and not (tmp_path / "runs").exists()


def test_a_report_keeps_the_two_guidances_apart(write_run, tmp_path, call):
    """And shows the runs that they share in both."""
    chain, guided = ("plane6", "plane4", "plane2"), ("plane6", "plane6 + plane4", "plane2")
    for path, accuracy in {
        ("plane6",): 60,
        ("plane2",): 40,
        ("plane6", "plane4"): 50,
        ("plane6", "plane2"): 43,
    }.items():
        write_run(path, 1, (accuracy,))
    write_run(chain, 1, (44,))
    write_run(guided, 1, (46,), teacher=["plane6", "plane4"], method="dgkd")
    found = collect.studies(collect.collect([tmp_path / "runs"]))
    assert {each.guidance: each.mean(chain) for each in found} == {"last": 44, "all": 46}
    assert all(each.mean(("plane6", "plane2")) == 43 and each.mean(("plane2",)) == 40 for each in found)
    assert call(report, tmp_path / "runs", "--output", tmp_path / "report").status == 0
    text = (tmp_path / "report/report.md").read_text()
    assert "From plane6 to plane2 on digits, each network from all above it" in text
    assert "plane6 > plane6 + plane4" in text and "dgkd" in text, "the leaderboard"


def test_what_a_tuner_proposes_is_not_for_the_teachers(monkeypatch, tmp_path):
    """All trials learn from the same ones, which have the options and the seed that the command line gives."""
    monkeypatch.setattr(nni_trial, "trial", lambda: "a1")
    monkeypatch.setattr(nni_trial, "proposal", lambda: {"temperature": 9.0, "dgkd.drop": 0.5, "seed": 7})
    command = (*CHAIN[4:], "--teacher", "plane6", "plane4", "--student", "plane2", "--method", "dgkd")
    config = run_config.parse([*command, "--lambda", "0.3", "--run-dir", str(tmp_path)])
    assert (config.temperature, config.method_options["drop"], config.seed) == (9.0, 0.5, 7)
    second = config.teacher_config()
    assert (second.temperature, second.lambda_, second.method, second.seed) == (4.0, 0.3, "kd", 1)
    assert second.teacher_config().seed == 1 and second.teacher_config().teacher is None


def test_a_search_with_two_teachers_trains_them_once(tmp_path, call):
    argv = ("--teacher", "plane6", "plane4", "--student", "plane2", "--dataset", "digits", "--cuda", "0")
    searched = sweep.sweep_of(sweep.read_arguments([*argv, "--method", "dgkd", "--runs", str(tmp_path)]))
    first = run_config.parse(searched.teacher_arguments)
    assert (first.student, first.teacher, first.method) == ("plane4", "plane6", "kd")
    trial = run_config.parse(searched.arguments(0, {"temperature": 2.0}, 7))
    assert trial.teachers == ["plane6", "plane4"] and (trial.seed, trial.temperature) == (7, 2.0)
    files = [first.teacher_config().best_file, first.best_file]
    assert trial.teacher_checkpoints == list(map(str, files)) and files[0].parent == tmp_path / "teacher/teacher"
