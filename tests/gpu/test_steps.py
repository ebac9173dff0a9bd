"""Training with steps as CUDA graphs, against the same steps launched kernel by kernel."""

import os
import signal

import pytest
import torch
from conftest import last_weights

import model_factory
from takd.distill.methods import METHODS
from takd.run.distributed import World
from takd.run.engine import TrainStep
from takd.run.trainer import Trainer

NETWORKS = ("resnet8", "plane2")
# Between two trainings of the same steps, as a share of how far the weights moved. Sums in another order (one or two
# threads of a CPU) are up to 0.006 apart after such an epoch, a learning rate wrong by a tenth 0.07 to 0.1.
BOUNDS = {"fp32": 0.02, "bf16": 0.05}
NOTE = "note: no CUDA graph"

DROPOUT = """
from torch import nn

class Dropout(nn.Sequential):
    def __init__(self, classes):
        convolution = nn.Conv2d(3, 16, 3, stride=4), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten()
        super().__init__(*convolution, nn.Dropout(0.3), nn.Linear(16 * 8 * 8, classes))
"""
READS_ON_HOST = """
from torch.nn import functional as F
from torch import nn

class ReadsOnHost(nn.Module):
    needs_features = False

    def forward(self, student, teacher, labels):
        loss = F.cross_entropy(student.logits.float(), labels)
        return {"loss": loss * (1 if loss.item() > 0 else 2)}
"""


@pytest.fixture(autouse=True)
def deterministic_convolutions(monkeypatch):
    """Or atomic additions make even two eager epochs differ."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


@pytest.fixture(params=BOUNDS)
def precision(request, cuda):
    if not cuda and request.param == "bf16":
        pytest.skip("--cuda 0 tries the tests out in fp32")
    return request.param


def assert_captured(out, cuda):
    assert NOTE not in out and ("as CUDA graphs" in out) == bool(cuda), out


def assert_close(folder, other, student, precision):
    """The weights and the running statistics of two runs, each by themselves."""
    torch.manual_seed(1)
    start, ours, theirs = model_factory.create(student, 10), last_weights(folder), last_weights(other)
    for kind in (start.named_parameters(), start.named_buffers()):
        names = {name: tensor.detach().double() for name, tensor in kind if tensor.is_floating_point()}
        apart, moved = (
            sum(float((theirs[name].double() - reference[name]).square().sum()) for name in names) ** 0.5
            for reference in (ours, names)
        )
        assert apart <= BOUNDS[precision] * moved > 0, f"{apart / moved:.2%} of the way apart"


@pytest.fixture
def compare(run, cuda, monkeypatch, tmp_path):
    """compare(student, precision, *flags) trains with graphs and without, there with every step forbidden to wait for
    the GPU, and checks that the outcomes are equal. The first eager step copies constants to the GPU."""

    def both(student, precision, *flags):
        flags = ("--student", student, "--precision", precision, *flags)
        assert_captured(run("captured", *flags), cuda)
        take_step, taken = TrainStep.__call__, []

        def without_waiting(step, batch, part):
            taken.append(part)
            if not cuda or len(taken) == 1:
                return take_step(step, batch, part)
            torch.cuda.set_sync_debug_mode("error")
            try:
                return take_step(step, batch, part)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        with monkeypatch.context() as patch:
            patch.setattr(TrainStep, "__call__", without_waiting)
            run("eager", *flags, *(("--no-cuda-graph",) if cuda else ()))
        assert len(taken) > 1
        assert_close(tmp_path / "captured", tmp_path / "eager", student, precision)

    return both


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method(method, network, precision, compare, teachers):
    """With a live teacher."""
    augment = ("--augment", "crop-flip", "--teacher-cache", "live")
    compare(network, precision, *teachers[network], "--method", method, *augment)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("cache, augment", [("full", "flip"), ("lazy", "crop-flip")])
def test_a_table_of_logits(cache, augment, network, precision, compare, teachers):
    """On a GPU it is resident: filled at the start, or before each epoch with what that needs. The second run finds all
    that it needs in the file."""
    compare(network, precision, *teachers[network], "--augment", augment, "--teacher-cache", cache, "--epochs", 2)


@pytest.fixture
def dropout(tmp_path):
    """A network with dropout, as --student names it."""
    (tmp_path / "network.py").write_text(DROPOUT)
    return f"{tmp_path / 'network.py'}:Dropout"


def test_a_network_with_dropout(precision, compare, dropout):
    """Each replay draws anew, and what the eager step would draw."""
    compare(dropout, precision)


def test_a_step_that_cannot_be_captured_leaves_the_next_run_a_clean_gpu(
    run, compare, dropout, cuda, teachers, tmp_path
):
    """It goes on eagerly and says where it waits for the GPU; then dropout, freed memory and another capture work."""
    (tmp_path / "method.py").write_text(READS_ON_HOST)
    out = run("host", "--student", "plane2", *teachers["plane2"], "--method", f"{tmp_path / 'method.py'}:ReadsOnHost")
    notes = [line for line in out.splitlines() if NOTE in line]
    assert len(notes) == cuda and all("method.py:10" in note for note in notes), out
    if cuda:
        torch.nn.functional.dropout(torch.ones(1000, device="cuda"))
        torch.cuda.empty_cache()
    compare(dropout, "fp32")


def test_reserved_memory_is_flat_from_epoch_3_to_40_and_over_a_milestone(on_gpu, run, monkeypatch, record_property):
    reserved, save = [], Trainer.save

    def save_and_look(trainer, record):
        save(trainer, record)
        reserved.append(torch.cuda.memory_reserved() / 1e6)

    monkeypatch.setattr(Trainer, "save", save_and_look)
    run("long", "--student", "resnet8", "--epochs", 41, "--milestones", 20, "--precision", "fp32")
    record_property("reserved megabytes, resnet8 on digits, epochs 3 and 40", f"{reserved[3]:.0f} {reserved[40]:.0f}")
    # Two of the allocator's segments of 20 MB; a step of resnet8 with a pool of its own reserves some 150 MB.
    assert max(reserved[3:]) - reserved[3] <= 40, reserved


@pytest.mark.parametrize("left", ["most steps", "the short last batch", "no step"])
def test_stopped_inside_an_epoch_and_continued(left, run, cuda, monkeypatch, tmp_path):
    """SIGTERM in the second of three epochs: the outcome of an undisturbed run, and steps are captured again."""
    steps, flags = (12 if cuda else 6), ("--student", "resnet8", "--epochs", 3, "--precision", "fp32")
    run("whole", *flags)
    done, seen, track_split, take_step = [], [], World.track_split, TrainStep.__call__
    stop_at = steps + {"most steps": 3, "the short last batch": steps - 1, "no step": steps}[left]

    def terminate(world, part):
        done.append(part)
        if len(done) == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        track_split(world, part)

    with monkeypatch.context() as patch:
        patch.setattr(World, "track_split", terminate)
        run("stopped", *flags, status=128 + signal.SIGTERM)
    assert len(done) == stop_at
    monkeypatch.setattr(TrainStep, "__call__", lambda *step: (seen.append(step), take_step(*step))[1])
    out = run("stopped", *flags)
    assert f"continuing at epoch 2, step {stop_at - steps}" in out
    assert_captured(out, cuda)
    # Of at least 12 steps: three of warm-up, one captured, one compared with its replay, and the short last ones.
    assert not cuda or len(seen) <= 8
    assert_close(tmp_path / "stopped", tmp_path / "whole", "resnet8", "fp32")
