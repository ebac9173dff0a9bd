"""The Dockerfile: it is not built here, but the files it copies exist and it installs what `make` does."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT


def test_the_dockerfile_copies_what_exists_and_installs_what_make_installs():
    lines = (ROOT / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    steps = [line.split(None, 1) for line in lines if line[:1].isalpha()]
    copied = [word for step, rest in steps if step == "COPY" for word in rest.split()[:-1]]
    assert all((ROOT / word).exists() for word in copied) and "." in copied
    installs = [rest for step, rest in steps if step == "RUN" and "pip install" in rest]
    assert len(installs) == 1 and installs[0].endswith("-r requirements.txt") and "requirements.txt" in copied
    assert steps[0][0] == "FROM" and json.loads(dict(steps)["ENTRYPOINT"]) == ["python3"]
    assert (ROOT / json.loads(dict(steps)["CMD"])[0]).is_file()
    ignored = {line.split("#")[0].strip() for line in (ROOT / ".dockerignore").read_text().splitlines()}
    assert {".git", ".venv", "runs"} <= ignored and not {"*.py", "*.c", "takd", "takd/cpu"} & ignored


def make(goal, python, **more):
    """What `make -n` would do, though these tests may run under `make` themselves."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")} | more
    command = ["make", "-n", "-W", "requirements.txt", goal, f"PYTHON={python}"]  # as if not installed yet
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("goal", ["demo", "test", "lint"])
def test_make_installs_nothing_where_everything_is_there(goal):
    planned = make(goal, sys.executable)
    assert planned.returncode == 0 and planned.stdout.startswith(sys.executable) and "pip" not in planned.stdout


def test_make_without_torch_makes_an_environment_and_with_torch_alone_names_what_is_missing(tmp_path):
    """-S: a Python without any packages; PYTHONPATH gives it one."""
    bare = make("demo", f"{sys.executable} -S")
    assert bare.returncode == 0 and "-m venv .venv" in bare.stdout
    (tmp_path / "torch.py").touch()
    partial = make("demo", f"{sys.executable} -S", PYTHONPATH=str(tmp_path))
    assert partial.returncode and "has torch but not torchvision numpy" in partial.stderr and not partial.stdout
