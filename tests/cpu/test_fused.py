"""Convolution, batch norm and what follows in one pass, beside PyTorch's own operations and float64."""

import copy

import pytest
import torch
from torch import nn

fused, kernels = map(pytest.importorskip, ("takd.cpu.fused", "takd.cpu.kernels"))
needs_kernels = pytest.mark.skipif(not kernels.available(), reason="no C compiler that makes kernels.c")


@pytest.fixture
def called(monkeypatch):
    """Names of the compiled functions that were called."""
    names, library = set(), kernels.library

    class Recorder:
        def __init__(self, dtype):
            self.library = library(dtype)

        def __getattr__(self, name):
            names.add(name)
            return getattr(self.library, name)

    monkeypatch.setattr(kernels, "library", Recorder)
    return names


def layers(channels):
    torch.manual_seed(0)
    conv, bn = nn.Conv2d(3, channels, 3, padding=1), nn.BatchNorm2d(channels)
    nn.init.uniform_(bn.weight, -1.5, 1.5)  # negative ones too: max-pool and batch norm do not commute then
    nn.init.uniform_(bn.bias, -1, 1)
    return conv.to(memory_format=torch.channels_last), bn


def images(count, height, width, channels=3, seed=1):
    drawn = torch.randn(count, channels, height, width, generator=torch.Generator().manual_seed(seed))
    return drawn.contiguous(memory_format=torch.channels_last)


def training_step(function, conv, bn, x, residual=None, dtype=torch.float32, **options):
    """Output, all gradients and running statistics, on copies of the layers."""
    conv, bn, x = (copy.deepcopy(each).to(dtype) for each in (conv, bn, x))
    inputs = [each.to(dtype).clone().requires_grad_() for each in (x, residual) if each is not None]
    y = function(conv, bn, *inputs, **options)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (y * weights.to(dtype)).sum().backward()
    gradients = [each.grad for each in (*inputs, *conv.parameters(), *bn.parameters())]
    return [y.detach(), *gradients, bn.running_mean, bn.running_var, bn.num_batches_tracked]


CASES = {
    "relu": {},
    "no relu": {"relu": False},
    "pool": {"pool": True},
    "residual": {"residual": True},
    "residual, no relu": {"residual": True, "relu": False},
}


@needs_kernels
@pytest.mark.parametrize("channels", [16, 32, 48, 64, 80, 256])
@pytest.mark.parametrize("case", CASES)
def test_a_training_step_is_as_exact_as_pytorchs(channels, case, called):
    """Against the same step in float64."""
    options = dict(CASES[case])
    residual = images(5, 12, 10, channels, seed=3) if options.pop("residual", False) else None
    given = *layers(channels), images(5, 12, 10), residual
    ours = training_step(fused.conv_norm, *given, **options)
    assert called >= ({"forward_pool", "backward_pool"} if case == "pool" else {"forward", "backward"})
    theirs = training_step(fused.reference, *given, **options)
    exact = training_step(fused.reference, *given, **options, dtype=torch.float64)
    for mine, other, true in zip(ours, theirs, exact, strict=True):
        assert (mine - true).double().norm() <= max(2e-6 * true.double().norm(), 2 * (other - true).double().norm())


@needs_kernels
def test_repeated_steps_are_equal_bit_for_bit():
    first, second = (training_step(fused.conv_norm, *layers(32), images(9, 16, 16), pool=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    "channels, shape, pool", [(10, (4, 6, 6), True), (16, (4, 5, 7), True), (10, (4, 5, 7), False)], ids=str
)
def test_cases_without_kernels_are_pytorchs(channels, shape, pool, called):
    """Numbers of channels that are not multiples of 16, and odd sizes before a pool."""
    given = *layers(channels), images(*shape)
    ours, theirs = (training_step(each, *given, pool=pool) for each in (fused.conv_norm, fused.reference))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)) and not called


def test_another_memory_layout_and_evaluation_are_pytorchs(called):
    conv, bn = layers(16)
    x = images(4, 6, 6).contiguous()
    assert torch.equal(fused.conv_norm(conv, copy.deepcopy(bn), x), fused.reference(conv, copy.deepcopy(bn), x))
    assert torch.equal(fused.conv_norm(conv.eval(), bn.eval(), x), fused.reference(conv, bn, x)) and not called


@needs_kernels
@pytest.mark.parametrize("options", [{}, {"pool": True}, {"relu": False}], ids=str)
def test_nan_passes_through(options):
    """A ReLU that turned it into 0 would hide that a run has diverged."""
    x = images(2, 4, 4)
    x[0, 0, 0, 0] = float("nan")
    assert fused.conv_norm(*layers(16), x, **options).isnan().any()
