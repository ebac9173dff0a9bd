"""The plan of the code: rooms in one order, who may print, sizes, and that importing does nothing."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Each room imports only rooms above it, and the ground: takd's own modules, on the standard library.
ROOMS = ("config", "images", "distill", "run", "study")
GROUND = ("errors", "process", "files")
APART = "cpu"  # its folder can be deleted: only these import it
IMPORT_CPU = ("train.py",)
COMMANDS = ("train", "evaluate", "distill_paths", "report")
# Imported before the arguments are checked, and where torch may be absent: the standard library only, at module level.
LIGHT_ROOMS, LIGHT_IN_RUN = ("ground", "config", "study"), ("run_directory", "console", "launch")
EXCEPTIONS = {"takd/study/figures.py": {"matplotlib"}}
PRINT = ("takd/config/flags.py", "takd/run/console.py", "takd/study/runner.py")
MODULE_LINES, FUNCTION_LINES, PARAMETERS, TOP_FILES, ROOM_IMPORTS = 400, 70, 7, 8, 50

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
    """The nodes that are executed when the module is imported: all but those inside functions."""
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, ast.FunctionDef):
            yield node
            yield from module_level(node)


def room(file: str) -> str:
    """takd/config/names.py -> config; takd/files.py -> ground."""
    parts = file.split("/")
    return parts[1] if len(parts) == 3 else "ground"


def package(name: str) -> str:
    """torch.nn -> torch; takd/config/names.py -> takd."""
    return re.split(r"[./]", name)[0]


IMPORTS = {file: imported(ast.walk(tree)) for file, tree in TREES.items()}
ROOMS_IMPORTED = {file: {room(other) for other in others if other in TAKD} for file, others in IMPORTS.items()}


# ---------------------------------------------------------------------------------------------------- imports
def test_every_folder_of_takd_is_a_room():
    assert {room(file) for file in TAKD} == {"ground", *ROOMS, APART}
    assert {Path(file).stem for file in TAKD if room(file) == "ground"} == {*GROUND, "__init__"}


@pytest.mark.parametrize("here", ["ground", *ROOMS, APART])
def test_rooms_import_only_rooms_above_them(here):
    allowed = {"ground", here, *(ROOMS[: ROOMS.index(here)] if here in ROOMS else ())}
    found = {file: ROOMS_IMPORTED[file] - allowed for file in TAKD if room(file) == here}
    assert {file: rooms for file, rooms in found.items() if rooms} == {}


def test_only_commands_and_benchmarks_import_the_cpu_room():
    assert [
        file for file in TREES if APART in ROOMS_IMPORTED[file] and room(file) != APART and file not in IMPORT_CPU
    ] == []


def test_takd_imports_no_module_of_the_top_and_nothing_imports_a_command():
    top = {Path(file).stem for file in TOP}
    assert [(file, name) for file in TAKD for name in IMPORTS[file] if package(name) in top] == []
    assert [(file, name) for file in TOP for name in IMPORTS[file] if package(name) in COMMANDS] == []


def test_imports_between_rooms_are_few():
    pairs = {(file, other) for file in TAKD for other in IMPORTS[file] if other in TAKD and room(other) != room(file)}
    assert len([pair for pair in pairs if "ground" not in map(room, pair)]) < ROOM_IMPORTS, sorted(pairs)


def test_light_modules_import_the_standard_library_only():
    light = [file for file in TAKD if room(file) in LIGHT_ROOMS]
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
    assert [file for file in TAKD if room(file) != "config" and "argparse" in IMPORTS[file]] == []
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
    """How many there are, without self and what is prescribed: a method's options, which takd/config/methods.py lists,
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


@pytest.fixture(scope="module")
def nothing_heavy(tmp_path_factory):
    """An environment in which importing anything heavy ends the process."""
    folder = tmp_path_factory.mktemp("nothing-heavy")
    for name in (
        "torch",
        "torchvision",
        "numpy",
        "PIL",
        "sklearn",
        "scipy",
        "matplotlib",
        "nni",
        "tensorboard",
        "tqdm",
    ):
        (folder / f"{name}.py").write_text("raise SystemExit(f'{__name__} was imported')")
    return {"PYTHONPATH": str(folder)}


WRONG = {  # a wrong name, a wrong number, a wrong combination
    "train.py": ("--student resnet21", "--epochs 0", "--temperature 3"),
    "evaluate.py": (
        "--checkpoint x --model resnet9",
        "--checkpoint x --image-size 7",
        "--checkpoint x --teacher plane2",
    ),
    "data_loader.py": ("--download cifar1000", "--download digits", "--dataset-dir data"),
    "distill_paths.py": ("--sizes plane11 plane2", "--family plane --jobs 0", "--sizes plane4 plane2 --family plane"),
    "report.py": ("runs --table plane11", "runs --price-per-hour -1", "--output report"),
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
