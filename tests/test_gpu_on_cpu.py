"""What is made for a GPU, tried out on the CPU: tests/gpu, and all parts of benchmarks/gpu.py."""

import pytest
from conftest import ROOT, read_json

pytestmark = pytest.mark.slow


def test_the_gpu_tests(run_command):
    outcome = run_command("-m", "pytest", "tests/gpu", "--cuda", "0", "-p", "no:cacheprovider", cwd=ROOT)
    assert outcome.status == 0 and "for an issue, whole" in outcome.out, outcome.out


def test_the_gpu_tests_are_not_among_the_others(run_command):
    outcome = run_command("-m", "pytest", "tests/gpu", "-p", "no:cacheprovider", cwd=ROOT)
    assert "no tests ran" in outcome.out, outcome.out


def test_the_benchmark(run_command, tmp_path):
    parts = ("networks", "precisions", "table", "profile", "start", "at-once", "study")
    tiny = ("--networks", "plane2", "--sizes", "plane4", "plane2", "--rounds", 1, "--at-once", 1, "--short-epochs", 1)
    more = ("--study-epochs", 1, "--jobs", 2, "--synthetic", 5, "--cuda", 0, "--out", tmp_path / "gpu.json")
    outcome = run_command("benchmarks/gpu.py", *parts, *tiny, *more)
    assert outcome.status == 0, outcome
    report = read_json(tmp_path / "gpu.json")
    assert report.keys() == {"environment", "images", "rounds", *parts} and all(report[part] for part in parts)
    assert [row["how"] for row in report["table"]] == ["labels", "live", "lazy table", "full table"]
    assert all(row["epoch_seconds"] > 0 for part in ("networks", "precisions", "table") for row in report[part])
