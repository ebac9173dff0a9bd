"""A convolution with the batch norm, residual, ReLU and max-pool after it, in one pass over memory, not three or four.

    y = conv_norm(conv, bn, x)                       relu(bn(conv(x)))
    y = conv_norm(conv, bn, x, residual=shortcut)    relu(bn(conv(x)) + shortcut)
    y = conv_norm(conv, bn, x, pool=True)            max_pool2d(relu(bn(conv(x))), 2)
    y = conv_norm(conv, bn, x, relu=False)           bn(conv(x))

oneDNN computes the convolution, kernels.c the rest. `reference` is the same in PyTorch's own operations: what the
kernels are tested against, and what runs wherever they do not apply, as in evaluation or in another memory layout.
"""

import ctypes

import torch
from torch import nn
from torch.nn import functional as F

from takd.cpu import kernels

Tensor = torch.Tensor


def conv_norm(
    conv: nn.Module, bn: nn.Module, x: Tensor, residual: Tensor | None = None, relu: bool = True, pool: bool = False
) -> Tensor:
    """[max_pool2d]([relu](bn(conv(x)) [+ residual])); residual has conv(x)'s shape; pool halves height and width."""
    if isinstance(conv, PackedConv):
        x = conv(x, residual, relu)
        return F.max_pool2d(x, 2) if pool else x
    if bn.training and _applies(conv, bn, x, pool):
        return _ConvNorm.apply(x, residual, conv.weight, conv.bias, bn.weight, bn.bias, conv, bn, relu, pool)
    return reference(conv, bn, x, residual, relu, pool)


def reference(
    conv: nn.Module, bn: nn.Module, x: Tensor, residual: Tensor | None = None, relu: bool = True, pool: bool = False
) -> Tensor:
    """`conv_norm` in PyTorch's own operations."""
    x = bn(conv(x))
    if residual is not None:
        x = x + residual
    if relu:
        x = F.relu(x)
    return F.max_pool2d(x, 2) if pool else x


class PackedConv(nn.Module):
    """A convolution that is never trained: weights in oneDNN's own layout, residual and ReLU in the same call."""

    def __init__(self, conv: nn.Conv2d, dtype: torch.dtype):
        super().__init__()
        self.place = list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups
        weight = conv.weight.detach().to(dtype, memory_format=torch.channels_last)
        self.weight = torch.ops.mkldnn._reorder_convolution_weight(weight, *self.place)
        self.bias = None if conv.bias is None else conv.bias.detach().to(dtype)
        self.dtype = dtype

    def forward(self, x, residual=None, relu=False):
        x, last = x.to(self.dtype), "relu" if relu else "none"
        if residual is None:
            return torch.ops.mkldnn._convolution_pointwise(x, self.weight, self.bias, *self.place, last, [], "")
        binary = torch.ops.mkldnn._convolution_pointwise.binary
        return binary(x, residual, self.weight, self.bias, *self.place, "add", 1.0, last if relu else None, [], "")


def _applies(conv, bn, x, pool):
    return (
        x.device.type == "cpu"
        and type(conv) is nn.Conv2d  # a subclass may compute something else
        and (conv.dilation, conv.groups, conv.padding_mode) == ((1, 1), 1, "zeros")
        and type(bn) is nn.BatchNorm2d
        and bn.affine
        and bn.track_running_stats
        and bn.momentum is not None
        and bn.weight.dtype == torch.float32
        and conv.weight.dtype == torch.float32
        and _dtype(x) in (torch.bfloat16, torch.float32)
        and conv.out_channels % 16 == 0
        and not isinstance(conv.padding, str)
        and _size_suits(conv, x, pool)
        and x.is_contiguous(memory_format=torch.channels_last)
        and kernels.available(_dtype(x))
    )


def _size_suits(conv, x, pool):
    geometry = zip(x.shape[2:], conv.padding, conv.kernel_size, conv.stride, strict=True)
    height, width = ((size + 2 * pad - kernel) // step + 1 for size, pad, kernel, step in geometry)
    if pool and (height % 2 or width % 2):
        return False
    return len(x) * height * width > 1  # a single value a channel has no variance: let PyTorch raise its error


def _dtype(x):
    """The dtype that a convolution computes in, under autocast or not."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


class _ConvNorm(torch.autograd.Function):
    """`conv_norm` for channels-last tensors as one node of autograd: a network's step is a few dozen of these."""

    @staticmethod
    def forward(ctx, x, residual, weight, bias, gamma, beta, conv, bn, relu, pool):
        dtype = _dtype(x)
        x, weight = _like(x, dtype), _like(weight, dtype)
        z = _like(F.conv2d(x, weight, None if bias is None else bias.to(dtype), conv.stride, conv.padding), dtype)
        residual = None if residual is None else _like(residual, dtype)
        images, channels, height, width = z.shape
        saved, library, threads = torch.empty(2, channels), kernels.library(dtype), torch.get_num_threads()
        if pool:
            shape, size = (images, channels, height // 2, width // 2), (ctypes.c_long(images), height, width, channels)
            y = torch.empty(shape, dtype=dtype, memory_format=torch.channels_last)
            kept = torch.empty(shape, dtype=torch.uint8, memory_format=torch.channels_last)
            library.forward_pool(_at(z), _at(y), _at(kept), *size, *_parameters(bn), *_at_rows(saved), threads)
        else:
            y, size = torch.empty_like(z), (_rows(z), channels)
            kept = None if residual is None else y
            library.forward(
                _at(z), _at(residual), _at(y), *size, *_parameters(bn), *_at_rows(saved), int(relu), threads
            )
        bn.num_batches_tracked.add_(1)
        ctx.save_for_backward(x, weight, z, kept, gamma, beta, saved)
        ctx.conv, ctx.relu, ctx.pool = conv, relu, pool
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, z, kept, gamma, beta, saved = ctx.saved_tensors
        dy, dz, dresidual, gradients = _like(dy, z.dtype), torch.empty_like(z), None, torch.empty_like(saved)
        images, channels, height, width = z.shape
        library, threads = kernels.library(z.dtype), torch.get_num_threads()
        statistics = *_at_rows(saved), *_at_rows(gradients)
        if ctx.pool:
            size = ctypes.c_long(images), height, width, channels
            library.backward_pool(_at(z), _at(kept), _at(dy), _at(dz), *size, _at(gamma), *statistics, threads)
        else:
            if kept is not None and ctx.needs_input_grad[1]:
                dresidual = torch.empty_like(z)
            tensors = (_at(tensor) for tensor in (z, kept, dy, dz, dresidual))
            library.backward(*tensors, _rows(z), channels, _at(gamma), _at(beta), *statistics, int(ctx.relu), threads)
        needs_x, _, needs_weight, needs_bias = ctx.needs_input_grad[:4]
        place = ctx.conv.stride, ctx.conv.padding, (1, 1), False, (0, 0), 1
        dx, dweight, _ = torch.ops.aten.convolution_backward(
            dz, x, weight, None, *place, (needs_x, needs_weight, False)
        )
        dbias = torch.zeros(channels) if needs_bias else None  # batch norm subtracts any constant
        return dx, dresidual, dweight, dbias, gradients[0], gradients[1], None, None, None, None


def _like(tensor, dtype):
    return tensor.to(dtype).contiguous(memory_format=torch.channels_last)


def _at(tensor):
    return None if tensor is None else ctypes.c_void_p(tensor.data_ptr())


def _at_rows(pair):
    start = pair.data_ptr()
    return ctypes.c_void_p(start), ctypes.c_void_p(start + pair.shape[1] * pair.element_size())


def _rows(x):
    return ctypes.c_long(x.numel() // x.shape[1])


def _parameters(bn):
    """gamma, beta, running mean, running variance, momentum, eps, as kernels.c takes them."""
    tensors = (bn.weight, bn.bias, bn.running_mean, bn.running_var)
    return *map(_at, tensors), ctypes.c_float(bn.momentum), ctypes.c_float(bn.eps)
