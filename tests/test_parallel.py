"""Several processes train what one would, to rounding: losses, weights and files; stopping, continuing, failing. gloo, on the CPU."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import data_loader
import train
from takd.run import checkpoint

ROOT = Path(train.__file__).resolve().parent
# What --cuda N does, as it needs no GPU of its own: N processes of a command.
LAUNCH = """
import sys
from takd.run import launch as launcher
say = lambda line: print(line, file=sys.stderr)
sys.exit(launcher.launch(int(sys.argv[1]), [sys.executable, *sys.argv[2:]], say))
"""
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
QUIET = ("--learning-rate", "0.001")  # small steps do not magnify rounding


@pytest.fixture(scope="module")
def start():
    """start(*python's arguments) in the suite's folder -> Popen."""
    started = []

    def begin(*argv):
        command = [sys.executable, *map(str, argv)]
        started.append(subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def group(start):
    """group(*arguments of train.py, processes=2) -> (exit status, output, errors) of the launcher."""

    def run(*argv, processes=2):
        process = start("-c", LAUNCH, processes, "train.py", *argv)
        out, err = process.communicate(timeout=300)
        return process.returncode, out, err

    return run


def records(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def names(run):
    return sorted(re.sub(r"tfevents\..*", "tfevents", path.name) for path in run.iterdir())


def assert_agree(run, alone, tolerance=1e-5):
    """Losses, accuracies, files, checkpoints' keys and final weights."""
    assert names(run) == names(alone)
    assert len(records(run)) == len(records(alone))
    for record, expected in zip(records(run), records(alone), strict=True):
        assert record.keys() == expected.keys()
        for key in expected:
            if key.endswith("accuracy_percent"):
                assert record[key] == pytest.approx(expected[key], abs=0.6), key  # rounding may turn one or two of 359 images
            elif "second" not in key:
                assert record[key] == pytest.approx(expected[key], rel=tolerance), key
    for name in ("last.pth.tar", next(alone.glob("*_best.pth.tar")).name):
        contents, expected = checkpoint.read(run / name), checkpoint.read(alone / name)
        assert contents.keys() == expected.keys()
        weights, expected = contents["model_state_dict"], expected["model_state_dict"]
        assert list(weights) == list(expected)
        for key, value in expected.items():
            torch.testing.assert_close(
                weights[key], value, rtol=10 * tolerance, atol=10 * tolerance, msg=lambda text, key=key: f"{key}: {text}"
            )


def alike(out, expected):
    """The same lines but for times, speeds, folders and the number of processes."""
    kinds = [[line.split()[0] for line in text.splitlines()] for text in (out, expected)]
    return kinds[0] == kinds[1]


# ------------------------------------------------------------------------------------- what one process would
def test_parts_of_a_batch():
    for images in range(1, 12):
        for size in range(1, 6):
            parts = [data_loader.part_of(images, rank, size) for rank in range(size)]
            assert sum(part.share for part in parts) == pytest.approx(1)
            assert all(part.weight == pytest.approx(part.share * size) for part in parts)
            taken = [row for part in parts for row in range(part.start, part.stop)]
            if images < size:
                assert taken == list(range(images)) * size and all(part.whole for part in parts)
            else:
                assert taken == list(range(images)) and (size == 1 or not any(part.whole for part in parts))
                assert max(part.stop - part.start for part in parts) - min(part.stop - part.start for part in parts) <= 1


def test_uneven_parts_and_a_last_batch_of_one_image(tmp_path, call, group, tiny):
    """1,438 images in batches of 479: parts of 239 and 240 images, and a last batch that every process takes."""
    command = (*tiny, *QUIET, "--epochs", "2", "--batch-size", "479")
    alone = call(train, *command, "--run-dir", tmp_path / "alone")
    status, out, err = group(*command, "--run-dir", tmp_path / "run")
    assert (status, err) == (0, "")
    assert_agree(tmp_path / "run", tmp_path / "alone")
    assert alike(out, alone.out) and "2 processes of 1 threads" in out
    assert json.loads((tmp_path / "run/config.json").read_text())["environment"]["processes"] == 2


def test_torchrun_with_a_teacher(tmp_path, call, start, tiny, teacher_file):
    command = (*tiny, *QUIET, "--augment", "crop-flip", "--teacher", "plane2", "--teacher-checkpoint", teacher_file)
    alone = call(train, *command, "--teacher-cache", "live", "--run-dir", tmp_path / "alone")
    process = start(*TORCHRUN, "train.py", *command, "--run-dir", tmp_path / "run")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert alike(out, alone.out)
    assert_agree(tmp_path / "run", tmp_path / "alone", tolerance=3e-4)  # the table holds float16


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fitnet", "at", "dkd"])
def test_methods_and_their_own_parameters(method, tmp_path, call, group, tiny, teacher_file):
    """FitNet's regressor has weights and a batch norm: both are the whole batch's."""
    command = (*tiny, *QUIET, "--teacher", "plane2", "--teacher-checkpoint", teacher_file, "--method", method)
    command += ("--learning-rate", "0.0001")  # FitNet's weight of 100 makes the steps large
    assert call(train, *command, "--run-dir", tmp_path / "alone").status == 0
    assert group(*command, "--run-dir", tmp_path / "run")[::2] == (0, "")
    assert_agree(tmp_path / "run", tmp_path / "alone", tolerance=1e-4)
    states = [checkpoint.read(tmp_path / run / "last.pth.tar")["method_state_dict"] for run in ("run", "alone")]
    assert states[0].keys() == states[1].keys() and bool(states[0]) == (method == "fitnet")
    for key, value in states[1].items():
        torch.testing.assert_close(states[0][key], value, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_a_residual_network_over_crops_and_flips(processes, tmp_path, call, group, tiny):
    command = (*tiny, *QUIET, "--student", "resnet8", "--augment", "crop-flip", "--epochs", "2")
    assert call(train, *command, "--run-dir", tmp_path / "alone").status == 0
    assert group(*command, "--run-dir", tmp_path / "run", processes=processes)[::2] == (0, "")
    assert_agree(tmp_path / "run", tmp_path / "alone", tolerance=1e-4)
    status, out, err = group(*command, "--run-dir", tmp_path / "run", processes=processes)
    assert status == 0 and out.count("finished ") == len(out.splitlines()) == 1 and err == ""


@pytest.mark.slow
def test_the_teacher_is_trained_first_and_both_agree(tmp_path, call, group, tiny):
    command = (
        *tiny,
        "--recipe",
        "paper",
        "--epochs",
        "2",
        "--teacher",
        "plane4",
        "--teacher-cache",
        "live",
        "--validation-split",
        "0.1",
    )
    assert call(train, *command, "--run-dir", tmp_path / "alone").status == 0
    assert group(*command, "--run-dir", tmp_path / "run")[::2] == (0, "")
    for run in ("teacher", "."):
        for record, expected in zip(records(tmp_path / "run" / run), records(tmp_path / "alone" / run), strict=True):
            assert record["train_loss"] == pytest.approx(expected["train_loss"], rel=2e-2)  # rounding grows at the full rate


@pytest.mark.slow
def test_bf16_of_two_processes_learns_as_one(tmp_path, call, group, tiny):
    command = (*tiny, *QUIET, "--precision", "bf16", "--epochs", "2")
    assert call(train, *command, "--run-dir", tmp_path / "alone").status == 0
    assert group(*command, "--run-dir", tmp_path / "run")[::2] == (0, "")
    for record, expected in zip(records(tmp_path / "run"), records(tmp_path / "alone"), strict=True):
        assert record["train_loss"] == pytest.approx(expected["train_loss"], rel=2e-2)


# --------------------------------------------------------------------------------------- stopping and failing
def wait_for(condition, process):
    while not condition():
        if process.poll() is not None:
            pytest.fail(f"ended before its time: {process.communicate()}")
        time.sleep(0.02)


def children(process):
    """Process ids in the order in which they were started."""
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def past_first_epoch(run):
    last = run / "last.pth.tar"
    return last.exists() and (saved := checkpoint.read(last))["epoch"] >= 1 and saved["step"] > 0


def under_way(start, *argv):
    """A launcher whose two processes are inside their second epoch or later, and save often; the last argument is the run's folder."""
    process = start("-c", LAUNCH, 2, "train.py", "--save-minutes", "0.0003", *argv)
    wait_for(lambda: past_first_epoch(argv[-1]), process)
    return process


SMALL = (*QUIET, "--epochs", "3", "--batch-size", "48")


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGINT, signal.SIGUSR1))]
)
def test_a_signal_saves_and_the_same_command_continues(number, tmp_path, call, start, group, tiny):
    command = (*tiny, *SMALL)
    run, alone = tmp_path / "run", tmp_path / "alone"
    process = under_way(start, *command, "--run-dir", run)
    members = children(process)
    process.send_signal(number)
    for pid in members:  # as a terminal and SLURM do: to the launcher and to its processes as well
        os.kill(pid, number)
    out, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (128 + number, "")
    assert out.count("the same command continues") == 1
    stopped = checkpoint.read(run / "last.pth.tar")
    assert stopped["epoch"] >= 1 and stopped["sums"]["images"] == [48] * stopped["step"]
    assert not (run / "summary.json").exists()
    status, out, err = group(*command, "--run-dir", run)
    assert status == 0 and f"continuing at epoch {stopped['epoch']}, step {stopped['step']}" in out and "note: " not in out, err
    assert call(train, *command, "--run-dir", alone).status == 0
    for record, expected in zip(records(run), records(alone), strict=True):  # after many steps rounding is no longer small
        assert record["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-2)


@pytest.mark.slow
def test_a_continued_group_ends_with_the_bits_of_an_undisturbed_one(tmp_path, start, group, tiny):
    command = (*tiny, *SMALL)
    process = under_way(start, *command, "--run-dir", tmp_path / "run")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=300)
    for run in ("run", "whole"):
        assert group(*command, "--run-dir", tmp_path / run)[::2] == (0, "")
    states = [checkpoint.read(tmp_path / run / "last.pth.tar")["model_state_dict"] for run in ("run", "whole")]
    assert checkpoint.digest(states[0]) == checkpoint.digest(states[1])


@pytest.mark.slow
def test_one_process_continues_what_two_began(tmp_path, call, start, tiny):
    command = (*tiny, *SMALL)
    process = under_way(start, *command, "--run-dir", tmp_path / "run")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=300)
    outcome = call(train, *command, "--run-dir", tmp_path / "run")
    assert outcome.status == 0 and "processes changed since the run began: rounding will differ" in outcome.out
    assert call(train, *command, "--run-dir", tmp_path / "alone").status == 0
    for record, expected in zip(records(tmp_path / "run"), records(tmp_path / "alone"), strict=True):
        assert record["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-2)


@pytest.mark.slow
def test_processes_end_with_a_launcher_that_is_killed(tmp_path, start, tiny):
    process = under_way(start, *tiny, *SMALL, "--run-dir", tmp_path)
    process.kill()
    out, _ = process.communicate(timeout=300)  # returns when its processes, too, have closed their output
    assert out.count("the same command continues") == 1


def test_a_process_that_dies_ends_the_others(tmp_path, start, tiny):
    process = start("-c", LAUNCH, 2, "train.py", *tiny, "--batch-size", "2", "--epochs", "9", "--run-dir", tmp_path)
    wait_for((tmp_path / "config.json").exists, process)
    members = children(process)
    os.kill(members[1], signal.SIGKILL)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGKILL
    assert err == "process 1 of 2 was ended by SIGKILL, and the others with it; the same command continues\n"
    for pid in members:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_an_error_that_all_meet_is_printed_once(tmp_path, group, tiny):
    (tmp_path / "teacher").write_text("no checkpoint")
    status, out, err = group(
        *tiny, "--teacher", "plane2", "--teacher-checkpoint", tmp_path / "teacher", "--run-dir", tmp_path / "run"
    )
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1 and "is refused: it holds more than tensors" in err
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------ the launcher
def test_exit_statuses(start):
    def launched(code, count=2):
        process = start("-c", LAUNCH, count, "-c", f"import os, sys, time; rank = int(os.environ['RANK']); {code}")
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    assert launched("print(rank, *(os.environ[key] for key in ('WORLD_SIZE', 'LOCAL_RANK', 'LOCAL_WORLD_SIZE')))", 1) == (
        0,
        "0 1 0 1\n",
        "",
    )
    assert launched("sys.exit(76 if rank else 2)") == (2, "", "")  # 76: only because another one ended
    assert launched("sys.exit(76)") == (1, "", "")
    assert launched("sys.exit(3) if rank else time.sleep(600)", 3) == (3, "", "")
    assert launched("rank and os.kill(os.getpid(), 9)")[:2] == (137, "")


def test_a_signal_that_torchrun_would_keep_is_passed_on(start):
    code = "import os, signal, time; signal.signal(signal.SIGUSR1, lambda *_: exit(5)); os.write(1, b'ready\\n'); time.sleep(600)"
    process = start("-c", LAUNCH, 2, "-c", code)
    assert [process.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
    process.send_signal(signal.SIGUSR1)
    assert process.wait(60) == 128 + signal.SIGUSR1


def test_cuda_2_starts_two_processes(start):
    """On a machine without GPUs that is told it has two: its processes find none, and one of them says so."""
    code = "import sys, train; from takd.config import flags as arguments; arguments.gpus_present = lambda: 2; train.main(sys.argv[1:]); assert 'torch' not in sys.modules"
    process = start("-c", code, "--cuda", "2", "--dataset", "digits")
    out, err = process.communicate(timeout=60)
    if "no GPU" not in err:
        pytest.skip("this machine has a GPU")
    assert (process.returncode, out, len(err.splitlines())) == (2, "", 1) and "--cuda 2: this machine has" in err


@pytest.fixture
def member(monkeypatch):
    """member(rank, size) makes this process one of torchrun's, to the environment."""

    def become(rank, size):
        place = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": size,
            "LOCAL_WORLD_SIZE": size,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": 1,
        }
        for key, value in place.items():
            monkeypatch.setenv(key, str(value))

    return become


def test_usage_errors_of_a_group(call, member, tiny):
    member(0, 4)
    refused = call(train, *tiny, "--batch-size", "3")
    assert refused.status == 2 and "--batch-size 3: 4 processes share a batch, and each needs an image of it" in refused.err
    refused = call(train, *tiny, "--cuda", "3")
    assert refused.status == 2 and "--cuda 3: torchrun started 4 processes here" in refused.err
    member(1, 4)
    assert call(train, *tiny, "--batch-size", "3") == (2, "", ""), "the first process says it"
