"""A convolution with the batch norm, residual, ReLU and max-pool behind it: what the networks are made of, made fast on the CPU.

    y = conv_norm(conv, bn, x)                       relu(bn(conv(x)))
    y = conv_norm(conv, bn, x, residual=shortcut)    relu(bn(conv(x)) + shortcut)
    y = conv_norm(conv, bn, x, pool=True)            max_pool2d(relu(bn(conv(x))), 2)
    y = conv_norm(conv, bn, x, relu=False)           bn(conv(x))

In training, what follows the convolution takes one pass over memory instead of three or four. A frozen teacher's convolutions do
their ReLU and residual themselves (PackedConv). Both are the same function, gradients and running statistics as PyTorch's own
operations, to rounding (tests/test_kernels.py), which run wherever the fast way does not apply: on a GPU, without a C compiler, in
other memory layouts. kernels.c is compiled once per machine by its own compiler, in a few seconds, and kept in the user's cache
folder. Why: much of a small network's step is not in its convolutions (docs/performance.md).
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch.nn import functional as F

SOURCE = Path(__file__).resolve().with_suffix(".c")
FLAGS = ["-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC"]
_switched_off = False


def conv_norm(conv, bn, x, residual=None, relu=True, pool=False):
    """[max_pool2d]([relu](bn(conv(x)) [+ residual])); residual has the shape of conv(x); pool halves height and width."""
    if isinstance(conv, PackedConv):
        x = conv(x, residual, relu)
        return F.max_pool2d(x, 2) if pool else x
    if bn.training and _applies(conv, bn, x, pool):
        return _ConvNorm.apply(x, residual, conv.weight, conv.bias, bn.weight, bn.bias, conv, bn, relu, pool)
    x = bn(conv(x))
    if residual is not None:
        x = x.add_(residual)  # nobody else needs what batch norm returned
    if pool:  # before the ReLU, which is then a quarter of the work: max and ReLU commute
        x = F.max_pool2d(x, 2)
    return F.relu(x, inplace=True) if relu else x


def keep_freed_memory():
    """Let this process keep what it frees: every step asks for the same tensors again, and fresh pages cost time."""
    trim_threshold, mmap_threshold = -1, -3  # of glibc's malloc.h; elsewhere there is no such function
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(mmap_threshold, 32 << 20)  # the most it takes
        libc.mallopt(trim_threshold, 2**31 - 1)


class PackedConv(torch.nn.Module):
    """A convolution that never learns: weights in oneDNN's own layout, residual and ReLU inside the same operation."""

    def __init__(self, conv, dtype):
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


def available(dtype=torch.float32):
    """Whether this process has the compiled kernels."""
    return not _switched_off and _library(dtype) is not None


@contextlib.contextmanager
def switched_off():
    """PyTorch's own operations for a while: for tests and benchmarks."""
    global _switched_off
    before, _switched_off = _switched_off, True
    try:
        yield
    finally:
        _switched_off = before


def _applies(conv, bn, x, pool):
    return (
        x.device.type == "cpu"
        and type(conv) is torch.nn.Conv2d  # a subclass means something else
        and (conv.dilation, conv.groups, conv.padding_mode) == ((1, 1), 1, "zeros")
        and type(bn) is torch.nn.BatchNorm2d
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
        and available(_dtype(x))
    )


def _size_suits(conv, x, pool):
    geometry = zip(x.shape[2:], conv.padding, conv.kernel_size, conv.stride, strict=True)
    height, width = ((size + 2 * pad - kernel) // step + 1 for size, pad, kernel, step in geometry)
    if pool and (height % 2 or width % 2):
        return False
    return len(x) * height * width > 1  # a single value a channel has no variance: let PyTorch say so


def _dtype(x):
    """What autocast, where it is on, would have a convolution compute in."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


class _ConvNorm(torch.autograd.Function):
    """`conv_norm` for channels-last tensors: a step of a network is a few dozen of these, and autograd has one node for each."""

    @staticmethod
    def forward(ctx, x, residual, weight, bias, gamma, beta, conv, bn, relu, pool):
        dtype = _dtype(x)
        x = _like(x, dtype)
        weight = _like(weight, dtype)
        z = _like(F.conv2d(x, weight, None if bias is None else bias.to(dtype), conv.stride, conv.padding), dtype)
        residual = None if residual is None else _like(residual, dtype)
        images, channels, height, width = z.shape
        saved, library, threads = torch.empty(2, channels), _library(dtype), torch.get_num_threads()
        if pool:
            shape = (images, channels, height // 2, width // 2)
            y = torch.empty(shape, dtype=dtype, memory_format=torch.channels_last)
            kept = torch.empty(shape, dtype=torch.uint8, memory_format=torch.channels_last)
            library.forward_pool(
                _at(z), _at(y), _at(kept), ctypes.c_long(images), height, width, channels, *_parameters(bn), *_at_rows(saved), threads
            )
        else:
            y = torch.empty_like(z)
            kept = None if residual is None else y
            library.forward(
                _at(z), _at(residual), _at(y), _rows(z), channels, *_parameters(bn), *_at_rows(saved), int(relu), threads
            )
        bn.num_batches_tracked.add_(1)
        ctx.save_for_backward(x, weight, z, kept, gamma, beta, saved)
        ctx.conv, ctx.relu, ctx.pool = conv, relu, pool
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, z, kept, gamma, beta, saved = ctx.saved_tensors
        dy = _like(dy, z.dtype)
        dz, dresidual, gradients = torch.empty_like(z), None, torch.empty_like(saved)
        images, channels, height, width = z.shape
        library, threads = _library(z.dtype), torch.get_num_threads()
        if ctx.pool:
            library.backward_pool(
                _at(z), _at(kept), _at(dy), _at(dz), ctypes.c_long(images), height, width, channels, _at(gamma), *_at_rows(saved),
                *_at_rows(gradients), threads,
            )  # fmt: skip
        else:
            if kept is not None and ctx.needs_input_grad[1]:
                dresidual = torch.empty_like(z)
            library.backward(
                _at(z), _at(kept), _at(dy), _at(dz), _at(dresidual), _rows(z), channels, _at(gamma), _at(beta),
                *_at_rows(saved), *_at_rows(gradients), int(ctx.relu), threads,
            )  # fmt: skip
        needs_x, _, needs_weight, needs_bias = ctx.needs_input_grad[:4]
        place = ctx.conv.stride, ctx.conv.padding, (1, 1), False, (0, 0), 1
        dx, dweight, _ = torch.ops.aten.convolution_backward(dz, x, weight, None, *place, (needs_x, needs_weight, False))
        dbias = torch.zeros(channels) if needs_bias else None  # batch norm takes a constant away again
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


# ------------------------------------------------------------------------------------------------ compiling
@functools.cache
def _library(dtype):
    """The compiled kernels for a dtype, or None where there is no C compiler that makes them."""
    if platform.system() != "Linux":
        return None
    try:
        path = _compiled("-DBF16" if dtype == torch.bfloat16 else "-DFLOAT32")
        for openmp in _loaded_openmp():  # torch's own threads, not a second set that would fight them for the cores
            ctypes.CDLL(openmp, mode=ctypes.RTLD_GLOBAL)
        return ctypes.CDLL(path)
    except (OSError, subprocess.SubprocessError):
        return None


def _loaded_openmp():
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {line.split()[-1] for line in lines if "libgomp" in line or "libiomp" in line or "libomp" in line}


def _compiled(kind):
    """Path of the shared library, compiled unless this source was on this processor by this compiler before."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise OSError("no C compiler")
    processor = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(("model name", "flags", "Features"))]
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    key = hashlib.blake2b(SOURCE.read_bytes() + version + "".join(sorted(set(processor))).encode() + kind.encode(), digest_size=8)
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "takd"
    path = folder / f"kernels-{key.hexdigest()}.so"
    if not path.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            folder = Path(tempfile.mkdtemp())
            path = folder / path.name
        temporary = folder / f".{path.name}.{os.getpid()}"
        # Linked without an OpenMP library of its own: it shall find torch's, already in the process.
        subprocess.run([compiler, *FLAGS, kind, "-c", str(SOURCE), "-o", f"{temporary}.o"], capture_output=True, check=True)
        subprocess.run([compiler, "-shared", f"{temporary}.o", "-lm", "-o", str(temporary)], capture_output=True, check=True)
        os.unlink(f"{temporary}.o")
        os.replace(temporary, path)
    return str(path)
