"""What the tests share: the commands, as processes and as calls, a trained teacher, and tiny data; on the CPU, with
one thread and no tuner.

`from conftest import read_json, read_lines, same_weights, wait_until, softmax` has the helpers that are plain
functions.
"""

import contextlib
import functools
import io
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

import distill_paths
import evaluate
import export
import report
import sweep
import train
from takd.config import flags, names, run_config
from takd.distill import evaluation
from takd.run import checkpoint

ROOT = Path(train.__file__).resolve().parent
# No NNI experiment, and one thread here and in the commands: bits depend on the number of threads.
for name in [name for name in os.environ if name.startswith("NNI_")]:
    del os.environ[name]
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

LONG = ("test_slurm.py", "test_kills.py", "test_sweep.py", "test_nni.py", "test_cifar.py")


def pytest_collection_modifyitems(items):
    """Files that take minutes first: `make test-all` gives each file to one of several processes."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


def read_json(file):
    return json.loads(Path(file).read_text(encoding="utf-8"))


def read_lines(file):
    """The objects of a JSON-lines file, such as a run's metrics.jsonl."""
    return [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]


def last_weights(run):
    """The state dict in a run's last.pth.tar."""
    return checkpoint.read(Path(run) / "last.pth.tar")["model_state_dict"]


def same_weights(state, other):
    return state.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in state.items())


def listing(folder):
    """Every file below a folder with its modification time, to find out what was written."""
    return {path: path.lstat().st_mtime_ns for path in sorted(Path(folder).rglob("*"))}


def parse_command(script, argv):
    """Parse a command line of the suite as the command itself does; SystemExit with a usage error if it is wrong."""
    argv = [str(word) for word in argv]
    if script == "train.py":
        run_config.parse(argv, elsewhere=True)
    elif script == "distill_paths.py":
        distill_paths.read_arguments(argv)
    elif script == "sweep.py":
        sweep.read_arguments(argv)
    else:
        parsers = {"evaluate.py": evaluate.build_parser, "report.py": report.build_parser}
        parsers["export.py"] = export.build_parser
        parsers["data_loader.py"] = lambda: flags.download_parser("")
        parsers[script]().parse_args(argv)


def shorten_latency(patch):
    """Let evaluate.py and export.py measure the time of three calls instead of half a second of them."""
    patch.setattr(evaluation, "median_seconds", functools.partial(evaluation.median_seconds, least_seconds=0))


def wait_until(condition, process=None, seconds=300):
    """Wait until another process has done something; fail if it ends before that, or takes too long."""
    end = time.monotonic() + seconds
    while not (result := condition()):
        if process is not None and process.poll() is not None:
            pytest.fail(f"ended before its time: {process.communicate()}")
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return result


def softmax(logits):
    """The softmax of float64 arrays (B, C), in numpy."""
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


class Outcome(NamedTuple):
    """A command's exit status and what it printed."""

    status: int
    out: str
    err: str


@pytest.fixture(scope="session")
def start_command():
    """start_command("train.py", ...) starts the real script and returns its Popen; cwd and environment by keyword.

    After "-c" and "-m" the arguments are Python's.
    """
    started = []

    def start(script, *argv, cwd=None, **environment):
        command = [sys.executable, script if script.startswith("-") else str(ROOT / script), *map(str, argv)]
        started.append(
            subprocess.Popen(
                command,
                cwd=cwd,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=os.environ | environment,
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


LAUNCH = """
import sys
from takd.run import launch
say = lambda line: print(line, file=sys.stderr)
sys.exit(launch.launch(int(sys.argv[1]), [sys.executable, *sys.argv[2:]], say))
"""


@pytest.fixture(scope="session")
def start_group(start_command):
    """start_group(2, "train.py", ...) does on the CPU what --cuda 2 does: it starts two processes of the command."""

    def start(processes, *argv):
        return start_command("-c", LAUNCH, processes, *argv, cwd=ROOT)

    return start


@pytest.fixture(scope="session")
def call():
    """call(train, ...) runs a command's main() in this process: the same code without the seconds that importing torch
    takes."""

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
def nothing_heavy(tmp_path_factory):
    """An environment in which importing anything slow ends the process."""
    folder = tmp_path_factory.mktemp("nothing-heavy")
    for module in "torch torchvision numpy PIL sklearn scipy matplotlib nni optuna tensorboard tqdm".split():
        (folder / f"{module}.py").write_text("raise SystemExit(f'{__name__} was imported')")
    return {"PYTHONPATH": str(folder)}


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
    """A copy of that teacher's checkpoint, so that no test finds another's table beside it."""
    return Path(shutil.copy(teacher_run / "plane2_seed1_best.pth.tar", tmp_path / "teacher.pth.tar"))


@pytest.fixture
def write_run(teacher_run, tmp_path):
    """write_run(path, seed, accuracies) makes a run's folder with such records, after those of a real run."""
    config, summary = read_json(teacher_run / "config.json"), read_json(teacher_run / "summary.json")
    line = read_lines(teacher_run / "metrics.jsonl")[0]
    del summary["test_images"]  # the data set may be another

    def write(path, seed, accuracies, finished=True, folder="runs", **settings):
        run = tmp_path / folder / "-".join((*path, f"seed{seed}", *map(str, settings.values())))
        run.mkdir(parents=True)
        epochs = settings.get("epochs", len(accuracies) if finished else 2)
        if finished:  # with a record of each epoch
            accuracies = (*accuracies[:1] * (epochs - len(accuracies)), *accuracies)
        own = {"student": path[-1], "path": path, "seed": seed, "epochs": epochs, "argv": [str(run)]}
        if len(path) > 1:
            own |= {"teacher": path[-2], "method": "kd", "method_options": {"temperature": 4.0, "lambda": 0.5}}
        (run / "config.json").write_text(json.dumps(config | own | settings))
        lines = [line | {"epoch": i, "test_accuracy_percent": accuracy} for i, accuracy in enumerate(accuracies)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in lines))
        if finished:
            (run / "summary.json").write_text(json.dumps(summary | {"model": path[-1], "path": path}))
            (run / f"{path[-1]}_seed{seed}_best.pth.tar").touch()
        return run

    return write


@pytest.fixture
def three_seeds(write_run, tmp_path):
    """A study of three sizes and three seeds; 4 > 2 is better than direct distillation by .9, 1.0 and 1.1 points."""
    direct = {1: 42.0, 2: 43.0, 3: 42.5}
    for seed, accuracy in direct.items():
        write_run(("plane10",), seed, (50, 56 + seed))
        write_run(("plane4",), seed, (40, 48))
        write_run(("plane2",), seed, (30, accuracy - 2 * seed))
        write_run(("plane10", "plane4"), seed, (45, 51))
        write_run(("plane10", "plane2"), seed, (accuracy, accuracy - 1))
        write_run(("plane10", "plane4", "plane2"), seed, (30, accuracy + 0.8 + 0.1 * seed))
    return tmp_path / "runs"


@pytest.fixture
def small_disk(tmp_path):
    """small_disk(size) mounts a file system of that size."""
    mounted = []

    def mount(size):
        place = tmp_path / f"disk{size}"
        place.mkdir()
        made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], capture_output=True)
        if made.returncode:
            pytest.skip(f"mounting a file system needs root: {made.stderr.decode().strip()}")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", place], check=True)


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
def photographs(tmp_path_factory):
    """Class folders of photographs of three colours in several sizes, 12 to train and 6 to validate of each.
    Read-only."""
    folder = tmp_path_factory.mktemp("photographs") / "three"
    random = np.random.default_rng(0)
    for part, count in (("train", 12), ("val", 6)):
        for name, colour in {"blue": (40, 60, 220), "green": (40, 200, 60), "red": (220, 50, 40)}.items():
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = (random.integers(-40, 40, (40 + i, 64 - i, 3)) + colour).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{i:02}.jpg", quality=95)
    return folder


@pytest.fixture(scope="session")
def cifar_dir():
    """The folder of the real CIFARs, where $TAKD_CIFAR_DIR names it."""
    if not (folder := os.environ.get("TAKD_CIFAR_DIR")):
        pytest.skip("TAKD_CIFAR_DIR does not name a folder with the real CIFARs")
    return Path(folder)
