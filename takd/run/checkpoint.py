"""Checkpoints in the released code's format, written atomically, and signals that ask to stop.

A checkpoint is a dict with `model_state_dict`, `optimizer_state_dict` and `epoch` (counted from 0) as in the released TAKD code,
plus what ours needs. It holds tensors and plain values only: everything is read with `weights_only=True`.
"""

import contextlib
import hashlib
import json
import pickle
import signal
import time
import warnings
from pathlib import Path

import numpy as np
import torch

from takd.config.names import UserError
from takd.files import replacing

# Plain numbers that numpy wrapped: some published checkpoints hold their accuracy like this. They run no code.
NUMPY_SCALARS = [np.dtype, *{type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8")}]
with contextlib.suppress(AttributeError):
    NUMPY_SCALARS += [(np._core.multiarray.scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]


# ------------------------------------------------------------------------------------------------- writing
def save(contents, path):
    """torch.save, atomically, with every tensor on the CPU so that the file opens on a machine without a GPU."""
    with replacing(path) as temporary:
        torch.save(to_cpu(contents), temporary)


def to_cpu(contents):
    """The same nested dicts and lists with every tensor detached on the CPU."""
    if isinstance(contents, torch.Tensor):
        return contents.detach().cpu()
    if isinstance(contents, dict):
        return {key: to_cpu(value) for key, value in contents.items()}
    if isinstance(contents, list | tuple):
        return type(contents)(to_cpu(value) for value in contents)
    return contents


# -------------------------------------------------------------------------------------------------- reading
def read(path):
    """The dict in a checkpoint file, tensors on the CPU. A file that is missing, damaged or holds code is a UserError."""
    path = Path(path)
    if not path.is_file():
        kind = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"checkpoint {path} {kind}; give a file that train.py wrote, like runs/<name>/<model>_..._best.pth.tar")
    try:
        with torch.serialization.safe_globals(NUMPY_SCALARS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).split("WeightsUnpickler error:")[-1].strip().splitlines()[0]
        raise UserError(f"checkpoint {path} is refused: it holds more than tensors and plain values ({reason})") from None
    except Exception as error:  # a damaged file makes torch raise nearly anything, with a message or without one
        reason = (str(error).splitlines() or [type(error).__name__])[0][:100]
        raise UserError(f"checkpoint {path} cannot be read: damaged or cut off ({reason})") from None
    if not isinstance(contents, dict):
        raise UserError(f"checkpoint {path} holds a {type(contents).__name__}, not a dict with model_state_dict")
    return contents


def weights_of(contents, path):
    """The state dict in a checkpoint's dict: ours and the released code's, RepDistiller's (`model`), or a bare one."""
    for key in ("model_state_dict", "model", "state_dict"):
        if isinstance(contents.get(key), dict):
            contents = contents[key]
            break
    if contents and all(isinstance(value, torch.Tensor) for value in contents.values()):
        return contents
    raise UserError(f"checkpoint {path} holds no weights under model_state_dict, model or state_dict (keys: {list(contents)[:5]})")


def digest(*parts):
    """A short hexadecimal digest of tensors, state dicts and plain values: equal parts, equal digest."""
    hasher = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, dict):
            for key in sorted(part):
                hasher.update(f"{key}:{digest(part[key])};".encode())
        elif isinstance(part, torch.Tensor):
            array = part.detach().cpu().contiguous()
            hasher.update(f"{array.dtype}{tuple(array.shape)}".encode())
            hasher.update(array.flatten().view(torch.uint8).numpy().data)
        else:
            hasher.update(json.dumps(part).encode())
    return hasher.hexdigest()


# -------------------------------------------------------------------------------------------------- signals
class Stopped(SystemExit):
    """A signal asked the process to end: exit status 128 + its number, as a shell gives."""

    def __init__(self, number):
        super().__init__(128 + number)
        self.name = signal.Signals(number).name


class StopSignals:
    """SIGTERM, SIGINT and SIGUSR1 (SLURM's warning before a time limit) end the process at a good moment.

    Outside `deferred()` a signal raises Stopped at once. Inside it is only noted in `received`, so that a training step ends and
    a save is made; a second one raises all the same. What comes within a second of another is the same request: a launcher
    passes on what its whole group was sent.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self):
        self.received = None
        self._deferring = False
        self._last = float("-inf")

    def __enter__(self):
        self._before = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number, _frame):
        before, self._last = self._last, time.monotonic()
        if self._last - before < 1:
            return
        if self._deferring and self.received is None:
            self.received = number
        else:
            raise Stopped(number)

    @contextlib.contextmanager
    def deferred(self):
        before, self._deferring = self._deferring, True
        try:
            yield
        finally:
            self._deferring = before
