"""Jobs on a real SLURM of one node (slurm_cluster.sh): studies and arrays, cancelled, warned, requeued, refused."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
from conftest import ROOT, last_weights, read_json, same_weights, wait_until
from test_sweep import check_whole, process_of

import train
from takd import files

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
    for parent in (folder, *folder.parents[:3]):
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


def job_of(pid):
    """The id of the job that a process belongs to; None where it has ended."""
    with contextlib.suppress(OSError):
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        return next((word[13:].decode() for word in environment if word.startswith(b"SLURM_JOB_ID=")), None)


def job_state(job_id):
    return slurm("scontrol", "show", "job", job_id, "--oneliner").split("JobState=")[1].split()[0]


@pytest.fixture
def study(cluster, run_command, tmp_path):
    """study(...) submits a study of two sizes in a folder of the test's own; returns what the command printed."""

    def submit(*argv):
        return run_command("distill_paths.py", *SIZES, *DIGITS, "--runs", "runs", *SITE, *argv, cwd=tmp_path)

    return submit


@pytest.fixture
def sbatch(cluster, tmp_path):
    """sbatch(options, command, ...) submits slurm/train.sbatch in the test's folder, with its output in `log`; returns
    the job's id. The environment is a job's own, without the tests' OMP_NUM_THREADS; more of it by keyword."""

    def submit(options, command, **environment):
        own = {"TAKD_HOME": str(ROOT), "TAKD_PYTHON": sys.executable} | environment
        own |= {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
        words = ["sbatch", "--parsable", "--mem=2G", "--output=log", *options.split(), ROOT / "slurm/train.sbatch"]
        words += [*command.split(), *(DIGITS if "--dataset" not in command else ())]
        done = subprocess.run(words, cwd=tmp_path, env=own, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    return submit


def warn(job_id):
    """Send a job what SLURM sends before a time limit, and wait until it is back in the queue or has ended."""
    slurm("scancel", "--signal=USR1", job_id)
    until(lambda: job_state(job_id) in ("PENDING", "FAILED"))


def begin_again(job_id):
    """Start a requeued job, for which SLURM would wait two minutes."""
    until(lambda: "BeginTime" in slurm("squeue", "--noheader", "--format=%r", "--jobs", job_id))
    time.sleep(10)  # it needs a few seconds
    slurm("scontrol", "update", f"JobId={job_id}", "StartTime=now")


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


def test_a_sweep_by_a_job_array_with_a_requeue_a_cancel_and_a_killed_worker(cluster, run_command, tmp_path):
    """As many of the three workers run at once as there are cores. What each leaves is adopted and continued."""
    seeds, T = {"_type": "choice", "_value": [1, 2]}, {"_type": "choice", "_value": [1, 2, 4, 8]}
    (tmp_path / "space.json").write_text(json.dumps({"T": T, "seed": seeds}))
    pair = ("--teacher", "plane2", "--student", "plane2", *DIGITS, "--epochs", "30", "--space", "space.json")
    runs = tmp_path / "runs"
    claims, trials = runs / "claims", runs / "trials"

    def submit():
        argv = (*pair, "--runs", "runs", "--trials", "6", "--workers", "3", *SITE)
        return run_command("sweep.py", *argv, cwd=tmp_path)

    def tasks():
        """{process of a worker whose trial has saved an epoch and is trained: (its task, its trial)}"""
        saved = [file.parent for file in trials.glob("*/last.pth.tar")]
        trained = [each for each in saved if files.is_locked(claims / each.name) and files.is_locked(each / ".lock")]
        pairs = {process_of(claims / trial.name): trial for trial in trained}
        lines = slurm("squeue", "--me", "--noheader", "--array", "--states=RUNNING", "--format=%F_%K %A").splitlines()
        jobs = {job: task for task, job in map(str.split, lines)}
        return {pid: (jobs[job_of(pid)], trial) for pid, trial in pairs.items() if job_of(pid) in jobs}

    def a_task():
        found = {}
        until(lambda: found.update(tasks()) or found)
        return next((pid, *rest) for pid, rest in found.items())

    outcome = submit()
    assert outcome.status == 0 and outcome.out.count("submitted") == 2, outcome
    assert "in queue  workers" in submit().out and len(queue()) >= 2, "an array in the queue is not submitted again"

    def over():
        """Whether the queue is empty; SLURM would wait for two minutes before it starts what was requeued."""
        lines = slurm("squeue", "--me", "--noheader", "--array", "--format=%F_%K %r").splitlines()
        for task in [line.split()[0] for line in lines if line.endswith("BeginTime")]:
            time.sleep(10)  # it needs a few seconds
            subprocess.run(["scontrol", "update", f"JobId={task}", "StartTime=now"], check=False)
        return not lines

    worker, _, _ = a_task()
    os.kill(worker, signal.SIGUSR1)  # as SLURM does before the time limit
    until(lambda: "BeginTime" in slurm("squeue", "--me", "--array", "--format=%r"))
    worker, _, trial = a_task()
    training = process_of(trial / ".lock")
    os.kill(worker, signal.SIGKILL)
    os.kill(training, signal.SIGKILL)
    _, cancelled, _ = a_task()
    slurm("scancel", cancelled)
    until(over, seconds=900)
    check_whole(runs, [1, 2], 6)
    logs = "".join(log.read_text() for log in (runs / "logs").glob("workers-*.log"))
    assert logs.count("begin     ") == 6, "each trial is begun once"
    assert logs.count("continue  ") >= 3 and "goes back into the queue" in logs
    assert "6 of 6 trials finished, 0 in progress, 0 failed" in logs


def test_data_is_staged_to_the_node(sbatch, class_folders, tmp_path):
    class_folders(tmp_path / "data")
    node = tmp_path / "node"
    run = "train.py --student plane2 --dataset cifar10 --epochs 1 --cuda 0 --run-dir run"
    sbatch("--wait", run, TAKD_STAGE="data/cifar10", SLURM_TMPDIR=str(node))
    config = read_json(tmp_path / "run/config.json")
    assert config["dataset_dir"] == str(node / "data") and config["download"] is False


def test_an_environment_is_made_on_the_node_after_a_purge_of_modules(sbatch, tmp_path):
    """Of no packages: train.py names the Python that lacks them. Environment Modules, too, exports a function."""
    (tmp_path / "requirements.txt").touch()
    environment = {"TAKD_VENV": "requirements.txt", "TAKD_PYTHON": "", "SLURM_TMPDIR": str(tmp_path)}
    environment |= {"TAKD_MODULES": "python/3.11 cuda", "BASH_FUNC_module%%": "() { echo module $*; }"}
    job_id = sbatch("", "train.py", **environment)
    until(lambda: job_state(job_id) == "FAILED")
    log = (tmp_path / "log").read_text()
    assert log.startswith("module purge\nmodule load python/3.11 cuda\n")
    assert f"No module named 'torch'; install what the suite needs with: {tmp_path}/env/bin/python3 -m" in log


def test_a_study_in_one_job_is_warned_requeued_and_finished(sbatch, tmp_path):
    study = "distill_paths.py --sizes plane4 plane2 --set 4:epochs=20 2:epochs=20 --jobs 2 --runs runs"
    job_id = sbatch("--cpus-per-task=2", study)
    until((tmp_path / "runs/plane4-seed1/last.pth.tar").exists)
    warn(job_id)
    assert len(finished(tmp_path)) < 3
    begin_again(job_id)
    until(lambda: job_state(job_id) == "COMPLETED")
    assert finished(tmp_path) == ["plane2-seed1", "plane4-plane2-seed1", "plane4-seed1"]
    assert "Left out" not in (tmp_path / "runs" / "report.md").read_text()
    for run in finished(tmp_path):
        assert read_json(tmp_path / "runs" / run / "config.json")["environment"]["threads"] == 1, "half of the job's"


def test_of_an_array_of_seeds_only_the_warned_task_is_requeued(sbatch, tmp_path):
    """The task whose job has the array's own ID, by which all would be. The last task's report has all seeds."""
    study = "distill_paths.py --sizes plane4 plane2 --paths 4,2 --set 4:epochs=20 --seeds %a --runs runs"
    job_id = sbatch("--array=1-2 --output=log%a", study)
    until(lambda: all((tmp_path / f"runs/plane4-seed{seed}/last.pth.tar").exists() for seed in (1, 2)))
    assert read_json(tmp_path / "runs/plane4-seed2/config.json")["environment"]["slurm_job"] == job_id
    warn(f"{job_id}_2")
    begin_again(f"{job_id}_2")
    until(lambda: not queue())
    logs = [(tmp_path / f"log{task}").read_text() for task in (1, 2)]
    assert [re.findall(r"job (\S+), start (\d)", log) for log in logs] == [
        [(f"{job_id}_1", "0")],
        [(f"{job_id}_2", "0"), (f"{job_id}_2", "1")],
    ]
    assert len(finished(tmp_path)) == len(read_json(tmp_path / "runs/study.json")["trainings"]) == 6
    assert "not begun" not in (tmp_path / "runs" / "report.md").read_text()


def test_a_job_that_is_warned_while_it_stages_ends_at_its_second_start(sbatch, tmp_path):
    os.mkfifo(tmp_path / "endless.tar")
    log, job_id = tmp_path / "log", sbatch("", "train.py", TAKD_STAGE="endless.tar", SLURM_TMPDIR=str(tmp_path))
    for start in (0, 1):
        until(lambda start=start: log.exists() and f"start {start}," in log.read_text())
        until(lambda: f"{job_id}.0" in slurm("squeue", "--steps", "--noheader", "--format=%i"))
        warn(job_id)
        if not start:
            begin_again(job_id)
    assert job_state(job_id) == "FAILED"
    assert log.read_text().splitlines()[-1].startswith(f"job {job_id} ends: the warning before its time limit")


def test_tasks_of_srun_are_refused_without_torchrun_and_train_together_with_it(cluster, tiny, tmp_path):
    run = tmp_path / "run"
    train_py = [ROOT / "train.py", *tiny, "--epochs", "9", "--run-dir", run]

    def start(*launcher):
        command = ["srun", "--ntasks=2", "--mem=4G", "--job-name=group", sys.executable, *launcher, *train_py]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def start_torchrun():
        with closing(socket.socket()) as free:
            free.bind(("127.0.0.1", 0))
            where = f"{socket.gethostname()}:{free.getsockname()[1]}"
        rendezvous = ("--rdzv-backend=c10d", "--rdzv-id=1", f"--rdzv-endpoint={where}")
        return start("-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", *rendezvous)

    refused = start()
    lines = [line for line in refused.communicate()[1].splitlines() if not line.startswith("srun: ")]
    assert refused.returncode == 2 and len(lines) == 1 and "torchrun" in lines[0] and "--cuda 2" in lines[0], lines
    assert not run.exists()
    stopped = start_torchrun()
    wait_until((run / "last.pth.tar").exists, stopped)
    slurm("scancel", "--signal=TERM", queue()["group"][0])
    out, _ = stopped.communicate()
    assert stopped.returncode and "the same command continues" in out and not (run / "summary.json").exists()
    continued = start_torchrun()
    out, err = continued.communicate()
    assert continued.returncode == 0 and "continuing at epoch" in out, err
    assert read_json(run / "config.json")["environment"]["processes"] == 2


def test_a_study_submitted_again_has_one_report_job_which_asks_for_little(study):
    def reports():
        lines = slurm("squeue", "--me", "--noheader", "--format=%j %i %l %m").splitlines()
        return [line.split()[1:] for line in lines if line.startswith("report ")]

    study("--sbatch=--hold")
    [(first, limit, memory)] = reports()
    assert (limit, memory) == ("10:00", "2G")
    slurm("scancel", queue()["plane2-seed1"][0])
    until(lambda: "plane2-seed1" not in queue())
    assert study("--sbatch=--hold").out.count("submitted") == 2
    [(second, *_)] = reports()
    assert second != first
    slurm("scancel", second)
    until(lambda: not reports())
    assert "submitted report" in study("--sbatch=--hold").out, "a report that was cancelled is submitted again"
    slurm("scancel", "--me")
    until(lambda: not queue())


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
