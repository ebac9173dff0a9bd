"""The CPU's fast ways against PyTorch's own operations: the same function, gradients and running statistics, to rounding."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import model_factory
from takd.cpu import kernels
from takd.distill.teacher import frozen

needs_kernels = pytest.mark.skipif(not kernels.available(), reason="no C compiler that makes kernels.c")


class Calls:
    """A stand-in for the compiled library that notes which of its functions are asked for."""

    def __init__(self, monkeypatch):
        self.made = set()
        real = kernels._library

        class Library:
            def __init__(self, library, made):
                self._library, self._made = library, made

            def __getattr__(self, name):
                self._made.add(name)
                return getattr(self._library, name)

        monkeypatch.setattr(kernels, "_library", lambda dtype: Library(real(dtype), self.made))


def conv_bn(channels, seed=0):
    torch.manual_seed(seed)
    conv, bn = nn.Conv2d(3, channels, 3, padding=1), nn.BatchNorm2d(channels)
    nn.init.uniform_(bn.weight, -1.5, 1.5)  # negative ones too: max-pool and batch norm do not commute then
    nn.init.uniform_(bn.bias, -1, 1)
    return conv.to(memory_format=torch.channels_last), bn


def images(count, height, width, channels=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, channels, height, width, generator=generator).contiguous(memory_format=torch.channels_last)


def results(conv, bn, x, residual, **how):
    """Output, all gradients and running statistics of one training step on copies."""
    conv, bn = copy.deepcopy(conv), copy.deepcopy(bn)
    residual = None if residual is None else residual.clone().requires_grad_()
    y = kernels.conv_norm(conv, bn, x, residual=residual, **how)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(y.dtype)
    (y * weights).sum().backward()
    gradients = [*(p.grad for p in (*conv.parameters(), *bn.parameters()))]
    if residual is not None:
        gradients.append(residual.grad)
    return [y.detach(), *gradients, bn.running_mean, bn.running_var, bn.num_batches_tracked]


@needs_kernels
@pytest.mark.parametrize("channels", [16, 32, 48, 64, 80, 256])
@pytest.mark.parametrize(
    "how", [{}, {"relu": False}, {"pool": True}, {"residual": True}, {"residual": True, "relu": False}], ids=str
)
def test_training_step_agrees_with_float64(channels, how, monkeypatch):
    """Against the same step in float64, and not worse than PyTorch's own float32."""
    conv, bn = conv_bn(channels)
    x = images(5, 12, 10)
    residual = images(5, 12, 10, channels, seed=3) if how.get("residual") else None
    how = {key: value for key, value in how.items() if key != "residual"}
    calls = Calls(monkeypatch)
    ours = results(conv, bn, x, residual, **how)
    assert calls.made >= {"forward_pool" if how.get("pool") else "forward"}, "the fast way was not taken"
    with kernels.switched_off():
        torchs = results(conv, bn, x, residual, **how)
        exact = results(conv.double(), bn.double(), x.double(), None if residual is None else residual.double(), **how)
    for mine, theirs, true in zip(ours, torchs, exact, strict=True):
        scale = true.double().norm() + 1e-9
        if scale > 1e-6:  # the bias before a batch norm has a gradient of zero, in exact arithmetic
            assert (mine.double() - true).norm() <= max(2e-6 * scale, 2 * (theirs.double() - true).norm())


@needs_kernels
@pytest.mark.parametrize("name", ["plane2", "plane6", "plane10", "resnet8", "resnet14"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_networks_step_agrees(name, precision):
    torch.manual_seed(1)
    network = model_factory.create_network(name, 100).to(memory_format=torch.channels_last).train()
    twin, x, labels = copy.deepcopy(network), images(16, 32, 32), torch.arange(16)

    def logits_and_gradients(network):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            logits = network(x)
        F.cross_entropy(logits.float(), labels).backward()
        return [logits.detach().float(), torch.cat([p.grad.flatten() for p in network.parameters()])]

    ours = logits_and_gradients(network)
    with kernels.switched_off():
        theirs = logits_and_gradients(twin)
    # An activation that rounding carries over a ReLU's corner changes gradients by more than rounding; a wrong formula by far more.
    for (mine, other), tolerance in zip(
        zip(ours, theirs, strict=True), {"fp32": (1e-5, 2e-2), "bf16": (5e-2, 0.3)}[precision], strict=True
    ):
        assert (mine - other).norm() <= tolerance * other.norm()


@needs_kernels
def test_repeated_steps_are_equal_bit_for_bit():
    conv, bn = conv_bn(32)
    first, second = (results(conv, bn, images(9, 16, 16), None, pool=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("shape", [(4, 5, 7), (4, 6, 6)])
def test_what_the_kernels_do_not_take_is_pytorchs(shape):
    """Odd sizes, channels that are no multiple of 16, other layouts and evaluation: the answer is PyTorch's all the same."""
    conv, bn = conv_bn(10)
    x = images(*shape)
    expected = F.max_pool2d(F.relu(copy.deepcopy(bn)(conv(x))), 2)
    assert torch.equal(kernels.conv_norm(conv, copy.deepcopy(bn), x, pool=True), expected)
    conv, bn = conv_bn(16)
    assert torch.allclose(kernels.conv_norm(conv.eval(), bn.eval(), x.contiguous()), F.relu(bn(conv(x))), atol=1e-6)


@pytest.mark.parametrize("name", ["plane2", "plane6", "plane10", "resnet8", "resnet20", "resnet14a"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_a_frozen_network_gives_the_same_logits(name, dtype, tolerance):
    torch.manual_seed(0)
    network = model_factory.create_network(name, 100)
    with torch.no_grad():
        for _ in range(3):  # statistics that are not 0 and 1, as after training
            network(torch.rand(32, 3, 32, 32) * 3)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    copied, x = frozen(network, torch.device("cpu"), dtype), images(8, 32, 32)
    assert any(isinstance(module, kernels.PackedConv) for module in copied.modules())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in copied.modules())
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        logits = copied(x).float()
    with torch.inference_mode():
        expected = network.eval()(x)
    assert (logits - expected).norm() <= tolerance * expected.norm()
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())


@needs_kernels
@pytest.mark.parametrize("how", [{}, {"pool": True}, {"relu": False}], ids=str)
def test_nan_goes_through(how):
    """A ReLU that turned it into 0 would hide that a run has diverged."""
    conv, bn = conv_bn(16)
    x = images(2, 4, 4)
    x[0, 0, 0, 0] = float("nan")
    assert kernels.conv_norm(conv, bn, x, **how).isnan().any()
