"""docs/coming_from.md: every command in its right-hand column, its arguments as they stand, and shrunk so far that it runs here."""

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

import distill_paths
import evaluate
import report
import train
from takd.config import flags as arguments
from takd.config import run_config as settings
from takd.run import checkpoint
from takd.study import cost

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = {"train": train, "evaluate": evaluate, "report": report, "distill_paths": distill_paths}
# What a training is shrunk to, and the flags with a value that give way to it. Two networks stand for all: the large and the others.
TINY = (
    "--dataset",
    "digits",
    "--epochs",
    "1",
    "--batch-size",
    "32",
    "--learning-rate",
    "0.01",
    "--cuda",
    "0",
    "--precision",
    "fp32",
)
GIVE_WAY = (*TINY[::2], "--dataset-dir", "--image-size")
LARGE, OTHERS = r"torchvision[:-]resnet50|resnet50|resnet110|Plane10", r"torchvision[:-]resnet\d+|resnet\d+|Plane\d+|cnn5"


def commands():
    """{project: [command, ...]} of the table, in its order."""
    found, project = {}, None
    for line in (ROOT / "docs/coming_from.md").read_text().splitlines():
        if line.startswith("|") and not line.startswith(("| from", "|---")):
            origin, _, here = line[1:-1].split("|")
            project = origin.strip() or project
            found.setdefault(project, []).extend(re.findall(r"`(python3 [^`]+)`", here))
    return found


def shrunk(script, argv):
    """The same command for this machine: of a training what TINY says, of a study its plan, of the rest everything."""
    if script == "distill_paths":
        return [*argv, "--dry-run"]
    argv = [re.sub(OTHERS, "plane2", re.sub(LARGE, "plane4", word)) for word in argv]
    argv = [found for word in argv for found in (sorted(map(str, Path().glob(word))) if "*" in word else [word])]
    if script == "train":
        kept = [word for i, word in enumerate(argv) if word not in GIVE_WAY and (i == 0 or argv[i - 1] not in GIVE_WAY)]
        return [*(word for word in kept if word != "--pretrained"), *TINY]
    return [*argv, *(("--cuda", "0") if script == "evaluate" else ())]


@pytest.fixture
def there(tmp_path, monkeypatch):
    """A folder with what the table takes for granted: a file of arguments."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "commandline_args.txt").write_text("# as there\n--student plane2 --dataset digits\n--epochs 1\n")
    return tmp_path


def test_the_table_is_read():
    assert len(commands()) == 5 and sum(map(len, commands().values())) >= 20


@pytest.mark.parametrize("project", commands())
def test_arguments_as_they_stand(project, there, monkeypatch):
    for command in commands()[project]:
        _, script, *argv = shlex.split(command)
        if script == "train.py":
            for method in ("base", "logit", "st", "at_st", "fsp") if "--method at" in command else [None]:
                given, origins, _ = settings.given_settings([*argv, *(["--method", method] if method else [])], elsewhere=True)
                settings.resolve(given, origins)
        elif script == "distill_paths.py":
            distill_paths.build_parser().parse_known_args(argv)
        elif script == "data_loader.py":
            monkeypatch.setattr(sys, "argv", [script, *argv])
            assert arguments.download("").download == ["cifar10", "cifar100"]
        else:
            COMMANDS[script.removesuffix(".py")].build_parser().parse_args(argv)


@pytest.mark.slow
@pytest.mark.parametrize("project", commands())
def test_each_runs_in_the_order_of_the_table(project, there, call, monkeypatch):
    monkeypatch.setattr(cost, "LEAST_SECONDS", 0)
    for command in commands()[project]:
        _, script, *argv = shlex.split(command)
        script = script.removesuffix(".py")
        if script == "data_loader":
            continue  # it fetches: tests/test_data.py has its own
        argv = shrunk(script, argv)
        for file in (Path(word) for word in argv if "XXXX" in word):  # as the released code would have left it
            contents = checkpoint.read(next(Path("runs").rglob("plane4_seed1_best.pth.tar")))
            torch.save({key: contents[key] for key in ("model_state_dict", "optimizer_state_dict", "epoch")}, file)
        outcome = call(COMMANDS[script], *argv)
        assert not outcome.status, f"{command}\n{argv}\n{outcome.err}"
