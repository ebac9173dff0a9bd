"""A convolution with the batch norm, residual, ReLU and max-pool behind it: what the networks are made of, made fast on the CPU.

    y = conv_norm(conv, bn, x)                       relu(bn(conv(x)))
    y = conv_norm(conv, bn, x, residual=shortcut)    relu(bn(conv(x)) + shortcut)
    y = conv_norm(conv, bn, x, pool=True)            max_pool2d(relu(bn(conv(x))), 2)
    y = conv_norm(conv, bn, x, relu=False)           bn(conv(x))

In training, what follows the convolution takes one pass over memory instead of three or four (kernels.c); a frozen teacher's
convolutions do their ReLU and residual themselves (PackedConv). Both are the same function, gradients and running statistics as
PyTorch's own operations, to rounding (tests/test_kernels.py), which run wherever the fast way does not apply: on a GPU, without
a C compiler, in other memory layouts. kernels.c is compiled once per machine by its own compiler, in about a second, and kept in
the user's cache folder. Why: much of a small network's step is not in its convolutions (docs/performance.md).
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
    x = conv(x)
    if bn.training and _applies(bn, x):
        if pool and x.shape[2] % 2 == 0 and x.shape[3] % 2 == 0:
            return _NormPool.apply(x, bn.weight, bn.bias, bn)
        if not pool:
            return _Norm.apply(x, residual, bn.weight, bn.bias, bn, relu)
    x = bn(x)
    if residual is not None:
        x = x.add_(residual)  # nobody else needs what batch norm returned
    if pool:  # before the ReLU, which is then a quarter of the work: max and ReLU commute
        x = F.max_pool2d(x, 2)
    return F.relu(x, inplace=True) if relu else x


def look_up(images, table):
    """What `table` (3, 256) says of each value of uint8 images (B, 3, H, W), channels last; None where the fast way does not apply."""
    if images.device.type != "cpu" or not images.is_contiguous() or images.shape[1] != 3 or not available(table.dtype):
        return None
    out = torch.empty(images.shape, dtype=table.dtype, memory_format=torch.channels_last)
    count, pixels = images.shape[0], images.shape[2] * images.shape[3]
    _library(table.dtype).look_up(
        _at(images), _at(out), ctypes.c_long(count), ctypes.c_long(pixels), _at(table), torch.get_num_threads()
    )
    return out


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


def _applies(bn, x):
    return (
        x.device.type == "cpu"
        and type(bn) is torch.nn.BatchNorm2d  # a subclass means something else
        and bn.affine
        and bn.track_running_stats
        and bn.momentum is not None
        and bn.weight.dtype == torch.float32
        and x.dtype in (torch.bfloat16, torch.float32)
        and x.shape[1] % 16 == 0
        and x.numel() > x.shape[1]  # a single value a channel has no variance: let PyTorch say so
        and x.is_contiguous(memory_format=torch.channels_last)
        and available(x.dtype)
    )


class _Norm(torch.autograd.Function):
    """relu(bn(x) + residual) for channels-last tensors."""

    @staticmethod
    def forward(ctx, x, residual, weight, bias, bn, relu):
        y = torch.empty_like(x)
        if residual is not None:
            residual = _like(residual, x)
        saved = torch.empty(2, x.shape[1])
        _library(x.dtype).forward(
            _at(x), _at(residual), _at(y), _rows(x), x.shape[1], *_parameters(bn), *_at_rows(saved), int(relu), torch.get_num_threads()
        )
        bn.num_batches_tracked.add_(1)
        ctx.save_for_backward(x, y if residual is not None else None, weight, bias, saved)
        ctx.relu, ctx.has_residual = relu, residual is not None
        return y

    @staticmethod
    def backward(ctx, dy):
        x, y, weight, bias, saved = ctx.saved_tensors
        dy = _like(dy, x)
        dx = torch.empty_like(x)
        dresidual = torch.empty_like(x) if ctx.has_residual and ctx.needs_input_grad[1] else None
        gradients = torch.empty_like(saved)
        _library(x.dtype).backward(
            _at(x), _at(y), _at(dy), _at(dx), _at(dresidual), _rows(x), x.shape[1], _at(weight), _at(bias),
            *_at_rows(saved), *_at_rows(gradients), int(ctx.relu), torch.get_num_threads(),
        )  # fmt: skip
        return dx, dresidual, gradients[0], gradients[1], None, None


class _NormPool(torch.autograd.Function):
    """max_pool2d(relu(bn(x)), 2) for channels-last tensors of even height and width."""

    @staticmethod
    def forward(ctx, x, weight, bias, bn):
        images, channels, height, width = x.shape
        shape = (images, channels, height // 2, width // 2)
        y = torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last)
        place = torch.empty(shape, dtype=torch.uint8, memory_format=torch.channels_last)
        saved = torch.empty(2, channels)
        _library(x.dtype).forward_pool(
            _at(x), _at(y), _at(place), images, height, width, channels, *_parameters(bn), *_at_rows(saved), torch.get_num_threads()
        )
        bn.num_batches_tracked.add_(1)
        ctx.save_for_backward(x, place, weight, saved)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, place, weight, saved = ctx.saved_tensors
        dy = _like(dy, x)
        dx = torch.empty_like(x)
        gradients = torch.empty_like(saved)
        images, channels, height, width = x.shape
        _library(x.dtype).backward_pool(
            _at(x), _at(place), _at(dy), _at(dx), images, height, width, channels, _at(weight), *_at_rows(saved),
            *_at_rows(gradients), torch.get_num_threads(),
        )  # fmt: skip
        return dx, gradients[0], gradients[1], None


def _like(tensor, model):
    return tensor.to(model.dtype).contiguous(memory_format=torch.channels_last)


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
