"""A frozen, scored teacher, and its table of logits.

A teacher never changes, and augmentation is a finite set of numbered views, so its logits are a table over (image, view): N x V x C
kept on disk beside the teacher's checkpoint. One view of CIFAR-100 is 20 MB in float32 and costs one pass over the training
images; the 162 of crop-flip are 1.6 GB in float16, filled as batches ask for them. Every run that learns from the same teacher shares it.

Legend: N images, V views, C classes, B batch.
"""

import contextlib
import copy
import json
import os
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import data_loader
from takd import files
from takd.config.names import UserError
from takd.cpu.kernels import PackedConv
from takd.images import augmentation
from takd.run import checkpoint, engine


class Logits(NamedTuple):
    """A teacher's answer where only logits are asked for."""

    logits: torch.Tensor  # float32 (B, C)


class Teacher:
    """A network that answers and never learns: evaluation mode, no gradients, batch norm folded, scored before it teaches.

    teacher(batch, images) -> Logits or Features; `images` are the student's normalised images, used where the teacher's
    normalisation and `image_size` are the same. `precision` is the arithmetic it teaches in; it is scored in float32.
    """

    def __init__(self, network, mean, std, split, device, precision, needs_features=False, image_size=None):
        device = torch.device(device)
        self.image_size = image_size or split.image_size
        self.weights_digest = checkpoint.digest(network.state_dict())
        self.exact = frozen(network, device, torch.float32, self.image_size)
        self.network = frozen(network, device, torch.bfloat16, self.image_size) if precision == "bf16" else self.exact
        self.mean, self.std, self.precision, self.needs_features = tuple(mean), tuple(std), precision, needs_features
        self.shares_normalisation = (self.mean, self.std, self.image_size) == (split.mean, split.std, split.image_size)
        self.call_size = max(1, (128 if device.type == "cpu" else 2048) * 64**2 // max(64, self.image_size) ** 2)
        self.table = None

    def score(self, split, checkpoint_path, recorded_percent=None, say=lambda line: None):
        """Accuracy on a split, computed once and kept beside the checkpoint, bound to weights, images and normalisation.

        Refuses a teacher that does not beat guessing, which is what wrongly loaded weights look like; then nothing is kept.
        """
        file = _folder(checkpoint_path) / f"score-{self.binding(split)}.json"
        try:
            accuracy = float(json.loads(file.read_text())["accuracy_percent"])
        except (OSError, ValueError, KeyError, TypeError):
            logits = engine.predict(self.exact, split, self.mean, self.std, image_size=self.image_size)
            accuracy = engine.score(logits, split.labels)["accuracy_percent"]
        if not accuracy > engine.chance_percent(split.labels):
            raise UserError(
                f"the teacher scores {accuracy:.2f} % on {split.name}, no better than guessing: its file does not belong to this "
                "data set or normalisation, or it was not trained; train it first (no --teacher-checkpoint does)"
            )
        if _free_bytes(file.parent.parent) and not file.exists():
            file.parent.mkdir(exist_ok=True)
            files.save_json({"split": split.name, "images": len(split), "accuracy_percent": accuracy}, file)
        if recorded_percent is None:
            say(f"teacher   {accuracy:.2f} % on {split.name} (its file records no accuracy)")
        else:
            say(f"teacher   {accuracy:.2f} % on {split.name} (its file records {recorded_percent:.2f} %)")
            if abs(accuracy - recorded_percent) > 0.5:
                say("warning: these differ by more than rounding: is it the same data set, whole, and the same normalisation?")
        return accuracy

    def binding(self, split, *more):
        """What a table or a score is bound to: weights, images and their order, normalisation, and the size they are brought to."""
        resized = [self.image_size] if self.image_size != split.images.shape[-1] else []
        return checkpoint.digest(self.weights_digest, split.digest(), list(self.mean), list(self.std), *resized, *more)[:16]

    def __call__(self, batch, images):
        if self.table is not None:
            return Logits(self.table.logits(batch))
        if not self.shares_normalisation:
            images = self._normalised(batch.images)
        with torch.no_grad(), engine.autocast(images.device, self.precision):
            if self.needs_features:
                return self.network.forward_features(images)
            return Logits(self.network(images).float())

    @torch.inference_mode()
    def answer(self, pixels):
        """float32 (B, C) logits of uint8 images, in calls of one fixed size: an image's logits don't depend on its company."""
        logits = []
        for chunk in pixels.split(self.call_size):
            short = self.call_size - len(chunk)
            padded = torch.cat([chunk, chunk[:1].expand(short, -1, -1, -1)]) if short else chunk
            with engine.autocast(pixels.device, self.precision):
                logits.append(self.network(self._normalised(padded)).float()[: len(chunk)])
        return torch.cat(logits)

    def _normalised(self, pixels):
        return data_loader.normalise(pixels, self.mean, self.std, self.image_size, engine.input_dtype(self.precision))


def frozen(network, device, dtype, image_size=32):
    """A copy for answering only: batch norm folded into the convolutions and, on the CPU, ReLU and residual as well.

    Each step is taken only where the copy still gives the same logits, so a network of another build is merely slower.
    """
    best = copy.deepcopy(network).eval().requires_grad_(False)
    probe = torch.rand(8, 3, image_size, image_size, generator=data_loader.generator(0, 0, "probe"))
    with torch.inference_mode():
        expected = best(probe)
    changes = {_fold: 1e-3, _pack: 1e-3 if dtype == torch.float32 else 5e-2}
    for change, tolerance in changes.items() if device.type == "cpu" else [(_fold, 1e-3)]:
        changed = copy.deepcopy(best)
        try:
            change(changed, dtype)
            with torch.inference_mode(), engine.autocast(torch.device("cpu"), "bf16" if change is _pack and tolerance > 1e-2 else "fp32"):
                close = (changed(probe).float() - expected).norm() <= tolerance * expected.norm()
        except (RuntimeError, AttributeError, TypeError):  # a torch whose oneDNN operations differ, a network that looks into its own
            break
        if not close:
            break
        best = changed
    return best.to(device, memory_format=torch.channels_last)


def _fold(module, dtype):
    """Batch norm into the convolution registered before it."""
    previous = None
    for name, child in list(module.named_children()):
        if isinstance(child, nn.BatchNorm2d) and isinstance(previous and getattr(module, previous), nn.Conv2d):
            setattr(module, previous, fuse_conv_bn_eval(getattr(module, previous), child))
            setattr(module, name, nn.Identity())
        else:
            _fold(child, dtype)
        previous = name


def _pack(module, dtype):
    """Convolutions whose batch norm is folded into them, as conv_norm's own frozen kind."""
    children = list(module.named_children())
    for (name, child), (_, following) in zip(children, [*children[1:], (None, None)], strict=False):
        if isinstance(child, nn.Conv2d) and isinstance(following, nn.Identity):
            setattr(module, name, PackedConv(child, dtype))
        else:
            _pack(child, dtype)


# ---------------------------------------------------------------------------------------------- the table
ZERO = 6e-8  # float16's smallest number stands for a logit of 0, so that a row of zeros is one not yet filled


def table_dtype(views):
    """float32 for one view, where it costs nothing; float16, whose rounding is a bf16 teacher's own or less, for many."""
    return np.dtype(np.float32 if views == 1 else np.float16)


class LogitsTable:
    """A teacher's logits over (image, view), (N, V, C) in a sparse file mapped into memory; rows fill as they are asked for.

    A row is whole where its first and last number are not 0: there is no second file that a crash could leave in disagreement.
    Several processes may fill the same table at once: whoever comes second writes the same values.
    """

    def __init__(self, path, teacher, split, augment, say=lambda line: None):
        self.teacher, self.split, self.augment = teacher, split, augment
        self.path = Path(path)
        shape = (len(split), augmentation.VIEWS[augment], len(split.classes))
        with files.locked(self.path.with_suffix(".lock"), f"table {self.path}", wait=True, say=say):
            self.values = self._open(shape, say)
        self.resident = None  # the whole table on the GPU, once it is full
        self._expected = torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)

    def _open(self, shape, say):
        """The mapped file, made or made anew where it is absent, of another size, or disagrees with the teacher."""
        dtype = table_dtype(shape[1])
        size = dtype.itemsize * int(np.prod(shape))
        for _ in range(2):
            if not self.path.exists() or self.path.stat().st_size != size:
                if self.path.exists():
                    say(f"warning: table {self.path} is damaged: rebuilding it")
                with files.replacing(self.path) as temporary, open(temporary, "wb") as file:
                    file.truncate(size)
            values = torch.from_numpy(np.memmap(self.path, dtype, "r+", shape=shape))
            if self._agrees(values):
                return values
            say(f"warning: table {self.path} disagrees with the teacher: rebuilding it")
            self.path.unlink()
        raise UserError(f"table {self.path} cannot be verified; delete it, or run with --teacher-cache live")

    def _agrees(self, values, count=64):
        """Whether a sample of filled rows holds what the teacher answers now, within rounding."""
        generator = data_loader.generator(0, 0, "table sample")
        index = torch.randint(len(values), (4096,), generator=generator)
        views = torch.randint(values.shape[1], (4096,), generator=generator)
        rows = values[index, views]
        chosen = _filled(rows).nonzero()[:count, 0]
        if not len(chosen):
            return True
        rows, fresh = rows[chosen].float(), self._answer(index[chosen], views[chosen]).cpu()
        return bool(rows.isfinite().all()) and float((rows - fresh).norm() / fresh.norm()) < 0.1

    def _answer(self, index, views):
        index, views = index.to(self.split.device), views.to(self.split.device)
        return self.teacher.answer(augmentation.apply(self.augment, self.split.take(index), views))

    def _ask(self, index, views):
        """The teacher's answers into the table. Beyond float16's range a logit becomes infinite, and the loss says so."""
        rows = self._answer(index, views).to(self.values.dtype).cpu()
        self.values[index, views] = torch.where(rows == 0, ZERO, rows)

    def expect(self, index, views):
        """The (image, view) pairs that an epoch will ask for, in their order: what is missing is then filled in full calls."""
        if self.resident is None:
            index, views = index.cpu(), views.cpu()
            missing = (self.values[index, views, 0] == 0) | (self.values[index, views, -1] == 0)
            self._expected = index[missing], views[missing]

    def logits(self, batch):
        """float32 (B, C) for a batch; what is not in the table yet is asked of the teacher and kept."""
        if self.resident is not None:
            return self.resident[batch.index, batch.views].float()
        index, views = batch.index.cpu(), batch.views.cpu()
        rows = self.values[index, views]
        while not (filled := _filled(rows)).all():
            wanted, wanted_views = self._expected
            if len(wanted) == 0:
                wanted, wanted_views = index[~filled], views[~filled]
            size = self.teacher.call_size
            self._ask(wanted[:size], wanted_views[:size])
            self._expected = wanted[size:], wanted_views[size:]
            rows = self.values[index, views]
        return rows.float().to(batch.images.device)

    def fill(self, say):
        """Ask the teacher for everything not in the table yet, in the file's order; on a GPU, keep the table there."""
        told, block = time.monotonic(), max(1, 8 * self.teacher.call_size // self.values.shape[1])
        for first in range(0, len(self.values), block):
            index, views = (~_filled(self.values[first : first + block])).nonzero(as_tuple=True)
            if len(index):
                self._ask(first + index, views)
            if time.monotonic() - told > 60:
                told = time.monotonic()
                say(f"table: {first + block} of {len(self.values)} images")
        if self.split.device.type == "cuda":
            self.resident = self.values.to(self.split.device)


def _filled(rows):
    return (rows[..., 0] != 0) & (rows[..., -1] != 0)


def attach_table(teacher, split, augment, mode, checkpoint_path, epochs, say):
    """Decide how the teacher's logits are had, say why, and give the teacher its table where it gets one."""
    views = augmentation.VIEWS[augment]
    if views is None:
        return say(f"logits    live: {augment} has no end of views to keep")
    if teacher.needs_features:
        if mode not in ("auto", "live"):
            raise UserError(f"--teacher-cache {mode}: this method looks at features, and the table holds logits; use live")
        return say("logits    live: the method looks at the teacher's features")
    dtype = table_dtype(views)
    size = dtype.itemsize * len(split) * views * len(split.classes)
    folder = _folder(checkpoint_path)
    path = folder / f"{augment}-{teacher.binding(split, augment)}.{dtype.name}"
    on_gpu = split.device.type == "cuda"
    if mode == "live":
        return say("logits    live: asked of the teacher for every batch")
    free, needed = _free_bytes(folder.parent), 0 if path.exists() else size
    if free is None or free < needed * 1.05:
        room = "cannot be written" if free is None else f"has {_size(free)} free"
        if mode == "auto":
            return say(f"logits    live: a table needs {_size(size)} beside the teacher's checkpoint, where {folder.parent} {room}")
        raise UserError(f"--teacher-cache {mode}: the table needs {_size(size)} and {folder.parent} {room}; free some or use live")
    if mode == "auto":
        if on_gpu and views > 1 and 4 * epochs < views and not path.exists():
            return say(f"logits    live: {epochs} epochs would see few of the {views} views that a table holds")
        mode = "full" if views == 1 or on_gpu else "lazy"
    how = {"full": "filled now", "lazy": "filled as batches ask"}[mode]
    say(f"logits    table of {views} view{'s' if views > 1 else ''}, {_size(size)} at most, {how}: {path}")
    teacher.table = LogitsTable(path, teacher, split, augment, say)
    if mode == "full":
        teacher.table.fill(say)
    return None


def _folder(checkpoint_path):
    """Where a checkpoint's tables and scores are kept: beside it."""
    return Path(f"{checkpoint_path}.logits")


def _free_bytes(folder):
    """None where the folder cannot be written."""
    if not os.access(folder, os.W_OK):
        return None
    with contextlib.suppress(OSError):
        status = os.statvfs(folder)
        return status.f_bavail * status.f_frsize
    return None


def _size(count):
    return f"{count / 1e9:.1f} GB" if count > 1e9 else f"{count / 1e6:.1f} MB"
