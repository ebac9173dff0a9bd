"""Data-parallel training: several processes, each with its part of every batch, compute what one process would, up to
rounding.

    world = join("cpu")                      World() alone is a single process, which communicates nothing
    ddp_student, ddp_method = world.wrap(student, method)

Gradients are averaged by PyTorch's DistributedDataParallel, NCCL's on GPUs and gloo's on the CPU; batch norm is over
the whole batch; control flow is agreed upon over a second gloo group, which may wait for days (rank 0 downloads, fills
tables and saves while the others wait). Rank 0 alone writes. launch.py starts the processes.
"""

import datetime
import inspect
import os
import socket
import sys
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch
from torch import distributed, nn
from torch.distributed.rendezvous import rendezvous

from takd import process
from takd.errors import first_line
from takd.images.split import step_rows
from takd.run import launch

TIMEOUT = datetime.timedelta(days=7)


class Part(NamedTuple):
    """One process's part of a step: contiguous rows of the epoch's plan, split as evenly as possible.

    A step with fewer images than processes is not split: each process takes all of it.
    """

    rows: slice
    images: int  # of the whole step
    share: float  # its values times this, summed over the processes, are the step's
    weight: float  # its loss times this, averaged over the processes, is the step's

    @property
    def whole(self) -> bool:
        return self.rows.stop - self.rows.start == self.images


def part_of(step: slice, rank: int = 0, size: int = 1) -> Part:
    """The Part of process `rank` of `size` in a step over these rows."""
    images = step.stop - step.start
    if images < size:
        return Part(step, images, 1 / size, 1.0)
    start, stop = images * rank // size, images * (rank + 1) // size
    rows, share = slice(step.start + start, step.start + stop), (stop - start) / images
    return Part(rows, images, share, (stop - start) * size / images)


class World:
    """One of `size` processes. With size 1 the methods communicate nothing."""

    def __init__(self, rank: int = 0, size: int = 1, store: Any = None, control: Any = None):
        self.rank, self.size = rank, size
        self.store, self.control = store, control
        self.is_rank_zero = rank == 0  # the process that writes
        self.replicated = False  # whether this step's batch is too small to split: every process takes all of it

    def parts(self, images: int, batch_size: int, first_step: int = 0) -> list[Part]:
        """This process's Part of each step of an epoch."""
        return [part_of(rows, self.rank, self.size) for rows in step_rows(images, batch_size, first_step)]

    def track_split(self, part: Part) -> None:
        """Before a step: batch norm needs to know whether the batch is split."""
        self.replicated = part.whole

    def broadcast(self, work: Callable[[], Any]) -> Any:
        """What `work()` returns on rank 0, in every process. An error in it ends rank 0, and thereby the others."""
        result = [work() if self.is_rank_zero else None]
        if self.size > 1:
            distributed.broadcast_object_list(result, src=0, group=self.control)
        return result[0]

    def rank_zero_first(self, work: Callable[[], Any]) -> Any:
        """`work()` in every process, first in rank 0: the others find what it downloaded, decoded or filled."""
        result = work() if self.is_rank_zero else None
        self.barrier()
        return result if self.is_rank_zero else work()

    def barrier(self) -> None:
        if self.size > 1:
            distributed.barrier(group=self.control)

    def all_reduce_max(self, value: int) -> int:
        """The greatest of the processes' whole numbers."""
        if self.size == 1:
            return value
        tensor = torch.tensor(value)
        distributed.all_reduce(tensor, distributed.ReduceOp.MAX, group=self.control)
        return int(tensor)

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of the processes' tensors (of one shape, on the training device), in place."""
        if self.size > 1:
            distributed.all_reduce(tensor)
        return tensor

    def wrap(self, student: nn.Module, method: nn.Module) -> tuple[Any, Any]:
        """(student, method) to train with: gradients are the mean over the processes, batch norm is over all images.

        The given modules are still the ones saved and evaluated. Only their batch norms change class, in place.
        """
        if self.size == 1:
            return student, method
        modules: list[Any] = [*student.modules(), *method.modules()]
        for module in modules:
            if type(module) is nn.BatchNorm2d:
                vars(module).update(world=self, process_group=None)
                module.__class__ = SyncBatchNorm2d if module.weight.is_cuda else SharedBatchNorm2d  # type: ignore
        has_parameters = any(parameter.requires_grad for parameter in method.parameters())
        return DDPStudent(student), _ddp(method) if has_parameters else method

    def claims_error(self) -> bool:
        """Whether this process is the one to print an error: the first that failed. Most errors occur in all."""
        try:
            return self.size == 1 or self.store.add("failed", 1) == 1
        except RuntimeError:  # the store ended with rank 0, which has printed the error
            return False

    def is_peer_failure(self, error: Exception) -> bool:
        """Whether an error is only the consequence of another process's end."""
        return self.size > 1 and (isinstance(error, distributed.DistError) or "gloo" in str(error).lower())

    def leave(self) -> None:
        """Called by all processes when everything is done."""
        if self.size > 1:
            distributed.destroy_process_group()

    def end(self, status: int) -> NoReturn:
        """End this process with an exit status, whatever the others do."""
        if self.size == 1:
            sys.exit(status)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # connections to processes that are gone cannot be closed in order: torch aborts, or waits


def join(device: str) -> World:
    """The World that the environment describes; waits until all its processes are there. `device` is 'cuda' or 'cpu'.

    Raises ConnectionError if they cannot connect.
    """
    place = process.place()
    if place.size == 1:
        return World()
    if device == "cuda":
        torch.cuda.set_device(place.local_rank)
    try:
        store, rank, size = _local_store(place) or next(rendezvous("env://"))
        distributed.init_process_group("nccl" if device == "cuda" else "gloo", store=store, rank=rank, world_size=size)
        control = distributed.new_group(backend="gloo", timeout=TIMEOUT)
    except (OSError, RuntimeError) as error:
        why = first_line(error)
        raise ConnectionError(f"process {place.rank} of {place.size} cannot reach the others: {why}") from None
    return World(rank, size, store, control)


def _local_store(place: process.Place) -> tuple[Any, int, int] | None:
    """(store, rank, size) of a group that launch.py started: PyTorch's own store would listen on all addresses."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if address != launch.ADDRESS or "TORCHELASTIC_RUN_ID" in os.environ:
        return None
    first = place.rank == 0
    listening: dict[str, Any] = {"master_listen_fd": socket.create_server((address, port)).detach()} if first else {}
    return distributed.TCPStore(address, port, place.size, first, **listening), place.rank, place.size


class DDPStudent:
    """A student under DDP, with the student's own interface."""

    def __init__(self, student: nn.Module):
        self.forward_features = _ddp(_ForwardFeatures(student))


class _ForwardFeatures(nn.Module):
    """DDP calls forward, training needs forward_features."""

    def __init__(self, student):
        super().__init__()
        self.student = student

    def forward(self, images):
        return self.student.forward_features(images)


def _ddp(module):
    # Buffers need no broadcast in each step: batch norm's are of the whole batch, and so the same in every process.
    known = inspect.signature(nn.parallel.DistributedDataParallel).parameters
    name = next(name for name in ("forward_sync_buffers", "broadcast_buffers") if name in known)  # the newer name first
    ddp: Any = nn.parallel.DistributedDataParallel
    return ddp(module, gradient_as_bucket_view=True, **{name: False})


class SyncBatchNorm2d(nn.SyncBatchNorm):
    """PyTorch's batch norm over the images of all processes, for GPUs."""

    world: World

    def forward(self, x):
        return nn.BatchNorm2d.forward(self, x) if self.world.replicated else super().forward(x)


class SharedBatchNorm2d(nn.BatchNorm2d):
    """Batch norm over the images of all processes, also on the CPU, where torch's SyncBatchNorm does not run."""

    world: World

    def forward(self, x):
        if not self.training or self.world.replicated:
            return super().forward(x)
        wide = x.float()
        channels, count = x.shape[1], x.numel() // x.shape[1]
        variance, mean = torch.var_mean(wide, dim=(0, 2, 3), correction=0)
        # Moments about the running mean, equal in all processes: about 0 their difference would lose digits.
        mean = mean - self.running_mean
        moments = torch.cat([count * mean, count * (variance + mean * mean), mean.new_full((1,), count)])
        moments = _AllReduceSum.apply(moments)
        images = moments[-1]
        mean, square = moments[:channels] / images, moments[channels:-1] / images
        variance = (square - mean * mean).clamp_min(0)
        mean = mean + self.running_mean
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (images / (images - 1)), self.momentum)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        shift = self.bias - mean * scale
        return (wide * scale[:, None, None] + shift[:, None, None]).to(x.dtype)


class _AllReduceSum(torch.autograd.Function):
    """The sum over processes, of tensors forward and of their gradients backward."""

    @staticmethod
    def forward(ctx, tensor):
        tensor = tensor.clone()
        distributed.all_reduce(tensor)
        return tensor

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous().clone()
        distributed.all_reduce(gradient)
        return gradient
