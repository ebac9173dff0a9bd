"""The batches of an epoch; those of random augmentation are made by worker processes."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch

from takd.images import augmentation
from takd.images.folder import upright_rgb
from takd.images.split import Batch, EpochPlan, Split
from takd.process import cores, ignore_stop_signals


def batches(split: Split, augment: str, plan: EpochPlan, steps: Sequence[slice], workers: int = 0) -> Iterator[Batch]:
    """A Batch for each of `steps`, which are rows of the plan.

    Random augmentation runs in `workers` processes, or here if 0; the pixels do not depend on their number.
    """
    if augmentation.VIEWS[augment] is not None and split.images.device == split.device:
        for rows in steps:
            yield Batch(split, augment, plan.order[rows], plan.views[rows])
        return
    if augmentation.VIEWS[augment] is None:
        augment, pixels = "none", _random_views(split, plan, steps, workers)  # they come augmented
    else:
        order = plan.order.cpu()
        pixels = (split.images[order[rows]] for rows in steps)
    for rows, images in zip(steps, _copied(pixels, split.device), strict=True):
        batch = Batch(split, augment, plan.order[rows], plan.views[rows])
        batch.images = augmentation.apply(augment, images, batch.views)
        yield batch


def _copied(pixels: Iterable[torch.Tensor], device: torch.device) -> Iterator[torch.Tensor]:
    """Tensors of the host on the device: each crosses to a GPU while the step before it computes."""
    if device.type != "cuda":
        yield from (images.to(device) for images in pixels)
        return
    crossing, computing = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    for images in pixels:
        with torch.cuda.stream(crossing):
            copy = images.pin_memory().to(device, non_blocking=True)
        computing.wait_stream(crossing)
        copy.record_stream(computing)  # its memory is not free before the step has read it
        yield copy


def usual_workers() -> int:
    """Worker processes for random augmentation where the user gives no number."""
    return min(8, cores())


class _RandomViews(torch.utils.data.Dataset):
    """The pixels of (row, seed): of the original file where there is one, else of the split's own image."""

    def __init__(self, split):
        self.files, self.images, self.size = split.files, None if split.files else split.images.cpu(), split.image_size
        augmentation.transforms(self.size)  # imported once, not by every worker of every epoch

    def __getitem__(self, place):
        row, seed = place
        if self.images is not None:
            return augmentation.random_view(self.images[row], seed, self.size)
        pixels = np.array(upright_rgb(self.files[row])[0]).transpose(2, 0, 1)
        return augmentation.random_view(torch.as_tensor(pixels), seed, self.size)


def _random_views(split, plan, steps, workers):
    """uint8 (B, 3, H, W) for each step, from torch's DataLoader."""
    places = list(zip(plan.order.tolist(), plan.views.tolist(), strict=True))
    loader = torch.utils.data.DataLoader(
        _RandomViews(split),
        batch_sampler=[places[rows] for rows in steps],
        num_workers=workers,
        worker_init_fn=ignore_stop_signals,
        multiprocessing_context="fork" if workers else None,
        generator=torch.Generator(),  # its own: PyTorch's global one goes on as if there were no loader
    )
    return iter(loader)
