"""export.py: the ONNX file beside the network that it was made from, its metadata, and what is refused."""

import dataclasses
import hashlib
import json
import math
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, listing, read_json, shorten_latency

import data_loader
import export
import model_factory
from takd.run import checkpoint


@pytest.fixture(scope="module")
def onnxruntime():
    for package in ("onnx", "onnxscript", "onnxruntime"):
        found = pytest.importorskip(package, reason=f"{package} is in requirements-export.txt")
    return found


@pytest.fixture
def quick(monkeypatch):
    shorten_latency(monkeypatch)


@pytest.fixture(scope="module")
def exported(onnxruntime, teacher_run, tmp_path_factory, call):
    """The trained plane2 as a file, and what the command printed."""
    file, source = tmp_path_factory.mktemp("export") / "student.onnx", teacher_run / "plane2_seed1_best.pth.tar"
    with pytest.MonkeyPatch.context() as patch:
        shorten_latency(patch)
        outcome = call(export, "--checkpoint", source, "--output", file)
    assert outcome.status == 0, outcome.err
    return SimpleNamespace(file=file, source=source, out=outcome.out, session=onnxruntime.InferenceSession(str(file)))


def onnx_logits(session, pixels):
    return torch.from_numpy(session.run(None, {"images": (pixels / 255).numpy()})[0])


def test_any_number_of_images_with_pixels_in_0_to_1(exported):
    test, (network, _) = data_loader.read("digits").test, model_factory.load(exported.source)
    with torch.no_grad():
        expected = network.eval()(test.transform(test.images))
    for count in (1, 3, len(test)):
        found = onnx_logits(exported.session, test.images[:count])
        torch.testing.assert_close(found, expected[:count], rtol=1e-4, atol=1e-4)


def test_metadata(exported, teacher_run):
    metadata = exported.session.get_modelmeta().custom_metadata_map
    best = read_json(teacher_run / "summary.json")["best"]
    assert json.loads(metadata.pop("class_names")) == [str(digit) for digit in range(10)]
    assert "float32 (N, 3, 32, 32), RGB, pixels in 0..1" in metadata.pop("input") and "logits" in metadata.pop("output")
    assert metadata.pop("checkpoint_sha256") == hashlib.sha256(exported.source.read_bytes()).hexdigest()
    assert metadata.pop("weights_digest") == checkpoint.weights_digest(exported.source)
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", metadata.pop("takd_version"))
    assert metadata == {
        "path": "plane2",
        "dataset": "digits",
        "seed": "1",
        "test_accuracy_percent": f"{best['test_accuracy_percent']:.2f}",
        "test_images": "359",
        "mean": "[0.306, 0.306, 0.306]",
        "std": "[0.376, 0.376, 0.376]",
        "checkpoint": "plane2_seed1_best.pth.tar",
    }
    assert str(ROOT).encode() not in exported.file.read_bytes()  # no stack traces


def test_the_table_compares_accuracy_size_and_latency(exported):
    heading, torchs, onnxs, *lines = exported.out.splitlines()
    assert re.sub("  +", "|", heading.strip()) == "test %|MB|ms, batch of 1|ms, batch of 128"
    assert torchs.split()[:2] == ["PyTorch", onnxs.split()[1]] and float(onnxs.split()[1]) > 80
    assert float(onnxs.split()[2]) == round(exported.file.stat().st_size / 1e6, 2)
    assert all(float(cell) > 0 for row in (torchs, onnxs) for cell in row.split()[1:])
    assert re.search(r"The logits of 359 test images differ by \d\.\de-0[5-9] at most\.", "\n".join(lines))


def test_the_difference_is_relative_for_logits_above_1():
    assert export.difference(torch.tensor([0.25, 80.0]), torch.tensor([0.5, 100.0])) == pytest.approx(0.25)
    assert math.isnan(export.difference(torch.tensor([0.0, math.nan]), torch.tensor([0.0, 0.0])))


def test_a_file_with_other_logits_is_not_written(onnxruntime, teacher_file, tmp_path, call, quick, monkeypatch):
    before, forward = listing(tmp_path), export.Session.forward
    monkeypatch.setattr(export.Session, "forward", lambda self, images: forward(self, images) * 1.001)
    outcome = call(export, "--checkpoint", teacher_file, "--output", tmp_path / "student.onnx")
    assert (outcome.status, outcome.out, outcome.err.count("\n")) == (1, "", 1)
    assert "differ from PyTorch's by" in outcome.err and listing(tmp_path) == before


def test_a_file_that_onnx_runtime_refuses_is_not_written(onnxruntime, teacher_file, tmp_path, call, monkeypatch):
    before = listing(tmp_path)
    monkeypatch.setattr(export, "exported", lambda *_: b"no protobuf")
    outcome = call(export, "--checkpoint", teacher_file, "--output", tmp_path / "student.onnx")
    assert (outcome.status, outcome.err.count("\n")) == (1, 1) and "ONNX Runtime cannot run the file" in outcome.err
    assert listing(tmp_path) == before


def test_labels_follow_the_order_of_the_networks_classes():
    args = export.parse(["--checkpoint", "x", "--output", "y.onnx"])
    classes, digits = list("9876543210"), data_loader.read("digits").test
    metadata = {"dataset": "digits", "classes": 10, "class_names": classes, "image_size": 32}
    test = export.test_images(args, metadata)
    assert test.classes == tuple(classes) and torch.equal(test.labels, 9 - digits.labels)


OWN = """
import torch

class Linear(torch.nn.Module):
    mean, std, image_size = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7), 8

    def __init__(self, classes):
        super().__init__()
        self.linear = torch.nn.Linear(192, classes)

    def forward(self, images):
        return self.linear(images.flatten(1))

class Branching(Linear):
    def forward(self, images):
        return super().forward(images if images.sum() > 0 else -images)
"""


@pytest.fixture
def own(tmp_path):
    """own(CLASS) writes a checkpoint of a user's network with random weights, for digits."""
    (tmp_path / "nets.py").write_text(OWN)

    def write(name):
        name = f"{tmp_path}/nets.py:{name}"
        state = model_factory.create(name, 10, 8).state_dict()
        torch.save({"model_state_dict": state, "model": name, "dataset": "digits"}, tmp_path / "own.pth.tar")
        return tmp_path / "own.pth.tar"

    return write


def test_the_users_network_with_its_own_normalisation(own, onnxruntime, tmp_path, call, quick):
    file = own("Linear")
    name = checkpoint.read(file)["model"]
    outcome = call(export, "--checkpoint", file, "--model", name, "--output", tmp_path / "own.onnx")
    assert outcome.status == 0, outcome.err
    session = onnxruntime.InferenceSession(str(tmp_path / "own.onnx"))
    network, metadata = model_factory.load(file, name)
    pixels = torch.randint(256, (5, 3, 8, 8))
    mean, std = (torch.tensor(metadata[key]).reshape(3, 1, 1) for key in ("mean", "std"))
    assert metadata["std"] == (0.5, 0.6, 0.7)
    torch.testing.assert_close(onnx_logits(session, pixels), network((pixels / 255 - mean) / std), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_network_that_cannot_be_exported(own, onnxruntime, tmp_path, call):
    file = own("Branching")
    name = checkpoint.read(file)["model"]
    outcome = call(export, "--checkpoint", file, "--model", name, "--output", tmp_path / "own.onnx")
    assert (outcome.status, outcome.err.count("\n")) == (2, 1) and "Branching cannot be exported: " in outcome.err
    assert not (tmp_path / "own.onnx").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"dataset": None}, "does not record its data set; name it with --dataset"),
        ({"class_names": list("abcdefghij")}, "was trained on other classes than those of digits"),
        ({"model": "resnet8"}, "is not resnet8"),
    ],
)
def test_files_that_are_refused(change, message, teacher_file, tmp_path, call):
    torch.save(checkpoint.read(teacher_file) | change, teacher_file)
    outcome = call(export, "--checkpoint", teacher_file, "--output", tmp_path / "student.onnx")
    assert (outcome.status, outcome.err.count("\n")) == (2, 1) and message in outcome.err
    assert not (tmp_path / "student.onnx").exists()


def test_without_its_packages_one_line_names_the_command(tmp_path, run_command):
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util\nfind = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *more: None if 'onnx' in name else find(name, *more)\n"
    )
    argv = ("--checkpoint", "x", "--output", tmp_path / "y.onnx")
    outcome = run_command("export.py", *argv, PYTHONPATH=str(tmp_path), PYTHONDONTWRITEBYTECODE="1")
    line = r"export\.py: error: No module named 'onnx'; [^\n]+ -m pip install -r requirements-export\.txt [^\n]+\n"
    assert outcome.status == 2 and re.fullmatch(line, outcome.err)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet110", "resnet20a", "plane10", "torchvision:vit_b_32", "resnet50"])
def test_every_family_of_networks(name, onnxruntime, tmp_path, call, quick, monkeypatch):
    """With random weights, on a few images."""
    digits, size = data_loader.read("digits"), 64 if ":" in name else 32
    monkeypatch.setattr(data_loader, "read", lambda *_: digits._replace(test=resized))
    few = digits.test.subset(slice(0, 20), "digits/20")
    resized = dataclasses.replace(few, transform=few.transform._replace(image_size=size))
    state = model_factory.create(name, 10, size).state_dict()
    contents = {"model_state_dict": state, "model": name, "dataset": "digits", "image_size": size}
    torch.save(contents, tmp_path / "file")
    outcome = call(export, "--checkpoint", tmp_path / "file", "--output", tmp_path / "file.onnx")
    assert outcome.status == 0, outcome.err
