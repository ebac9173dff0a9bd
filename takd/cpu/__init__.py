"""Faster blocks for our networks on a CPU; optional, and imported by train.py and the benchmarks only.

    accelerate(network)          for training: replaces the network's blocks by fused ones; state-dict keys stay
    pack(network, dtype)         for a frozen network: convolutions with ReLU and residual inside, in oneDNN's layout

Both compute what the network's own blocks do, gradients and running statistics included, up to rounding (tests/cpu).
Much of a small network's step is not in its convolutions; docs/performance.md has what each part is worth.
"""

import contextlib
import ctypes
import sys

import torch
from torch import nn

from takd.cpu import kernels
from takd.cpu.fused import PackedConv, conv_norm


class FusedBasicBlock:
    """model_factory.BasicBlock, each convolution in one pass with its batch norm, ReLU and residual."""

    def forward(self, x):
        shortcut = self.shortcut(x) if self.downsample is None else conv_norm(*self.downsample, x, relu=False)
        x = conv_norm(self.conv1, self.bn1, x)
        return conv_norm(self.conv2, self.bn2, x, residual=shortcut)


class FusedResNet:
    """model_factory.ResNet with a fused stem; its blocks are replaced separately."""

    def stem(self, images):
        return conv_norm(self.conv1, self.bn1, images)


class FusedPlaneCNN:
    """model_factory.PlaneCNN, each convolution in one pass with its batch norm, ReLU and max-pool."""

    def stages(self, images):
        layers, x, stages = [*self.conv_layers, None], images, []
        for i, layer in enumerate(layers):
            if isinstance(layer, nn.Conv2d | PackedConv):  # then batch norm, ReLU, and perhaps a pool
                pool = isinstance(layers[i + 3], nn.MaxPool2d)
                x = conv_norm(layer, layers[i + 1], x, pool=pool)
                if pool or layers[i + 3] is None:
                    stages.append(x)
        return stages


# By their names in model_factory.py.
FUSED = {"BasicBlock": FusedBasicBlock, "ResNet": FusedResNet, "PlaneCNN": FusedPlaneCNN}


def accelerate(network: nn.Module) -> bool:
    """Replace our blocks by fused ones, in place. Returns whether that was possible: it takes a C compiler."""
    if kernels.available():
        _fuse(network)
    return kernels.available()


def pack(network: nn.Module, dtype: torch.dtype) -> None:
    """Replace the convolutions with a folded batch norm in a frozen network by PackedConvs, in place."""
    _fuse(network)
    for module in list(network.modules()):
        children = list(module.named_children())
        for (name, child), (_, following) in zip(children, children[1:], strict=False):
            if isinstance(child, nn.Conv2d) and isinstance(following, nn.Identity):
                setattr(module, name, PackedConv(child, dtype))


def _fuse(network: nn.Module) -> None:
    ours = sys.modules.get("model_factory")  # a user's file may have classes, and a module, of the same names
    for module in network.modules():
        own = type(module)
        if own.__name__ in FUSED and getattr(ours, own.__name__, None) is own:
            module.__class__ = type(own.__name__, (FUSED[own.__name__], own), {})


def keep_freed_memory() -> None:
    """Let this process keep freed memory: every step needs the same tensors again, and fresh pages cost time."""
    trim_threshold, mmap_threshold = -1, -3  # of glibc's malloc.h; elsewhere there is no such function
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(mmap_threshold, 32 << 20)  # the maximum
        libc.mallopt(trim_threshold, 2**31 - 1)
