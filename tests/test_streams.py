"""Commands work to their end wherever their output goes: closed streams, encodings and locales without all letters."""

import subprocess
import sys

import pytest
from conftest import ROOT, read_json

CLOSED = 'exec "$0" "$@" >&- 2>&- <&-'
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def run_closed(script, *argv):
    """The exit status of a command whose standard streams are closed."""
    words = [sys.executable, str(ROOT / script), *map(str, argv)]
    return subprocess.run(["sh", "-c", CLOSED, *words], timeout=300).returncode


@pytest.mark.parametrize("environment", [{"PYTHONIOENCODING": "ascii"}, ASCII])
def test_letters_that_the_output_lacks_are_escaped(environment, three_seeds, run_command):
    outcome = run_command("report.py", three_seeds, "--table", "plane2", **environment)
    assert (outcome.status, outcome.err) == (0, "") and r"43.50 \xb1 0.56" in outcome.out


def test_closed_streams(three_seeds):
    assert run_closed("report.py", three_seeds) == 0
    assert "43.50 ± 0.56" in (three_seeds / "report.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_trainings_and_studies_with_closed_streams_and_in_ascii(tmp_path, tiny, run_command):
    assert run_closed("train.py", *tiny, "--train-images", "64", "--run-dir", tmp_path / "closed") == 0
    assert read_json(tmp_path / "closed/summary.json")["epochs"] == 1
    assert sorted(file.name.split(".")[0] for file in (tmp_path / "closed").iterdir() if file.name[0] != ".") == [
        "config",
        "events",
        "last",
        "metrics",
        "plane2_seed1_best",
        "summary",
    ]
    study = ("--sizes", "plane4", "plane2", *tiny[2:], "--batch-size", "32", "--seeds", "1", "2")
    for environment in ({"PYTHONIOENCODING": "ascii"}, ASCII):
        runs = tmp_path / f"study{len(environment)}"
        outcome = run_command("distill_paths.py", *study, "--runs", runs, **environment)
        assert outcome.status == 0 and (runs / "report.html").exists(), outcome
    refused = run_command("train.py", *tiny, "--run-dir", "café", cwd=tmp_path, **ASCII)
    assert refused.status == 2 and "is not UTF-8 in this locale" in refused.err
