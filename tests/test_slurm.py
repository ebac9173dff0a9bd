"""A study on a real SLURM of one node (slurm_cluster.sh): whole, failed parent, cancelled, over its time limit."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, last_weights, read_json, same_weights, wait_until

import train

pytestmark = pytest.mark.slow
CLUSTER = Path(__file__).with_name("slurm_cluster.sh")
SIZES = ("--sizes", "plane4", "plane2")
DIGITS = ("--dataset", "digits", "--epochs", "1", "--batch-size", "32", "--cuda", "0", "--precision", "fp32")
SITE = ("--slurm", "--memory", "2G", "--cpus", "1", "--time", "10")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Environment of a running cluster."""
    if os.geteuid() or not all(map(shutil.which, ("slurmctld", "slurmd", "munged"))):
        pytest.skip("needs root and Debian's slurm-wlm and munge")
    folder = tmp_path_factory.mktemp("slurm")
    for parent in (folder, *folder.parents[:2]):
        parent.chmod(0o755)  # munge's own user must reach its socket
    subprocess.run([CLUSTER, "start", folder], check=True, timeout=120)
    before = dict(os.environ)
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    yield folder
    subprocess.run(["scancel", "--me"], check=False)
    subprocess.run([CLUSTER, "stop", folder], check=True)
    os.environ.clear()
    os.environ.update(before)


def slurm(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.strip()


def queue():
    """{job name: (id, state, reason)}"""
    lines = (line.split("|") for line in slurm("squeue", "--me", "--noheader", "--format=%j|%i|%T|%r").splitlines())
    return {name: tuple(rest) for name, *rest in lines}


def until(condition, seconds=300):
    """wait_until, with a pause between calls of SLURM's commands."""
    wait_until(lambda: condition() or time.sleep(0.3), seconds=seconds)


def job_state(job_id):
    return slurm("scontrol", "show", "job", job_id, "--oneliner").split("JobState=")[1].split()[0]


@pytest.fixture
def study(cluster, run_command, tmp_path):
    """study(...) submits a study of two sizes in a folder of the test's own; returns what the command printed."""

    def submit(*argv):
        return run_command("distill_paths.py", *SIZES, *DIGITS, "--runs", "runs", *SITE, *argv, cwd=tmp_path)

    return submit


def finished(folder):
    return sorted(file.parent.name for file in folder.glob("runs/*/summary.json"))


def test_a_study_from_submission_to_report(study, tmp_path):
    outcome = study("--seeds", "1", "2", "--pack", "2", "--gpu-type", "1")
    assert outcome.status == 0 and outcome.out.count("submitted") == 7, outcome
    assert {"plane4-plane2-seed1", "plane2-seed1", "report"} <= queue().keys()
    assert study("--seeds", "1", "2", "--pack", "2").out.count("submitted") == 0, (
        "jobs in the queue are not submitted again"
    )
    until(lambda: not queue())
    assert finished(tmp_path) == sorted(
        f"{name}-seed{seed}" for name in ("plane2", "plane4", "plane4-plane2") for seed in (1, 2)
    )
    assert "plane2 alone (NOKD)" in (tmp_path / "runs" / "report.md").read_text()
    assert "Left out" not in (tmp_path / "runs" / "report.md").read_text()
    config = read_json(tmp_path / "runs/plane4-plane2-seed1/config.json")
    assert config["environment"]["slurm_job"] and config["download"] is False
    assert study("--seeds", "1", "2").out.count("submitted") == 0, "nothing is left to do"


def test_packed_students_share_a_job(cluster, run_command, tmp_path):
    sizes = ("--sizes", "plane6", "plane4", "plane2", "--paths", "6,4", "6,2")
    argv = (*sizes, *DIGITS, "--batch-size", "16", "--runs", "runs", *SITE, "--pack", "2")
    outcome = run_command("distill_paths.py", *argv, cwd=tmp_path)
    assert outcome.status == 0 and "plane6-plane4-seed1+1" in outcome.out, outcome
    until(lambda: not queue())
    names = ("plane6", "plane6-plane4", "plane6-plane2", "plane4", "plane2")
    assert finished(tmp_path) == sorted(f"{name}-seed1" for name in names)
    configs = {name: read_json(tmp_path / "runs" / name / "config.json") for name in finished(tmp_path)}
    jobs = {name: config["environment"]["slurm_job"] for name, config in configs.items()}
    assert jobs["plane6-plane4-seed1"] == jobs["plane6-plane2-seed1"] != jobs["plane6-seed1"]


def test_data_is_staged_to_the_node(cluster, class_folders, tmp_path):
    class_folders(tmp_path / "data")
    (tmp_path / "node").mkdir()
    run = "train.py --student plane2 --dataset cifar10 --epochs 1 --cuda 0 --run-dir run".split()
    environment = {"TAKD_HOME": str(ROOT), "TAKD_PYTHON": sys.executable, "TAKD_STAGE": "data/cifar10"}
    environment = os.environ | environment | {"SLURM_TMPDIR": str(tmp_path / "node")}
    command = ["sbatch", "--wait", "--mem=2G", "--output=log", ROOT / "slurm/train.sbatch", *run]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)
    assert done.returncode == 0, (tmp_path / "log").read_text()
    config = read_json(tmp_path / "run/config.json")
    assert config["dataset_dir"] == str(tmp_path / "node" / "data") and config["download"] is False


def test_a_failed_parent_stops_its_students_and_nothing_else(study, tmp_path):
    assert study("--sbatch=--hold").status == 0
    teacher = tmp_path / "runs" / "plane4-seed1"
    teacher.mkdir()
    (teacher / "in the way").write_text("train.py refuses a folder with other files")
    job_id = queue()["plane4-seed1"][0]
    for held, *_ in queue().values():
        slurm("scontrol", "release", held)
    until(lambda: not queue())
    assert job_state(job_id) == "FAILED"
    assert finished(tmp_path) == ["plane2-seed1"]
    assert "not begun" in (tmp_path / "runs" / "report.md").read_text(), "the report covers what there is"
    shutil.rmtree(teacher)
    outcome = study()
    assert outcome.out.count("submitted") == 3, outcome  # teacher, student, report
    until(lambda: not queue())
    assert finished(tmp_path) == ["plane2-seed1", "plane4-plane2-seed1", "plane4-seed1"]


def test_a_cancelled_job_has_saved_and_is_continued(study, call, tmp_path):
    long = ("--epochs", "30", "--paths", "4,2")
    study(*long)
    teacher = tmp_path / "runs" / "plane4-seed1"
    metrics = teacher / "metrics.jsonl"
    until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= 2)
    slurm("scancel", queue()["plane4-seed1"][0])
    until(lambda: not {"plane4-seed1", "plane4-plane2-seed1"} & queue().keys())
    assert (teacher / "last.pth.tar").exists() and not (teacher / "summary.json").exists()
    [log] = (tmp_path / "runs" / "logs").glob("plane4-seed1-*.log")
    assert "the same command continues" in log.read_text(), (
        "train.py received SLURM's signal and saved before it was ended"
    )
    slurm("scancel", "--me")
    until(lambda: not queue())
    assert study(*long).out.count("submitted plane4-seed1") == 1
    until(lambda: (teacher / "summary.json").exists())
    slurm("scancel", "--me")
    log = max((tmp_path / "runs" / "logs").glob("plane4-seed1-*.log"), key=lambda file: file.stat().st_mtime)
    assert "continuing at epoch" in log.read_text()


def test_at_its_time_limit_a_job_saves_is_requeued_and_ends_with_the_same_weights(study, call, tmp_path):
    epochs = ("--epochs", "100", "--paths", "4,2")
    outcome = study(*epochs, "--time", "1", "--sbatch=--signal=USR1@25")
    assert outcome.status == 0, outcome
    teacher = tmp_path / "runs" / "plane4-seed1"
    job_id = queue()["plane4-seed1"][0]
    for name in ("plane2-seed1", "report"):
        slurm("scancel", queue()[name][0])

    def done():
        if queue().get("plane4-seed1", ("", "", ""))[2] == "BeginTime":  # SLURM would wait for two minutes
            time.sleep(10)  # it needs a few seconds
            longer = ["TimeLimit=60"] if (teacher / "last.pth.tar").exists() else []  # over the limit once is enough
            slurm("scontrol", "update", f"JobId={job_id}", "StartTime=now", *longer)
        return (teacher / "summary.json").exists()

    until(done, seconds=560)
    assert "plane4-plane2-seed1" in queue(), "the student's job waits through the requeue"
    slurm("scancel", queue()["plane4-plane2-seed1"][0])
    [log] = (tmp_path / "runs" / "logs").glob(f"plane4-seed1-{job_id}.log")
    text = log.read_text()
    assert f"job {job_id} goes back into the queue" in text and "start 1," in text and "continuing at epoch" in text
    undisturbed = tmp_path / "undisturbed"
    assert call(train, "--student", "plane4", *DIGITS, "--epochs", "100", "--run-dir", undisturbed).status == 0
    assert same_weights(last_weights(teacher), last_weights(undisturbed))
