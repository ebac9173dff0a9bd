"""docs/coming_from.md: each command of its right-hand column, parsed as it stands, and run at a small scale."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from conftest import ROOT, parse_command, shorten_latency

import distill_paths
import evaluate
import report
import train
from takd.run import checkpoint

COMMANDS = {"train.py": train, "evaluate.py": evaluate, "report.py": report, "distill_paths.py": distill_paths}
# The settings of every training in these tests, and the flags of the document that they replace.
TINY = "--dataset digits --epochs 1 --batch-size 32 --learning-rate 0.01 --cuda 0 --precision fp32".split()
REPLACED = (*TINY[::2], "--dataset-dir", "--image-size")
# Two networks replace all others: one the large ones, one the rest.
LARGE, OTHERS = (
    r"torchvision[:-]resnet50|resnet50|resnet110|Plane10",
    r"torchvision[:-]resnet\d+|resnet\d+|Plane\d+|cnn5",
)


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
    """The same command at a small scale: a training with TINY, a study as its dry run, the others as they are."""
    if script == "distill_paths.py":
        return [*argv, "--dry-run"]
    argv = [re.sub(OTHERS, "plane2", re.sub(LARGE, "plane4", word)) for word in argv]
    argv = [found for word in argv for found in (sorted(map(str, Path().glob(word))) if "*" in word else [word])]
    if script == "train.py":
        before = ["", *argv]
        kept = [word for word, flag in zip(argv, before, strict=False) if not {word, flag} & set(REPLACED)]
        return [*(word for word in kept if word != "--pretrained"), *TINY]
    return [*argv, *(("--cuda", "0") if script == "evaluate.py" else ())]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with the file of arguments that the table names."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "commandline_args.txt").write_text("# as there\n--student plane2 --dataset digits\n--epochs 1\n")
    return tmp_path


def test_the_table_is_read():
    assert len(commands()) == 5 and sum(map(len, commands().values())) >= 20


@pytest.mark.parametrize("project", commands())
def test_arguments_as_they_stand(project, folder):
    for command in commands()[project]:
        _, script, *argv = shlex.split(command)
        parse_command(script, argv)
        if "--method at" in command:  # the table names these as alternatives
            for method in ("base", "logit", "st", "at_st", "fsp"):
                parse_command(script, [*argv, "--method", method])


@pytest.mark.slow
@pytest.mark.parametrize("project", commands())
def test_each_command_runs_in_the_order_of_the_table(project, folder, call, monkeypatch):
    shorten_latency(monkeypatch)
    for command in commands()[project]:
        _, script, *argv = shlex.split(command)
        if script == "data_loader.py":
            continue  # it downloads
        argv = shrunk(script, argv)
        for file in (Path(word) for word in argv if "XXXX" in word):  # a checkpoint of the released code
            contents = checkpoint.read(next(Path("runs").rglob("plane4_seed1_best.pth.tar")))
            torch.save({key: contents[key] for key in ("model_state_dict", "optimizer_state_dict", "epoch")}, file)
        outcome = call(COMMANDS[script], *argv)
        assert not outcome.status, f"{command}\n{argv}\n{outcome.err}"
