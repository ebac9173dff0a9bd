"""A frozen teacher's logits as a table over (image, view): N x V x C, kept on disk beside the teacher's checkpoint.

The teacher never changes, and augmentation is a finite set of numbered views. One view of CIFAR-100 is 20 MB in float32
and costs one pass over the training images; the 162 of crop-flip are 1.6 GB in float16, filled lazily: on the CPU as
batches need them, on a GPU, which holds the table, before an epoch what it will need. Every run that learns from the
same teacher shares the file. Legend: N images, V views, C classes, B batch.
"""

import contextlib
import os
import time
from concurrent import futures
from pathlib import Path
from typing import Any

import numpy as np
import torch

from takd.errors import UserError
from takd.files import Say, locked, remove_leftovers, replacing
from takd.images.augmentation import VIEWS
from takd.images.split import Batch, Split, generator
from takd.process import safe_point

ZERO = 6e-8  # float16's smallest number stands for a logit of 0, so that a row of zeros is one not yet filled


def table_dtype(views: int) -> Any:
    """float32 for one view, where it costs nothing; float16, whose rounding is a bf16 teacher's or less, for many."""
    return np.dtype(np.float32 if views == 1 else np.float16)


class LogitTable:
    """Logits (N, V, C) in a file mapped into memory; rows are filled when they are first needed.

    A row is filled where its first and last number are not 0: there is no second file that a crash could leave in
    disagreement. Several processes may fill the same table at once: whoever comes second writes the same values.
    `teacher` has `answer(pixels)`, the logits of uint8 images, and `call_size`, how many it takes at once. OSError if
    the file cannot be made.
    """

    def __init__(self, path: Path, teacher: Any, split: Split, augment: str, say: Say):
        self.path, self.teacher, self.split, self.augment = path, teacher, split, augment
        with locked(path.with_suffix(".lock"), f"table {path}", wait=True, say=say):
            self.values = self._open((len(split), VIEWS[augment], len(split.classes)), say)
        self.resident: torch.Tensor | None = None  # the table on the GPU, where it has room for it
        if split.device.type == "cuda" and self.values.nbytes < 0.5 * torch.cuda.mem_get_info(split.device)[0]:
            self.hold_on(split.device)
        self.complete = False  # whether every row is known to be filled
        self._expected = torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)

    def _open(self, shape, say):
        """The mapped file, created, or rebuilt where it has another size or disagrees with the teacher."""
        dtype = table_dtype(shape[1])
        size = dtype.itemsize * int(np.prod(shape))
        for _ in range(2):
            if not self.path.exists() or self.path.stat().st_size != size:
                if self.path.exists():
                    say(f"warning: table {self.path} is damaged: rebuilding it")
                remove_leftovers(self.path.parent, self.path.name)
                with replacing(self.path) as temporary:
                    temporary.touch()
                    _allocate(temporary, size)
            _allocate(self.path, size)
            values = torch.from_numpy(np.memmap(self.path, dtype, "r+", shape=shape))
            if self._agrees(values):
                return values
            say(f"warning: table {self.path} disagrees with the teacher: rebuilding it")
            self.path.unlink()
        raise UserError(f"table {self.path} cannot be verified; delete it, or run with --teacher-cache live")

    def _agrees(self, values):
        """Whether a sample of filled rows holds what the teacher computes now, within rounding."""
        seeded = generator(0, 0, "table sample")
        index = torch.randint(len(values), (4096,), generator=seeded)
        views = torch.randint(values.shape[1], (4096,), generator=seeded)
        rows = values[index, views]
        chosen = _filled(rows).nonzero()[:64, 0]
        if not len(chosen):
            return True
        rows, fresh = rows[chosen].float(), self._compute(index[chosen], views[chosen]).cpu()
        return bool(rows.isfinite().all()) and float((rows - fresh).norm() / fresh.norm()) < 0.1

    def _compute(self, index, views):
        batch = Batch(self.split, self.augment, index.to(self.split.device), views.to(self.split.device))
        return self.teacher.answer(batch.images)

    def hold_on(self, device: torch.device) -> None:
        """Look logits up on this device from now on, in a copy of the table; the file is written behind it."""
        self.resident = self.values.to(device)
        self._writer, self._writing = futures.ThreadPoolExecutor(1, "table"), futures.Future[None]()
        self._writing.set_result(None)

    def _store(self, index, views):
        """Keep the teacher's logits. One beyond float16's range becomes infinite, and the loss shows it."""
        rows = self._compute(index, views).to(self.values.dtype)
        rows = torch.where(rows == 0, ZERO, rows)
        if self.resident is None:
            self._write(index, views, rows)
        else:
            self.resident[index, views] = rows
            self._writing = self._writer.submit(self._write, index, views, rows)

    def _write(self, index, views, rows):
        self.values[index.cpu(), views.cpu()] = rows.cpu()

    def expect(self, index: torch.Tensor, views: torch.Tensor) -> None:
        """The (image, view) pairs that an epoch will need, in order: what is missing is computed in full calls, at once
        where the table is resident, else as batches come to it."""
        if self.complete:
            return
        values = self.values if self.resident is None else self.resident
        index, views = index.to(values.device), views.to(values.device)
        missing = (values[index, views, 0] == 0) | (values[index, views, -1] == 0)
        self._expected = index[missing], views[missing]
        if self.resident is not None:
            self._writing.result()  # of the epoch before: a disk that is full ends the run
            index, views = self._expected
            for first in range(0, len(index), self.teacher.call_size):
                safe_point()
                rows = slice(first, first + self.teacher.call_size)
                self._store(index[rows], views[rows])

    def logits(self, batch: Batch) -> torch.Tensor:
        """float32 (B, C) for a batch; what is not in the table yet is computed and kept."""
        if self.resident is not None:
            return self.resident[batch.index, batch.views].float()
        index, views = batch.index.cpu(), batch.views.cpu()
        rows = self.values[index, views]
        while not (filled := _filled(rows)).all():
            wanted, wanted_views = self._expected
            if len(wanted) == 0:
                wanted, wanted_views = index[~filled], views[~filled]
            size = self.teacher.call_size
            self._store(wanted[:size], wanted_views[:size])
            self._expected = wanted[size:], wanted_views[size:]
            rows = self.values[index, views]
        return rows.float().to(self.split.device)

    def fill(self, say: Say) -> None:
        """Compute everything that is not in the table yet, in the file's order."""
        reported, block = time.monotonic(), max(1, 8 * self.teacher.call_size // self.values.shape[1])
        for first in range(0, len(self.values), block):
            safe_point()
            index, views = (~_filled(self.values[first : first + block])).nonzero(as_tuple=True)
            if len(index):
                self._store(first + index, views)
            if time.monotonic() - reported > 60:
                reported = time.monotonic()
                say(f"table: {first + block} of {len(self.values)} images")
        self.complete = True


def _allocate(path, size):
    """The file's room on the disk: without it, writing to the mapped file on a full disk kills the process (SIGBUS)."""
    status = path.stat()
    if status.st_size < size or 512 * status.st_blocks < size:  # the latter a sparse file of an earlier version
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, size)


def _filled(rows):
    return (rows[..., 0] != 0) & (rows[..., -1] != 0)


def features_cache(mode: str) -> tuple[str, str]:
    """As `choose_cache`, for a method that uses the teacher's features."""
    if mode in ("auto", "live"):
        return "live", "live: the method uses the teacher's features"
    raise UserError(f"--teacher-cache {mode}: this method uses features, and the table holds logits; use live")


def choose_cache(split: Split, augment: str, mode: str, path: Path) -> tuple[str, str]:
    """('full', 'lazy' or 'live', a line with the reason) for --teacher-cache `mode` and a table at `path`."""
    views = VIEWS[augment]
    if views is None:
        return "live", f"live: random augmentation ({augment}) cannot be cached"
    if mode == "live":
        return "live", "live: computed for every batch"
    size = table_dtype(views).itemsize * len(split) * views * len(split.classes)
    beside = path.parent.parent
    free, needed = free_bytes(beside), 0 if path.exists() else size
    if free is None or free < needed * 1.05:
        room = "cannot be written" if free is None else f"has {_size(free)} free"
        if mode != "auto":
            why = f"the table needs {_size(size)} and {beside} {room}"
            raise UserError(f"--teacher-cache {mode}: {why}; free some or use live")
        return "live", f"live: a table needs {_size(size)} beside the teacher's checkpoint, where {beside} {room}"
    if mode == "auto":
        mode = "full" if views == 1 else "lazy"
    how = {"full": "filled now", "lazy": "filled lazily"}[mode]
    return mode, f"table of {views} view{'s' if views > 1 else ''}, {_size(size)} at most, {how}: {path}"


def free_bytes(folder: Path) -> int | None:
    """None where the folder, or what there is of it, cannot be written."""
    folder = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    if os.access(folder, os.W_OK):
        with contextlib.suppress(OSError):
            status = os.statvfs(folder)
            return status.f_bavail * status.f_frsize
    return None


def _size(count):
    return f"{count / 1e9:.1f} GB" if count > 1e9 else f"{count / 1e6:.1f} MB"
