"""The path study: its plan and what it refuses, and a real one that is interrupted, loses a child and is continued."""

import json
import os
import re
import shlex
import signal
import time

import pytest
import torch

import distill_paths
import report
import train
from takd.config import run_config as settings
from takd.run import checkpoint
from takd.study import plan as study

DIGITS = ("--dataset", "digits", "--epochs", "2", "--cuda", "0", "--precision", "fp32")
PLANE = study.FAMILIES["plane"]


def until(condition, seconds=300):
    """Wait for something that another process does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def commands_of(text):
    """The train.py commands of a dry run, as lists of arguments."""
    return [shlex.split(line)[2:] for line in text.splitlines() if "train.py --student" in line]


def value_of(command, flag):
    return command[command.index(flag) + 1]


# --------------------------------------------------------------------------------------------------- the plan
def plan(*paths, sizes=PLANE, seeds=(1,)):
    return study.plan("runs", sizes, study.choose_paths(sizes, paths), seeds, {}, [])


def test_five_sizes_need_sixteen_trainings_and_four_alone():
    trainings = plan()
    taught = [training for training in trainings if len(training.path) > 1]
    assert (len(trainings), len(taught)) == (20, 15)
    assert len({training.name for training in trainings}) == 20
    assert sorted(training.path[-1] for training in trainings if len(training.path) == 1) == sorted(PLANE)
    ends = [training.path for training in taught if training.path[-1] == "plane2"]
    assert len(ends) == 8, "2^3 subsets of three assistants"


def test_teachers_come_first_and_their_students_together():
    trainings = plan()
    place = {training.path: i for i, training in enumerate(trainings)}
    assert all(place[training.path[:-1]] < place[training.path] for training in trainings if training.teacher)
    teachers = [training.teacher for training in trainings if training.teacher]
    changes = sum(one is not other for one, other in zip(teachers, teachers[1:], strict=False))
    assert changes == len(set(teachers)) - 1, "each teacher's table is filled and used in one go"


def test_chosen_paths_share_their_beginnings():
    trainings = plan("10,6,2", "10,6,4,2")
    assert {training.path for training in trainings if len(training.path) > 1} == {
        ("plane10", "plane6"), ("plane10", "plane6", "plane4"), ("plane10", "plane6", "plane2"), ("plane10", "plane6", "plane4", "plane2"),
    }  # fmt: skip
    assert {training.path for training in trainings if len(training.path) == 1} == {
        ("plane10",), ("plane6",), ("plane4",), ("plane2",)
    }  # fmt: skip


def test_each_seed_has_a_tree_of_its_own():
    trainings = plan("10,2", seeds=(1, 2))
    assert [training.name for training in trainings] == [
        "plane10-seed1", "plane10-plane2-seed1", "plane2-seed1", "plane10-seed2", "plane10-plane2-seed2", "plane2-seed2",
    ]  # fmt: skip
    assert trainings[4].teacher is trainings[3]


def test_dry_run_shows_tree_estimate_and_commands_and_leaves_nothing(call, tmp_path):
    runs = tmp_path / "runs"
    outcome = call(distill_paths, "--sizes", "plane4", "plane2", *DIGITS, "--seeds", 3, 5, "--runs", runs, "--dry-run")
    assert outcome.status in (0, None), outcome.err
    assert "└── plane2" in outcome.out and "6 trainings (3 a seed, seeds 3 5), 0 finished" in outcome.out
    assert re.search(r"estimate: \d+:\d\d .* [\d.]+ GB", outcome.out)
    commands = commands_of(outcome.out)
    assert [value_of(command, "--seed") for command in commands] == ["3", "3", "3", "5", "5", "5"]
    assert value_of(commands[1], "--teacher-checkpoint") == str(runs / "plane4-seed3" / "plane4_seed3_best.pth.tar")
    assert all(value_of(command, "--precision") == "fp32" for command in commands)
    assert not runs.exists()


def test_earlier_runs_give_the_estimate(teacher_run):
    folder, config = teacher_run.parent, json.loads((teacher_run / "config.json").read_text())
    summary = json.loads((teacher_run / "summary.json").read_text())
    costs = study.earlier_costs([folder], {"dataset": "digits", "batch_size": 128}, "cpu")
    assert costs == {"plane2": study.Cost(summary["seconds"] / config["epochs"], 13_082)}
    assert study.earlier_costs([folder], {"dataset": "cifar10", "batch_size": 128}, "cpu") == {}


def test_an_estimate_adds_up():
    trainings = plan("10,2")  # plane10, plane10 > plane2, plane2
    resolved = {training: {"epochs": 10, "dataset": "cifar100", "augment": "none"} for training in trainings}
    costs = {"plane10": study.Cost(60, 3_000_000), "plane2": study.Cost(6, 200_000)}
    seconds, total, disk = study.estimate(trainings, resolved, costs, jobs=1)
    assert [seconds[training] for training in trainings] == [600, 60 + 20, 60], "the table costs one pass of the teacher"
    assert total == 740
    assert disk == 16 * 3_400_000 + 2 * 50_000 * 100
    assert study.estimate(trainings, resolved, costs, jobs=2)[1] == 680, "no shorter than the longest chain"


# ----------------------------------------------------------------------------------------- settings of a step
def dry(call, *argv):
    outcome = call(distill_paths, *argv, "--slurm", "--dry-run")
    assert outcome.status == 0, outcome.err
    words = [shlex.split(line.split("$(", 1)[1].rstrip(")")) for line in outcome.out.splitlines() if "train.py" in line]
    return {value_of(command, "--run-dir").split("/")[-1]: command for command in words}


def test_steps_have_settings_of_their_own_and_the_most_specific_wins(call, tmp_path):
    (tmp_path / "steps").write_text("# of the paper\n2:temperature=5,lambda=.15\n4,2:temperature=7\n10:learning-rate=0.02\n")
    commands = dry(
        call, "--paths", "plane10,plane4,plane2", "plane10,plane2", *DIGITS, "--temperature", 3, "--set", f"@{tmp_path / 'steps'}"
    )
    assert value_of(commands["plane10-plane4-seed1"], "--temperature") == "3.0"
    assert value_of(commands["plane10-plane2-seed1"], "--temperature") == "5.0"
    assert value_of(commands["plane10-plane4-plane2-seed1"], "--temperature") == "7.0"
    assert value_of(commands["plane10-plane4-plane2-seed1"], "--lambda") == "0.15"
    assert value_of(commands["plane10-seed1"], "--learning-rate") == "0.02"
    for alone in ("plane10-seed1", "plane4-seed1", "plane2-seed1"):
        assert "--temperature" not in commands[alone] and "--lambda" not in commands[alone]


def test_flags_of_train_reach_every_training(call):
    given = ("--recipe", "released-code", "--milestones", 1, 2, "--no-nesterov", "--dataset-dir", "some where", "--batch-size", 32)
    for command in dry(call, "--sizes", "plane4", "plane2", *DIGITS, *given).values():
        arguments = command[command.index("train.py") + 1 :]
        parsed = vars(settings.build_parser().parse_args(arguments))
        assert (parsed["recipe"], parsed["milestones"], parsed["nesterov"]) == ("released-code", [1, 2], False)
        assert (parsed["dataset_dir"], parsed["batch_size"], parsed["precision"]) == ("some where", 32, "fp32")


# -------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ("", "name the sizes"),
        ("--sizes plane10", "two or more sizes"),
        ("--sizes plane2 plane10", "plane10 plane2, not plane2 plane10"),
        ("--sizes plane10 plane4 plane4 plane2", "plane4 is among the sizes more than once"),
        ("--sizes plane10 plane3", "unknown network 'plane3'"),
        ("--sizes plane10 plane2 --family plane", "give one of them"),
        ("--family plane --paths 8,2", "skips the teacher"),
        ("--family plane --paths 10,4,6,2", "wrong order"),
        ("--family plane --paths 10,4,4,2", "more than once"),
        ("--family plane --paths 10,5,2", "size 5 is not among the sizes"),
        ("--family plane --paths 10", "no student"),
        ("--paths 10,2", "write whole names"),
        ("--sizes resnet8 plane8 plane2 --paths resnet8,8,2", "resnet8 or plane8"),
        ("--family plane --set 4:temprature=5", "'temprature=5' is not setting=value"),
        ("--family plane --set 4:temperature=0", "above 0"),
        ("--family plane --set 4", "size:setting=value"),
        ("--family plane --paths 10,2 --set 4:lambda=.5", "no training of the plan ends with plane4"),
        ("--family plane --temprature 5", "unrecognized arguments: --temprature"),
        ("--family plane --epochs none", "'none' is not a whole number"),
        ("--family plane --seed 5", "use --seeds"),
        ("--family plane --teacher plane10", "is the plan's to give"),
        ("--family plane --seeds 1 1", "each seed once"),
        ("--family plane --jobs 0", "at least 1"),
        ("--family plane --pack 2", "--pack needs --slurm"),
        ("--family plane --account me", "--account needs --slurm"),
        ("--family plane --gpus 0 --cuda 0", "contradict"),
        ("--family plane --gpus 99", "this machine has"),
        ("--family plane --only plane9-seed1", "not a training of this plan"),
    ],
)
def test_bad_input_is_one_line(call, tmp_path, argv, says):
    outcome = call(distill_paths, *argv.split(), "--runs", tmp_path / "runs", "--dataset", "digits")
    assert outcome.status == 2 and says in outcome.err and outcome.err.count("\n") == 1, outcome
    assert not (tmp_path / "runs").exists()


def test_two_families_are_allowed_and_said(call):
    outcome = call(distill_paths, "--sizes", "resnet20", "plane10", "plane2", "--dataset", "digits", "--slurm", "--dry-run")
    assert outcome.status == 0 and "sizes of 2 families (resnet, plane)" in outcome.out


def test_without_sbatch_slurm_is_refused(run_command, tmp_path):
    outcome = run_command("distill_paths.py", "--family", "plane", "--slurm", "--runs", tmp_path / "runs", PATH=str(tmp_path))
    assert outcome.status == 2 and "no sbatch on this machine" in outcome.err and outcome.err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


# ------------------------------------------------------------------------------------------------ a real study
def test_a_study_survives_an_interrupt_and_a_killed_child(start_command, call, tmp_path):
    runs = tmp_path / "runs"
    argv = ("distill_paths.py", "--sizes", "plane4", "plane2", *DIGITS, "--set", "4:epochs=4", "--runs", runs)
    teacher, student, alone = (runs / name for name in ("plane4-seed1", "plane4-plane2-seed1", "plane2-seed1"))

    process = start_command(*argv)
    until((teacher / "last.pth.tar").exists)  # the first of its epochs is over
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 130 and "the same command continues" in out, (out, err)
    assert not (teacher / "summary.json").exists() and not student.exists()

    process = start_command(*argv)
    until((student / "config.json").exists)
    os.kill(int(re.search(r"process (\d+)", (student / ".lock").read_text())[1]), signal.SIGKILL)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 1 and err.count("plane4-plane2-seed1: killed by SIGKILL") == 1, (out, err)
    assert (alone / "summary.json").exists(), "what does not depend on it goes on"
    half_way = (runs / "report.md").read_text()
    assert "2 of 3 trainings are finished" in half_way and "4 > 2 (BLKD), not finished" in half_way

    before = {folder: (folder / "summary.json").stat().st_mtime_ns for folder in (teacher, alone)}
    process = start_command(*argv)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0 and "3 trainings, 2 finished" in out, (out, err)
    assert before == {folder: (folder / "summary.json").stat().st_mtime_ns for folder in before}, "finished ones are left alone"

    summary = json.loads((student / "summary.json").read_text())
    assert summary["path"] == ["plane4", "plane2"] and summary["seed"] == 1
    assert f"{summary['best']['test_accuracy_percent']:.2f}" in (runs / "report.md").read_text()
    # Interrupted and continued or not: the same weights.
    assert call(train, "--student", "plane4", *DIGITS, "--epochs", 4, "--run-dir", tmp_path / "undisturbed").status == 0
    weights = [checkpoint.read(folder / "last.pth.tar")["model_state_dict"] for folder in (teacher, tmp_path / "undisturbed")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])

    other = call(distill_paths, *argv[1:], "--epochs", "3")
    assert other.status == 2 and "epochs 2 there, 3 now" in other.err and other.err.count("\n") == 1
    moved = runs.rename(tmp_path / "moved")
    outcome = call(report, moved)
    assert outcome.status == 0 and "3 runs" in outcome.out, outcome.err
    assert (moved / "report.html").stat().st_size > 10_000
