"""A frozen, scored teacher, and its table of logits.

A teacher never changes, and augmentation is a finite set of numbered views, so its logits are a table over (image, view): N x V x C
in float16, kept on disk beside the teacher's checkpoint. One view of CIFAR-100 is 10 MB and costs one pass over the training
images; the 162 of crop-flip are 1.6 GB, filled as batches ask for them. Every run that learns from the same teacher shares it.

Legend: N images, V views, C classes, B batch.
"""

import contextlib
import copy
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import augmentation
import checkpoint
import data_loader
import engine
import files
from names import UserError


class Logits(NamedTuple):
    """A teacher's answer where only logits are asked for."""

    logits: torch.Tensor  # float32 (B, C)


class Teacher:
    """A network that answers and never learns: evaluation mode, no gradients, batch norm folded, scored before it teaches.

    teacher(batch, images) -> Logits or Features; `images` are the student's normalised images and are used where the teacher's
    normalisation is the same.
    """

    def __init__(self, network, mean, std, split, device, precision, needs_features=False):
        self.weights_digest = checkpoint.digest(network.state_dict())
        self.network = folded(network).to(device, memory_format=torch.channels_last).requires_grad_(False).eval()
        self.mean, self.std, self.precision, self.needs_features = tuple(mean), tuple(std), precision, needs_features
        self.shares_normalisation = (self.mean, self.std) == (split.mean, split.std)
        self.table = None

    def score(self, split, recorded_percent=None, say=lambda line: None):
        """Accuracy on a split. Refuses a teacher that does not beat guessing, which is what wrongly loaded weights look like."""
        result = engine.score(engine.predict(self.network, split, self.mean, self.std), split.labels)
        accuracy = result["accuracy_percent"]
        if not accuracy > engine.chance_percent(split.labels):
            raise UserError(
                f"the teacher scores {accuracy:.2f} % on {split.name}, no better than guessing: its file does not belong to this "
                "data set or normalisation, or it was not trained; train it first (no --teacher-checkpoint does)"
            )
        if recorded_percent is None:
            say(f"teacher   {accuracy:.2f} % on {split.name} (its file records no accuracy)")
        else:
            say(f"teacher   {accuracy:.2f} % on {split.name} (its file records {recorded_percent:.2f} %)")
            if abs(accuracy - recorded_percent) > 0.5:
                say("warning: these differ by more than rounding: is it the same data set, whole, and the same normalisation?")
        return accuracy

    def __call__(self, batch, images):
        if self.table is not None:
            return Logits(self.table.logits(batch))
        with torch.no_grad(), engine.autocast(images.device, self.precision):
            if self.needs_features:
                return self.network.forward_features(self.own(batch.images, images))
            return Logits(self.network(self.own(batch.images, images)).float())

    def own(self, pixels, images):
        """The images under this teacher's normalisation."""
        return images if self.shares_normalisation else data_loader.normalise(pixels, self.mean, self.std)

    @torch.inference_mode()
    def answer(self, pixels):
        """float32 (B, C) logits of uint8 images, in calls of one fixed size: an image's logits don't depend on its company."""
        logits = []
        for chunk in pixels.split(CALL_SIZE):
            short = CALL_SIZE - len(chunk)
            padded = torch.cat([chunk, chunk[:1].expand(short, -1, -1, -1)]) if short else chunk
            with engine.autocast(pixels.device, self.precision):
                logits.append(self.network(data_loader.normalise(padded, self.mean, self.std)).float()[: len(chunk)])
        return torch.cat(logits)


CALL_SIZE = 128


def folded(network):
    """A copy in evaluation mode with every batch norm folded into the convolution before it, where that changes nothing."""
    network = copy.deepcopy(network).eval()
    folded = copy.deepcopy(network)
    _fold(folded)
    probe = torch.rand(4, 3, 32, 32)
    with torch.inference_mode():
        same = torch.allclose(network(probe), folded(probe), rtol=1e-3, atol=1e-3)
    return folded if same else network


def _fold(module):
    previous = None
    for name, child in list(module.named_children()):
        if isinstance(child, nn.BatchNorm2d) and isinstance(previous and getattr(module, previous), nn.Conv2d):
            setattr(module, previous, fuse_conv_bn_eval(getattr(module, previous), child))
            setattr(module, name, nn.Identity())
        else:
            _fold(child)
        previous = name


# ---------------------------------------------------------------------------------------------- the table
ZERO = 6e-8  # float16's smallest number stands for a logit of 0, so that a row of zeros is one not yet filled
MODES = ("auto", "live", "lazy", "full")


class LogitsTable:
    """A teacher's logits over (image, view), float16 (N, V, C) in a sparse file mapped into memory; rows fill as they are asked for.

    A row is whole where its first and last number are not 0: there is no second file that a crash could leave in disagreement.
    Several processes may fill the same table at once: whoever comes second writes the same values.
    """

    def __init__(self, path, teacher, split, augment, say=lambda line: None):
        self.teacher, self.split, self.augment = teacher, split, augment
        self.path = Path(path)
        shape = (len(split), augmentation.VIEWS[augment], len(split.classes))
        with files.locked(self.path.with_suffix(".lock"), f"table {self.path}", wait=True, say=say):
            self.values = self._open(shape, say)

    def _open(self, shape, say):
        """The mapped file, made or made anew where it is absent, of another size, or disagrees with the teacher."""
        size = 2 * int(np.prod(shape))
        for attempt in ("as found", "made anew"):
            if not self.path.exists() or self.path.stat().st_size != size:
                if attempt == "as found" and self.path.exists():
                    say(f"warning: table {self.path} is damaged: rebuilding it")
                with files.replacing(self.path) as temporary, open(temporary, "wb") as file:
                    file.truncate(size)
            values = torch.from_numpy(np.memmap(self.path, np.float16, "r+", shape=shape))
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
        index, views, rows = index[chosen], views[chosen], rows[chosen].float()
        fresh = self._answer(index.to(self.split.images.device), views.to(self.split.images.device)).cpu()
        return bool(rows.isfinite().all()) and float((rows - fresh).norm() / fresh.norm()) < 0.1

    def _answer(self, index, views):
        return self.teacher.answer(augmentation.apply(self.augment, self.split.images[index], views))

    def logits(self, batch):
        """float32 (B, C) for a batch; what is not in the table yet is asked of the teacher and kept."""
        rows = self.values[batch.index, batch.views]
        missing = (~_filled(rows)).nonzero()[:, 0]
        if len(missing):
            rows[missing] = self._store(batch.index[missing], batch.views[missing], self.teacher.answer(batch.images[missing]))
        return rows.float()

    def _store(self, index, views, logits):
        rows = logits.to(self.values.dtype)  # beyond float16's range a logit becomes infinite and the loss says so
        rows[rows == 0] = ZERO
        self.values[index, views] = rows
        return rows

    def fill(self):
        """Ask the teacher for everything not in the table yet, view by view."""
        device = self.split.images.device
        for view in range(self.values.shape[1]):
            missing = (~_filled(self.values[:, view])).nonzero()[:, 0].to(device)
            for index in missing.split(8 * CALL_SIZE) if len(missing) else ():
                views = torch.full_like(index, view)
                self._store(index, views, self._answer(index, views))


def _filled(rows):
    return (rows[..., 0] != 0) & (rows[..., -1] != 0)


def attach_table(teacher, split, augment, mode, checkpoint_path, say):
    """Decide how the teacher's logits are had, say why, and give the teacher its table where it gets one."""
    views = augmentation.VIEWS[augment]
    size = 2 * len(split) * views * len(split.classes)
    path = Path(f"{checkpoint_path}.logits") / f"{augment}-{_binding(teacher, split, augment)}.f16"
    if teacher.needs_features:
        if mode not in ("auto", "live"):
            raise UserError(f"--teacher-cache {mode}: this method looks at features, and the table holds logits; use live")
        return say("logits    live: the method looks at the teacher's features")
    if mode == "live":
        return say("logits    live: asked of the teacher for every batch")
    if mode == "auto":
        mode = "full" if views == 1 else "lazy"
        free = _free_bytes(path.parent.parent)
        if free is None or free < size * 1.05:
            room = "that folder cannot be written" if free is None else f"{free / 1e9:.1f} GB are free"
            return say(f"logits    live: a table beside the teacher's checkpoint needs {_size(size)} and {room}")
    elif (free := _free_bytes(path.parent.parent)) is None or free < size:
        raise UserError(f"--teacher-cache {mode}: {path.parent.parent} has no room for the table of {_size(size)}; free some or use live")
    how = {"full": "filled now", "lazy": "filled as batches ask"}[mode]
    say(f"logits    table of {views} view{'s' if views > 1 else ''}, {_size(size)} at most, {how}: {path}")
    teacher.table = LogitsTable(path, teacher, split, augment, say)
    if mode == "full":
        teacher.table.fill()
    return None


def _binding(teacher, split, augment):
    """What a table's name is bound to: weights, images and their order, normalisation, views."""
    return checkpoint.digest(teacher.weights_digest, split.digest(), list(teacher.mean), list(teacher.std), augment)[:16]


def _free_bytes(folder):
    if not os.access(folder, os.W_OK):
        return None
    with contextlib.suppress(OSError):
        status = os.statvfs(folder)
        return status.f_bavail * status.f_frsize
    return None


def _size(count):
    return f"{count / 1e9:.1f} GB" if count > 1e9 else f"{count / 1e6:.0f} MB"
