"""Every file of a run damaged in every way: train.py continues to the same end or refuses in one line, evaluate.py and
report.py give true numbers, say what they leave out, or refuse.
"""

import os
import random
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import wait_until
from test_fuzz import contents
from test_kills import outcome
from tried import note
from warm import Command

from takd.run import checkpoint

RUN = "--dataset folder --dataset-dir images --image-size 32 --student plane2 --teacher plane4 --teacher-cache full "
RUN += "--epochs 12 --batch-size 12 --cuda 0 --precision fp32 --run-dir run"
STUDY = ("--sizes", "plane4", "plane2", "--dataset", "digits", "--epochs", "1", "--cuda", "0", "--runs", "study")
SWEEP = ("--teacher", "plane4", "--student", "plane2", "--dataset", "digits", "--epochs", "1", "--cuda", "0")
EVALUATE = ("evaluate.py", "--dataset-dir", "images", "--cuda", "0", "--checkpoint")
FILES = [
    f"run/{name}" for name in ("config.json", "metrics.jsonl", "summary.json", "last.pth.tar", "plane2*_best.pth.tar")
]
FILES += [f"run/teacher/{Path(name).name}".replace("plane2", "plane4") for name in FILES]
FILES += ["run/teacher/.*/*.float32", "images/.*.npy", "study/study.json", "sweep/study.json", "sweep/journal.log"]
SHAPES = ["[]", "{}", "null", "5", '"text"', "[5]", '{"epoch": "x"}', '{"epoch": {}}']


def truncated(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flipped(path):
    """A bit in each of three bytes; the highest, so that it shows in text."""
    contents = bytearray(path.read_bytes())
    for place in random.sample(range(len(contents)), 3):
        contents[place] ^= 128
    path.write_bytes(contents)


def replaced(path):
    """By another file of the same run and format."""
    others = {".json": "config.json", ".jsonl": "summary.json", ".tar": "last.pth.tar"}
    other = path.with_name(others.get(path.suffix, "absent"))
    if other == path:
        other = next(iter(path.parent.glob("*_best.pth.tar")), path.with_name("summary.json"))
    path.write_bytes(other.read_bytes() if other.exists() else b"another file\n" * 100)


def misshapen(path):
    """Readable, with other contents than they should be."""
    if path.suffix == ".tar":
        state = checkpoint.read(path)
        state[random.choice(list(state))] = random.choice([5, None, [], {}, "text", [5], torch.zeros(1)])
        torch.save(state, path)
    else:
        path.write_text(random.choice(SHAPES) + "\n")


def other_kind(make):
    def damage(path):
        path.unlink()
        make(path)

    return damage


DAMAGES = {
    "emptied": lambda path: path.write_bytes(b""),
    "truncated": truncated,
    "bits flipped": flipped,
    "replaced by another": replaced,
    "of wrong shape": misshapen,
    "removed": lambda path: path.unlink(),
    "a FIFO": other_kind(os.mkfifo),
    "a folder": other_kind(Path.mkdir),
    "a link to itself": other_kind(lambda path: path.symlink_to(path.name)),
}


@pytest.fixture(scope="module")
def trees(tmp_path_factory, photographs):
    """(a folder with a run that was stopped, one with the same run finished, what the latter recorded)."""
    begun, patch = tmp_path_factory.mktemp("damage") / "begun", pytest.MonkeyPatch()
    shutil.copytree(photographs, begun / "images")
    patch.chdir(begun)
    (begun / "space.json").write_text('{"lambda": {"_type": "choice", "_value": [0.5, 1]}}')
    sweep = ("sweep.py", *SWEEP, "--space", "space.json", "--runs", "sweep")
    # Their records alone: the trainings would take a minute, and are runs like any other.
    import distill_paths
    from sweep import read_arguments, sweep_of

    study = distill_paths.read_arguments(list(STUDY))
    distill_paths.plan.record(
        study.args.runs,
        distill_paths.plan.plan(study.args.runs, study.sizes, study.paths, study.args.seeds, study.common, study.steps),
    )
    sweep_of(read_arguments(list(sweep[1:]))).record(2)
    patch.undo()
    metrics = begun / "run/metrics.jsonl"

    command = Command(begun, "train.py", *RUN.split())
    wait_until(lambda: not command.running or (metrics.exists() and metrics.stat().st_size))
    command.process.terminate()
    status, out, err = command.end()
    assert status == 143 and not (begun / "run/summary.json").exists(), (out, err)
    finished = begun.with_name("finished")
    shutil.copytree(begun, finished)
    status, out, err = Command(finished, "train.py", *RUN.split()).end()
    assert status == 0, (out, err)
    expected = outcome(finished, last=False)
    numbers = numbers_of(Command(finished, "report.py", ".", "--table").end()[1])
    for tree in (begun, finished):
        for file in tree.rglob("*.pth.tar"):
            numbers |= numbers_of(Command(tree, *EVALUATE, str(file.relative_to(tree))).end()[1])
    return begun, finished, expected, numbers


def numbers_of(text):
    return set(re.findall(r"\d+\.\d+", text))


def check(command, folder, expected):
    """Run a command on a damaged folder; its outcome, which is right or fails the test."""
    before = contents(folder)
    status, out, err = Command(folder, *command).end()
    assert status in (0, 1, 2) and "Traceback" not in err, err
    if status:
        assert err.count("\n") == 1, err
        assert status == 1 or contents(folder) == before
        return "refused it in one line"
    if command[0] == "train.py":
        assert outcome(folder, last=False) == expected  # a finished run does not need its last state
        return "ended as undisturbed"
    assert numbers_of(out) <= expected, out
    return "gave true numbers"


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("pattern", FILES)
def test_damaged_files(pattern, damage, trees, tmp_path):
    begun, finished, expected, numbers = trees
    for tree in (begun, finished):
        random.seed(f"{pattern} {damage} {tree.name}")
        folder = tmp_path / tree.name
        shutil.copytree(tree, folder)
        files = list(folder.glob(pattern))
        if not files:
            continue
        DAMAGES[damage](files[0])
        commands = [("report.py", ".", "--table")]
        if pattern.startswith("sweep"):
            commands = [("sweep.py", "sweep")]
        elif "best" in pattern or "last" in pattern:
            commands.append((*EVALUATE, str(files[0].relative_to(folder))))
        if pattern.startswith(("run", "images")):
            commands.append(("train.py", *RUN.split()))
        for command in commands:
            came = check(command, folder, expected if command[0] == "train.py" else numbers)
            note(files[0].name, "damaged", f"{command[0]} {came}")
