"""A frozen teacher: evaluation mode, no gradients, batch norm folded into the convolutions, scored before it
teaches."""

import contextlib
import copy
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from takd.distill import evaluation
from takd.distill.logit_table import LogitTable, choose_cache, features_cache, table_dtype
from takd.distill.methods import Features, Logits
from takd.errors import UserError
from takd.files import PERCENT, Say, digest, read_json, save_json
from takd.images.augmentation import VIEWS
from takd.images.split import Batch, Split, Transform, generator

Progress = Callable[[str, int], contextlib.AbstractContextManager[Callable[[int], object]]]
Rewrite = Callable[[nn.Module, torch.dtype], None]  # of a network, in place, into a faster one of the same function


def no_progress(title: str, images: int) -> contextlib.AbstractContextManager[Callable[[int], object]]:
    return contextlib.nullcontext(lambda images: None)


class Teacher:
    """teacher(batch, images) -> Logits, or Features where the method needs them.

    `images` are the student's normalised images, used where the teacher's own transform is the same. `precision` is the
    arithmetic that it teaches in; it is scored in float32. `pack` rewrites the frozen copies for this processor.
    """

    def __init__(
        self,
        network: nn.Module,
        transform: Transform,
        split: Split,
        precision: str,
        needs_features: bool = False,
        pack: Rewrite | None = None,
    ):
        self.transform, self.precision, self.needs_features = transform, precision, needs_features
        self.shares_transform = transform == split.transform
        self.weights_digest = digest(network.state_dict())
        size = transform.image_size
        self.exact: Any = freeze(network, split.device, torch.float32, size, pack)
        self.network: Any = self.exact
        if precision == "bf16":
            self.network = freeze(network, split.device, torch.bfloat16, size, pack)
        # Images of a call that fills a table: few enough for a CPU's cache, enough to fill a GPU.
        self.call_size = max(1, (128 if split.device.type == "cpu" else 2048) * 64**2 // max(64, size) ** 2)
        self.table: LogitTable | None = None
        self.label = ""  # in what is printed, which one of several it is
        self.path: list[str] = []  # the networks that it learned from, then itself
        self.accuracy_percent: float | None = None  # once it is scored

    def __call__(self, batch: Batch, images: torch.Tensor) -> Logits | Features:
        if self.table is not None:
            return Logits(self.table.logits(batch))
        if not self.shares_transform:
            images = self.transform(batch.images, evaluation.input_dtype(self.precision))
        with torch.no_grad(), evaluation.autocast(images.device, self.precision):
            if self.needs_features:
                return self.network.forward_features(images)
            return Logits(self.network(images).float())

    @torch.inference_mode()
    def answer(self, pixels: torch.Tensor) -> torch.Tensor:
        """float32 (B, C) logits of uint8 images, in calls of one size: an image's logits don't depend on its batch."""
        logits = []
        for chunk in pixels.split(self.call_size):
            short = self.call_size - len(chunk)
            padded = torch.cat([chunk, chunk[:1].expand(short, -1, -1, -1)]) if short else chunk
            with evaluation.autocast(pixels.device, self.precision):
                images = self.transform(padded, evaluation.input_dtype(self.precision))
                logits.append(self.network(images).float()[: len(chunk)])
        return torch.cat(logits)

    def choose_table(self, split: Split, augment: str, mode: str, checkpoint: str) -> tuple[str, str, Path]:
        """('full', 'lazy' or 'live', a line with the reason, the table's file) for --teacher-cache `mode`. Writes
        nothing; a UserError where the table is not possible."""
        dtype = table_dtype(VIEWS[augment] or 0)
        path = _cache_folder(checkpoint) / f"{augment}-{self.binding(split, augment)}.{dtype.name}"
        if self.needs_features:
            return *features_cache(mode), path
        return *choose_cache(split, augment, mode, path), path

    def attach_table(self, split: Split, augment: str, mode: str, checkpoint: str, say: Say) -> None:
        """Keep the logits of a split in a table beside the checkpoint where that is possible and useful."""
        asked = mode
        mode, line, path = self.choose_table(split, augment, mode, checkpoint)
        say(f"logits    {self.label}{line}")
        if mode != "live":
            try:
                self.table = LogitTable(path, self, split, augment, say)
            except OSError as error:  # a quota, a read-only folder
                why = f"{path} cannot be written ({error.strerror})"
                if asked != "auto":
                    raise UserError(f"--teacher-cache {asked}: {why}; free some room or use live") from None
                say(f"logits    live: {why}")
        if self.table and mode == "full":
            self.table.fill(say)

    def binding(self, split: Split, *more: str) -> str:
        """Digest of what a table or a score depends on: weights, images in order, normalisation, input size."""
        mean, std, size = self.transform
        resized = [size] if size != split.images.shape[-1] else []
        return digest(self.weights_digest, split.digest, list(mean), list(std), *resized, *more)[:16]

    def score(
        self,
        split: Split,
        checkpoint: str,
        recorded_percent: float | None,
        say: Say,
        any_teacher: bool = False,
        progress: Progress = no_progress,
    ) -> float:
        """Accuracy in percent on a split, computed once: `keep_score` keeps it beside the checkpoint.

        Unless `any_teacher`, one no better than guessing, as one with wrongly loaded weights is, is refused.
        `progress(title, images)` gives a function that is told the images of each batch.
        """
        file = _cache_folder(checkpoint) / f"score-{self.binding(split)}.json"
        try:
            kept = read_json(file, {"accuracy_percent": PERCENT}, "it is measured again")
        except UserError:
            kept = None
        if kept:
            accuracy = kept["accuracy_percent"]
        else:
            with progress("teacher, test", len(split)) as advance:
                logits = evaluation.predict(self.exact, split, self.transform, advance=advance)
            accuracy = evaluation.score(logits, split.labels)["accuracy_percent"]
        chance = evaluation.chance_percent(split.labels)
        if not accuracy > chance and not any_teacher:
            if recorded_percent is None:
                why = "it was not trained, or with other images or another normalisation"
                fix = "train it first (leave out --teacher-checkpoint)"
            elif recorded_percent > chance:
                why = f"its file records {recorded_percent:.2f} %, so these are other images or other weights"
                fix = "train it on these images (leave out --teacher-checkpoint)"
            else:
                why = f"its file records {recorded_percent:.2f} % too: it has hardly been trained"
                fix = "train it for more epochs"
            raise UserError(
                f"the teacher {checkpoint} scores {accuracy:.2f} % on {split.name}, no better than guessing: {why}; "
                f"{fix}, or try the command out with --any-teacher"
            )
        self._score = file, {"split": split.name, "images": len(split), "accuracy_percent": accuracy}
        records = "no accuracy" if recorded_percent is None else f"{recorded_percent:.2f} %"
        say(f"teacher   {self.label}{accuracy:.2f} % on {split.name} (its file records {records})")
        if abs(accuracy - (recorded_percent or accuracy)) > 0.5:
            question = "is it the same data set, whole, and the same normalisation?"
            say(f"warning: these differ by more than rounding: {question}")
        self.accuracy_percent = accuracy
        return accuracy

    def keep_score(self) -> None:
        """Write what `score` found, where that is possible: once nothing can refuse the run any more."""
        file, contents = self._score
        if os.access(file.parent.parent, os.W_OK) and not file.exists():
            file.parent.mkdir(exist_ok=True)
            save_json(contents, file)


class Teachers:
    """Several teachers of one student, each with its own transform, weights and table: teachers(batch, images) ->
    Logits (K, B, C), in their order."""

    def __init__(self, members: Sequence[Teacher]):
        self.members = members

    def __call__(self, batch: Batch, images: torch.Tensor) -> Logits:
        return Logits(torch.stack([teacher(batch, images).logits for teacher in self.members]))


def members(teacher: Teacher | Teachers | None) -> Sequence[Teacher]:
    """The teachers of a run: none, one or several."""
    return teacher.members if isinstance(teacher, Teachers) else [teacher] if teacher else []


def path_of(teachers: Sequence[Teacher], names: Sequence[str]) -> list[str]:
    """What a student of these teachers, so named, has learned from: of several, the longest of their paths, which ends
    with all of their names as one."""
    if len(teachers) < 2:
        return [network for teacher in teachers for network in teacher.path]
    longest = max(teachers, key=lambda teacher: len(teacher.path))
    return [*longest.path[:-1], " + ".join(names)]


def _cache_folder(checkpoint):
    return Path(f"{checkpoint}.logits")


# -------------------------------------------------------------------------------------------------- freezing
def freeze(
    network: nn.Module, device: torch.device, dtype: torch.dtype, image_size: int = 32, pack: Rewrite | None = None
) -> nn.Module:
    """A copy for inference only: batch norm folded into the convolutions, then `pack` applied where it is given, and
    else weights rounded to `dtype`, which autocast would do in every call.

    Each rewrite is kept only where the copy still computes the same logits: another architecture is merely slower.
    """
    best: Any = copy.deepcopy(network).eval().requires_grad_(False)
    probe = torch.rand(8, 3, image_size, image_size, generator=generator(0, 0, "probe"))
    with torch.inference_mode():
        expected = best(probe)
    for rewrite in (fold_batch_norm, pack or round_weights):
        low = rewrite is not fold_batch_norm and dtype == torch.bfloat16
        rewritten = copy.deepcopy(best)
        try:
            rewrite(rewritten, dtype)
            with torch.inference_mode(), evaluation.autocast(torch.device("cpu"), "bf16" if low else "fp32"):
                close = (rewritten(probe).float() - expected).norm() <= (5e-2 if low else 1e-3) * expected.norm()
        except (RuntimeError, AttributeError, TypeError):  # another torch's oneDNN, a network that uses its own modules
            break
        if not close:
            break
        best = rewritten
    return best.to(device, memory_format=torch.channels_last)


def fold_batch_norm(module: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Each batch norm into the convolution registered before it, in place."""
    previous = None
    for name, child in list(module.named_children()):
        if isinstance(child, nn.BatchNorm2d) and previous and isinstance(conv := getattr(module, previous), nn.Conv2d):
            setattr(module, previous, fuse_conv_bn_eval(conv, child))
            setattr(module, name, nn.Identity())
        else:
            fold_batch_norm(child, dtype)
        previous = name


def round_weights(network: nn.Module, dtype: torch.dtype) -> None:
    """The weights and biases of convolutions and linear layers to `dtype`, in place."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.to(dtype)
