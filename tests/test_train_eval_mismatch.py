"""A network with 96 % in training and 10 % in evaluation: each possible cause, reproduced.

In every case evaluate.py reports the training's accuracy or refuses the file, also as a teacher.
"""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch

import data_loader
import evaluate
import model_factory
import train
from takd.config import names
from takd.distill import evaluation
from takd.files import digest
from takd.run import checkpoint

PERCENT = "test_accuracy_percent"


@pytest.fixture
def contents(teacher_run):
    """The dict of a trained checkpoint."""
    return checkpoint.read(teacher_run / "plane2_seed1_best.pth.tar")


@pytest.fixture
def scored(call, tmp_path):
    """scored(contents, ...) evaluates a file with these contents: status, standard error and the fields of the JSON."""

    def score(contents, *argv):
        torch.save(contents, tmp_path / "file.pth.tar")
        outcome = call(evaluate, "--checkpoint", tmp_path / "file.pth.tar", "--json", "--cuda", "0", *argv)
        result = json.loads(outcome.out) if outcome.out else {}
        return SimpleNamespace(status=outcome.status, err=outcome.err, **result)

    return score


@pytest.fixture
def distilled_from(call, tmp_path, tiny):
    """distilled_from(contents) is the outcome of a distillation, in `run`, from a file with these contents."""

    def distil(contents):
        torch.save(contents, tmp_path / "teacher.pth.tar")
        teacher = ("--teacher", "plane2", "--teacher-checkpoint", tmp_path / "teacher.pth.tar")
        return call(train, *tiny, *teacher, "--run-dir", tmp_path / "run")

    return distil


def refused(outcome, message):
    assert outcome.status == 2 and outcome.err.count("\n") == 1 and message in outcome.err


def untrained(contents):
    """The same file with freshly initialised weights."""
    torch.manual_seed(5)
    return contents | {"model_state_dict": model_factory.create("plane2", 10).state_dict()}


def test_an_intact_file(contents, scored):
    outcome = scored(contents)
    assert contents[PERCENT] > 90 and outcome.test_accuracy_percent == pytest.approx(contents[PERCENT], abs=1e-9)
    assert outcome.err == ""


def test_weights_that_were_never_loaded_or_trained(contents, scored):
    """The accuracy of the file's weights, with a warning that the file records another one."""
    outcome = scored(untrained(contents))
    assert outcome.test_accuracy_percent < 30
    assert f"records {contents[PERCENT]:.2f} %" in outcome.err and "does not beat guessing" in outcome.err


def test_an_untrained_teacher_is_refused(contents, distilled_from, scored, tmp_path):
    """Distilling from random weights would spoil every student silently."""
    refused(distilled_from(untrained(contents)), "no better than guessing")
    assert not (tmp_path / "run").exists()
    torch.save(untrained(contents), tmp_path / "random.pth.tar")
    argv = ("--teacher-checkpoint", tmp_path / "random.pth.tar", "--report", tmp_path / "report")
    outcome = scored(contents, *argv)
    assert outcome.status == 2 and "no better than guessing" in outcome.err and not (tmp_path / "report").exists()


@pytest.mark.parametrize("prefix", ["model.", "model.module.", "module.model._orig_mod."])
def test_prefix_of_a_wrapper(prefix, contents, scored, distilled_from):
    """With `strict=False` such a file would load nothing, without an error."""
    state = {prefix + key: value for key, value in contents["model_state_dict"].items()}
    outcome = scored({"state_dict": state}, "--model", "plane2", "--dataset", "digits")
    bare = scored({"state_dict": contents["model_state_dict"]}, "--model", "plane2", "--dataset", "digits")
    assert outcome.status == 0 and outcome.test_accuracy_percent == bare.test_accuracy_percent > 90
    assert f"{contents[PERCENT]:.2f} % on digits/test" in distilled_from(contents | {"model_state_dict": state}).out


def test_a_network_with_a_module_named_like_a_wrapper(contents, scored, tmp_path, monkeypatch):
    """Here `model.` is part of the network's own keys."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_nets.py").write_text(
        "from torch import nn\n\n\nclass Wrapped(nn.Module):\n"
        "    def __init__(self, classes):\n        super().__init__()\n"
        "        self.model = nn.Sequential(nn.Flatten(), nn.Linear(3072, classes))\n\n"
        "    def forward(self, images):\n        return self.model(images)\n"
    )
    weights = {"model.1.weight": torch.zeros(10, 3072), "model.1.bias": torch.arange(10.0)}
    outcome = scored(
        contents | {"model_state_dict": weights, "model": "my_nets.py:Wrapped"}, "--model", "my_nets.py:Wrapped"
    )
    assert outcome.status == 0, outcome.err
    nines = 100 * float((data_loader.read("digits").test.labels == 9).double().mean())
    assert outcome.test_accuracy_percent == pytest.approx(nines)


def test_a_teacher_beside_the_network(contents, scored):
    """A file with student and teacher is refused: there is no guessing which is meant."""
    state = {
        f"{role}.{key}": value for role in ("student", "teacher") for key, value in contents["model_state_dict"].items()
    }
    refused(scored({"state_dict": state}, "--model", "plane2", "--dataset", "digits"), "holds no classifier weights")


@pytest.mark.parametrize("missing", ["conv_layers.0.weight", "conv_layers.1.running_mean", "fc_layers.0.bias"])
def test_a_missing_key(missing, contents, scored):
    del contents["model_state_dict"][missing]
    refused(scored(contents), "keys are missing")


def test_training_mode(contents):
    """Predictions use evaluation mode: they do not depend on the batch, and change no running statistics."""
    network = model_factory.from_state("plane2", contents["model_state_dict"], "file").train()
    test = data_loader.read("digits").test
    before = digest(network.state_dict())
    whole = evaluation.predict(network, test)
    network.train()
    in_small = evaluation.predict(network, test, batch_size=3)
    assert torch.allclose(whole, in_small, atol=1e-4)
    assert 100 * float((whole.argmax(1) == test.labels).double().mean()) == pytest.approx(contents[PERCENT], abs=1e-9)
    assert digest(network.state_dict()) == before


def test_another_normalisation(monkeypatch, tmp_path, call, tiny, scored):
    """A network is evaluated with the normalisation that it was trained with, even if the data set's has changed."""
    with monkeypatch.context() as patch:
        spec = dataclasses.replace(names.DATASETS["digits"], mean=(0.9,) * 3, std=(0.05,) * 3)
        patch.setitem(names.DATASETS, "digits", spec)
        assert call(train, *tiny, "--epochs", "2", "--run-dir", tmp_path / "run").status == 0
    contents = checkpoint.read(tmp_path / "run/plane2_seed1_best.pth.tar")
    outcome = scored(contents)
    assert contents[PERCENT] > 70 and outcome.test_accuracy_percent == pytest.approx(contents[PERCENT], abs=1e-9)
    forgotten = {key: value for key, value in contents.items() if key not in ("mean", "std")}
    assert abs(scored(forgotten).test_accuracy_percent - contents[PERCENT]) > 0.5  # so the test can fail


def test_another_image_size(tmp_path, call, tiny, scored):
    """A network is evaluated at the size that it was trained at; a file without a size is refused at a wrong one."""
    assert call(train, *tiny, "--epochs", "2", "--image-size", "48", "--run-dir", tmp_path / "run").status == 0
    contents = checkpoint.read(tmp_path / "run/plane2_seed1_best.pth.tar")
    assert contents[PERCENT] > 70
    assert scored(contents).test_accuracy_percent == pytest.approx(contents[PERCENT], abs=1e-9)
    refused(scored(contents, "--image-size", "32"), "48x48, not 32x32")
    del contents["image_size"]
    refused(scored(contents), "is not plane2")
    assert scored(contents, "--image-size", "48").test_accuracy_percent == pytest.approx(contents[PERCENT], abs=1e-9)


def reordered(contents):
    """The same network with its classes permuted, as from class folders that sort differently."""
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    state = dict(contents["model_state_dict"])
    for key in ("fc_layers.0.weight", "fc_layers.0.bias"):
        state[key] = state[key][order]
    return contents | {"model_state_dict": state, "class_names": [contents["class_names"][i] for i in order]}


def test_another_order_of_the_classes(contents, scored, distilled_from, tmp_path):
    outcome = scored(reordered(contents))
    assert outcome.test_accuracy_percent == pytest.approx(contents[PERCENT], abs=1e-9)
    assert "matched by name" in outcome.err
    refused(distilled_from(reordered(contents)), "in another order")
    unnamed = {key: value for key, value in reordered(contents).items() if key != "class_names"}
    assert "does not beat guessing" in scored(unnamed).err


def test_another_network(contents, scored):
    refused(scored(contents, "--model", "plane4"), "holds a plane2, not a plane4")
    refused(scored(contents | {"model": "plane4"}), "is not plane4")


def test_another_data_set_with_as_many_classes(contents, scored, class_folders, tmp_path):
    outcome = scored(contents, "--dataset", "cifar10", "--dataset-dir", class_folders(tmp_path / "data"))
    assert outcome.status == 0 and "was trained on digits (0, 1, 2, ...), not cifar10" in outcome.err
    assert outcome.recorded_test_accuracy_percent is None


def test_another_number_of_classes(contents, scored, class_folders, tmp_path):
    folders = class_folders(tmp_path / "data", "cifar100", train_images=1)
    outcome = scored(contents, "--dataset", "cifar100", "--dataset-dir", folders)
    assert outcome.status == 2 and "was trained for 10 classes; cifar100 has 100" in outcome.err
