"""Files that survive: atomic writes and locks. Standard library only, so that planning and reporting need no torch."""

import contextlib
import errno
import fcntl
import json
import os
import time
from pathlib import Path

from takd.config.names import UserError


@contextlib.contextmanager
def replacing(path):
    """A temporary path beside `path` that takes its place when the block ends well: a reader sees the old file or the new."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_json(contents, path):
    """Indented JSON, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")


# -------------------------------------------------------------------------------------------------- locking
class Busy(UserError):
    """Another process holds the lock."""


@contextlib.contextmanager
def locked(path, what, wait=False, say=lambda line: None):
    """Hold an exclusive lock on a file for the block; it is released however the process ends.

    Without `wait` a lock held elsewhere raises Busy at once; with it, `say` is told once and the lock is waited for.
    A file system without locks (some clusters' scratch) is used without one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+") as file:
        told = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                    break
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    raise
            file.seek(0)
            holder = file.read().strip() or "another process"
            if not wait:
                raise Busy(f"{what} is in use by {holder}; wait for it or stop it, then repeat the command")
            if not told:
                say(f"waiting for {holder}, which holds {what}")
                told = True
            time.sleep(0.2)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}")
        file.flush()
        yield


def is_locked(path):
    """Whether somebody holds the lock on a file at this moment."""
    with contextlib.suppress(FileNotFoundError), open(path, encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno in (errno.EAGAIN, errno.EACCES)
    return False
