"""Whole training steps without a GPU, on PyTorch's `meta` device: nothing in them needs the host, as a CUDA graph
demands.

Meta tensors have shapes and no values. Each operation passes a guard that refuses what would read from the GPU, wait
for it or copy to it: host reads, sizes that depend on values (nonzero, boolean masks), tensors made from host data and
tensors on the CPU.
"""

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data_loader
import model_factory
import train
from takd.config import run_config
from takd.distill.logit_table import LogitTable
from takd.distill.methods import METHODS, CrossEntropy, Logits, build
from takd.distill.teacher import Teacher, Teachers
from takd.images.augmentation import VIEWS
from takd.images.split import Batch, Transform
from takd.run.distributed import part_of
from takd.run.engine import TrainStep

SIZE = 6  # images in a batch
VALUES_NEEDED = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
FINITE = [augment for augment, views in VIEWS.items() if views]
FAMILIES = {"resnet8": "resnet14", "plane2": "plane2"}  # a student, and a teacher with the same channels, for FSP


class HostNeeded(Exception):
    """An operation that a CUDA graph cannot capture, or would replay with an old value."""


class Guard(TorchDispatchMode):
    """Raises HostNeeded for operations that involve the host. Inside it no tensor may be on the CPU."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        name = function._schema.name.removeprefix("aten::")
        if name == "index" or "index_put" in name:
            refused = torch.bool in {index.dtype for index in args[1] if index is not None}
        else:
            refused = name == "lift_fresh" or VALUES_NEEDED & set(function.tags)
        if refused or "cpu" in {each.device.type for each in tensors} | {str(kwargs.get("device"))}:
            raise HostNeeded(name)
        return function(*args, **kwargs)


@pytest.fixture(autouse=True)
def no_autocast(monkeypatch):
    """There is none for meta; what it does on a GPU, casts, needs no host."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())


def assembled(family, augment="none", method="base", transform=None):
    """(step, batch) on the meta device. They are built on the CPU, where a method may look at labels."""
    torch.manual_seed(0)
    flags = ("--teacher", FAMILIES[family], "--method", method, "--augment", augment, "--cuda", "0")
    config = run_config.parse(["--student", family, "--dataset", "digits", *flags])
    split = data_loader.random_split("digits", count=2 * SIZE)
    network = model_factory.create(FAMILIES[family], len(split.classes))
    teacher = Teacher(network, transform or split.transform, split, "fp32", METHODS[method].needs_features)
    step = train.assemble(config, split, teacher, "fp32", None)
    for module in (step.student, step.method, teacher.network):
        module.train(module is not teacher.network).to("meta")
    parameters = [*step.student.parameters(), *step.method.parameters()]
    # Fused SGD has no meta kernel.
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4, foreach=True)
    index = torch.empty(SIZE, dtype=torch.int64, device="meta")
    split = split.to("meta")
    batch = Batch(split, augment, index, torch.empty_like(index))
    return TrainStep(step.student, step.method, teacher, optimizer, split, "fp32"), batch


def guarded_step(step, batch):
    """A step as a CUDA graph captures it: after one that made the optimizer's buffers and constants of the split."""
    with contextlib.suppress(RuntimeError):  # of a planted fault
        step(batch, part_of(slice(0, SIZE)))
    with Guard():
        return step(Batch(batch.split, batch.augment, batch.index, batch.views), part_of(slice(0, SIZE)))


CASES = [(name, family, FINITE[i % len(FINITE)]) for i, name in enumerate(METHODS) for family in FAMILIES]


def test_all_augmentations_are_among_the_cases():
    assert {(family, augment) for _, family, augment in CASES} == {(a, b) for a in FAMILIES for b in FINITE}


@pytest.mark.parametrize("method, family, augment", CASES)
def test_a_step_with_a_live_teacher(method, family, augment):
    names, row = guarded_step(*assembled(family, augment, method))
    assert row.shape == (len(names) + 1,) and row.device.type == "meta"


def test_a_step_with_a_teacher_of_another_normalisation():
    guarded_step(*assembled("plane2", "crop-flip", "kd", Transform((0.5,) * 3, (0.25,) * 3, 32)))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_with_a_resident_table(family, tmp_path):
    """Looked up without the teacher's network."""
    step, batch = assembled(family, "crop-flip", "kd")
    on_cpu = data_loader.random_split("digits", count=2 * SIZE)
    step.teacher.table = LogitTable(tmp_path / "table", step.teacher, on_cpu, "crop-flip", print)
    step.teacher.table.resident = step.teacher.table.values.to("meta")
    step.teacher.network = None
    guarded_step(step, batch)


def test_a_step_with_several_teachers_that_leaves_terms_out():
    step, batch = assembled("plane2", "crop-flip", "kd")
    two = Logits(torch.zeros(3, 2, 10))
    options = {"temperature": 4.0, "lambda": 0.5, "reduction": "batchmean", "drop": 0.5}
    method = build("dgkd", options, two, two, torch.zeros(2))
    teachers = Teachers([step.teacher] * 3)
    guarded_step(TrainStep(step.student, method, teachers, step.optimizer, step.split, "fp32"), batch)


ON_HOST = torch.ones(())
FAULTS = {
    "_local_scalar_dense": lambda logits, labels: logits.sum().item() * logits.sum(),
    "nonzero": lambda logits, labels: logits.sum() * len(labels.nonzero()),
    "index": lambda logits, labels: logits[labels == 0].sum(),
    "lift_fresh": lambda logits, labels: (logits * torch.tensor([0.5], device=labels.device)).sum(),
    "_to_copy": lambda logits, labels: logits.sum() * ON_HOST.to(labels.device),
    "mul": lambda logits, labels: logits.sum() * ON_HOST,  # no copy, but a graph would keep the number
}


@pytest.mark.parametrize("operation", FAULTS)
def test_a_planted_fault_is_found(operation):
    class Faulty(CrossEntropy):
        def forward(self, student, teacher, labels):
            return {"loss": FAULTS[operation](student.logits, labels)}

    step, batch = assembled("plane2")
    step.method = step.ddp_method = Faulty()
    with pytest.raises(HostNeeded, match=f"^{operation}$"):
        guarded_step(step, batch)
