"""The suite's shape: who may import whom, who may print, and that importing does nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(ROOT.glob("*.py"))}

# Left may import right and nothing else of the suite's; every row is below the rows that it imports.
ARROWS = {
    "names": "",
    "launcher": "",
    "parallel": "launcher",
    "files": "names",
    "augmentation": "names",
    "losses": "names",
    "kernels": "",
    "arguments": "names",
    "recipes": "names",
    "tuner": "names",
    "settings": "names launcher arguments recipes tuner",
    "checkpoint": "names files",
    "model_factory": "names checkpoint kernels",
    "data_loader": "names arguments files checkpoint kernels augmentation",
    "runlog": "names files",
    "study": "names files runlog settings",
    "cluster": "names files",
    "results": "names runlog settings study",
    "figures": "",
    "document": "files",
    "cost": "runlog",
    "engine": "data_loader",
    "graphs": "",
    "teacher": "names files augmentation checkpoint data_loader engine kernels",
    "training": "names parallel recipes tuner augmentation checkpoint kernels model_factory data_loader runlog losses engine graphs teacher",
    "train": "names launcher parallel arguments tuner settings checkpoint data_loader engine runlog training",
    "evaluate": "names arguments cost data_loader document engine figures model_factory",
    "calibrate": "names arguments data_loader engine graphs losses model_factory training",
    "distill_paths": "names arguments cluster runlog settings study",
    "report": "names arguments recipes runlog study results figures document",
}
COMMANDS = ("train", "evaluate", "calibrate", "distill_paths", "report")
# Asked before the arguments are known to be good; what else they need is imported where it is used.
LIGHT = {
    "names": set(), "launcher": set(), "files": set(), "recipes": set(), "settings": set(), "arguments": {"torch"}, "tuner": {"nni"},
    "runlog": {"torch", "numpy", "tqdm"}, "study": set(), "cluster": set(), "results": {"scipy"},
    "distill_paths": {"tqdm"}, "report": set(), "document": set(),
}  # fmt: skip
PRINTERS = (*COMMANDS, "data_loader", "arguments", "runlog")  # its download, errors of usage, and the console


def imports(nodes):
    """Top-level names of the packages that import statements name."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


def calls(tree):
    return {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}


@pytest.mark.parametrize("module", MODULES)
def test_imports_follow_the_arrows(module):
    assert module in ARROWS, f"{module}.py is new: give it a row in ARROWS"
    of_ours = set(imports(ast.walk(MODULES[module]))) & MODULES.keys()
    assert of_ours <= set(ARROWS[module].split())
    above = list(ARROWS)[: list(ARROWS).index(module)]
    assert set(ARROWS[module].split()) <= set(above), "arrows point one way only"


@pytest.mark.parametrize("module", MODULES)
def test_nothing_imports_a_command(module):
    assert not set(imports(ast.walk(MODULES[module]))) & set(COMMANDS)


@pytest.mark.parametrize("module", sorted(MODULES.keys() - set(PRINTERS)))
def test_libraries_do_not_print(module):
    assert not calls(MODULES[module]) & {"print", "input"}


@pytest.mark.parametrize("module", sorted(MODULES.keys() - set(COMMANDS) - {"arguments", "settings"}))
def test_libraries_know_no_arguments(module):
    assert "argparse" not in set(imports(ast.walk(MODULES[module])))
    assert "__main__" not in ast.dump(MODULES[module]) or module == "data_loader"  # which downloads


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_need_the_standard_library_alone(module):
    allowed = set(sys.stdlib_module_names) | MODULES.keys()
    assert set(imports(MODULES[module].body)) <= allowed
    assert set(imports(ast.walk(MODULES[module]))) <= allowed | LIGHT[module]


def test_importing_prints_nothing_and_leaves_the_gpu_alone():
    code = (
        f"import torch, {', '.join(MODULES)}; assert not torch.cuda.is_initialized(); assert 'nni' not in __import__('sys').modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
