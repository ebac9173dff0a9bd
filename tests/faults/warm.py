"""Commands of the suite in children of a process that has imported torch: they begin after 30 ms instead of 4 s."""

import multiprocessing
import os
import resource
import runpy
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["train", "evaluate", "takd.study.sections", "sklearn.datasets", "torch._dynamo", "torch.utils.tensorboard"]
)


def _run(folder, output, script, argv, new):
    """In the child: run a command as python3 does, with its output in two files. `new`: in a new Python."""
    os.chdir(folder)
    for name, descriptor in zip(output, (1, 2), strict=True):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.environ["https_proxy"] = "http://127.0.0.1:9"  # nothing is downloaded
    sys.argv = [str(ROOT / script), *argv]
    if new:
        os.execv(sys.executable, [sys.executable, *sys.argv])
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = used + 4 * 2**30  # what reads without end gets a MemoryError, and ends nothing else
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    runpy.run_path(sys.argv[0], run_name="__main__")


class Command:
    """`python3 SCRIPT ARGUMENTS` in a folder, started."""

    def __init__(self, folder, script, *argv, new=False, output=None):
        self.output = [Path(f"{output or folder}.{name}") for name in ("out", "err")]
        self.process = SERVER.Process(target=_run, args=(folder, self.output, script, argv, new))
        self.process.start()
        self.pid = self.process.pid

    @property
    def running(self):
        return self.process.exitcode is None

    @property
    def texts(self):
        """What it wrote so far to standard output and error."""
        return [file.read_text(errors="backslashreplace") if file.exists() else "" for file in self.output]

    def end(self, seconds=float("inf")):
        """(exit status, output, errors). After `seconds` of computing it gets SIGTERM; what neither computes nor ends
        for half a minute, nor its children, fails the test."""
        computed, since = 0.0, time.monotonic()
        while self.running:
            self.process.join(1)
            now = computing_seconds(self.pid)
            if now > computed:
                computed, since = now, time.monotonic()
            if computed > seconds:
                self.process.terminate()
            if time.monotonic() - since > 30:
                self.process.kill()
                pytest.fail(f"hangs: {self.texts}")
        return self.process.exitcode, *self.texts


def children(pid):
    """The ids of a process's children."""
    file = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in file.read_text().split()] if file.exists() else []


def computing_seconds(pid):
    """Processor time of a process and its children, rounded to 1/100 s; 0 once it has ended."""
    ticks = 0
    for each in (pid, *children(pid)):
        try:
            ticks += sum(map(int, Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()[11:15]))
        except OSError:  # ended meanwhile
            return 0.0
    return ticks / os.sysconf("SC_CLK_TCK")
