"""Captured steps: the bookkeeping with a CPU stand-in for CUDA, and, where there is a GPU, the real capture."""

import sys

import pytest
import torch
from conftest import same_weights

import data_loader
import model_factory
from takd.distill import methods
from takd.distill.methods import CrossEntropy, Features
from takd.images.split import Batch, epoch_plan
from takd.run.cuda_graph import CaptureError, Cuda, StepGraph
from takd.run.distributed import World
from takd.run.engine import EpochSums, TrainStep


class StandIn:
    """A device whose capture is the function itself, replayed into the tensors that its first call returned.

    `faults`: "waits" and "host", as a step that synchronises; "exchange" and "counter", as one that keeps state where a
    graph cannot; "inputs", a capture that goes on with its own batch; or a function of the student, called after a
    replay.
    """

    def __init__(self, fault=None):
        self.captures, self.replays, self.fault, self.errors = 0, 0, fault, []

    def on_stream(self, function):
        self.errors.append(sys.exc_info()[1])
        return function()

    def watched(self, function):
        return function(), "my_losses.py:12" if self.fault == "waits" else None

    def capture(self, function):
        self.captures += 1
        if self.fault == "host":
            raise CaptureError("operation not permitted when stream is capturing")
        names, row = [], torch.zeros(0)

        def replay():
            self.replays += 1
            before = {name: tensor.clone() for name, tensor in self.student.state_dict().items()}
            names[:], values = function()
            row.resize_(values.shape).copy_(values)
            if callable(self.fault):
                self.fault(self.student, before)

        if self.fault == "exchange":
            self.student.register_buffer("bank", torch.ones(3))
        if self.fault == "counter":
            self.student.calls += 1
        return replay, (names, row)

    def release(self):
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
    take_step = StepGraph(step, lines.append, 32, device) if device else step
    if isinstance(device, StandIn):
        device.student, device.graph = student, take_step
    student.register_buffer("bank", torch.zeros(3))
    student.calls = 0
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
    assert (device.captures, device.replays) == (1, 4 + 7)  # three steps run eagerly at first


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


def test_dkd_is_captured_once_over_its_warm_up(split):
    """Its weights are in a buffer; each epoch's, as if it were not captured."""
    dkd = methods.build("dkd", {"alpha": 1.0, "beta": 8.0, "temperature": 4.0, "warmup": 3}, None, None, split.labels)
    teacher = Features(None, None, torch.arange(320.0).reshape(32, 10).sin())

    class Taught(CrossEntropy):
        def __init__(self):
            super().__init__()
            self.dkd = dkd

        epoch = property(fset=lambda self, epoch: setattr(self.dkd, "epoch", epoch))

        def forward(self, student, _, labels):
            return self.dkd(student, teacher._replace(logits=teacher.logits[: len(labels)]), labels)

    device = StandIn()
    assert_equal(trained(split, device, method=Taught()), trained(split, method=Taught()))
    assert device.captures == 1


def rate(factor):
    """A replay that takes `factor` times the step's update of the parameters, all else being right."""

    def fault(student, before):
        with torch.no_grad():
            for name, parameter in student.named_parameters():
                parameter.copy_(before[name] + factor * (parameter - before[name]))

    return fault


def statistics_off(student, before):
    student.bn1.running_var.copy_(before["bn1.running_var"]) if hasattr(student, "bn1") else [
        buffer.copy_(before[name]) for name, buffer in student.named_buffers() if "running" in name
    ]


@pytest.mark.parametrize(
    "fault, why",
    [
        ("waits", "the step waits for the GPU at my_losses.py:12"),
        ("host", "operation not permitted when stream is capturing"),
        ("exchange", "the step changes or replaces PlaneCNN.bank"),
        ("counter", "the step changes or replaces PlaneCNN.calls"),
        (rate(0.1), "a replayed step's parameters differ from the same step run eagerly: 90%"),
        (rate(0), "a replayed step's parameters differ from the same step run eagerly: 100%"),
        (rate(-1), "a replayed step's parameters differ from the same step run eagerly: 200%"),
        (statistics_off, "a replayed step's buffers differ"),
    ],
)
def test_a_step_that_cannot_be_captured_goes_on_eagerly(split, fault, why):
    """The same bits, one line with the reason, and no second attempt."""
    plain, device = trained(split), StandIn(fault)
    state, losses, lines = trained(split, device)
    assert same_weights(state, plain[0]) and losses == plain[1] and device.captures == (fault != "waits")
    assert len(lines) == 1 and why in lines[0] and "\n" not in lines[0]
    assert device.student.calls == 0 and not state["bank"].any()


def test_a_capture_that_does_not_see_new_batches_is_found(split):
    """It is captured on the batch before the one that it is checked with."""

    class Blind(StandIn):
        def capture(self, function):
            inputs = [tensor.clone() for tensor in self.graph.inputs]

            def with_old_inputs():
                for own, old in zip(self.graph.inputs, inputs, strict=True):
                    own.copy_(old)
                return function()

            return super().capture(with_old_inputs)

    plain, device = trained(split), Blind()
    state, losses, lines = trained(split, device)
    assert same_weights(state, plain[0]) and losses == plain[1]
    assert len(lines) == 1 and "differ from the same step run eagerly" in lines[0]


def test_a_method_whose_numbers_change_in_each_step_goes_on_eagerly(split):
    class Counting(CrossEntropy):
        calls = 0

        def forward(self, *args):
            self.calls += 1
            return super().forward(*args)

    method, device = Counting(), StandIn()
    _, _, lines = trained(split, device, method=method)
    assert method.calls == 16 and device.captures == 0 and len(lines) == 1 and "numbers change" in lines[0]


def test_the_step_that_cannot_be_captured_runs_outside_the_handler(split):
    """In it the failed capture would stay alive: the exception's traceback holds its tensors."""
    device, raised = StandIn("host"), []

    class Watching(CrossEntropy):
        def forward(self, *args):
            raised.append(sys.exc_info()[1])
            return super().forward(*args)

    trained(split, device, method=Watching())
    assert len(raised) == 16 and not any(raised)


def test_continuing_at_an_epochs_short_last_batch_captures_the_full_ones(split):
    """The first batch that the graph sees has 9 images, those after it 32."""
    torch.manual_seed(0)
    student = model_factory.create("plane2", 10)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9)
    device, lines = StandIn(), []
    device.student = student
    graph = StepGraph(TrainStep(student, CrossEntropy(), None, optimizer, split, "fp32"), lines.append, 32, device)
    plan, parts = epoch_plan(split, "none", 1, 0), World().parts(len(split), 32)
    for part in (parts[-1], *parts):
        graph(Batch(split, "none", plan.order[part.rows], plan.views[part.rows]), part)
    assert (device.captures, device.replays) == (1, 4) and not lines


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", ["plane2", "resnet8"])
def test_a_captured_step_on_a_gpu(name, split):
    split = split.to("cuda")
    eager, captured = (trained(split, device, epochs=1, name=name) for device in (None, Cuda()))
    assert captured[2] == [] and captured[1] == pytest.approx(eager[1], rel=1e-3)
