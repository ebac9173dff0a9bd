"""Recorded steps: the bookkeeping with a stand-in for CUDA that records on the CPU, and, where there is a GPU, the real thing."""

import copy

import pytest
import torch

import data_loader
import model_factory
from takd.distill import methods as losses
from takd.run import cuda_graph as graphs
from takd.run import engine


class Tape:
    """A device whose record is the function itself, played on what its first call returned: results and inputs stay in their place."""

    def __init__(self, fault=None):
        self.recordings, self.plays, self.fault = 0, 0, fault

    def aside(self, function):
        return function()

    def recorded(self, function):
        self.recordings += 1
        if self.fault == "host":
            raise RuntimeError("operation not permitted when stream is capturing\nmore lines")
        names, row = ["loss"], torch.zeros(2)

        def play():
            self.plays += 1
            row.copy_(function()[1])
            if self.fault == "weights":
                self.weights[0].data += 1

        if self.fault == "exchange":
            self.module.register_buffer("bank", torch.ones(3))
        return play, (names, row)

    def synchronise(self):
        pass

    random_state, set_random_state = staticmethod(torch.get_rng_state), staticmethod(torch.set_rng_state)


@pytest.fixture(scope="module")
def split():
    return data_loader.load("digits")[0].subset(torch.arange(7 * 32 + 9), "digits/part")


def trained(split, tape=None, epochs=2, rate_of=lambda epoch: 0.01, method=None):
    """(student's state, losses, what was said) after some epochs of batches of 32, the last one of 9 images."""
    torch.manual_seed(0)
    student = model_factory.create_network("plane2", 10)
    method, said, rows = method or losses.CrossEntropy(), [], []
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9, nesterov=True, fused=True)
    graph = None
    if tape:
        tape.weights, tape.module = list(student.parameters()), student
        graph = graphs.StepGraph((student, method), optimizer, said.append, tape)
        if tape.fault == "exchange":
            student.register_buffer("bank", torch.zeros(3))
    for epoch in range(epochs):
        if hasattr(type(method), "epoch"):
            method.epoch = epoch
        optimizer.param_groups[0]["lr"] = rate_of(epoch)
        batches = (data_loader.train_draws if graph else data_loader.train_batches)(split, 32, "crop-flip", 1, epoch)
        sums = engine.EpochSums()
        engine.train_epoch(student, method, None, optimizer, split, batches, sums, "fp32", graph=graph)
        assert sums.images == [32] * 7 + [9]
        rows += [float(row[0]) for row in sums.rows]
    return copy.deepcopy(student.state_dict()), rows, said


def same(one, other):
    return all(torch.equal(one[key], other[key]) for key in other)


def test_played_steps_are_the_steps(split):
    """Every batch once and in its order: the same bits as without a graph, the short last batches included."""
    plain, tape = trained(split), Tape()
    played = trained(split, tape)
    assert same(played[0], plain[0]) and played[1:] == (plain[1], [])
    assert (tape.recordings, tape.plays) == (1, 4 + 7)  # three steps run at first, and each epoch's last


def test_another_rate_is_recorded_anew(split):
    plain, tape = trained(split, rate_of=lambda epoch: 0.01 * 0.1**epoch), Tape()
    played = trained(split, tape, rate_of=lambda epoch: 0.01 * 0.1**epoch)
    assert same(played[0], plain[0]) and played[1:] == (plain[1], [])
    assert (tape.recordings, tape.plays) == (2, 4 + 4)


def test_a_method_that_looks_at_the_epoch_is_recorded_in_each(split):
    class Fading(losses.CrossEntropy):
        epoch = 0

        def forward(self, student, teacher, labels):
            parts = super().forward(student, teacher, labels)
            return {"loss": parts["loss"] / (1 + self.epoch)}

    tape = Tape()
    plain = trained(split, method=Fading())
    assert trained(split, tape, method=Fading())[1] == plain[1]
    assert tape.recordings == 2


@pytest.mark.parametrize(
    "fault, why",
    [
        ("host", "operation not permitted when stream is capturing"),
        ("exchange", "puts another tensor in the place of bank"),
        ("weights", "of its length away from the same step run"),
    ],
)
def test_a_step_that_cannot_be_recorded_goes_on_as_it_was(split, fault, why):
    """The same bits, one line that says why, and no second attempt."""
    plain, tape = trained(split), Tape(fault)
    state, rows, said = trained(split, tape)
    assert same(state, plain[0]) and rows == plain[1] and tape.recordings == 1
    assert len(said) == 1 and why in said[0] and "\n" not in said[0]
    assert "bank" not in state or not state["bank"].any()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", ["plane2", "resnet8"])
def test_on_a_gpu(name, split):
    split = split.to("cuda")
    results = []
    for graphed in (False, True):
        torch.manual_seed(0)
        student = model_factory.create_network(name, 10).to("cuda", memory_format=torch.channels_last)
        method, said = losses.CrossEntropy(), []
        optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9, nesterov=True, fused=True)
        graph = graphs.StepGraph((student, method), optimizer, said.append) if graphed else None
        sums = engine.EpochSums()
        batches = (data_loader.train_draws if graph else data_loader.train_batches)(split, 32, "crop-flip", 1, 0)
        engine.train_epoch(student, method, None, optimizer, split, batches, sums, "fp32", graph=graph)
        assert said == []
        results.append([float(row[0]) for row in sums.rows])
    assert results[0] == pytest.approx(results[1], rel=1e-3)
