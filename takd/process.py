"""Which process this is in a group of several (torchrun, or --cuda N), and the signals that stop it. Standard library.

torchrun describes each process that it starts by RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and
MASTER_PORT; takd/run/launch.py starts the processes of one machine in the same way.
"""

import contextlib
import io
import os
import signal
import sys
from typing import Any, NamedTuple

DOWNLOAD_TIMEOUT_SECONDS = 20
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # the last is SLURM's warning before a time limit


class Place(NamedTuple):
    """Rank and number of processes, in all and on this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


def place() -> Place:
    """This process's place, from the environment; a single process where the environment is incomplete."""
    try:
        rank, size, local_rank = (int(os.environ[key]) for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    except (KeyError, ValueError):
        return Place()
    if size < 2 or not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        return Place()
    return Place(rank, size, local_rank, local_size)


def start() -> None:
    """A command's first call, before the slow imports: from now on it ends without a traceback on a signal, and prints
    to its end wherever its output goes.

    What is printed to a closed stream, or to a reader that has gone (`| head`), is discarded; letters that the stream's
    encoding lacks are escaped. Signals that the caller ignores, as a shell does for a job in the background, stay so.
    """
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _note)
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)  # or a file opened later takes the number, and a library prints into it
    os.close(descriptor)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name) or open(descriptor, "w", closefd=False)  # None where it was closed
        buffering = stream.line_buffering or stream.write_through
        file = io.BufferedWriter(_Pipe(stream.fileno(), "w", closefd=False))
        setattr(sys, name, io.TextIOWrapper(file, stream.encoding, "backslashreplace", line_buffering=buffering))


class _Pipe(io.FileIO):
    """A file that goes on as the null device where its reader has gone."""

    def write(self, data):  # type: ignore[no-untyped-def, override]
        try:
            return super().write(data)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            return len(data)


def srun_tasks() -> int:
    """Tasks that srun started of this command without a launcher, each of them a whole run; 1 where there is none."""
    return 1 if "RANK" in os.environ else int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))


@contextlib.contextmanager
def rank_zero_output():
    """Discard what all but a machine's first process print, such as a usage error that occurs in all of them."""
    with contextlib.ExitStack() as stack:
        if place().local_rank or (srun_tasks() > 1 and os.environ.get("SLURM_PROCID") != "0"):
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        yield


def cores() -> int:
    """Cores that this process may use: its affinity's, and under SLURM no more than its task was granted."""
    allowed = len(os.sched_getaffinity(0))
    return min(allowed, int(os.environ.get("SLURM_CPUS_PER_TASK", allowed)))


def threads_each(processes: int) -> str:
    """OMP_NUM_THREADS for each of several processes here: its share of the cores, or fewer where that is set lower.

    A SLURM job sets it for one process, to all of the job's cores.
    """
    share, given = max(1, cores() // processes), os.environ.get("OMP_NUM_THREADS", "")
    return str(min(share, int(given)) if given.isdigit() else share)


class Stopped(SystemExit):
    """The process ends because of a signal: exit status 128 + its number, as in a shell."""

    def __init__(self, number: int):
        super().__init__(128 + number)
        self.number = number


_noted: int | None = None  # the first of STOP_SIGNALS that came
_deferring, _killable = False, True


def _note(number, _frame):
    """Only noted: an exception raised wherever the program happens to be is lost in an import or aborts a library.

    Where there is nothing to save yet, the process ends at once, without cleaning up, as if it were killed.
    """
    global _noted
    _noted = _noted or number
    if _killable:
        os._exit(128 + number)


def note_stop_signals() -> dict[int, Any]:
    """Take note of STOP_SIGNALS from now on; returns the handlers before.

    They end the process at once until a StopSignals block begins, and from then on at a `safe_point`.
    """
    return {number: signal.signal(number, _note) for number in STOP_SIGNALS}


def safe_point() -> None:
    """Raises Stopped after one of STOP_SIGNALS. Called where nothing is half done: between batches, files, attempts."""
    if _noted and not _deferring:
        raise Stopped(_noted)


@contextlib.contextmanager
def downloading():
    """A download, which has no safe points and may be cut off anywhere: a signal ends the process at once.

    DOWNLOAD_TIMEOUT_SECONDS of silence are an OSError: a compute node without a network does not hang.
    """
    import socket

    global _killable
    before = _killable, socket.getdefaulttimeout()
    _killable = True
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_SECONDS)
    try:
        safe_point()
        yield
    finally:
        _killable = before[0]
        socket.setdefaulttimeout(before[1])


class StopSignals:
    """For the block, STOP_SIGNALS end the process at a safe point; `received` is the first of them.

    Inside `deferred()` a safe point raises nothing: the caller looks at `received` itself.
    """

    def __enter__(self) -> "StopSignals":
        global _noted, _killable
        self._before, _killable = note_stop_signals(), False
        if _note not in self._before.values():
            _noted = None  # of an earlier block
        return self

    def __exit__(self, *_):
        global _killable
        _killable = True
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def received(self) -> int | None:
        return _noted

    @contextlib.contextmanager
    def deferred(self):
        global _deferring
        before, _deferring = _deferring, True
        try:
            yield
        finally:
            _deferring = before


def ignore_stop_signals(_worker: int = 0) -> None:
    """For worker processes: on a signal to the whole group the run itself stops, and then ends its workers."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
