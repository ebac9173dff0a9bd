"""What a network costs: multiply-accumulates counted by hand, and the median time of a call."""

from types import SimpleNamespace

import pytest
import torch

import model_factory
from takd.config import names
from takd.distill import evaluation

# Million multiply-accumulates of one 32x32 image with 10 and with 100 classes, counted by hand from the layers.
MACS = {
    "plane2": (1.04, 3.45), "plane4": (6.36, 24.89), "plane6": (9.89, 39.45), "plane8": (13.45, 52.86),
    "plane10": (71.80, 72.24), "resnet8": (12.50, 12.51), "resnet14": (26.66, 26.66), "resnet20": (40.81, 40.82),
    "resnet26": (54.97, 54.97), "resnet32": (69.12, 69.13), "resnet44": (97.44, 97.44), "resnet56": (125.75, 125.75),
    "resnet110": (253.15, 253.16),
}  # fmt: skip


@pytest.mark.parametrize("name", MACS)
def test_multiply_accumulates(name):
    counted = [evaluation.multiply_accumulates(model_factory.create(name, classes), 32) / 1e6 for classes in (10, 100)]
    assert [f"{value:.2f}" for value in counted] == [f"{value:.2f}" for value in MACS[name]]


@pytest.mark.parametrize(
    "name, size, classes, expected",
    [
        ("resnet20a", 32, 10, 40_813_184 - 16 * 32 * 16**2 - 32 * 64 * 8**2),  # resnet20 without its two projections
        ("cnn5", 224, 10, 676_083_576),
        ("resnet50", 224, 1000, 4_089_184_256),  # torchvision's documentation: 4.09 billion
    ],
)
def test_multiply_accumulates_at_other_sizes(name, size, classes, expected):
    assert evaluation.multiply_accumulates(model_factory.create(name, classes, size), size) == expected


def test_every_network_of_the_paper_is_counted():
    assert set(MACS) == {f"resnet{depth}" for depth in names.RESNET_DEPTHS} | {
        f"plane{size}" for size in names.PLANE_SIZES
    }


def test_multiply_accumulates_of_attention():
    """PyTorch's fast path for attention is one operation, and its counter does not support it."""

    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.TransformerEncoderLayer(12, 3, dim_feedforward=20, batch_first=True)

        def forward(self, images):
            return self.layer(images.reshape(len(images), -1, 12)).mean(1)

    tokens = 3 * 8 * 8 // 12
    expected = tokens * (4 * 12 * 12 + 2 * 12 * 20) + 2 * tokens * tokens * 12
    assert evaluation.multiply_accumulates(Attention(), 8) == expected


def test_latency_is_the_median_after_a_warm_up(monkeypatch):
    """With a clock that each call advances by its duration; the first two, the warm-up, take by far the longest."""

    class Slow(torch.nn.Linear):
        def forward(self, images):
            shapes.append(tuple(images.shape))
            clock.now += durations[len(shapes) - 1]
            return images

    durations, shapes, clock = [90, 90, 1, 50, 2], [], SimpleNamespace(now=0.0)
    monkeypatch.setattr(evaluation, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    assert evaluation.latency(Slow(1, 1), 8, 5) == 2
    assert shapes == [(5, 3, 8, 8)] * 5
