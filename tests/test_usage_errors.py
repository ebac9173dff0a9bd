"""Usage errors of the commands: one line, exit status 2, nothing written, before torch is imported."""

import os
import re
import shutil

import pytest
import torch
from conftest import listing

import model_factory
import train
from takd.distill import evaluation, logit_table
from takd.errors import UserError
from takd.run import trainer

FEW = ("--student", "plane2", "--dataset", "digits")
USAGE_ERRORS = {
    "unknown flag": (["--learn-rate", "1"], "unrecognized arguments"),
    "abbreviation": (["--epoch", "3"], "unrecognized arguments"),
    "unknown network": (["--student", "resnet9"], "did you mean resnet8?"),
    "unknown teacher": (["--teacher", "vgg"], "networks: resnet8"),
    "unknown data set": (["--dataset", "cifar1000"], "did you mean cifar100?"),
    "unknown recipe": (["--recipe", "mine"], "released-code"),
    "unknown method": (["--teacher", "plane4", "--method", "cdr"], "did you mean crd?"),
    "method without a teacher": (["--method", "st"], "--method needs --teacher"),
    "option without a teacher": (["--method-option", "alpha=1"], "--method-option needs --teacher"),
    "option of base without a teacher": (["--method", "base", "--temperature", "3"], "--temperature needs --teacher"),
    "temperature of a method without it": (
        ["--teacher", "plane4", "--method", "at", "--temperature", "3"],
        "options of at: beta",
    ),
    "unknown option": (["--teacher", "plane4", "--method-option", "temprature=3"], "did you mean temperature?"),
    "option given twice": (
        ["--teacher", "plane4", "--lambda", ".1", "--method-option", "lambda=.1"],
        "lambda is given twice",
    ),
    "option outside its choices": (["--teacher", "plane4", "--method-option", "reduction=sum"], "batchmean or mean"),
    "option out of bounds": (["--teacher", "plane4", "--method-option", "lambda=2"], "at most 1"),
    "option without a value": (["--teacher", "plane4", "--method-option", "lambda"], "write key=value"),
    "method in no file": (["--teacher", "plane4", "--method", "absent.py:Mine"], "absent.py cannot be read"),
    "no repetition": (["--repeat", "0"], "at least 1"),
    "seeds beyond the largest": (["--seed", str(2**63 - 1), "--repeat", "2"], "seeds end at"),
    "network of an absent file": (["--student", "absent.py:Net"], "absent.py cannot be read (no such file)"),
    "network that a file lacks": (
        ["--student", "nets.py:Nett"],
        "nets.py defines no 'Nett' (did you mean Net?); it defines: Net",
    ),
    "network in a file with a syntax error": (["--student", "wrong.py:Net"], "wrong.py is not Python"),
    "network in a file that cannot be imported": (
        ["--student", "broken.py:Net"],
        "broken.py:Net cannot be imported: ModuleNotFoundError: No module named 'absent_package' (line 2)",
    ),
    "pretrained weights of a network of the suite": (["--pretrained"], "--pretrained needs a network of torchvision's"),
    "pretrained weights of a trained teacher": (
        ["--pretrained", "--teacher", "resnet50", "--teacher-checkpoint", "x"],
        "--pretrained needs a network",
    ),
    "workers without random augmentation": (
        ["--workers", "2", "--augment", "crop-flip"],
        "--workers needs --augment rotate-crop-flip",
    ),
    "a table of random views": (
        ["--teacher", "plane4", "--augment", "rotate-crop-flip", "--teacher-cache", "full"],
        "--teacher-cache full: random augmentation (rotate-crop-flip) cannot be cached",
    ),
    "a CUDA graph on the CPU": (["--no-cuda-graph"], "for GPUs only"),
    "TF32 on the CPU": (["--precision", "tf32"], "for GPUs only"),
    "image size of 0": (["--image-size", "0"], "at least 8"),
    "no epochs": (["--epochs", "0"], "at least 1"),
    "half an epoch": (["--epochs", "1.5"], "whole number"),
    "huge epochs": (["--epochs", "9" * 400], "whole number"),
    "negative batch": (["--batch-size", "-4"], "at least 1"),
    "rate of zero": (["--learning-rate", "0"], "above 0"),
    "rate not a number": (["--learning-rate", "nan"], "above 0"),
    "infinite rate": (["--learning-rate", "inf"], "above 0"),
    "momentum of 1": (["--momentum", "1"], "below 1"),
    "negative decay": (["--weight-decay", "-1"], "at least 0"),
    "temperature of 0": (["--teacher", "plane4", "--temperature", "0"], "above 0"),
    "lambda above 1": (["--teacher", "plane4", "--lambda", "1.5"], "at most 1"),
    "lambda without a teacher": (["--lambda", "0.5"], "--lambda needs --teacher"),
    "temperature without a teacher": (["--temperature", "4"], "--temperature needs --teacher"),
    "checkpoint without a teacher": (["--teacher-checkpoint", "x"], "--teacher-checkpoint needs --teacher"),
    "Nesterov without momentum": (["--nesterov", "--momentum", "0"], "--momentum above 0"),
    "one and a half images": (["--validation-split", "1.5"], "neither a share below 1 nor a whole number"),
    "an epoch of a measurement": (["--measure", "plane2", "--epochs", "3"], "--epochs has no effect"),
    "negative seed": (["--seed", "-1"], "at least 0"),
    "seed too large": (["--seed", str(2**63)], "at most"),
    "cuda maybe": (["--cuda", "maybe"], "neither yes or no"),
    "cuda negative": (["--cuda", "-1"], "neither yes or no"),
    "more GPUs than there are": (["--cuda", "99"], "this machine has"),
    "no value": (["--epochs"], "expected one argument"),
    "a stray word": (["digits"], "unrecognized arguments"),
    "absent arguments file": (["@absent.txt"], "absent.txt"),
    "open quote in an arguments file": (["@quote.txt"], "quotation"),
    "arguments file that includes itself": (["@self.txt"], "includes itself"),
    "binary arguments file": (["@binary.txt"], "UTF-8"),
    "named pipe as an arguments file": (["@pipe"], "not a file"),
    "link to itself as an arguments file": (["@loop"], "symbolic links"),
    "empty value": (["--teacher", "plane4", "--teacher-checkpoint", ""], "has no value"),
    "name that is not UTF-8": (["--run-dir", "caf\udce9"], "'caf\\udce9' is not UTF-8"),
    "rate that would overflow": (["--learning-rate-decay", "1e300"], "at most 1"),
    "temperature that would overflow": (["--teacher", "plane4", "--temperature", "1e200"], "at most 1000"),
    "a thousand million runs": (["--repeat", "1000000000"], "at most 1000"),
    "a hundred thousand processes": (["--augment", "rotate-crop-flip", "--workers", "100000"], "at most 256"),
    "an embedding that fits nowhere": (
        ["--teacher", "plane4", "--method", "crd", "--method-option", "dimensions=1000000000"],
        "at most 4096",
    ),
    "method in a named pipe": (["--teacher", "plane4", "--method", "pipe:Mine"], "pipe cannot be read"),
    "class that is no method": (["--teacher", "plane4", "--method", "nets.py:Net"], "is a torch.nn.Module"),
}


@pytest.mark.parametrize("case", USAGE_ERRORS)
def test_usage_errors_are_one_line_and_need_no_heavy_import(case, tmp_path, run_command, nothing_heavy):
    (tmp_path / "quote.txt").write_text("--epochs '3\n")
    (tmp_path / "self.txt").write_text("@self.txt\n")
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "nets.py").write_text("class Net:\n    pass\n")
    (tmp_path / "wrong.py").write_text("class Net(:\n")
    (tmp_path / "broken.py").write_text("import json\nimport absent_package\n")
    before = listing(tmp_path)
    argv, message = USAGE_ERRORS[case]
    # Without bytecode: the folder would get Python's __pycache__ of a user's file.
    outcome = run_command("train.py", *FEW, *argv, cwd=tmp_path, **nothing_heavy, PYTHONDONTWRITEBYTECODE="1")
    assert (outcome.status, outcome.out) == (2, ""), outcome
    assert re.fullmatch(r"train\.py: error: [^\n]+\n", outcome.err) and message in outcome.err
    assert listing(tmp_path) == before


def test_an_unknown_network_of_torchvision(tmp_path, run_command):
    """The names are torchvision's own, so it is imported where one is given; without it the message is one line too."""
    argv = ("train.py", *FEW, "--student", "torchvision:resnet", "--run-dir", "run")
    (tmp_path / "torchvision.py").write_text("raise ImportError")
    unknown = "unknown network 'torchvision:resnet' (did you mean resnet18?); torchvision's networks: alexnet "
    absent = "torchvision is not installed; pip install -r requirements.txt"
    for environment, message in (({}, unknown), ({"PYTHONPATH": str(tmp_path)}, absent)):
        outcome = run_command(*argv, cwd=tmp_path, **environment, PYTHONDONTWRITEBYTECODE="1")
        assert (outcome.status, outcome.out) == (2, "") and outcome.err.count("\n") == 1 and message in outcome.err
    assert [path.name for path in tmp_path.iterdir()] == ["torchvision.py"]


@pytest.mark.parametrize(
    "script, argv",
    [
        ("evaluate.py", []),
        ("evaluate.py", ["--checkpoint"]),
        ("evaluate.py", ["--checkpoint", "x", "--model", "resnet9"]),
        ("evaluate.py", ["--checkpoint", "x", "--top", "5"]),
        ("distill_paths.py", ["--sizes", "plane10"]),
        ("report.py", []),
        ("report.py", ["x", "--table", "resnet9"]),
        ("export.py", ["--checkpoint", "x", "--output", "absent/student.onnx"]),
        ("data_loader.py", ["--download", "digits"]),
    ],
)
def test_usage_errors_of_the_other_commands(script, argv, tmp_path, run_command, nothing_heavy):
    outcome = run_command(script, *argv, cwd=tmp_path, **nothing_heavy)
    assert (outcome.status, outcome.out) == (2, "")
    assert re.fullmatch(rf"{re.escape(script)}: error: [^\n]+\n", outcome.err)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", ["train.py", "evaluate.py", "distill_paths.py", "report.py", "data_loader.py"])
def test_help_needs_no_heavy_import(script, run_command, nothing_heavy):
    outcome = run_command(script, "--help", **nothing_heavy)
    assert (outcome.status, outcome.err) == (0, "") and outcome.out.startswith(f"usage: {script}")


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--teacher", "plane2", "--teacher-checkpoint", "absent.pth.tar"], "does not exist"),
        (["--teacher", "plane2", "--teacher-checkpoint", "."], "is a folder"),
        (["--validation-split", "5000"], "leaves"),
        (["--train-images", "5000"], "there are 1438 images to train on"),
        (["--dataset", "folder", "--dataset-dir", "absent"], "absent/train does not exist"),
        (["--student", "cnn5", "--image-size", "16"], "too small for this network's 5 poolings"),
        (["--student", "torchvision:alexnet"], "does not work with 32x32 images"),
        (
            ["--student", "torchvision:shufflenet_v2_x0_5", "--batch-size", "1437"],
            "leaves one of 1438 images for the last step",
        ),
        (["--dataset", "cifar10", "--no-download"], "downloading is off"),
    ],
)
def test_errors_found_when_files_are_read_are_one_line(argv, message, tmp_path, call, tiny, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = call(train, *tiny, *argv, "--run-dir", "run")
    assert (outcome.status, outcome.err.count("\n")) == (2, 1) and message in outcome.err
    assert not list(tmp_path.iterdir())


TAUGHT = ("--teacher", "resnet8", "--student", "plane2")
REFUSED = {  # what a run is refused for once torch is imported, with a teacher's file or one that is to be trained
    "method that does not fit": ("--method fsp", "every other method works"),
    "table that the method does not use": ("--method at --teacher-cache full", "the table holds logits"),
    "table without room": ("--teacher-cache full", "has 0.0 MB free"),
    "network too deep for the images": ("--student cnn5 --image-size 16", "too small for this network"),
    "last batch of one image": ("--student torchvision:shufflenet_v2_x0_5 --batch-size 1437", "leaves one of 1438"),
    "more images than there are": ("--train-images 5000", "there are 1438 images"),
}


@pytest.mark.parametrize("trained_first", [True, False])
@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    case, trained_first, tmp_path, call, tiny, monkeypatch
):
    argv, message = REFUSED[case]
    monkeypatch.setattr(logit_table, "free_bytes", lambda folder: 1000)
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "teacher.pth.tar"
    if not trained_first:
        torch.save({"model_state_dict": model_factory.create("resnet8", 10).state_dict()}, file)
    given = () if trained_first else ("--teacher-checkpoint", file)
    before = listing(tmp_path)
    monkeypatch.setattr(evaluation, "chance_percent", lambda labels: -1.0)  # any teacher will do
    outcome = call(train, *tiny, *TAUGHT, *given, *argv.split(), "--run-dir", "run")
    assert (outcome.status, outcome.err.count("\n")) == (2, 1) and message in outcome.err, outcome
    assert listing(tmp_path) == before


def test_images_are_not_decoded_for_a_run_that_is_refused(tmp_path, call, tiny, photographs):
    folder = shutil.copytree(photographs, tmp_path / "three", ignore=shutil.ignore_patterns("takd-decoded*"))
    before = listing(folder)
    data = ("--dataset", "folder", "--dataset-dir", folder, "--image-size", "16", "--run-dir", tmp_path / "run")
    for argv, message in (("--student cnn5", "too small"), ("--validation-split 36", "leaves 0 of 36 images")):
        outcome = call(train, *tiny, *data, *argv.split())
        assert outcome.status == 2 and message in outcome.err and listing(folder) == before, outcome
    assert not (tmp_path / "run").exists()


def test_divergence_is_one_line(tmp_path, call, tiny):
    outcome = call(train, *tiny, "--learning-rate", "1e30", "--run-dir", tmp_path / "run")
    assert outcome.status == 1 and "no longer a number at epoch 1" in outcome.err and outcome.err.count("\n") == 1
    assert not (tmp_path / "run/summary.json").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU that torch can use")
def test_a_gpu_that_torch_cannot_use_is_a_user_error():
    """As with a driver too old for this build of torch: on this machine there is none."""
    evaluation.check_gpu("cpu")
    with pytest.raises(UserError) as raised:
        evaluation.check_gpu("cuda")
    message = str(raised.value)
    assert "\n" not in message and all(part in message for part in (torch.__version__, "the GPU", "--cuda 0"))


def test_out_of_memory_on_a_gpu_is_one_line(tmp_path, call, tiny, teacher_file):
    (tmp_path / "full.py").write_text(
        "import torch\nfrom torch.nn import functional as F\nclass Full(torch.nn.Module):\n    calls = 0\n"
        "    def forward(self, student, teacher, labels):\n        self.calls += 1\n        if self.calls > 3:\n"
        "            raise torch.cuda.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a '\n"
        "                'total capacity of 79.10 GiB of which 1.05 GiB is free. Process 7 has 78 GiB in use.')\n"
        "        return {'loss': F.cross_entropy(student.logits, labels)}\n"
    )
    taught = ("--teacher", "plane2", "--teacher-checkpoint", teacher_file, "--method", f"{tmp_path}/full.py:Full")
    outcome = call(train, *tiny, *taught, "--run-dir", tmp_path / "run")
    assert outcome.status == 1 and outcome.err.count("\n") == 1
    expected = (
        "out of memory",
        "Tried to allocate 2.00 GiB",
        "1.05 GiB is free",
        "--batch-size",
        "--teacher-cache live",
    )
    assert all(part in outcome.err for part in (*expected, "--jobs"))


def test_hardware_notes(monkeypatch):
    monkeypatch.setattr(evaluation, "native_bf16", lambda device: False)
    assert list(trainer.hardware_notes("cpu", "fp32", 2, 32)) == []
    assert "emulates bf16" in list(trainer.hardware_notes("cpu", "bf16", 1, 32))[0]
    assert "--gpus 0 1" in list(trainer.hardware_notes("cuda", "fp32", 2, 32))[0]
    assert list(trainer.hardware_notes("cuda", "fp32", 2, 224)) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_an_error(tmp_path, call, tiny):
    tmp_path.chmod(0o500)
    outcome = call(train, *tiny, "--run-dir", tmp_path / "run")
    assert outcome.status == 1 and "Permission denied" in outcome.err
