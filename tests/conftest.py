"""What the tests share: the commands, as processes and as calls, a trained teacher, and tiny data. One thread, no tuner, CPU."""

import contextlib
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

import train
from takd.config import names

ROOT = Path(train.__file__).resolve().parent
# No experiment around the tests, and one thread in here and in the commands: bits depend on the number of threads.
for name in [name for name in os.environ if name.startswith("NNI_")]:
    del os.environ[name]
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


class Outcome(NamedTuple):
    """What a command left: its exit status and what it printed."""

    status: int
    out: str
    err: str


@pytest.fixture(scope="session")
def start_command():
    """start_command("train.py", ...) starts the real script and returns its Popen; cwd and further environment by keyword."""
    started = []

    def start(script, *argv, cwd=None, **environment):
        command = [sys.executable, str(ROOT / script), *map(str, argv)]
        started.append(
            subprocess.Popen(
                command, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | environment
            )
        )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture(scope="session")
def run_command(start_command):
    """run_command("train.py", ...) runs the real script to its end."""

    def run(script, *argv, **options):
        process = start_command(script, *argv, **options)
        out, err = process.communicate(timeout=300)
        return Outcome(process.returncode, out, err)

    return run


@pytest.fixture(scope="session")
def call():
    """call(train, ...) runs a command's main() in this process: the same code without the seconds that importing torch takes."""

    def run(command, *argv):
        out, err, status = io.StringIO(), io.StringIO(), 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                command.main([str(argument) for argument in argv])
            except SystemExit as end:
                status = end.code
        return Outcome(status, out.getvalue(), err.getvalue())

    return run


@pytest.fixture(scope="session")
def tiny():
    """Arguments of a run of about a second."""
    return ("--student", "plane2", "--dataset", "digits", "--epochs", "1", "--cuda", "0", "--precision", "fp32")


@pytest.fixture(scope="session")
def teacher_run(tmp_path_factory, call, tiny):
    """The folder of a finished run on digits: plane2, two epochs, about 95 %. Not to be written to."""
    folder = tmp_path_factory.mktemp("teacher") / "run"
    outcome = call(train, *tiny, "--epochs", "2", "--run-dir", folder)
    assert outcome.status == 0, outcome.err
    return folder


@pytest.fixture
def teacher_file(teacher_run, tmp_path):
    """A copy of that teacher's checkpoint, so that no test meets another's table beside it."""
    return Path(shutil.copy(teacher_run / "plane2_seed1_best.pth.tar", tmp_path / "teacher.pth.tar"))


@pytest.fixture(scope="session")
def class_folders():
    """class_folders(root) draws a tiny cifar10 as class folders: random pixels, in several modes and formats."""

    def draw(root, name="cifar10", train_images=3, test_images=1, classes=None):
        random = np.random.default_rng(0)
        for part, count in (("train", train_images), ("test", test_images)):
            for label in range(classes or names.DATASETS[name].classes):
                folder = Path(root) / name / part / f"class{label:03}"
                folder.mkdir(parents=True)
                for i in range(count):
                    Image.fromarray(random.integers(0, 256, (32, 32, 3), np.uint8)).save(folder / f"{i}.png")
        return Path(root)

    return draw


@pytest.fixture(scope="session")
def cifar_dir():
    """The folder of the real CIFARs, where $TAKD_CIFAR_DIR names it."""
    if not (folder := os.environ.get("TAKD_CIFAR_DIR")):
        pytest.skip("TAKD_CIFAR_DIR does not name a folder with the real CIFARs")
    return Path(folder)
