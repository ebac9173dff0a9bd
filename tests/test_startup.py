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


def test_signals_end_a_command_before_while_and_after_it_downloads():
    for place in ("pass", "while 1: pass"):
        code = f"""
from takd import process
process.start()
with process.downloading():
    print("now", flush=True)
    {place}
print("now", flush=True)
while True: pass
"""
        running = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for _ in range(2 if place == "pass" else 1):
            assert running.stdout.readline() == "now\n"
        running.terminate()
        assert running.wait(timeout=30) == 143


def test_a_command_leaves_ignored_signals_alone():
    code = "import os, signal; from takd import process; process.start(); os.kill(os.getpid(), signal.SIGINT)"
    done = subprocess.run(["sh", "-c", 'trap "" INT; exec "$0" -c "$1"', sys.executable, code], cwd=ROOT)
    assert done.returncode == 0


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
