"""Checkpoints in the released code's format, written atomically and read without executing anything.

A checkpoint is a dict with `model_state_dict`, `optimizer_state_dict` and `epoch` (counted from 0) as in the released
TAKD code, plus what ours needs. It holds tensors and plain values only: everything is read with `weights_only=True`.
"""

import contextlib
import io
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from takd.errors import UserError, first_line
from takd.files import NUMBER, PERCENT, TEXT, WHOLE, Rule, digest, misfit, replacing

# Plain numbers as numpy scalars: some published checkpoints hold their accuracy like this. They run no code.
NUMPY_SCALARS: list[Any] = [np.dtype, *{type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8")}]
with contextlib.suppress(KeyError):
    NUMPY_SCALARS += [
        (vars(np)["_core"].multiarray.scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")
    ]
MOST_CLASSES, LARGEST_IMAGE = 100_000, 1024  # what a file may ask memory for
TENSOR = Rule("a tensor", lambda value: isinstance(value, torch.Tensor))
_CHANNELS = Rule("three numbers", lambda value: not misfit(value, [NUMBER]) and len(value) == 3)
METADATA = {  # what a file may say of its network
    "classes?": Rule("a number of classes", lambda value: type(value) is int and 1 < value <= MOST_CLASSES),
    "class_names?": [TEXT],
    "image_size?": Rule("an image size", lambda value: type(value) is int and 8 <= value <= LARGEST_IMAGE),
    "dataset?": TEXT,
    "mean?": _CHANNELS,
    "std?": Rule("three numbers above 0", lambda value: _CHANNELS.holds(value) and min(value) > 0),
    "path?": [TEXT],
    "epoch?": WHOLE,
    "test_accuracy_percent?": PERCENT,
    "validation_accuracy_percent?": PERCENT,
}


def save(contents: dict[str, Any], path: str | Path) -> None:
    """torch.save, atomically, with every tensor on the CPU so that the file opens on a machine without a GPU.

    Into memory first: on a full disk torch itself raises a RuntimeError about positions in a file.
    """
    buffer = io.BytesIO()
    torch.save(to_cpu(contents), buffer)
    with replacing(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


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
        kind = "is a folder" if path.is_dir() else "is no file" if path.exists() else "does not exist"
        raise UserError(
            f"checkpoint {path} {kind}; give a file that train.py wrote, like runs/<name>/<model>_..._best.pth.tar"
        )
    try:
        _check_digests(path)
        with torch.serialization.safe_globals(NUMPY_SCALARS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            contents = torch.load(path, map_location="cpu", weights_only=True)
        _check_tensors(contents, path.stat().st_size)
    except pickle.UnpicklingError as error:
        reason = str(error).split("WeightsUnpickler error:")[-1].strip().splitlines()[0]
        raise UserError(
            f"checkpoint {path} is refused: it holds more than tensors and plain values ({reason})"
        ) from None
    except Exception as error:  # a damaged file makes torch raise nearly anything, with a message or without one
        reason = first_line(error)[:100]
        raise UserError(f"checkpoint {path} cannot be read: damaged or cut off ({reason})") from None
    if not isinstance(contents, dict):
        raise UserError(f"checkpoint {path} holds a {type(contents).__name__}, not a dict with model_state_dict")
    return contents


def _check_digests(path):
    """Raises ValueError where a part of a file differs from its CRC-32, which torch writes and never looks at.

    Files written by torch before 1.6 are no zip archives and have none.
    """
    with open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return
    with zipfile.ZipFile(path) as archive:
        packed = [member.filename for member in archive.infolist() if member.compress_type != zipfile.ZIP_STORED]
        if packed:  # torch packs nothing: no file may unpack to a larger one
            raise ValueError(f"{packed[0]} is compressed")
        if wrong := archive.testzip():
            raise ValueError(f"the checksum of {wrong} differs")


def _check_tensors(contents, file_bytes):
    """Raises ValueError for a tensor whose numbers are not all in the file: on no device, or few numbers repeated."""
    left, seen, storages, held = [contents], set(), set(), 0
    while left:
        value = left.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            left += value.values()
        elif isinstance(value, list | tuple):
            left += value
        elif isinstance(value, torch.Tensor):
            if value.device.type != "cpu" or value.layout != torch.strided or value.is_quantized:
                raise ValueError(f"a tensor of shape {tuple(value.shape)} without plain numbers")
            storage = value.untyped_storage()
            held += storage.nbytes() * (storage.data_ptr() not in storages)
            storages.add(storage.data_ptr())
            if value.nbytes > storage.nbytes() or held > file_bytes:
                raise ValueError(f"a tensor of shape {tuple(value.shape)} has more numbers than the file")


def weights_of(contents: dict[str, Any], path: str | Path) -> dict[str, torch.Tensor]:
    """The state dict in a checkpoint's dict: ours and the released code's, RepDistiller's (`model`), or a bare one."""
    for key in ("model_state_dict", "model", "state_dict"):
        if isinstance(contents.get(key), dict):
            contents = contents[key]
            break
    if contents and not misfit(contents, {...: TENSOR}) and all(isinstance(key, str) for key in contents):
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


def strip_prefixes(state_dict: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """Without prefixes of DataParallel (`module.`), torch.compile (`_orig_mod.`) and Lightning (`model.`)."""
    for prefix in ("module.", "_orig_mod.", "model.") * 3:
        if state_dict and all(key.startswith(prefix) for key in state_dict):
            state_dict = {key.removeprefix(prefix): value for key, value in state_dict.items()}
    return state_dict
