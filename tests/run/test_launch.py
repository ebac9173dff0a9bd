"""The launcher of --cuda N: exit statuses, signals, and usage errors of a group of processes."""

import os
import signal
from pathlib import Path

import pytest
from conftest import LAUNCH, ROOT, wait_until

from takd import process


def finished(process):
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


@pytest.mark.parametrize(
    "processes, code, expected",
    [
        (
            1,
            "print(rank, *(os.environ[key] for key in ('WORLD_SIZE', 'LOCAL_RANK', 'LOCAL_WORLD_SIZE')))",
            (0, "0 1 0 1\n"),
        ),
        (2, "sys.exit(76 if rank else 2)", (2, "")),  # 76: only because another one ended
        (2, "sys.exit(76)", (1, "")),
        (3, "sys.exit(3) if rank else time.sleep(600)", (3, "")),
    ],
)
def test_exit_status_is_the_first_failures(processes, code, expected, start_group):
    program = f"import os, sys, time; rank = int(os.environ['RANK']); {code}"
    assert finished(start_group(processes, "-c", program)) == (*expected, "")


def test_a_killed_process_is_reported(start_group):
    status, out, err = finished(start_group(2, "-c", "import os; int(os.environ['RANK']) and os.kill(os.getpid(), 9)"))
    assert (status, out) == (128 + signal.SIGKILL, "") and err.startswith("process 1 of 2 was ended by SIGKILL")


def test_a_signal_that_torchrun_does_not_forward_is_forwarded(start_group):
    handler = "signal.signal(signal.SIGUSR1, lambda *_: exit(5))"
    process = start_group(2, "-c", f"import os, signal, time; {handler}; os.write(1, b'ready\\n'); time.sleep(600)")
    assert [process.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
    process.send_signal(signal.SIGUSR1)
    assert process.wait(60) == 128 + signal.SIGUSR1


@pytest.mark.parametrize(
    "slurm, given, processes, threads",
    [(None, None, 2, 8), ("4", None, 2, 2), ("4", "4", 2, 2), ("4", "1", 2, 1), (None, "99", 1, 16), ("4", "4", 5, 1)],
)
def test_processes_share_the_jobs_cores_and_no_others(slurm, given, processes, threads, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(16))
    for name, value in (("SLURM_CPUS_PER_TASK", slurm), ("OMP_NUM_THREADS", given)):
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
    assert process.threads_each(processes) == str(threads)


def test_children_get_their_share_where_a_job_exports_all_of_its_threads(start_command):
    program = "import os; os.write(1, os.environ['OMP_NUM_THREADS'].encode() + b'\\n')"  # in one piece
    job = {"OMP_NUM_THREADS": "2", "SLURM_CPUS_PER_TASK": "2"}
    assert finished(start_command("-c", LAUNCH, 2, "-c", program, cwd=ROOT, **job)) == (0, "1\n1\n", "")


def test_a_process_that_dies_ends_the_others(tmp_path, start_group, tiny):
    process = start_group(2, "train.py", *tiny, "--batch-size", "2", "--epochs", "9", "--run-dir", tmp_path)
    wait_until((tmp_path / "config.json").exists, process)
    members = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(members[1]), signal.SIGKILL)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGKILL
    assert err == "process 1 of 2 was ended by SIGKILL, and the others with it; the same command continues\n"
    for pid in map(int, members):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_cuda_2_starts_two_processes_without_importing_torch(start_command):
    """Where the command finds two GPUs and its processes none: one of these reports it."""
    code = """if True:
        import runpy, sys
        from takd.config import flags
        flags.gpus_present = lambda: 2
        try:
            runpy.run_path("train.py", run_name="__main__")
        finally:
            assert "torch" not in sys.modules
    """
    status, out, err = finished(start_command("-c", code, "--cuda", "2", "--dataset", "digits", cwd=ROOT))
    if "no GPU" not in err:
        pytest.skip("this machine has a GPU")
    assert (status, out, err.count("\n")) == (2, "", 1) and "--cuda 2: this machine has" in err


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--batch-size", "3"), "--batch-size 3: 4 processes share a batch, and each needs an image of it"),
        (("--cuda", "3"), "--cuda 3: torchrun started 4 processes here"),
    ],
    ids=" ".join,
)
def test_usage_errors_of_a_group_are_printed_by_its_first_process(flags, message, run_command, tiny):
    place = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    first, second = (run_command("train.py", *tiny, *flags, **place, RANK=rank, LOCAL_RANK=rank) for rank in ("0", "1"))
    assert first.status == 2 and first.err.count("\n") == 1 and message in first.err
    assert second == (2, "", "")


def test_tasks_of_srun_without_a_launcher_are_refused_by_the_first(run_command, tiny, tmp_path):
    first, second = (
        run_command("train.py", *tiny, cwd=tmp_path, SLURM_STEP_NUM_TASKS="2", SLURM_PROCID=task) for task in "01"
    )
    assert first.status == 2 and first.err.count("\n") == 1 and "torchrun" in first.err and "--cuda 2" in first.err
    assert second == (2, "", "") and not list(tmp_path.iterdir())
