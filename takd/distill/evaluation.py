"""Evaluation: the logits of a whole split, their accuracy, and the agreement of two networks. Legend: N images, C
classes."""

import contextlib
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from takd.config.flags import gpu_name
from takd.errors import UserError, first_line
from takd.images.split import Split, Transform
from takd.process import safe_point


@contextlib.contextmanager
def autocast(device: torch.device, precision: str) -> Iterator[None]:
    """Run networks in a precision: "bf16" (weights, optimizer and losses stay float32), "tf32" or IEEE "fp32"."""
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"), tf32(precision == "tf32"):
        yield


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Whether a GPU may round the factors of float32 convolutions and matrix products to TF32.

    PyTorch's default is yes for convolutions, although their dtype is float32, and no for matrix products.
    """
    backends: Any = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = allowed
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.allow_tf32 = value


def native_bf16(device: torch.device) -> bool:
    """Whether the hardware has bf16 arithmetic, as all GPUs with TF32 do; elsewhere it is emulated and slower than
    float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags or " bf16" in flags  # the last is Arm's spelling


def check_gpu(device: str) -> None:
    """A UserError where torch cannot compute on the GPU that the driver reports; `device` is "cuda" or "cpu"."""
    if device != "cuda":
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the same comes as an error, on fewer lines
            torch.zeros(1, device="cuda").add_(1).item()
    except torch.cuda.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError) as error:
        build = (
            f"torch {torch.__version__} (built for {f'CUDA {torch.version.cuda}' if torch.version.cuda else 'CPUs'})"
        )
        why, install = first_line(error), "another build of torch (pytorch.org/get-started) or driver may"
        raise UserError(f"{build} cannot use {gpu_name()}: {why}; {install}, --cuda 0 runs on the CPU") from None


@contextlib.contextmanager
def out_of_memory(fix: str) -> Iterator[None]:
    """PyTorch's paragraph about a GPU's memory as a MemoryError of one line, with a remedy."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        why = ", ".join(str(error).split(". ")[1:3]) or error
        raise MemoryError(f"the GPU is out of memory: {why}; {fix}") from None


def input_dtype(precision: str) -> torch.dtype:
    """What images are normalised to: the first convolution's arithmetic, so that autocast has nothing to convert."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


@torch.inference_mode()
def predict(
    network: nn.Module,
    split: Split,
    transform: Transform | None = None,
    batch_size: int = 500,
    advance: Callable[[int], object] = lambda images: None,
) -> torch.Tensor:
    """float32 (N, C): the logits of a whole split in its order, the network in evaluation mode and in float32.

    `transform` is the network's own where it differs from the split's. `advance` is told the images of each batch.
    """
    network.eval()
    transform = transform or split.transform
    # Larger images in smaller batches: a batch's activations grow with its pixels.
    batch_size = max(1, batch_size * 64**2 // max(64, transform.image_size) ** 2)
    logits = []
    for images in split.images.split(batch_size):
        safe_point()
        with autocast(split.device, "fp32"):
            logits.append(network(transform(images.to(split.device))).float())
        advance(len(images))
    return torch.cat(logits)


def score(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Accuracy and cross-entropy of logits (N, C) against labels (N,), over all N."""
    top = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    return {
        "images": len(labels),
        "loss": float(F.cross_entropy(logits, labels)),
        "accuracy_percent": 100 * float(top[:, 0].double().mean()),
        "top5_percent": 100 * float(top.any(dim=1).double().mean()),
    }


def agreement(logits: torch.Tensor, teacher_logits: torch.Tensor) -> dict[str, float]:
    """How close a network is to its teacher on the same images, both float32 (N, C): the share of images for which both
    predict the same class, and KL(teacher || network) of their softmax distributions at temperature 1, in nats, the
    mean over the images.
    """
    same = logits.argmax(1) == teacher_logits.argmax(1)
    network, teacher = (F.log_softmax(each.double(), dim=1) for each in (logits, teacher_logits))
    divergence = F.kl_div(network, teacher, reduction="batchmean", log_target=True)
    return {"agreement_percent": 100 * float(same.double().mean()), "kl_nats": float(divergence)}


def chance_percent(labels: torch.Tensor) -> float:
    """The accuracy of always predicting the commonest class, plus four standard errors: below, nothing was learned."""
    share = float(torch.bincount(labels).max()) / len(labels)
    return 100 * (share + 4 * (share * (1 - share) / len(labels)) ** 0.5)


# ---------------------------------------------------------------------------------------- what a network costs
def count_parameters(network: nn.Module) -> int:
    """Numbers in a network's parameters."""
    return sum(parameter.numel() for parameter in network.parameters())


def weights_bytes(network: nn.Module) -> int:
    """Size of what a network's state dict holds."""
    return sum(value.nbytes for value in network.state_dict().values())


def multiply_accumulates(network: nn.Module, image_size: int) -> int:
    """Of one image's convolutions and matrix products, as papers count: no biases, batch norm, ReLU or pooling."""
    from torch.utils.flop_counter import FlopCounterMode

    image = torch.zeros(1, 3, image_size, image_size, device=next(network.parameters()).device)
    # With gradients: without them PyTorch's attention is one operation, which the counter does not look into.
    with torch.enable_grad(), FlopCounterMode(display=False) as counter:
        network.eval()(image)
    return counter.get_total_flops() // 2


def latency(network: nn.Module, image_size: int, images: int) -> float:
    """Median seconds of one call on a batch of `images` in float32, the images already on the device."""
    device = next(network.parameters()).device
    batch = torch.rand(images, 3, image_size, image_size, device=device).contiguous(memory_format=torch.channels_last)
    network.eval()

    def forward() -> None:
        network(batch)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    with torch.inference_mode():
        return median_seconds(forward)


def median_seconds(call: Callable[[], object], least_seconds: float = 0.5) -> float:
    """Median seconds of a call, which is repeated for `least_seconds` after two calls to warm up."""
    times: list[float] = []
    for _ in range(2):
        call()
    while len(times) < 3 or sum(times) < least_seconds:
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times)
