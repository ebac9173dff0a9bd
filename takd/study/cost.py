"""What a network costs: multiply-accumulates, bytes, and the time of an answer on the device that it is on."""

import statistics
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from takd.run import run_directory as runlog

LEAST_CALLS, LEAST_SECONDS = 3, 0.5  # of each measurement, after two calls to warm up


def multiply_accumulates(network, image_size):
    """Of one image's convolutions and matrix products, as papers count: no biases, batch norm, ReLU or pooling."""
    image = torch.zeros(1, 3, image_size, image_size, device=next(network.parameters()).device)
    # With gradients: without them PyTorch's attention is one operation, which the counter does not look into.
    with torch.enable_grad(), FlopCounterMode(display=False) as counter:
        network.eval()(image)
    return counter.get_total_flops() // 2


def latency(network, image_size, images):
    """Seconds that one call on a batch of `images` takes: the median of repeated calls in float32, the images already there."""
    device = next(network.parameters()).device
    batch = torch.rand(images, 3, image_size, image_size, device=device).contiguous(memory_format=torch.channels_last)
    network.eval()

    def seconds():
        started = time.perf_counter()
        network(batch)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    with torch.inference_mode():
        seconds(), seconds()
        times = []
        while len(times) < LEAST_CALLS or sum(times) < LEAST_SECONDS:
            times.append(seconds())
    return statistics.median(times)


def of(network, image_size, file):
    """What is known without measuring: multiply-accumulates of an image, bytes of the weights and of the file that holds them."""
    return {
        "multiply_accumulates": multiply_accumulates(network, image_size),
        "weights_bytes": sum(value.numel() * value.element_size() for value in network.state_dict().values()),
        "file_bytes": Path(file).stat().st_size,
    }


def machine(device):
    """What times depend on: {"device": its name, "threads": of the CPU}."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else runlog.processor()
    return {"device": name, "threads": torch.get_num_threads()}
