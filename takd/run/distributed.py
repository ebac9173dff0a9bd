"""Data-parallel training: several processes, each with its part of every batch, compute what one process would, to rounding.

    world = join("cpu")                      World() alone: one process, and nothing here does anything
    learner, lesson = world.wrap(student, method)

Gradients are averaged by PyTorch's DistributedDataParallel, NCCL's on GPUs and gloo's on the CPU; batch norm is over the whole
batch; what decides where all go next is agreed upon over a second gloo group, which may wait for days (rank 0 downloads, fills
tables and saves while the others wait). Rank 0 alone writes. launcher.py starts the processes.
"""

import datetime
import inspect
import os
import sys

import torch
from torch import distributed, nn
from torch.distributed.rendezvous import rendezvous

from takd.run import launch as launcher

PATIENCE = datetime.timedelta(days=7)


class World:
    """One of `size` processes; with size 1 every method returns what it was given, or does it, and talks to nobody."""

    def __init__(self, rank=0, size=1, store=None, control=None):
        self.rank, self.size = rank, size
        self.store, self.control = store, control
        self.copied = False  # whether this step's batch, too small to split, is whole in every process

    @property
    def first(self):
        """Whether this process is the one that writes."""
        return self.rank == 0

    def shared(self, work):
        """What `work()` returns on rank 0, in every process. An error of it ends rank 0, and thereby the others."""
        if self.size == 1:
            return work()
        result = [work() if self.first else None]
        distributed.broadcast_object_list(result, src=0, group=self.control)
        return result[0]

    def in_turn(self, work):
        """`work()` of every process, rank 0's before the others': they find what it downloaded, decoded or filled."""
        result = work() if self.first else None
        self.barrier()
        return result if self.first else work()

    def barrier(self):
        if self.size > 1:
            distributed.barrier(group=self.control)

    def highest(self, value):
        """The greatest of the processes' whole numbers."""
        if self.size == 1:
            return value
        value = torch.tensor(value)
        distributed.all_reduce(value, distributed.ReduceOp.MAX, group=self.control)
        return int(value)

    def total(self, tensor):
        """The sum of the processes' tensors (of one shape, on the training device), in place."""
        if self.size > 1:
            distributed.all_reduce(tensor)
        return tensor

    def wrap(self, student, method):
        """(student, method) to train with: gradients are the mean over the processes, batch norm is over all their images.

        The modules given stay what is saved and evaluated. Only their batch norms change class, in place.
        """
        if self.size == 1:
            return student, method
        for module in (*student.modules(), *method.modules()):
            if type(module) is nn.BatchNorm2d:
                module.__class__, module.world = SharedBatchNorm2d, self
        learns = any(parameter.requires_grad for parameter in method.parameters())
        return Learner(student), _averaging(method) if learns else method

    def noting(self, batches):
        """The batches; while one is trained on, batch norm knows whether it was split."""
        if self.size == 1:
            return batches
        return self._noting(batches)

    def _noting(self, batches):
        for batch in batches:
            self.copied = batch.part.whole
            yield batch

    def speaks(self):
        """Whether this process is the one to print an error: the first that failed. All meet most errors alike."""
        if self.size == 1:
            return True
        try:
            return self.store.add("failed", 1) == 1
        except RuntimeError:  # the store went with the process that kept it, which has spoken
            return False

    def lost(self, error):
        """Whether an error only says that another process has ended."""
        return self.size > 1 and (isinstance(error, distributed.DistError) or "gloo" in str(error).lower())

    def leave(self):
        """For all, when everything is done."""
        if self.size > 1:
            distributed.destroy_process_group()

    def end(self, status):
        """End this process with an exit status, whatever the others do."""
        if self.size == 1:
            sys.exit(status)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # connections to processes that are gone cannot be closed in order: torch aborts, or waits


def join(device):
    """The World that the environment describes; waits until all its processes are there. `device` is 'cuda' or 'cpu'.

    Raises ConnectionError where they do not come together.
    """
    place = launcher.place()
    if place.size == 1:
        return World()
    if device == "cuda":
        torch.cuda.set_device(place.local_rank)
    try:
        store, rank, size = next(rendezvous("env://"))
        distributed.init_process_group("nccl" if device == "cuda" else "gloo", store=store, rank=rank, world_size=size)
        control = distributed.new_group(backend="gloo", timeout=PATIENCE)
    except RuntimeError as error:
        raise ConnectionError(f"process {place.rank} of {place.size} does not reach the others: {str(error).splitlines()[0]}") from None
    return World(rank, size, store, control)


class Learner:
    """A student under DDP: to engine.train_epoch what the student itself is."""

    def __init__(self, student):
        self.train, self.averaged = student.train, _averaging(_Features(student))

    def forward_features(self, images):
        return self.averaged(images)


class _Features(nn.Module):
    """DDP calls forward, training wants forward_features."""

    def __init__(self, student):
        super().__init__()
        self.student = student

    def forward(self, images):
        return self.student.forward_features(images)


def _averaging(module):
    # Buffers need no broadcast in each step: batch norm's are of the whole batch, and so the same in every process.
    known = inspect.signature(nn.parallel.DistributedDataParallel).parameters
    buffers = {next(name for name in ("forward_sync_buffers", "broadcast_buffers") if name in known): False}  # its newer name, and the older
    return nn.parallel.DistributedDataParallel(module, gradient_as_bucket_view=True, **buffers)


class SharedBatchNorm2d(nn.BatchNorm2d):
    """Batch norm over the images of all processes. torch's SyncBatchNorm does the same, on GPUs alone."""

    def forward(self, x):
        if not self.training or self.world.copied:
            return super().forward(x)
        wide = x.float()
        channels, count = x.shape[1], x.numel() // x.shape[1]
        variance, mean = torch.var_mean(wide, dim=(0, 2, 3), correction=0)
        # Moments about the running mean, which all share: about 0 their difference would lose digits.
        mean = mean - self.running_mean
        moments = torch.cat([count * mean, count * (variance + mean * mean), mean.new_full((1,), count)])
        moments = _Total.apply(moments)
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


class _Total(torch.autograd.Function):
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
