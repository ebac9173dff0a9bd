"""Ctrl-C while a command is being imported, and a reader of its output that has gone."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT, read_json

COMMANDS = ("train.py", "evaluate.py", "distill_paths.py", "sweep.py", "report.py", "export.py", "data_loader.py")


@pytest.mark.parametrize("command", COMMANDS)
def test_ctrl_c_during_the_imports_is_silent(command, run_command, tmp_path):
    """difflib stands for the modules of the standard library that every command imports."""
    (tmp_path / "difflib.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    outcome = run_command(command, "--help", PYTHONPATH=str(tmp_path))
    assert outcome == (130, "", "")


def without_reader(*command):
    """(status, standard error) of a command whose standard output is a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run([sys.executable, *map(str, command)], stdout=writing, stderr=subprocess.PIPE, text=True)
    finally:
        os.close(writing)
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    "command", ["train.py --help-methods", "distill_paths.py --family plane --dataset digits --slurm --dry-run"]
)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_nobody_reads_is_discarded(command, unbuffered, monkeypatch):
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    monkeypatch.chdir(ROOT)
    assert without_reader(*command.split()) == (0, "")


@pytest.mark.slow
def test_a_training_goes_on_when_its_reader_has_gone(tmp_path, tiny):
    assert without_reader(ROOT / "train.py", *tiny, "--run-dir", tmp_path) == (0, "")
    assert read_json(tmp_path / "summary.json")["epochs"] == 1
