"""Starting the processes of one machine for `--cuda N`: the same command N times. Standard library only: it runs before
torch.

The processes find each other as torchrun's do (takd/process.py); what they do together is in distributed.py.
"""

import ctypes
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from types import FrameType

from takd.process import STOP_SIGNALS, threads_each

ADDRESS = "127.0.0.1"  # where the processes of one machine find each other, and nobody else finds them
PEER_FAILED = 76  # exit status of a process that ended only because another one did (EX_PROTOCOL of sysexits.h)
NOTICE_SECONDS, KILL_SECONDS = 3, 15  # after a failure: until the others get SIGTERM, and until they are killed


def launch(count: int, command: list[str], say: Callable[[str], object]) -> int:
    """Run `command` as `count` processes that find each other; returns an exit status when all have ended.

    Signals that stop a run are forwarded (torchrun does not forward SIGUSR1). If one process fails, the others are
    ended; the status is 128 + a signal's number, or that of the first failure. A killed process is reported with `say`.
    """
    children: list[subprocess.Popen] = []
    received: list[int] = []

    def forward(number: int, _frame: FrameType | None = None) -> None:
        received.append(number)
        for child in children:
            child.send_signal(number)

    before = {number: signal.signal(number, forward) for number in STOP_SIGNALS}
    try:
        port, threads = _free_port(), threads_each(count)
        for rank in range(count):
            environment = os.environ | {
                "OMP_NUM_THREADS": threads,
                "MASTER_ADDR": ADDRESS,
                "MASTER_PORT": str(port),
                "RANK": str(rank),
                "WORLD_SIZE": str(count),
                "LOCAL_RANK": str(rank),
                "LOCAL_WORLD_SIZE": str(count),
            }
            children.append(subprocess.Popen(command, env=environment, preexec_fn=_end_with_parent()))
        if received:  # while they were being started
            forward(received[0])
        ended = _wait(children)
    finally:
        for child in children:
            child.kill()  # all have ended, unless this function failed
        for number, handler in before.items():
            signal.signal(number, handler)
    failures = {rank: status for rank, status in ended.items() if status}
    if received and failures:
        return 128 + received[0]
    causes = {rank: status for rank, status in failures.items() if status != PEER_FAILED} or dict.fromkeys(failures, 1)
    for rank, status in causes.items():
        if status < 0:
            name = signal.Signals(-status).name
            say(f"process {rank} of {count} was ended by {name}, and the others with it; the same command continues")
        return status if status > 0 else 128 - status
    return 0


def _wait(children: list[subprocess.Popen]) -> dict[int, int]:
    """{rank: exit status} in the order in which they ended."""
    ended: dict[int, int] = {}
    failed: float | None = None
    terminated = False
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
            elif rank not in ended and late > NOTICE_SECONDS and not terminated:
                child.terminate()
        terminated = terminated or late > NOTICE_SECONDS
    return ended


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((ADDRESS, 0))
        return probe.getsockname()[1]


def _end_with_parent() -> Callable[[], object]:
    """For a child to call: the kernel sends it SIGTERM if this process is killed."""
    libc = ctypes.CDLL(None)
    set_parent_death_signal = 1  # of linux/prctl.h
    return lambda: libc.prctl(set_parent_death_signal, signal.SIGTERM)
