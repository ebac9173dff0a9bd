"""`make test-gpu`: tests that need --cuda, and the block of text for an issue that they end with.

pytest tests/gpu --cuda 1          on a GPU, some minutes
pytest tests/gpu --cuda 0          tries the tests out on the CPU, tiny; what is about a GPU skips
"""

import collections
import shutil
import subprocess

import pytest
import torch

import train
from takd.run.run_directory import environment


def pytest_addoption(parser):
    parser.addoption("--cuda", type=int, choices=(0, 1), help="1: on the GPU; 0: tries the tests out on the CPU")


def pytest_ignore_collect(config):
    """Without --cuda there are none: neither `pytest` nor `make test` runs them."""
    return True if config.getoption("--cuda", None) is None else None


def pytest_configure(config):
    if config.getoption("--cuda", None) and not torch.cuda.is_available():
        raise pytest.UsageError(f"torch {torch.__version__} can use no GPU here; --cuda 0 tries the tests out")


@pytest.fixture(scope="session")
def cuda(request):
    """1 on a GPU, 0 on the CPU."""
    return request.config.getoption("--cuda")


@pytest.fixture
def on_gpu(cuda):
    """Skips a test of what there is on a GPU only."""
    if not cuda:
        pytest.skip("is about a GPU")


@pytest.fixture
def run(cuda, call, tmp_path):
    """run(folder, ...) trains by train.py in this process, on digits, in `folder`; returns what it printed.

    An epoch is 11 batches of 128 images and one of 30; on the CPU 5 of 8 and one of 5.
    """
    size = ("--batch-size", 128) if cuda else ("--train-images", 45, "--batch-size", 8)

    def run_in(folder, *flags, status=0):
        common = ("--dataset", "digits", "--learning-rate", 0.001, "--epochs", 1, "--cuda", cuda, *size)
        outcome = call(train, *common, *flags, "--run-dir", tmp_path / folder)
        assert outcome.status == status, outcome
        return outcome.out

    return run_in


@pytest.fixture(scope="session")
def teachers(cuda, call, tmp_path_factory):
    """{network: flags of a teacher of the same network, trained for two epochs on digits}."""
    flags = {}
    for name in ("resnet8", "plane2"):
        folder = tmp_path_factory.mktemp(f"teacher-{name}")
        command = ("--student", name, "--dataset", "digits", "--epochs", 2, "--cuda", cuda, "--precision", "fp32")
        outcome = call(train, *command, "--learning-rate", 0.02, "--batch-size", 32, "--run-dir", folder)
        assert outcome.status == 0, outcome
        flags[name] = ("--teacher", name, "--teacher-checkpoint", folder / f"{name}_seed1_best.pth.tar")
    return flags


# ------------------------------------------------------------------------------------------------- the block
def pytest_terminal_summary(terminalreporter, config):
    if config.getoption("--cuda", None) is None:
        return
    reporter = terminalreporter
    reporter.section("for an issue, whole")
    for line in versions(config.getoption("--cuda")):
        reporter.line(line)
    kinds = ("passed", "failed", "error", "skipped")
    reporter.line(", ".join(f"{len(reporter.stats.get(kind, ()))} {kind}" for kind in kinds))
    for report in [*reporter.stats.get("failed", ()), *reporter.stats.get("error", ())]:
        reason = getattr(getattr(report.longrepr, "reprcrash", None), "message", str(report.longrepr))
        reporter.line(f"failed    {report.nodeid}: {' '.join(reason.split())[:300]}")
    reasons = collections.Counter(report.longrepr[2] for report in reporter.stats.get("skipped", ()))
    for reason, count in reasons.items():
        reporter.line(f"skipped   {count}, {reason.removeprefix('Skipped: ')}")
    for report in [*reporter.stats.get("passed", ()), *reporter.stats.get("failed", ())]:
        for name, value in report.user_properties:
            reporter.line(f"measured  {name}: {value}")


def versions(cuda):
    """What the results depend on, as lines."""
    here = environment(torch.device("cuda" if cuda else "cpu"))
    yield f"takd {here['commit']}, Python {here['python']}, {here['platform']}"
    yield f"torch {here['torch']}, built for CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    yield f"device {here['device']}"
    if cuda:
        if shutil.which("nvidia-smi"):
            query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
            yield subprocess.run(query, capture_output=True, text=True).stdout.strip()
        yield f"compute capability {torch.cuda.get_device_capability()}, {torch.cuda.device_count()} visible"
