"""What a start finds in a run's folder: files damaged, removed or replaced, a disk that was full, what a kill left."""

import json
import os
import shutil
import signal
import stat
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import last_weights, listing, read_json, read_lines, same_weights

import train
from takd import files
from takd.errors import UserError
from takd.run import checkpoint

BEST, METRICS, LAST = "plane2_seed1_best.pth.tar", "metrics.jsonl", "last.pth.tar"


@pytest.fixture(scope="module")
def command(tiny):
    return (*tiny, "--batch-size", "32", "--epochs", "3")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, call, command):
    """A finished run. Not to be written to."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert call(train, *command, "--run-dir", folder).status == 0
    return folder


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, call, command):
    """The same run, stopped by a signal after its first epoch. Not to be written to."""
    folder = tmp_path_factory.mktemp("stopped") / "run"

    def stop():
        while not (folder / BEST).exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop).start()
    outcome = call(train, *command, "--run-dir", folder)
    assert outcome.status == 128 + signal.SIGTERM and "the same command continues" in outcome.out
    assert 1 <= len(read_lines(folder / METRICS)) < 3
    return folder


def slow(*values):
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


def flipped(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


def replaced_by_link(file):
    file.unlink()
    file.symlink_to(file.name)


DAMAGES = {
    "removed": Path.unlink,
    "emptied": lambda file: file.write_bytes(b""),
    "cut": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "flipped": flipped,
    "a link to itself": replaced_by_link,
}


def assert_equal(folder, finished):
    """The same outcome, time apart, and the best network's file is the one that the summary names."""
    lines = [[{k: v for k, v in line.items() if "second" not in k} for line in read_lines(each / METRICS)]
             for each in (folder, finished)]  # fmt: skip
    assert lines[0] == lines[1] and same_weights(last_weights(folder), last_weights(finished))
    best = [checkpoint.read(each / BEST) for each in (folder, finished)]
    assert same_weights(*(each["model_state_dict"] for each in best)) and best[0]["epoch"] == best[1]["epoch"]
    assert read_json(folder / "summary.json")["best"]["epoch"] == best[0]["epoch"]


@pytest.mark.parametrize("damage", ["removed", "a link to itself", *slow("emptied", "cut", "flipped")])
def test_a_run_continues_from_last_alone(damage, stopped, finished, command, tmp_path, call):
    folder = shutil.copytree(stopped, tmp_path / "run")
    DAMAGES[damage](folder / BEST)
    DAMAGES["cut" if damage == "flipped" else damage](folder / METRICS)
    (folder / ".last.pth.tar.4711.tmp").write_text("left by a killed save")
    outcome = call(train, *command, "--run-dir", folder)
    assert outcome.status == 0, outcome.err
    assert f"restored  {folder / METRICS}" in outcome.out and f"restored  {folder / BEST}" in outcome.out
    assert_equal(folder, finished)
    assert not list(folder.glob(".*.tmp"))


@pytest.mark.parametrize("damage", DAMAGES)
def test_before_a_run_is_called_finished_its_files_are_restored(damage, finished, command, tmp_path, call):
    folder = shutil.copytree(finished, tmp_path / "run")
    for name in (BEST, METRICS):
        DAMAGES[damage](folder / name)
    outcome = call(train, *command, "--run-dir", folder)
    assert outcome.status == 0 and outcome.out.splitlines()[-1].startswith("finished"), outcome
    assert_equal(folder, finished)
    for name in (BEST, METRICS):
        DAMAGES[damage](folder / LAST)
        DAMAGES["cut" if damage == "flipped" else damage](folder / name)
        before = listing(folder)
        outcome = call(train, *command, "--run-dir", folder)
        assert outcome.status == 2 and "finished" not in outcome.out and listing(folder) == before
        assert outcome.err.count("\n") == 1 and str(folder / name) in outcome.err
        shutil.rmtree(folder)
        shutil.copytree(finished, folder)


def another_run(file):
    contents = checkpoint.read(file)
    checkpoint.save(contents | {"settings": contents["settings"] | {"learning_rate": 0.5}}, file)


def wrong_shape(file):
    contents = checkpoint.read(file)
    contents["optimizer_state_dict"]["state"][0]["momentum_buffer"] = torch.zeros(3)
    checkpoint.save(contents, file)


LAST_DAMAGES = DAMAGES | {
    "the best file": lambda file: shutil.copy(file.with_name(BEST), file),
    "another run's": another_run,
    "a wrong shape": wrong_shape,
}


@pytest.mark.parametrize("damage", LAST_DAMAGES)
def test_without_the_state_a_run_is_not_continued(damage, stopped, command, tmp_path, call):
    folder = shutil.copytree(stopped, tmp_path / "run")
    line = read_lines(folder / METRICS)[0]
    (folder / METRICS).write_text("".join(json.dumps(line | {"epoch": epoch}) + "\n" for epoch in range(2)))
    LAST_DAMAGES[damage](folder / LAST)
    (folder / ".lock").unlink()
    before = listing(folder)
    outcome = call(train, *command, "--run-dir", folder)
    assert outcome.status == 2 and outcome.err.count("\n") == 1 and LAST in outcome.err, outcome
    (folder / ".lock").unlink()
    assert listing(folder) == before


def test_a_run_of_an_earlier_version_continues(stopped, finished, command, tmp_path, call):
    """Its state has neither records nor the best network; without its other files it is not continued."""
    folder = shutil.copytree(stopped, tmp_path / "run")
    state = checkpoint.read(folder / LAST)
    checkpoint.save({k: v for k, v in state.items() if k not in ("records", "best_network", "settings")}, folder / LAST)
    shutil.copytree(folder, tmp_path / "damaged")
    assert call(train, *command, "--run-dir", folder).status == 0
    assert_equal(folder, finished)
    for name in (METRICS, BEST):
        (tmp_path / "damaged" / name).unlink()
        outcome = call(train, *command, "--run-dir", tmp_path / "damaged")
        assert outcome.status == 2 and outcome.err.count("\n") == 1


@pytest.mark.parametrize("size", [400, *slow(4, 80, 250, 330)])
def test_a_disk_that_fills_costs_no_more_than_an_epoch(size, small_disk, finished, command, tmp_path, call):
    """One line, and what is there continues to the same end where there is room."""
    folder = small_disk(f"{size}k") / "run"
    outcome = call(train, *command, "--run-dir", folder)
    assert outcome.status == 1 and outcome.err.count("\n") == 1, outcome
    assert f"No space left on device: '{folder}" in outcome.err and not list(folder.glob(".*.tmp"))
    continued = shutil.copytree(folder, tmp_path / "run")
    assert call(train, *command, "--run-dir", continued).status == 0
    assert_equal(continued, finished)


@pytest.mark.slow
def test_a_signal_while_the_command_starts_ends_it_in_silence(start_command, tiny, tmp_path):
    for number in (signal.SIGUSR1, signal.SIGINT):
        process = start_command("train.py", *tiny, "--run-dir", tmp_path / "run")
        time.sleep(1)
        process.send_signal(number)
        assert process.communicate(timeout=60) == ("", "") and process.returncode == 128 + number
    assert not list(tmp_path.iterdir())


def test_a_device_is_not_replaced(tmp_path):
    """Renaming a file onto /dev/null, which root may do, would break the machine."""
    if os.geteuid():
        pytest.skip("only root can make a device")
    device = tmp_path / "null"
    os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    with pytest.raises(UserError, match="null is a device; give a file"):
        files.save_json({}, device)
    assert device.is_char_device() and [path.name for path in tmp_path.iterdir()] == ["null"]
