"""Augmentation of batches. Where it is a finite set of numbered views, a teacher's logits are a table over (image,
view).

`none` has one view and `flip` two, the image and its mirror. `crop-flip` (zero padding of 4 pixels, a random crop, a
mirror with probability 1/2: He et al. 2016) has 9 x 9 x 2 = 162: view = (row * 9 + column) * 2 + mirrored, row and
column in 0..8 and 4 in the middle; `crop-flip-reflect` pads by reflection instead of with zeros.
`rotate-crop-flip` draws torchvision's transforms at random: there a view number is the seed of the draw.
"""

import functools
from typing import Any

import torch
from torch.nn import functional as F

from takd.config.names import VIEWS as VIEWS

PADDING = 4
OFFSETS = 2 * PADDING + 1


def apply(augment: str, images: torch.Tensor, views: torch.Tensor) -> torch.Tensor:
    """The numbered views of a batch, where VIEWS has a number of them.

    images: uint8 (B, 3, H, W); views: int64 (B,), on the same device. Returns uint8 (B, 3, H, W), pixel for pixel what
    torchvision's pad, crop and hflip give for one image at a time.
    """
    if augment == "none":
        return images
    mirrored = (views % 2).bool()[:, None, None, None]
    if augment != "flip":
        height, width = images.shape[2:]
        padded = _reflected(images) if augment == "crop-flip-reflect" else F.pad(images, (PADDING,) * 4)
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # (B, 3, 9, 9, H, W), without a copy
        place = views // 2
        batch = torch.arange(len(images), device=images.device)
        images = windows[batch, :, place // OFFSETS, place % OFFSETS]  # (B, 3, H, W)
    return torch.where(mirrored, images.flip(3), images)


def _reflected(images: torch.Tensor) -> torch.Tensor:
    """Padded by mirroring, the border's own pixels not repeated. PyTorch's reflection padding has no uint8."""

    def places(length: int) -> torch.Tensor:
        steps = torch.arange(-PADDING, length + PADDING, device=images.device).abs()
        return torch.where(steps < length, steps, 2 * (length - 1) - steps)

    height, width = map(places, images.shape[2:])
    return images[:, :, height][..., width]


def random_view(image: torch.Tensor, seed: int, size: int) -> torch.Tensor:
    """rotate-crop-flip of one image: a rotation by up to 30 degrees, a random resized crop, a horizontal flip.

    image: uint8 (3, H, W) of any size. Returns uint8 (3, size, size). PyTorch's global generator is left as it was.
    """
    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(int(seed))
        return transforms(size)(image)


@functools.cache
def transforms(size: int) -> Any:
    """rotate-crop-flip as torchvision's transforms of uint8 tensors (3, H, W)."""
    from torchvision.transforms import InterpolationMode, v2

    return v2.Compose(
        [v2.RandomRotation(30, InterpolationMode.BILINEAR), v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()]
    )
