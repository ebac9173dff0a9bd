"""The structure of the code: the order of its layers, what may print, sizes, and imports without side effects."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Each layer imports only those before it, and the base: takd's own modules, on the standard library.
LAYERS = ("config", "images", "distill", "run", "study")
BASE = ("errors", "process", "files")
APART = "cpu"  # its folder can be deleted: only these import it
IMPORT_CPU = ("train.py",)
COMMANDS = ("train", "evaluate", "distill_paths", "sweep", "report", "export")
# Imported before the arguments are checked, or without torch installed: only the standard library at module level.
LIGHT_LAYERS, LIGHT_IN_RUN = ("base", "config", "study"), ("run_directory", "console", "launch")
EXCEPTIONS = {"takd/study/figures.py": {"matplotlib"}, "takd/study/search.py": {"optuna"}}
PRINT = ("takd/config/flags.py", "takd/run/console.py", "takd/study/runner.py")
MODULE_LINES, FUNCTION_LINES, PARAMETERS, TOP_FILES, CROSS_IMPORTS = 400, 70, 7, 8, 50

TOP, TAKD, BENCHMARKS = (
    {path.relative_to(ROOT).as_posix(): path for path in sorted(ROOT.glob(pattern))}
    for pattern in ("*.py", "takd/**/*.py", "benchmarks/*.py")
)
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in (TOP | TAKD | BENCHMARKS).items()}


def imported(nodes: Iterable[ast.AST]) -> set[str]:
    """The modules that import statements name: "torch.nn", and files of takd: "takd/config/names.py"."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "absolute imports only"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {takd_file(name) if name.split(".")[0] == "takd" else name for name in found}


def takd_file(name: str) -> str:
    """takd.config.names.network -> takd/config/names.py."""
    parts = name.split(".")
    candidates = (f"{'/'.join(parts[:n])}{end}" for n in range(len(parts), 0, -1) for end in (".py", "/__init__.py"))
    return next(candidate for candidate in candidates if candidate in TAKD)


def module_level(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes that are executed when the module is imported: all except those inside functions."""
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, ast.FunctionDef):
            yield node
            yield from module_level(node)


def layer(file: str) -> str:
    """takd/config/names.py -> config; takd/files.py -> base."""
    parts = file.split("/")
    return parts[1] if len(parts) == 3 else "base"


def package(name: str) -> str:
    """torch.nn -> torch; takd/config/names.py -> takd."""
    return re.split(r"[./]", name)[0]


IMPORTS = {file: imported(ast.walk(tree)) for file, tree in TREES.items()}
LAYERS_IMPORTED = {file: {layer(other) for other in others if other in TAKD} for file, others in IMPORTS.items()}


# ---------------------------------------------------------------------------------------------------- imports
def test_every_folder_of_takd_is_a_layer():
    assert {layer(file) for file in TAKD} | {APART} == {"base", *LAYERS, APART}
    assert {Path(file).stem for file in TAKD if layer(file) == "base"} == {*BASE, "__init__"}


@pytest.mark.parametrize("here", ["base", *LAYERS, APART])
def test_layers_import_only_layers_before_them(here):
    allowed = {"base", here, *(LAYERS[: LAYERS.index(here)] if here in LAYERS else ())}
    found = {file: LAYERS_IMPORTED[file] - allowed for file in TAKD if layer(file) == here}
    assert {file: layers for file, layers in found.items() if layers} == {}


def test_only_train_py_imports_takd_cpu():
    assert [
        file for file in TREES if APART in LAYERS_IMPORTED[file] and layer(file) != APART and file not in IMPORT_CPU
    ] == []


def test_takd_imports_no_module_of_the_top_and_nothing_imports_a_command():
    top = {Path(file).stem for file in TOP}
    assert [(file, name) for file in TAKD for name in IMPORTS[file] if package(name) in top] == []
    others = {file: {name for name in IMPORTS[file] if package(name) in COMMANDS} for file in TOP}
    studies = {"distill_paths.py": {"train"}, "sweep.py": {"train"}}  # they check all their trainings before the first
    assert {file: names for file, names in others.items() if names} == studies


def test_imports_between_layers_are_few():
    pairs = {(file, other) for file in TAKD for other in IMPORTS[file] if other in TAKD and layer(other) != layer(file)}
    assert len([pair for pair in pairs if "base" not in map(layer, pair)]) < CROSS_IMPORTS, sorted(pairs)


def test_light_modules_import_the_standard_library_only():
    light = [file for file in TAKD if layer(file) in LIGHT_LAYERS]
    light += [f"takd/run/{name}.py" for name in LIGHT_IN_RUN]
    standard = {*sys.stdlib_module_names, "takd"}
    found = {file: set(map(package, imported(module_level(TREES[file])))) - standard for file in light}
    assert {file: packages for file, packages in found.items() if packages} == EXCEPTIONS


# ------------------------------------------------------------------------------- what a library may do, and sizes
def test_libraries_do_not_print():
    calls = [(file, node.func) for file in TAKD for node in ast.walk(TREES[file]) if isinstance(node, ast.Call)]
    printing = {file for file, called in calls if isinstance(called, ast.Name) and called.id in ("print", "input")}
    assert printing == set(PRINT)


def test_libraries_parse_no_arguments():
    assert [file for file in TAKD if layer(file) != "config" and "argparse" in IMPORTS[file]] == []
    assert [file for file in TAKD if "__main__" in ast.dump(TREES[file])] == []


@pytest.mark.parametrize("file", TOP | TAKD)
def test_modules_and_functions_are_small(file):
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    assert sum(1 for line in lines if line.strip()) <= MODULE_LINES
    for node in ast.walk(TREES[file]):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < FUNCTION_LINES, node.name
            assert parameters(node, file) <= PARAMETERS, node.name


def parameters(function: ast.FunctionDef, file: str) -> int:
    """The number of parameters, without self and prescribed ones: a method's options, listed in takd/config/methods.py,
    and the tensors of an autograd.Function."""
    arguments = function.args
    names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
    if file != "takd/distill/methods.py":
        names += [argument.arg for argument in arguments.kwonlyargs]
    return 0 if names[:1] == ["ctx"] else len([name for name in names if name not in ("self", "cls")])


def test_few_files_at_the_top():
    assert len(TOP) <= TOP_FILES


# ------------------------------------------------------------------------------------------------- in processes
def test_importing_prints_nothing_and_leaves_the_gpu_alone():
    names = [file.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for file in TOP | TAKD]
    code = f"import sys, torch, {', '.join(names)}; print(torch.cuda.is_initialized(), 'nni' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "False False\n", "")


WRONG = {  # a wrong name, a wrong number, a wrong combination
    "train.py": ("--student resnet21", "--epochs 0", "--temperature 3"),
    "evaluate.py": (
        "--checkpoint x --model resnet9",
        "--checkpoint x --image-size 7",
        "--checkpoint x --teacher plane2",
    ),
    "data_loader.py": ("--download cifar1000", "--download digits", "--dataset-dir data"),
    "distill_paths.py": ("--sizes plane11 plane2", "--family plane --jobs 0", "--sizes plane4 plane2 --family plane"),
    "sweep.py": ("--trials 0", "--student plane11", "--teacher plane4 --temperature 3"),
    "report.py": ("runs --table plane11", "runs --price-per-hour -1", "--output report"),
    "export.py": ("--checkpoint x", "--checkpoint x --output .", "--checkpoint x --output absent/student.onnx"),
}


@pytest.mark.parametrize("command", WRONG)
def test_help_needs_nothing_heavy_and_works_from_any_directory(command, run_command, tmp_path, nothing_heavy):
    outcome = run_command(command, "--help", cwd=tmp_path, **nothing_heavy)
    assert (outcome.status, outcome.err) == (0, "") and outcome.out.startswith(f"usage: {command}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command, words", [(command, words) for command in WRONG for words in WRONG[command]])
def test_usage_errors_are_one_line_and_need_nothing_heavy(command, words, run_command, tmp_path, nothing_heavy):
    outcome = run_command(command, *words.split(), cwd=tmp_path, **nothing_heavy)
    assert (outcome.status, outcome.out) == (2, "")
    assert re.fullmatch(rf"{re.escape(command)}: error: [^\n]+\n", outcome.err), outcome.err
    assert not list(tmp_path.iterdir())
