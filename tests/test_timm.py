"""The commands of docs/timm.md and the README's on photographs, with the packages themselves, on small images."""

import re
import shutil

import pytest
import torch
from conftest import ROOT, shorten_latency
from test_readme import commands

import export
import model_factory
import train
from takd.run import checkpoint

COMMANDS = {"train.py": train, "export.py": export}
TINY = tuple("--epochs 6 --batch-size 6 --image-size 32 --learning-rate 0.01 --precision fp32 --cuda 0".split())


@pytest.fixture
def place(photographs, tmp_path, monkeypatch):
    """The current folder, with photographs under the documents' names."""
    monkeypatch.chdir(tmp_path)
    shorten_latency(monkeypatch)
    for name in ("photos", "imagenette2"):
        shutil.copytree(photographs, tmp_path / name, ignore=shutil.ignore_patterns("takd-decoded*"))
    return tmp_path


@pytest.fixture
def vit(place):
    """The file of docs/timm.md."""
    timm = pytest.importorskip("timm", reason="timm is in requirements-dev.txt")
    text = (ROOT / "docs/timm.md").read_text()
    (place / "vit.py").write_text(re.search(r"^```python\n(.+?)^```", text, re.DOTALL | re.MULTILINE)[1])
    return timm


def typed(document, word):
    """The commands of a document that have this word, without --pretrained: there is no network connection."""
    lines = [(script, argv) for line, script, argv in commands((ROOT / document).read_text()) if word in line]
    return [(script, [each for each in argv if each != "--pretrained"]) for script, argv in lines]


def needs_export():
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is in requirements-export.txt")


def run(lines, call, *more):
    for script, argv in lines:
        outcome = call(COMMANDS[script], *argv, *(() if script == "export.py" else more))
        assert outcome.status == 0, (argv, outcome.err)


@pytest.mark.slow
def test_the_readmes_teacher_student_and_onnx_file(place, call):
    needs_export()
    lines = typed("README.md", "photos")
    assert [script for script, _ in lines] == ["train.py", "train.py", "export.py"]
    run(lines, call, *TINY)
    assert (place / "student.onnx").stat().st_size > 4 * 50_000


@pytest.mark.slow
def test_the_pages_commands(place, vit, call):
    """timm's normalisation is in the checkpoint, and its weights in timm's own network give the same logits."""
    needs_export()
    lines = typed("docs/timm.md", "imagenette2")
    assert [script for script, _ in lines] == ["train.py", "train.py", "export.py"]
    run(lines, call, *TINY)
    contents = checkpoint.read("runs/vit/vit.py-ViT_seed1_best.pth.tar")
    assert (contents["mean"], contents["std"], contents["image_size"]) == ([0.5] * 3, [0.5] * 3, 32)
    theirs = vit.create_model("vit_tiny_patch16_224", num_classes=3, img_size=32).eval()
    theirs.load_state_dict(contents["model_state_dict"])
    ours, images = (
        model_factory.load("runs/vit/vit.py-ViT_seed1_best.pth.tar", "vit.py:ViT")[0].eval(),
        torch.rand(2, 3, 32, 32),
    )
    with torch.no_grad():
        assert torch.equal(ours(images), theirs(images))
    student = ("--student", "vit.py:ViT", "--dataset", "folder", "--dataset-dir", "photos", *TINY, "--epochs", "1")
    teacher = ("--teacher", "vit.py:ViT", "--teacher-checkpoint", "runs/vit/vit.py-ViT_seed1_best.pth.tar")
    assert call(train, *student, *teacher, "--method", "rkd", "--run-dir", "runs/rkd").status == 0
    refused = call(train, *student, *teacher, "--method", "at", "--run-dir", "runs/at")
    assert (refused.status, refused.err.count("\n")) == (2, 1) and "compares square feature maps" in refused.err


@pytest.mark.slow
def test_the_size_that_the_class_declares(place, vit, call, class_folders):
    command = "--student vit.py:ViT --dataset cifar10 --epochs 1 --cuda 0 --precision fp32 --run-dir runs/own"
    outcome = call(train, *command.split(), "--dataset-dir", class_folders(place / "data"))
    assert outcome.status == 0, outcome.err
    assert checkpoint.read("runs/own/vit.py-ViT_seed1_best.pth.tar")["image_size"] == 224
