"""The suite's shape: commands on top, rooms in one order, who may print, and that importing does nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOP = {path.stem: path for path in sorted(ROOT.glob("*.py"))}


def test_importing_prints_nothing_and_leaves_the_gpu_alone():
    code = f"import torch, {', '.join(TOP)}; assert not torch.cuda.is_initialized(); assert 'nni' not in __import__('sys').modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("path", TOP.values(), ids=lambda path: path.name)
def test_nothing_imports_a_command(path):
    commands = {"train", "evaluate", "calibrate", "distill_paths", "report"}
    found = {alias.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import) for alias in node.names}
    assert not found & commands
