"""Splits of labelled images, whole in memory, and their batches in seeded order.

    plan = epoch_plan(train, "crop-flip", seed=1, epoch=0)
    for rows in step_rows(len(train), 128):
        batch = Batch(train, "crop-flip", plan.order[rows], plan.views[rows])

Order and views come from two generators seeded by (seed, epoch), so any epoch can be rebuilt alone, from any step on,
on any device. Legend: N images of a split, B of a batch, H W their size.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn import functional as F

from takd.errors import UserError
from takd.files import digest
from takd.images import augmentation


class Transform(NamedTuple):
    """What a network expects of its input: mean and deviation per channel, of pixels in 0..1, and image size."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int

    def __call__(self, images: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """uint8 (B, 3, H, W) -> (B, 3, size, size), channels last: resized where they differ (bilinear, antialiased),
        then (pixel / 255 - mean) / std as torchvision's ToTensor and Normalize, rounded to `dtype`."""
        scale, shift = _constants(self.mean, self.std, images.device)
        if images.shape[-1] != self.image_size:
            size = self.image_size, self.image_size
            images = F.interpolate(images.float(), size, mode="bilinear", antialias=True)
        return images.to(torch.float32, memory_format=torch.channels_last).mul_(scale).add_(shift).to(dtype)


@functools.lru_cache
@torch.inference_mode(False)  # cached: first used in an evaluation, they would be inference tensors in training too
def _constants(mean, std, device):
    """Factor and offset per channel, (2, 1, 3, 1, 1); made once, as copying them to a GPU would make each step wait."""
    scale = [1 / (255 * deviation) for deviation in std]
    shift = [-average / deviation for average, deviation in zip(mean, std, strict=True)]
    return torch.tensor([scale, shift]).reshape(2, 1, 3, 1, 1).to(device)


@dataclasses.dataclass(frozen=True)
class Split:
    """Labelled images, whole and on one device; the pixels on the host where a GPU has no room for them."""

    name: str  # such as "cifar100/train"
    images: torch.Tensor  # uint8 (N, 3, H, W)
    labels: torch.Tensor  # int64 (N,)
    classes: tuple[str, ...]  # class names, by label
    transform: Transform  # of the input of networks trained on it
    files: Sequence[str] = ()  # the original images, where they came from files

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def part(self) -> str:
        """Which of the data set's: "train", "test", or "val" where a folder has that in place of test."""
        return self.name.rpartition("/")[2].partition("-")[0]

    @property
    def device(self) -> torch.device:
        """Where batches are."""
        return self.labels.device

    @property
    def image_size(self) -> int:
        return self.transform.image_size

    def to(self, device: str | torch.device) -> "Split":
        device = torch.device(device)
        fits = device.type != "cuda" or self.images.nbytes < 0.6 * torch.cuda.mem_get_info(device)[0]
        images = self.images.to(device) if fits else self.images
        return dataclasses.replace(self, images=images, labels=self.labels.to(device))

    def take(self, index: torch.Tensor) -> torch.Tensor:
        """uint8 (B, 3, H, W): the images of these rows, on the device."""
        return self.images[index.to(self.images.device)].to(self.device)

    def subset(self, index: torch.Tensor | slice, name: str) -> "Split":
        files = tuple(self.files[row] for row in torch.arange(len(self))[index].tolist()) if self.files else ()
        return dataclasses.replace(self, name=name, images=self.images[index], labels=self.labels[index], files=files)

    @functools.cached_property
    def digest(self) -> str:
        """Digest of the pixels and labels, which a table of logits is bound to."""
        return digest(self.images, self.labels)


class Batch:
    """Rows of a split under an augmentation. The pixels are gathered when they are first needed, on its device."""

    def __init__(self, split: Split, augment: str, index: torch.Tensor, views: torch.Tensor):
        self.split, self.augment = split, augment
        self.index = index  # int64 (B,), rows of the split
        self.views = views  # int64 (B,), see takd/images/augmentation.py

    def __len__(self) -> int:
        return len(self.index)

    @functools.cached_property
    def images(self) -> torch.Tensor:
        """uint8 (B, 3, H, W), augmented."""
        return augmentation.apply(self.augment, self.split.take(self.index), self.views)

    @functools.cached_property
    def labels(self) -> torch.Tensor:
        """int64 (B,)."""
        return self.split.labels[self.index]


# ---------------------------------------------------------------------------------------------- seeded order
def generator(seed: int, epoch: int, purpose: str) -> torch.Generator:
    """A CPU generator for one purpose of one epoch. Hashed, so that neighbouring seeds and epochs share nothing."""
    number = hashlib.blake2b(f"{seed} {epoch} {purpose}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(number, "little") >> 1)


class EpochPlan(NamedTuple):
    """The order of the images in one epoch, and their views."""

    order: torch.Tensor  # int64 (N,), rows of the split
    views: torch.Tensor  # int64 (N,)


def epoch_plan(split: Split, augment: str, seed: int, epoch: int) -> EpochPlan:
    """Every image once, in an order and under views drawn on the CPU from (seed, epoch): the same on every device."""
    count, images = augmentation.VIEWS[augment] or 2**62, len(split)
    order = torch.randperm(images, generator=generator(seed, epoch, "order"))
    views = torch.randint(count, (images,), generator=generator(seed, epoch, "views"))
    return EpochPlan(order.to(split.device), views.to(split.device))


def step_rows(images: int, batch_size: int, first_step: int = 0) -> list[slice]:
    """The rows of an epoch's plan that each step takes, the last partial one included."""
    starts = range(first_step * batch_size, images, batch_size)
    return [slice(start, min(start + batch_size, images)) for start in starts]


# ---------------------------------------------------------------------------------------- parts of a split
def hold_out(train: Split, amount: float) -> tuple[Split, Split]:
    """(train, validation): `amount` below 1 is a share, else a number of images, the same share of each class.

    The same images whatever the seed, so that a teacher and its students leave out the same ones.
    """
    count = round(amount * len(train)) if amount < 1 else int(amount)
    rest, prefix = len(train) - count, train.name.split("/")[0]
    if not 0 < count < len(train):
        raise UserError(f"--validation-split {amount:g} leaves {rest} of {len(train)} images to train on")
    chosen = _stratified_order(train)
    kept = train.subset(chosen[count:].sort().values, f"{prefix}/train-{rest}")
    return kept, train.subset(chosen[:count].sort().values, f"{prefix}/validation-{count}")


def fewer(split: Split, count: int) -> Split:
    """`count` images of a split, the same share of each class, the same ones whatever the seed."""
    if count > len(split):
        flag, purpose = ("train", "train on") if split.part == "train" else ("test", "test")
        raise UserError(f"--{flag}-images {count}: there are {len(split)} images to {purpose}")
    name = f"{split.name.split('/')[0]}/{split.part}-{count}"
    return split.subset(_stratified_order(split)[:count].sort().values, name)


def _stratified_order(train):
    """All rows, ordered so that every prefix has the classes in their proportions."""
    shuffled = torch.randperm(len(train), generator=generator(0, 0, "validation"))
    # Rank of each image within its class, as a share: the smallest shares of every class come first.
    by_class = shuffled[train.labels[shuffled].argsort(stable=True)]
    sizes = torch.bincount(train.labels, minlength=len(train.classes))
    starts = sizes.cumsum(0) - sizes
    ordered = train.labels[by_class]
    share = (torch.arange(len(train)) - starts[ordered]) / sizes[ordered]
    return by_class[share.argsort(stable=True)]


def class_order(recorded: Sequence[str] | None, classes: Sequence[str]) -> list[int] | None:
    """The place of each class in a file with the same classes in another order; None if nothing needs reordering.

    A file that names no classes, or other ones, is matched by position.
    """
    if not recorded or list(recorded) == list(classes) or sorted(recorded) != sorted(classes):
        return None
    return [list(recorded).index(name) for name in classes]
