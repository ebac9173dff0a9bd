"""distill_paths.py: dry runs, usage errors, and a study that is interrupted, loses a training, and continues."""

import os
import re
import shlex
import signal

import pytest
from conftest import last_weights, read_json, same_weights, wait_until

import distill_paths
import report
import train
from takd.config import run_config

DIGITS = ("--dataset", "digits", "--epochs", "2", "--cuda", "0", "--precision", "fp32")


def commands_of(text):
    """The arguments of each train.py command that a dry run prints."""
    return [shlex.split(line)[2:] for line in text.splitlines() if "train.py --student" in line]


def value_of(command, flag):
    return command[command.index(flag) + 1]


# ------------------------------------------------------------------------------------------------- a dry run
def test_a_dry_run_prints_tree_estimate_and_commands_and_writes_nothing(call, tmp_path):
    runs = tmp_path / "runs"
    outcome = call(distill_paths, "--sizes", "plane4", "plane2", *DIGITS, "--seeds", 3, 5, "--runs", runs, "--dry-run")
    assert not outcome.status, outcome.err
    assert "└── plane2" in outcome.out and "6 trainings (3 per seed, seeds 3 5), 0 finished" in outcome.out
    assert outcome.out.startswith("missing  plane4, the teacher, of seed 3 5: trained first\n")
    assert "per seed 2 of the teacher and the paths, and 1 of the other sizes alone (NOKD)" in outcome.out
    assert re.search(r"estimate: \d+:\d\d .* [\d.]+ GB", outcome.out.splitlines()[-1])
    commands = commands_of(outcome.out)
    assert [value_of(command, "--seed") for command in commands] == ["3", "3", "3", "5", "5", "5"]
    assert value_of(commands[1], "--teacher-checkpoint") == str(runs / "plane4-seed3" / "plane4_seed3_best.pth.tar")
    assert all(value_of(command, "--precision") == "fp32" for command in commands)
    assert not runs.exists()


def test_a_dry_run_begins_with_what_is_missing(call, tmp_path):
    command = ("--family", "plane", "--dataset", "cifar100", "--dataset-dir", tmp_path, "--cuda", 0, "--dry-run")
    lines = call(distill_paths, *command, "--slurm", "--runs", tmp_path / "runs").out.splitlines()
    fetch = f"python3 data_loader.py --download cifar100 --dataset-dir {tmp_path}"
    assert lines[0] == f"# missing  cifar100: not in {tmp_path}; fetch it with {fetch}"
    assert lines[1] == "# missing  plane10, the teacher, of seed 1: trained first" and "missing" not in lines[2]


# ----------------------------------------------------------------------------------------- settings of a step
def submitted(call, *argv):
    """{run: its command} of a dry run on SLURM."""
    outcome = call(distill_paths, *argv, "--slurm", "--dry-run")
    assert outcome.status == 0, outcome.err
    words = [shlex.split(line.split("$(", 1)[1].rstrip(")")) for line in outcome.out.splitlines() if "train.py" in line]
    return {value_of(command, "--run-dir").split("/")[-1]: command for command in words}


def test_settings_of_steps_are_read_from_a_file(call, tmp_path):
    steps = ("# of the paper", "2:temperature=5,lambda=.15", "4,2:temperature=7", "10:learning-rate=0.02")
    (tmp_path / "steps").write_text("\n".join(steps))
    study = ("--paths", "plane10,plane4,plane2", "plane10,plane2", *DIGITS, "--temperature", 3)
    commands = submitted(call, *study, "--set", f"@{tmp_path / 'steps'}")
    assert value_of(commands["plane10-plane4-seed1"], "--temperature") == "3.0"
    assert value_of(commands["plane10-plane2-seed1"], "--temperature") == "5.0"
    assert value_of(commands["plane10-plane4-plane2-seed1"], "--temperature") == "7.0"
    assert value_of(commands["plane10-plane4-plane2-seed1"], "--lambda") == "0.15"
    assert value_of(commands["plane10-seed1"], "--learning-rate") == "0.02"
    for alone in ("plane10-seed1", "plane4-seed1", "plane2-seed1"):
        assert "--temperature" not in commands[alone] and "--lambda" not in commands[alone]


def test_flags_of_train_reach_every_training(call):
    given = (
        "--recipe",
        "released-code",
        "--milestones",
        1,
        2,
        "--no-nesterov",
        "--dataset-dir",
        "some where",
        "--batch-size",
        32,
    )
    for command in submitted(call, "--sizes", "plane4", "plane2", *DIGITS, *given).values():
        arguments = command[command.index("train.py") + 1 :]
        config = run_config.parse(arguments, elsewhere=True)
        assert (config.recipe, config.milestones, config.nesterov) == ("released-code", [1, 2], False)
        assert (config.dataset_dir, config.batch_size, config.precision) == ("some where", 32, "fp32")


# ----------------------------------------------------------------------------------------------- usage errors
@pytest.mark.parametrize(
    "argv, message",
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
        ("--family plane --teacher plane10", "is set by the plan"),
        ("--family plane --measure plane10", "use --dry-run"),
        ("--family plane --seeds 1 1", "each seed once"),
        ("--family plane --jobs 0", "at least 1"),
        ("--family plane --pack 2", "--pack needs --slurm"),
        ("--family plane --account me", "--account needs --slurm"),
        ("--family plane --slurm --time 3:00", "a job is warned 180 s before its limit"),
        ("--family plane --slurm --time 0-0:03", "--time 0-0:03: a job is warned"),
        ("--family plane --gpus 0 --cuda 0", "contradict"),
        ("--family plane --gpus 99", "this machine has"),
        ("--family plane --only plane9-seed1", "not a training of this plan"),
        ("--family plane --set 2:milestones='1", "No closing quotation"),
        ("--sizes resnet8 plane2 --method fsp", "channels in the student"),
    ],
)
def test_usage_errors_of_a_study_are_one_line(call, tmp_path, argv, message):
    outcome = call(distill_paths, *argv.split(), "--runs", tmp_path / "runs", "--dataset", "digits")
    assert outcome.status == 2 and message in outcome.err and outcome.err.count("\n") == 1, outcome
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("limit", ["4", "3:01", "1:00:00", "0-1", "1-0:00", "UNLIMITED", "1 --sbatch=--signal=USR1@30"])
def test_a_time_limit_beyond_the_warning_is_allowed(call, limit):
    outcome = call(distill_paths, *"--family plane --dataset digits --slurm --dry-run --time".split(), *limit.split())
    assert outcome.status == 0 and f"--time={limit.split()[0]}" in outcome.out, outcome.err


def test_two_families_are_allowed_with_a_note(call):
    sizes = ("resnet20", "plane10", "plane2")
    outcome = call(distill_paths, "--sizes", *sizes, "--dataset", "digits", "--slurm", "--dry-run")
    assert outcome.status == 0 and "sizes of 2 families (resnet, plane)" in outcome.out


@pytest.mark.parametrize("kind", ["itself", "binary", "pipe"])
def test_an_arguments_file_that_is_none_is_one_line(call, tmp_path, kind):
    file = tmp_path / kind
    os.mkfifo(file) if kind == "pipe" else file.write_bytes(b"\xff\0" if kind == "binary" else f"@{file}".encode())
    outcome = call(distill_paths, f"@{file}", "--runs", tmp_path / "runs")
    assert outcome.status == 2 and "arguments file" in outcome.err and outcome.err.count("\n") == 1, outcome
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("runs", ["loop", "loop/runs", "pipe", "pipe/runs"])
def test_a_place_that_can_hold_no_runs_is_one_line(call, tmp_path, runs):
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    outcome = call(distill_paths, *"--family plane --dataset digits --runs".split(), tmp_path / runs)
    assert outcome.status == 2 and "is not a folder" in outcome.err and outcome.err.count("\n") == 1, outcome


def test_without_sbatch_slurm_is_refused(run_command, tmp_path):
    argv = ("--family", "plane", "--slurm", "--runs", tmp_path / "runs")
    outcome = run_command("distill_paths.py", *argv, PATH=str(tmp_path))
    assert outcome.status == 2 and "no sbatch on this machine" in outcome.err and outcome.err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


# ------------------------------------------------------------------------------------------------ a study
@pytest.mark.slow
def test_a_study_continues_after_an_interrupt_and_a_killed_training(start_command, call, tmp_path):
    runs = tmp_path / "runs"
    argv = ("distill_paths.py", "--sizes", "plane4", "plane2", *DIGITS, "--set", "4:epochs=4", "--runs", runs)
    teacher, student, alone = (runs / name for name in ("plane4-seed1", "plane4-plane2-seed1", "plane2-seed1"))

    process = start_command(*argv)
    wait_until((teacher / "last.pth.tar").exists, process)  # after its first epoch
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 130 and "the same command continues" in out, (out, err)
    assert not (teacher / "summary.json").exists() and not student.exists()

    process = start_command(*argv)
    wait_until((student / "config.json").exists, process)
    os.kill(int(re.search(r"process (\d+)", (student / ".lock").read_text())[1]), signal.SIGKILL)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 1 and err.count("plane4-plane2-seed1: killed by SIGKILL") == 1, (out, err)
    assert (alone / "summary.json").exists(), "trainings that do not depend on it go on"
    partial = (runs / "report.md").read_text()
    assert "2 of 3 trainings are finished" in partial and "4 > 2 (BLKD), failed" in partial, partial

    finished = [folder / "summary.json" for folder in (teacher, alone)]
    before = [file.stat().st_mtime_ns for file in finished]
    process = start_command(*argv)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0 and "3 trainings, 2 finished" in out, (out, err)
    assert before == [file.stat().st_mtime_ns for file in finished], "finished trainings are not repeated"

    summary = read_json(student / "summary.json")
    assert summary["path"] == ["plane4", "plane2"] and summary["seed"] == 1
    assert f"{summary['best']['test_accuracy_percent']:.2f}" in (runs / "report.md").read_text()
    assert call(train, "--student", "plane4", *DIGITS, "--epochs", 4, "--run-dir", tmp_path / "whole").status == 0
    assert same_weights(last_weights(teacher), last_weights(tmp_path / "whole"))

    best, records = student / "plane2_seed1_best.pth.tar", student / "metrics.jsonl"
    lost = {file: file.read_bytes() for file in (best, records)}
    for file in lost:
        file.unlink()
    process = start_command(*argv)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0 and "3 trainings, 2 finished" in out, (out, err)
    assert records.read_bytes() == lost[records] and best.exists(), "restored from last.pth.tar"

    other = call(distill_paths, *argv[1:], "--epochs", "3")
    assert other.status == 2 and "epochs 2 there, 3 now" in other.err and other.err.count("\n") == 1
    moved = runs.rename(tmp_path / "moved")
    outcome = call(report, moved)
    assert outcome.status == 0 and "3 runs" in outcome.out, outcome.err
    assert (moved / "report.html").stat().st_size > 10_000
