"""Frozen teachers: unchanged by training, the same logits as their network, scored before they teach."""

import io

import pytest
import torch

import data_loader
import model_factory
import train
from takd.config import run_config
from takd.distill import evaluation
from takd.distill.teacher import Teacher, freeze
from takd.errors import UserError
from takd.images.split import Batch, Transform
from takd.process import StopSignals
from takd.run.console import Console
from takd.run.distributed import World
from takd.run.run_directory import RunDirectory
from takd.run.trainer import Context, Trainer


@pytest.fixture(scope="module")
def digits():
    return data_loader.read("digits")


def cloned(network):
    return {key: value.clone() for key, value in network.state_dict().items()}


def unchanged(network, before):
    return all(torch.equal(before[key], value) for key, value in network.state_dict().items())


def teacher_of(path, split):
    network, metadata = model_factory.load(path, "plane2")
    transform = Transform(tuple(metadata["mean"]), tuple(metadata["std"]), split.image_size)
    return Teacher(network, transform, split, "fp32")


# ------------------------------------------------------------------------------------------- frozen
def test_training_does_not_change_the_teacher(teacher_file, tmp_path):
    config = run_config.parse(
        ["--teacher", "plane2", "--teacher-checkpoint", str(teacher_file), "--student", "plane2", "--dataset", "digits"]
        + ["--epochs", "1", "--cuda", "0", "--teacher-cache", "live", "--run-dir", str(tmp_path / "run")]
    )
    console, cpu = Console(io.StringIO()), train.cpu_annex(config)
    splits = data_loader.load(config, console.say)
    teacher = train.load_teacher(config, splits, "fp32", cpu, console.say)
    step = train.assemble(config, splits.train, teacher, "fp32", cpu)
    network, student = cloned(teacher.network), cloned(step.student)
    directory = RunDirectory(config.run_path)
    with StopSignals() as signals, directory.claim():
        trainer = Trainer(config, splits, step, directory, Context(World(), console, signals))
        trainer.resume(None, {})
        for epoch in range(trainer.epoch, config.epochs):
            trainer.train(epoch)
            trainer.save(trainer.evaluate(epoch))
    assert network and unchanged(teacher.network, network) and not unchanged(step.student, student)
    assert not teacher.network.training
    assert all(not value.requires_grad and value.grad is None for value in teacher.network.parameters())


@pytest.mark.parametrize("name", ["plane2", "plane10", "resnet8", "resnet20"])
def test_freezing_changes_neither_the_logits_nor_the_network(name):
    torch.manual_seed(0)
    network = model_factory.create(name, 10)
    with torch.no_grad():  # statistics that are not 0 and 1, as after training
        for _ in range(3):
            network(torch.rand(32, 3, 32, 32) * 3)
    before = cloned(network)
    frozen = freeze(network, torch.device("cpu"), torch.float32)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in frozen.modules())  # folded
    images = torch.randn(16, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(frozen(images), network.eval()(images), rtol=1e-3, atol=1e-4)
    assert unchanged(network, before)


def test_frozen_weights_are_rounded_once_where_nothing_packs_them():
    """Autocast would round them in every call: the same logits to the bit."""
    torch.manual_seed(0)
    network = model_factory.create("resnet8", 10)
    exact, rounded = (freeze(network, torch.device("cpu"), dtype) for dtype in (torch.float32, torch.bfloat16))
    weighted = [each for each in rounded.modules() if isinstance(each, torch.nn.Conv2d | torch.nn.Linear)]
    assert weighted and all(each.weight.dtype == torch.bfloat16 for each in weighted)
    images = torch.rand(16, 3, 32, 32)
    with torch.inference_mode(), evaluation.autocast(images.device, "bf16"):
        assert torch.equal(rounded(images), exact(images))


def test_a_teacher_keeps_its_own_normalisation(teacher_file, digits):
    """The released code's files expect other constants than digits': their images are normalised separately."""
    network, _ = model_factory.load(teacher_file)
    teacher = Teacher(network, Transform((0.5,) * 3, (0.25,) * 3, 32), digits.train, "fp32")
    batch = Batch(digits.train, "none", torch.arange(64), torch.zeros(64, dtype=torch.long))
    with torch.no_grad():
        expected = network.eval()((batch.images.float() / 255 - 0.5) / 0.25)
    logits = teacher(batch, digits.train.transform(batch.images)).logits
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)


# ------------------------------------------------------------------------------------------- scored
def test_the_score_is_the_networks(teacher_file, digits):
    network, _ = model_factory.load(teacher_file)
    plain = evaluation.score(evaluation.predict(network, digits.test), digits.test.labels)["accuracy_percent"]
    lines = []
    score = teacher_of(teacher_file, digits.train).score(digits.test, teacher_file, plain, lines.append)
    assert score == pytest.approx(plain, abs=0.3)
    assert len(lines) == 1 and f"{plain:.2f}" in lines[0]


def test_a_score_unlike_the_recorded_one_gives_a_warning(teacher_file, digits):
    lines = []
    teacher_of(teacher_file, digits.train).score(digits.test, teacher_file, 50.0, lines.append)
    assert lines[-1].startswith("warning:")


@pytest.mark.parametrize(
    "recorded, reason",
    [(None, "it was not trained"), (9.0, "records 9.00 % too"), (95.0, "records 95.00 %, so these are other images")],
)
def test_a_teacher_at_chance_is_refused_with_the_reason_or_taken_on_request(recorded, reason, tmp_path, digits):
    torch.manual_seed(0)
    file = tmp_path / "teacher.pth.tar"
    torch.save({"model_state_dict": model_factory.create("plane2", 10).state_dict()}, file)
    teacher = teacher_of(file, digits.train)
    with pytest.raises(UserError, match=reason):
        teacher.score(digits.test, file, recorded, print)
    assert teacher.score(digits.test, file, recorded, print, any_teacher=True) < 20


def test_the_recorded_data_set_is_compared_before_an_image_is_scored(teacher_file, tmp_path, call, tiny, monkeypatch):
    file = tmp_path / "teacher.pth.tar"
    names = [f"class {i}" for i in range(10)]
    torch.save(torch.load(teacher_file) | {"dataset": "cifar10", "class_names": names}, file)
    monkeypatch.setattr(evaluation, "predict", None)
    outcome = call(train, *tiny, "--teacher", "plane2", "--teacher-checkpoint", file, "--run-dir", tmp_path / "run")
    assert outcome.status == 2 and "was trained on cifar10, and this run is on digits" in outcome.err


@pytest.mark.parametrize(
    "classes, message",
    [(10, "no better than guessing"), (100, "was trained for 100 classes; digits has 10")],
    ids=["untrained", "of other classes"],
)
def test_an_unsuitable_teacher_is_refused_and_nothing_is_written(classes, message, tmp_path, call, tiny):
    torch.manual_seed(0)
    file = tmp_path / "teacher.pth.tar"
    torch.save({"model_state_dict": model_factory.create("plane2", classes).state_dict()}, file)
    outcome = call(train, *tiny, "--teacher", "plane2", "--teacher-checkpoint", file, "--run-dir", tmp_path / "run")
    assert outcome.status == 2 and message in outcome.err and outcome.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == [file]
