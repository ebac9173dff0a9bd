"""Several processes train what one would, to rounding: losses, weights and files; stopping, continuing, failing."""

import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import ROOT, Outcome, last_weights, read_json, read_lines, same_weights, wait_until

import train
from takd.run import checkpoint
from takd.run.distributed import part_of

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
QUIET = ("--learning-rate", "0.001")  # small steps do not magnify rounding
SMALL = (*QUIET, "--epochs", "8", "--batch-size", "48")


@pytest.fixture
def group(start_group):
    """group(*arguments of train.py, processes=2) -> Outcome of the launcher."""

    def run(*argv, processes=2):
        process = start_group(processes, "train.py", *argv)
        out, err = process.communicate(timeout=300)
        return Outcome(process.returncode, out, err)

    return run


def records(run):
    return read_lines(run / "metrics.jsonl")


def file_names(run):
    return sorted(re.sub(r"tfevents\..*", "tfevents", path.name) for path in run.iterdir())


def assert_same_losses(run, alone, tolerance):
    for record, expected in zip(records(run), records(alone), strict=True):
        assert record["train_loss"] == pytest.approx(expected["train_loss"], rel=tolerance)


def assert_same_runs(run, alone, tolerance=1e-5):
    """Losses, accuracies, files, checkpoints' keys and final weights."""
    assert file_names(run) == file_names(alone)
    for record, expected in zip(records(run), records(alone), strict=True):
        assert record.keys() == expected.keys()
        for key in expected:
            if key.endswith("accuracy_percent"):
                assert record[key] == pytest.approx(expected[key], abs=0.6), key  # one or two of 359 images
            elif "second" not in key:
                assert record[key] == pytest.approx(expected[key], rel=tolerance), key
    for name in ("last.pth.tar", next(alone.glob("*_best.pth.tar")).name):
        contents, expected = checkpoint.read(run / name), checkpoint.read(alone / name)
        assert contents.keys() == expected.keys()
        assert_close(contents["model_state_dict"], expected["model_state_dict"], 10 * tolerance, 10 * tolerance)


def assert_close(state, expected, rtol, atol):
    assert list(state) == list(expected)
    for key, value in expected.items():
        torch.testing.assert_close(state[key], value, rtol=rtol, atol=atol, msg=lambda text, key=key: f"{key}: {text}")


def first_words(out):
    """The first word of each line; the rest differs in times, speeds, folders and the number of processes."""
    return [line.split()[0] for line in out.splitlines()]


# --------------------------------------------------------------------------- the same as with one process
@pytest.mark.parametrize("size", range(1, 6))
@pytest.mark.parametrize("images", range(1, 12))
def test_parts_of_a_batch(images, size):
    """Every image once, in parts of equal size but for one; a batch smaller than the group is not split."""
    parts = [part_of(slice(20, 20 + images), rank, size) for rank in range(size)]
    assert sum(part.share for part in parts) == pytest.approx(1)
    assert all(part.images == images and part.weight == pytest.approx(part.share * size) for part in parts)
    rows = [list(range(part.rows.start, part.rows.stop)) for part in parts]
    if images < size:
        assert rows == [list(range(20, 20 + images))] * size and all(part.whole for part in parts)
    else:
        assert sum(rows, []) == list(range(20, 20 + images)) and (size == 1 or not any(part.whole for part in parts))
        assert max(map(len, rows)) - min(map(len, rows)) <= 1


def test_uneven_parts_and_a_last_batch_of_one_image(tmp_path, call, group, tiny):
    """1,438 images in batches of 479: parts of 239 and 240 images, and a last batch that every process takes."""
    command = (*tiny, *QUIET, "--epochs", "2", "--batch-size", "479")
    alone = call(train, *command, "--run-dir", tmp_path / "alone")
    status, out, err = group(*command, "--run-dir", tmp_path / "run")
    assert (status, err) == (0, "")
    # Batch norm over one image magnifies rounding: one process with one thread and with two is 5e-5 apart.
    assert_same_runs(tmp_path / "run", tmp_path / "alone", tolerance=1e-4)
    assert first_words(out) == first_words(alone.out) and "2 processes of 1 threads" in out
    assert read_json(tmp_path / "run/config.json")["environment"]["processes"] == 2


@pytest.mark.slow
def test_torchrun_with_several_teachers(tmp_path, call, start_command, tiny, teacher_file):
    """Every process leaves out the same terms."""
    other = tmp_path / "other.pth.tar"
    assert call(train, *tiny, "--seed", "2", "--run-dir", tmp_path / "other").status == 0
    shutil.copy(tmp_path / "other/plane2_seed2_best.pth.tar", other)
    command = (*tiny, *QUIET, "--teacher", "plane2", "plane2", "--teacher-checkpoint", teacher_file, other)
    command += ("--method", "dgkd", "--method-option", "drop=0.5")
    alone = call(train, *command, "--run-dir", tmp_path / "alone")
    process = start_command(*TORCHRUN, "train.py", *command, "--run-dir", tmp_path / "run", cwd=ROOT)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert first_words(out) == first_words(alone.out)
    assert_same_runs(tmp_path / "run", tmp_path / "alone")


def test_torchrun_with_a_teacher(tmp_path, call, start_command, tiny, teacher_file):
    command = (*tiny, *QUIET, "--augment", "crop-flip", "--teacher", "plane2", "--teacher-checkpoint", teacher_file)
    alone = call(train, *command, "--teacher-cache", "live", "--run-dir", tmp_path / "alone")
    process = start_command(*TORCHRUN, "train.py", *command, "--run-dir", tmp_path / "run", cwd=ROOT)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert first_words(out) == first_words(alone.out)
    assert_same_runs(tmp_path / "run", tmp_path / "alone", tolerance=3e-4)  # the table holds float16


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fitnet", "at", "dkd"])
def test_methods_and_their_own_parameters(method, tmp_path, call, group, tiny, teacher_file):
    """FitNet's regressor has weights and a batch norm: both are the whole batch's."""
    command = (*tiny, "--teacher", "plane2", "--teacher-checkpoint", teacher_file, "--method", method)
    command += ("--learning-rate", "0.0001")  # FitNet's weight of 100 makes the steps large
    assert call(train, *command, "--run-dir", tmp_path / "alone").status == 0
    assert group(*command, "--run-dir", tmp_path / "run")[::2] == (0, "")
    assert_same_runs(tmp_path / "run", tmp_path / "alone", tolerance=1e-4)
    ours, theirs = (checkpoint.read(tmp_path / run / "last.pth.tar")["method_state_dict"] for run in ("run", "alone"))
    assert bool(ours) == (method == "fitnet")
    assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_a_residual_network_with_augmentation(processes, tmp_path, call, group, tiny):
    command = (*tiny, *QUIET, "--student", "resnet8", "--augment", "crop-flip", "--epochs", "2")
    assert call(train, *command, "--run-dir", tmp_path / "alone").status == 0
    assert group(*command, "--run-dir", tmp_path / "run", processes=processes)[::2] == (0, "")
    assert_same_runs(tmp_path / "run", tmp_path / "alone", tolerance=1e-4)
    status, out, err = group(*command, "--run-dir", tmp_path / "run", processes=processes)
    assert status == 0 and out.count("finished ") == len(out.splitlines()) == 1 and err == ""


@pytest.mark.slow
def test_a_teacher_trained_first(tmp_path, call, group, tiny):
    command = (*tiny, "--recipe", "paper", "--epochs", "2", "--teacher", "plane4", "--teacher-cache", "live")
    command += ("--validation-split", "0.1")
    assert call(train, *command, "--run-dir", tmp_path / "alone").status == 0
    assert group(*command, "--run-dir", tmp_path / "run")[::2] == (0, "")
    for run in ("teacher", "."):  # rounding grows at the full learning rate
        assert_same_losses(tmp_path / "run" / run, tmp_path / "alone" / run, tolerance=2e-2)


@pytest.mark.slow
def test_bf16(tmp_path, call, group, tiny):
    command = (*tiny, *QUIET, "--precision", "bf16", "--epochs", "2")
    assert call(train, *command, "--run-dir", tmp_path / "alone").status == 0
    assert group(*command, "--run-dir", tmp_path / "run")[::2] == (0, "")
    assert_same_losses(tmp_path / "run", tmp_path / "alone", tolerance=2e-2)


# --------------------------------------------------------------------------------------- stopping and failing
@pytest.fixture
def under_way(start_group):
    """under_way(*arguments, folder) -> a launcher whose two processes have finished an epoch, and save often."""

    def past_first_epoch(run):
        last = run / "last.pth.tar"
        return last.exists() and (saved := checkpoint.read(last))["epoch"] >= 1 and saved["step"] > 0

    def start(*argv):
        process = start_group(2, "train.py", "--save-minutes", "0.0003", *argv)
        wait_until(lambda: past_first_epoch(argv[-1]), process)
        return process

    return start


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_and_the_same_command_continues(number, tmp_path, call, under_way, group, tiny):
    command, run, alone = (*tiny, *SMALL), tmp_path / "run", tmp_path / "alone"
    process = under_way(*command, "--run-dir", run)
    members = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(number)
    for pid in map(int, members):  # as a terminal and SLURM do: to the launcher and to its processes as well
        os.kill(pid, number)
    out, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (128 + number, "")
    assert out.count("the same command continues") == 1
    stopped = checkpoint.read(run / "last.pth.tar")
    assert stopped["epoch"] >= 1 and stopped["sums"]["images"] == [48] * stopped["step"]
    assert not (run / "summary.json").exists()
    status, out, err = group(*command, "--run-dir", run)
    assert status == 0, err
    assert f"continuing at epoch {stopped['epoch'] + 1}, step {stopped['step']}" in out and "note: " not in out
    assert call(train, *command, "--run-dir", alone).status == 0
    assert_same_losses(run, alone, tolerance=1e-2)  # after many steps rounding is no longer small


@pytest.mark.slow
def test_a_continued_group_ends_with_the_bits_of_an_uninterrupted_one(tmp_path, under_way, group, tiny):
    process = under_way(*tiny, *SMALL, "--run-dir", tmp_path / "run")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=300)
    for run in ("run", "whole"):
        assert group(*tiny, *SMALL, "--run-dir", tmp_path / run)[::2] == (0, "")
    assert same_weights(last_weights(tmp_path / "run"), last_weights(tmp_path / "whole"))


@pytest.mark.slow
def test_one_process_continues_what_two_began(tmp_path, call, under_way, tiny):
    process = under_way(*tiny, *SMALL, "--run-dir", tmp_path / "run")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=300)
    outcome = call(train, *tiny, *SMALL, "--run-dir", tmp_path / "run")
    assert outcome.status == 0 and "processes changed since the run began: rounding will differ" in outcome.out
    assert call(train, *tiny, *SMALL, "--run-dir", tmp_path / "alone").status == 0
    assert_same_losses(tmp_path / "run", tmp_path / "alone", tolerance=1e-2)


@pytest.mark.slow
def test_processes_end_with_a_launcher_that_is_killed(tmp_path, under_way, tiny):
    process = under_way(*tiny, *SMALL, "--run-dir", tmp_path)
    process.kill()
    out, _ = process.communicate(timeout=300)  # returns when its processes, too, have closed their output
    assert out.count("the same command continues") == 1


def test_an_error_of_all_processes_is_printed_once(tmp_path, group, tiny):
    (tmp_path / "teacher").write_text("no checkpoint")
    command = (*tiny, "--teacher", "plane2", "--teacher-checkpoint", tmp_path / "teacher")
    status, out, err = group(*command, "--run-dir", tmp_path / "run")
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1 and "is refused: it holds more than tensors" in err
    assert not (tmp_path / "run").exists()
