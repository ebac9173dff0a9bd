"""A network that has 96 % while it is trained and 10 % when it is evaluated: each cause that this can have, played.

In every case evaluate.py gives the number of the training or refuses the file; a teacher with such a fault never teaches.
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
from takd.run import checkpoint, engine

PERCENT = "test_accuracy_percent"


@pytest.fixture
def contents(teacher_run):
    """A trained checkpoint's dict, to be tampered with."""
    return checkpoint.read(teacher_run / "plane2_seed1_best.pth.tar")


@pytest.fixture
def scored(call, tmp_path):
    """scored(contents, ...) evaluates a file with these contents: its status, messages and JSON."""

    def score(contents, *argv):
        torch.save(contents, tmp_path / "file.pth.tar")
        outcome = call(evaluate, "--checkpoint", tmp_path / "file.pth.tar", "--json", "--cuda", "0", *argv)
        return SimpleNamespace(status=outcome.status, err=outcome.err, **(json.loads(outcome.out) if outcome.out else {}))

    return score


@pytest.fixture
def taught(call, tmp_path, tiny):
    """taught(contents) lets a file with these contents teach: the command's outcome. The run's folder is `run`."""

    def teach(contents):
        torch.save(contents, tmp_path / "teacher.pth.tar")
        teacher = ("--teacher", "plane2", "--teacher-checkpoint", tmp_path / "teacher.pth.tar")
        return call(train, *tiny, *teacher, "--run-dir", tmp_path / "run")

    return teach


def refused(outcome, message):
    assert outcome.status == 2 and outcome.err.count("\n") == 1 and message in outcome.err


def untrained(contents):
    """The same file with weights that were never trained."""
    torch.manual_seed(5)
    return contents | {"model_state_dict": model_factory.create_network("plane2", 10).state_dict()}


def test_nothing_played(contents, scored):
    outcome = scored(contents)
    assert contents[PERCENT] > 90 and outcome.test_accuracy_percent == pytest.approx(contents[PERCENT], abs=1e-9)
    assert outcome.err == ""


def test_weights_that_were_never_loaded_or_trained(contents, scored):
    """The number is the file's own weights', and it is said that the file records another one."""
    outcome = scored(untrained(contents))
    assert outcome.test_accuracy_percent < 30
    assert f"records {contents[PERCENT]:.2f} %" in outcome.err and "does not beat guessing" in outcome.err


def test_an_untrained_teacher_is_refused(contents, taught, scored, tmp_path):
    """What a head of random weights does to seed after seed of students."""
    refused(taught(untrained(contents)), "no better than guessing")
    assert not (tmp_path / "run").exists()
    torch.save(untrained(contents), tmp_path / "random.pth.tar")
    argv = ("--teacher-checkpoint", tmp_path / "random.pth.tar", "--report", tmp_path / "report")
    outcome = scored(contents, *argv)
    assert outcome.status == 2 and "no better than guessing" in outcome.err and not (tmp_path / "report").exists()


@pytest.mark.parametrize("prefix", ["model.", "model.module.", "module.model._orig_mod."])
def test_a_wrappers_prefix(prefix, contents, scored, taught):
    """`strict=False` loads nothing of such a file and says nothing."""
    state = {prefix + key: value for key, value in contents["model_state_dict"].items()}
    outcome = scored({"state_dict": state}, "--model", "plane2", "--dataset", "digits")
    bare = scored({"state_dict": contents["model_state_dict"]}, "--model", "plane2", "--dataset", "digits")
    assert outcome.status == 0 and outcome.test_accuracy_percent == bare.test_accuracy_percent > 90
    assert f"{contents[PERCENT]:.2f} % on digits/test" in taught(contents | {"model_state_dict": state}).out


def test_a_network_with_a_part_of_that_name(contents, scored, tmp_path, monkeypatch):
    """`model.` is then no wrapper's."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_nets.py").write_text(
        "from torch import nn\n\n\nclass Wrapped(nn.Module):\n    def __init__(self, classes):\n        super().__init__()\n"
        "        self.model = nn.Sequential(nn.Flatten(), nn.Linear(3072, classes))\n\n"
        "    def forward(self, images):\n        return self.model(images)\n"
    )
    weights = {"model.1.weight": torch.zeros(10, 3072), "model.1.bias": torch.arange(10.0)}
    outcome = scored(contents | {"model_state_dict": weights, "model": "my_nets.py:Wrapped"})
    assert outcome.status == 0, outcome.err
    nines = 100 * float((data_loader.load("digits")[1].labels == 9).double().mean())
    assert outcome.test_accuracy_percent == pytest.approx(nines)


def test_a_teacher_beside_the_network(contents, scored):
    """A file of a whole distillation: which of the two is meant is not guessed."""
    state = {f"{role}.{key}": value for role in ("student", "teacher") for key, value in contents["model_state_dict"].items()}
    refused(scored({"state_dict": state}, "--model", "plane2", "--dataset", "digits"), "holds no classifier weights")


@pytest.mark.parametrize("missing", ["conv_layers.0.weight", "conv_layers.1.running_mean", "fc_layers.0.bias"])
def test_a_part_that_is_missing(missing, contents, scored):
    del contents["model_state_dict"][missing]
    refused(scored(contents), "keys are missing")


def test_training_mode(contents):
    """Answers depend on the image alone, not on its batch, and asking changes nothing in the network."""
    network = model_factory.network_from_state("plane2", contents["model_state_dict"], "file").train()
    test = data_loader.load("digits")[1]
    before = checkpoint.digest(network.state_dict())
    whole = engine.predict(network, test)
    network.train()
    in_small = engine.predict(network, test, batch_size=3)
    assert torch.allclose(whole, in_small, atol=1e-4)
    assert 100 * float((whole.argmax(1) == test.labels).double().mean()) == pytest.approx(contents[PERCENT], abs=1e-9)
    assert checkpoint.digest(network.state_dict()) == before


def test_another_normalisation(monkeypatch, tmp_path, call, tiny, scored):
    """A network keeps the normalisation that it was trained with, whatever the data set's is now."""
    with monkeypatch.context() as patch:
        spec = dataclasses.replace(names.DATASETS["digits"], mean=(0.9,) * 3, std=(0.05,) * 3)
        patch.setitem(names.DATASETS, "digits", spec)
        assert call(train, *tiny, "--epochs", "2", "--run-dir", tmp_path / "run").status == 0
    contents = checkpoint.read(tmp_path / "run/plane2_seed1_best.pth.tar")
    outcome = scored(contents)
    assert contents[PERCENT] > 70 and outcome.test_accuracy_percent == pytest.approx(contents[PERCENT], abs=1e-9)
    forgotten = {key: value for key, value in contents.items() if key not in ("mean", "std")}
    assert abs(scored(forgotten).test_accuracy_percent - contents[PERCENT]) > 0.5  # it does matter here


def test_another_image_size(tmp_path, call, tiny, scored):
    """A network is asked at the size that it was trained at; where a file does not say, a wrong size does not pass."""
    assert call(train, *tiny, "--epochs", "2", "--image-size", "48", "--run-dir", tmp_path / "run").status == 0
    contents = checkpoint.read(tmp_path / "run/plane2_seed1_best.pth.tar")
    assert contents[PERCENT] > 70 and scored(contents).test_accuracy_percent == pytest.approx(contents[PERCENT], abs=1e-9)
    refused(scored(contents, "--image-size", "32"), "48x48, not 32x32")
    del contents["image_size"]
    refused(scored(contents), "is not plane2")
    assert scored(contents, "--image-size", "48").test_accuracy_percent == pytest.approx(contents[PERCENT], abs=1e-9)


def reordered(contents):
    """The same network, its classes in another order: as from folders with other names for their order."""
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    state = dict(contents["model_state_dict"])
    for key in ("fc_layers.0.weight", "fc_layers.0.bias"):
        state[key] = state[key][order]
    return contents | {"model_state_dict": state, "class_names": [contents["class_names"][i] for i in order]}


def test_another_order_of_the_classes(contents, scored, taught, tmp_path):
    outcome = scored(reordered(contents))
    assert outcome.test_accuracy_percent == pytest.approx(contents[PERCENT], abs=1e-9) and "matched by name" in outcome.err
    refused(taught(reordered(contents)), "in another order")
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
    assert outcome.status == 2 and "tells 10 classes apart, cifar100 has 100" in outcome.err
