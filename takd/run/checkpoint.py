"""Checkpoints in the released code's format, written atomically and read without executing anything.

A checkpoint is a dict with `model_state_dict`, `optimizer_state_dict` and `epoch` (counted from 0) as in the released
TAKD code, plus what ours needs. It holds tensors and plain values only: everything is read with `weights_only=True`.
"""

import contextlib
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from takd.errors import UserError
from takd.files import digest, replacing

# Plain numbers as numpy scalars: some published checkpoints hold their accuracy like this. They run no code.
NUMPY_SCALARS: list[Any] = [np.dtype, *{type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8")}]
with contextlib.suppress(KeyError):
    NUMPY_SCALARS += [
        (vars(np)["_core"].multiarray.scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")
    ]


def save(contents: dict[str, Any], path: str | Path) -> None:
    """torch.save, atomically, with every tensor on the CPU so that the file opens on a machine without a GPU."""
    with replacing(path) as temporary:
        torch.save(to_cpu(contents), temporary)


def to_cpu(contents: Any) -> Any:
    """The same nested dicts and lists with every tensor detached on the CPU."""
    if isinstance(contents, torch.Tensor):
        return contents.detach().cpu()
    if isinstance(contents, dict):
        return {key: to_cpu(value) for key, value in contents.items()}
    if isinstance(contents, list | tuple):
        return type(contents)(to_cpu(value) for value in contents)
    return contents


def read(path: str | Path) -> dict[str, Any]:
    """The dict in a checkpoint file, tensors on the CPU; a missing, damaged or unsafe file is a UserError."""
    path = Path(path)
    if not path.is_file():
        kind = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(
            f"checkpoint {path} {kind}; give a file that train.py wrote, like runs/<name>/<model>_..._best.pth.tar"
        )
    try:
        with torch.serialization.safe_globals(NUMPY_SCALARS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).split("WeightsUnpickler error:")[-1].strip().splitlines()[0]
        raise UserError(
            f"checkpoint {path} is refused: it holds more than tensors and plain values ({reason})"
        ) from None
    except Exception as error:  # a damaged file makes torch raise nearly anything, with a message or without one
        reason = (str(error).splitlines() or [type(error).__name__])[0][:100]
        raise UserError(f"checkpoint {path} cannot be read: damaged or cut off ({reason})") from None
    if not isinstance(contents, dict):
        raise UserError(f"checkpoint {path} holds a {type(contents).__name__}, not a dict with model_state_dict")
    return contents


def weights_of(contents: dict[str, Any], path: str | Path) -> dict[str, torch.Tensor]:
    """The state dict in a checkpoint's dict: ours and the released code's, RepDistiller's (`model`), or a bare one."""
    for key in ("model_state_dict", "model", "state_dict"):
        if isinstance(contents.get(key), dict):
            contents = contents[key]
            break
    if contents and all(isinstance(value, torch.Tensor) for value in contents.values()):
        return contents
    raise UserError(
        f"checkpoint {path} holds no weights under model_state_dict, model or state_dict (keys: {list(contents)[:5]})"
    )


def weights_digest(path: str | Path) -> str:
    """Identity of the network in a checkpoint file, whatever its path and other contents."""
    return digest(weights_of(read(path), path))


def load_weights(network: nn.Module, state_dict: Mapping[str, torch.Tensor]) -> None:
    """Load weights into a network that has all their keys; its other values stay.

    load_state_dict alone will not do: MNASNet checks version metadata that a file has lost.
    """
    own = network.state_dict()
    own.update(state_dict)
    network.load_state_dict(own)
