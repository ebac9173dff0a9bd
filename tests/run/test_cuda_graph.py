"""Captured steps: the bookkeeping with a CPU stand-in for CUDA, and, where there is a GPU, the real capture."""

import pytest
import torch
from conftest import same_weights

import data_loader
import model_factory
from takd.distill.methods import CrossEntropy
from takd.images.split import Batch, epoch_plan
from takd.run.cuda_graph import Cuda, StepGraph
from takd.run.distributed import World
from takd.run.engine import EpochSums, TrainStep


class StandIn:
    """A device whose capture is the function itself, replayed into the tensors that its first call returned."""

    def __init__(self, fault=None):
        self.captures, self.replays, self.fault = 0, 0, fault

    def on_side_stream(self, function):
        return function()

    def capture(self, function):
        self.captures += 1
        if self.fault == "host":
            raise RuntimeError("operation not permitted when stream is capturing\nmore lines")
        names, row = ["loss"], torch.zeros(2)

        def replay():
            self.replays += 1
            row.copy_(function()[1])
            if self.fault == "weights":
                next(self.student.parameters()).data += 1

        if self.fault == "exchange":
            self.student.register_buffer("bank", torch.ones(3))
        return replay, (names, row)

    def synchronise(self):
        pass

    random_state, set_random_state = staticmethod(torch.get_rng_state), staticmethod(torch.set_rng_state)


@pytest.fixture(scope="module")
def split():
    return data_loader.read("digits").train.subset(torch.arange(7 * 32 + 9), "digits/part")


def trained(split, device=None, epochs=2, rates=(0.01, 0.01), method=None, name="plane2"):
    """(student's state, losses, printed lines) after some epochs of batches of 32, the last one of 9 images."""
    torch.manual_seed(0)
    student = model_factory.create(name, 10).to(split.device, memory_format=torch.channels_last)
    method, lines, losses = method or CrossEntropy(), [], []
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9, nesterov=True, fused=True)
    step = TrainStep(student, method, None, optimizer, split, "fp32")
    take_step = StepGraph(step, lines.append, device) if device else step
    if isinstance(device, StandIn):
        device.student = student
        if device.fault == "exchange":
            student.register_buffer("bank", torch.zeros(3))
    for epoch in range(epochs):
        if hasattr(type(method), "epoch"):
            method.epoch = epoch
        optimizer.param_groups[0]["lr"] = rates[epoch]
        student.train()
        plan, sums = epoch_plan(split, "crop-flip", 1, epoch), EpochSums()
        for part in World().parts(len(split), 32):
            batch = Batch(split, "crop-flip", plan.order[part.rows], plan.views[part.rows])
            sums.add(*take_step(batch, part), part.images)
        assert sums.images == [32] * 7 + [9]
        losses += [float(row[0]) for row in sums.rows]
    return student.state_dict(), losses, lines


def assert_equal(graphed, plain):
    """The same bits, and nothing printed."""
    assert same_weights(graphed[0], plain[0]) and graphed[1:] == (plain[1], [])


def test_replayed_steps_are_the_eager_steps(split):
    """Every batch once and in its order, the short last batches included."""
    device = StandIn()
    assert_equal(trained(split, device), trained(split))
    assert (device.captures, device.replays) == (1, 4 + 7)  # three steps run eagerly at first, and each epoch's last


def test_another_learning_rate_is_captured_anew(split):
    device, rates = StandIn(), (0.01, 0.001)
    assert_equal(trained(split, device, rates=rates), trained(split, rates=rates))
    assert (device.captures, device.replays) == (2, 4 + 4)


def test_a_method_that_uses_the_epoch_is_captured_in_each(split):
    class Fading(CrossEntropy):
        epoch = 0

        def forward(self, student, teacher, labels):
            return {"loss": super().forward(student, teacher, labels)["loss"] / (1 + self.epoch)}

    device = StandIn()
    assert_equal(trained(split, device, method=Fading()), trained(split, method=Fading()))
    assert device.captures == 2


@pytest.mark.parametrize(
    "fault, why",
    [
        ("host", "operation not permitted when stream is capturing"),
        ("exchange", "puts another tensor in the place of bank"),
        ("weights", "of its length away from the same step run"),
    ],
)
def test_a_step_that_cannot_be_captured_goes_on_eagerly(split, fault, why):
    """The same bits, one line with the reason, and no second attempt."""
    plain, device = trained(split), StandIn(fault)
    state, losses, lines = trained(split, device)
    bank = state.pop("bank", torch.zeros(3))
    assert same_weights(state, plain[0]) and losses == plain[1] and device.captures == 1 and not bank.any()
    assert len(lines) == 1 and why in lines[0] and "\n" not in lines[0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", ["plane2", "resnet8"])
def test_a_captured_step_on_a_gpu(name, split):
    split = split.to("cuda")
    eager, captured = (trained(split, device, epochs=1, name=name) for device in (None, Cuda))
    assert captured[2] == [] and captured[1] == pytest.approx(eager[1], rel=1e-3)
