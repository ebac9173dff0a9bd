"""Every flag of every command with hostile values: exit 0 with a true result, or 1 or 2 with one line; never a
traceback or a hang; nothing written where it is 2. Flags and commands are found by asking the commands for --help.

TAKD_FUZZ=all tries each value with each flag, instead of a tenth of them, others with each flag.
"""

import argparse
import contextlib
import json
import os
import re
import runpy
import shutil
from pathlib import Path

import pytest
from conftest import ROOT, read_json
from tried import note
from warm import Command

from takd.config import flags

TEXTS = [
    "",
    " ",
    "=",
    "-",
    "--",
    ":",
    "a=b",
    "lambda=",
    "two\nlines",
    "ü",
    "\udcff",
    "%s %(prog)s",
    "$x_{$",
    "<b>",
    "'",
]
TEXTS += ["[]", "{}", "null", '"', "@", "@absent", "@self.txt", "@binary", "plane2", "resnet9", "torchvision:", "true"]
NUMBERS = ["0", "1", "-1", "2.5", "1e300", "1e-300", "nan", "-inf", "9" * 400, "1_0", "٣", "0x10", "100000000"]
PATHS = [".", "/dev/null", "/dev/full", "/dev/zero", "fifo", "loop", "loop/in", "folder", "file", "binary", "absent/in"]
PATHS += [
    "teacher.pth.tar",
    "absent.py:Net",
    "broken.py:Net",
    "a" * 300,
    "a/" * 3000,
    "\udcff/in",
    "a" * 300 + ".jsonl",
]
VALUES = [*TEXTS, *NUMBERS, *PATHS]
STEP = 1 if os.environ.get("TAKD_FUZZ") == "all" else 10

SHORT = "--dataset digits --epochs 1 --cuda 0"
# A command line of each command that succeeds, to which the flag is added; and what its output then contains.
COMMANDS = {
    "train.py": f"--student plane2 --teacher plane2 --teacher-checkpoint teacher.pth.tar {SHORT} --train-images 20 "
    "--run-dir run",
    "evaluate.py": "--checkpoint teacher.pth.tar --cuda 0",
    "export.py": "--checkpoint teacher.pth.tar --output student.onnx",
    "report.py": "runs",
    "distill_paths.py": f"--sizes plane4 plane2 {SHORT} --slurm --dry-run --runs study",
    "sweep.py": f"--teacher plane4 --student plane2 {SHORT} --slurm --dry-run --trials 2 --runs sweep",
    "data_loader.py": "--download cifar10",
}
TRUTH = {
    "train.py": r'"test_accuracy_percent": \d|test \d+\.\d\d %|train_images_per_second|distillation term',
    "evaluate.py": "ACCURACY",
    "export.py": r"PyTorch +ACCURACY",
    "report.py": "ACCURACY",
    "distill_paths.py": r"sbatch .*(train|distill_paths)\.py",
    "sweep.py": r"sbatch .*(train|sweep)\.py",
    "data_loader.py": r"cifar10 is in .*: 30 images to train, 10 to test",
}


def parser_of(script):
    """The parser that answers a command's --help."""
    found = []
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(SystemExit):
        patch.setattr(flags.Parser, "print_help", lambda self, file=None: found.append(self))
        patch.setattr("sys.argv", [str(ROOT / script), "--help"])
        patch.setattr("signal.signal", lambda number, handler: None)  # the handlers here are pytest's
        runpy.run_path(str(ROOT / script), run_name="__main__")
    return found[0]


SCRIPTS = sorted(path.name for path in ROOT.glob("*.py") if "flags." in path.read_text())
ACTIONS = {
    (script, (action.option_strings or [""])[0]): action
    for script in SCRIPTS
    for action in parser_of(script)._actions
    if not isinstance(action, (argparse._HelpAction, flags._Version))
}


def forms(script, flag):
    """A flag in the ways that it can be given: with values, and without one."""
    values = VALUES[list(ACTIONS).index((script, flag)) % STEP :: STEP]
    if not flag:
        return [[value] for value in values if not value.startswith("-")]
    if ACTIONS[script, flag].nargs == 0:
        return [[flag], [f"{flag}=1"]]
    return [*([f"{flag}={value}"] for value in values), [flag]]


@pytest.fixture(scope="module")
def template(tmp_path_factory, teacher_run, class_folders):
    """A folder with what the command lines name."""
    folder = tmp_path_factory.mktemp("fuzz") / "template"
    folder.mkdir()
    shutil.copy(teacher_run / "plane2_seed1_best.pth.tar", folder / "teacher.pth.tar")
    shutil.copytree(teacher_run, folder / "runs/run")
    class_folders(folder / "data")
    (folder / "folder").mkdir()
    (folder / "file").write_text("text\n")
    (folder / "binary").write_bytes(bytes(range(256)))
    (folder / "self.txt").write_text("@self.txt\n")
    (folder / "broken.py").write_text("import absent_package\n")
    os.mkfifo(folder / "fifo")
    os.symlink("loop", folder / "loop")
    return folder


def copied(template, folder):
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(template, folder, symlinks=True, ignore=shutil.ignore_patterns("fifo"))
    os.mkfifo(folder / "fifo")


def contents(folder):
    """Every file below a folder, links not followed, with size and time of modification but for locks, taken anew."""
    found = {}
    for place, _, names in os.walk(os.fsencode(folder)):
        for name in [*names, b""]:
            status = os.lstat(os.path.join(place, name))
            kept = name and name != b".lock"
            found[os.path.join(place, name)] = kept and (status.st_size, status.st_mtime_ns)
    return found


def records_below(folder):
    """The text of the records and reports in a folder."""
    names = ("report.md", "summary.json", "*.jsonl")
    return "".join(path.read_text(errors="replace") for name in names for path in Path(folder).rglob(name))


def faults(script, argv, accuracy, before, folder):
    """(outcome, None), or (None, what is wrong with it)."""
    status, out, err = Command(folder, script, *argv).end(seconds=60)
    if "Traceback" in err or status not in (0, 1, 2, 143):
        return None, f"status {status}: {err.strip()[-300:]}"
    after = contents(folder)
    if status in (1, 2) and not re.fullmatch(rf"{script}: error: \S[^\n]+\n", err):
        return None, f"status {status} with other than one line: {err[-300:]}"
    if status == 2 and after != before:
        changed = sorted(set(after.items()) ^ set(before.items()))[:5]
        return None, f"status 2 ({err.strip()[-200:]}) and files: {changed}"
    if status == 0:
        truth = TRUTH[script].replace("ACCURACY", f"({accuracy:.2f}|{accuracy})")
        if not re.search(truth, out + err + (records_below(folder) if after != before else "")):
            return None, f"status 0, and not {truth}: {out[-300:]} {err[-300:]}"
    return {0: "done", 1: "one line, exit 1", 2: "one line, exit 2", 143: "stopped by SIGTERM"}[status], None


def test_every_command_has_a_row():
    assert set(SCRIPTS) <= set(COMMANDS) and set(COMMANDS) == set(TRUTH)


@pytest.mark.slow
@pytest.mark.parametrize("script, flag", ACTIONS)
def test_hostile_values(script, flag, template, tmp_path, teacher_run):
    folder, wrong, action = tmp_path / "here", [], ACTIONS[script, flag]
    accuracy = read_json(teacher_run / "summary.json")["best"]["test_accuracy_percent"]
    copied(template, folder)
    before = contents(folder)
    for form in forms(script, flag):
        base = COMMANDS[script].split()
        argv = [*(base if action.option_strings or action.nargs == 0 else base[:-1]), *form]
        outcome, why = faults(script, argv, accuracy, before, folder)
        if why:
            wrong.append(f"{script} {json.dumps(form)[:100]}: {why}")
        else:
            note(script, "hostile value of a flag", outcome)
        if contents(folder) != before:
            copied(template, folder)
            before = contents(folder)
    assert not wrong, "\n\n".join(wrong)
