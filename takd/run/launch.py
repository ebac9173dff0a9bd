"""Data-parallel training's processes: which one this is, and starting them. Standard library only: it answers before torch.

torchrun describes each process it starts by RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT in its
environment; `launch` starts processes of one machine in the same way. What they do together is in parallel.py.
"""

import contextlib
import ctypes
import io
import os
import signal
import socket
import subprocess
import sys
import time
from typing import NamedTuple

LOST = 76  # exit status of a process that ended only because another one did (EX_PROTOCOL of sysexits.h)
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
NOTICE_SECONDS, KILL_SECONDS = 3, 15  # after one has failed: the others end by themselves, are asked to, are killed


class Place(NamedTuple):
    """Which of how many processes this is, in all and on this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


def place():
    """As the environment says; one process alone where it does not say all of it."""
    try:
        rank, size, local_rank = (int(os.environ[key]) for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    except (KeyError, ValueError):
        return Place()
    if size < 2 or not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        return Place()
    return Place(rank, size, local_rank, local_size)


@contextlib.contextmanager
def one_voice():
    """For what every process of a machine would print alike, such as a usage error: only the machine's first prints it."""
    if place().local_rank == 0:
        yield
    else:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield


def launch(count, command, say):
    """Run `command` (a list) as `count` processes that find each other; returns an exit status when all have ended.

    Signals that stop a run are passed on (torchrun passes on no SIGUSR1). Where one process fails the others are ended; the
    status is 128 + a signal's number, or the first failure's. `say` is told of a process that was killed.
    """
    children, received = [], []

    def forward(number, _frame=None):
        received.append(number)
        for child in children:
            child.send_signal(number)

    before = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        port, threads = _free_port(), str(max(1, (os.cpu_count() or 1) // count))
        for rank in range(count):
            environment = {"OMP_NUM_THREADS": threads} | os.environ
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(count)}
            environment |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count)}
            children.append(subprocess.Popen(command, env=environment, preexec_fn=_end_with_parent()))
        if received:  # while they were being started
            forward(received[0])
        ended = _wait(children)
    finally:
        for child in children:
            child.kill()  # none is left, unless this function failed
        for number, handler in before.items():
            signal.signal(number, handler)
    failures = {rank: status for rank, status in ended.items() if status}
    if received and failures:
        return 128 + received[0]
    causes = {rank: status for rank, status in failures.items() if status != LOST} or dict.fromkeys(failures, 1)
    for rank, status in causes.items():
        if status < 0:
            name = signal.Signals(-status).name
            say(f"process {rank} of {count} was ended by {name}, and the others with it; the same command continues")
        return status if status > 0 else 128 - status
    return 0


def _wait(children):
    """{rank: exit status} in the order in which they ended."""
    ended, failed, asked = {}, None, False
    while len(ended) < len(children):
        time.sleep(0.05)
        for rank, child in enumerate(children):
            if rank not in ended and (status := child.poll()) is not None:
                ended[rank] = status
                if status and failed is None:
                    failed = time.monotonic()
        late = time.monotonic() - failed if failed is not None else 0
        for rank, child in enumerate(children):
            if rank not in ended and late > KILL_SECONDS:
                child.kill()
            elif rank not in ended and late > NOTICE_SECONDS and not asked:
                child.terminate()
        asked = asked or late > NOTICE_SECONDS
    return ended


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _end_with_parent():
    """What a child calls to be sent SIGTERM where this process is killed itself and can forward nothing; None off Linux."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    set_parent_death_signal = 1  # of linux/prctl.h
    return lambda: libc.prctl(set_parent_death_signal, signal.SIGTERM)
