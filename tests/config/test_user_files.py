"""takd.files.import_class: a class from the user's own FILE.py, whose imports find the modules beside it."""

import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

import data_loader
import model_factory
import train
from takd import files
from takd.errors import UserError

OURS = {"train": train, "model_factory": model_factory, "data_loader": data_loader}
NAMES = (*OURS, "evaluate", "report", "distill_paths", "losses", "files", "names", "config", "checkpoint")


@pytest.fixture(autouse=True)
def path(monkeypatch):
    """Restores sys.path after the test."""
    monkeypatch.setattr(sys, "path", sys.path.copy())


@pytest.fixture
def folder(tmp_path):
    """folder(name, {file name: text, ...}) makes a folder of Python files."""

    def make(name, **modules):
        (tmp_path / name).mkdir()
        for module, text in modules.items():
            (tmp_path / name / f"{module}.py").write_text(text)
        return tmp_path / name

    return make


# ------------------------------------------------------------------------------------------------ neighbours
def test_a_file_imports_its_neighbours_also_later_inside_a_function(folder):
    mine = """
import helper
class Mine:
    word = helper.word
    def later(self):
        import other
        return other.word
"""
    place = folder("mine", nets=mine, helper="word = 'helper'", other="word = 'other'")
    found = files.import_class(f"{place}/nets.py:Mine")
    assert (found.__name__, found.word, found().later()) == ("Mine", "helper", "other")


def test_its_own_modules_precede_the_suites_which_are_found_again_afterwards(folder):
    """The suite's are imported already, as train.py has when it builds the network."""
    imports = "".join(f"import {name}\n" for name in NAMES)
    marks = f"class Mine:\n    marks = [{', '.join(f'{name}.mark' for name in NAMES)}]\n"
    place = folder("mine", nets=imports + marks, **{name: f"mark = 'my {name}'" for name in NAMES})
    before = {name: sys.modules.get(name) for name in NAMES}
    assert files.import_class(f"{place}/nets.py:Mine").marks == [f"my {name}" for name in NAMES]
    assert {name: sys.modules.get(name) for name in NAMES} == before
    assert {name: __import__(name) for name in OURS} == OURS
    import evaluate  # perhaps not yet imported

    assert evaluate.__file__ == str(ROOT / "evaluate.py")


@pytest.mark.slow
def test_a_run_whose_files_have_neighbours_named_like_the_suites(folder, run_command, tmp_path, tiny, teacher_file):
    """They are imported before the suite's own, while the arguments are read."""
    net = """
import model_factory, names
from torch import nn
class Net(nn.Sequential):
    def __init__(self, classes):
        assert model_factory.mark == "my model_factory" and names.mark == "my names"
        super().__init__(nn.Conv2d(3, 8, 3, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(512, classes))
"""
    loss = """
import losses, data_loader, train
from takd.config import methods as table
from takd.distill import methods
class Own(methods.METHODS["kd"]):
    options = table.METHODS["kd"].options
    mark = losses.mark, data_loader.mark, train.mark
"""
    place = folder("mine", net=net, loss=loss, **{name: f"mark = 'my {name}'" for name in NAMES})
    command = (*tiny, "--student", place / "net.py:Net", "--method", place / "loss.py:Own", "--train-images", "200")
    more = ("--teacher", "plane2", "--teacher-checkpoint", teacher_file, "--method-option", "temperature=2")
    outcome = run_command("train.py", *command, *more, "--run-dir", tmp_path / "run", cwd=place)
    assert (outcome.status, outcome.err) == (0, ""), outcome
    (best,) = (tmp_path / "run").glob("*_best.pth.tar")
    scored = run_command("evaluate.py", best, "--model", place / "net.py:Net", "--cuda", "0", cwd=place)
    assert (scored.status, scored.err) == (0, "") or "does not beat guessing" in scored.err


@pytest.mark.parametrize("module, file", [("helper", "helper.py"), ("helper.part", "helper/part.py")])
def test_two_folders_have_neighbours_of_one_name(module, file, folder):
    classes = []
    for name in ("first", "second"):
        place = folder(name, nets=f"import {module}\nclass Mine:\n    word = {module}.word\n")
        (place / file).parent.mkdir(exist_ok=True)
        (place / file).with_name("__init__.py").touch()
        (place / file).write_text(f"word = {name!r}")
        classes.append(files.import_class(f"{place}/nets.py:Mine"))
    assert [found.word for found in classes] == ["first", "second"]
    assert not {"helper", "helper.part"} & sys.modules.keys()


def test_a_file_beside_the_commands_shares_their_modules(tmp_path):
    """A network of the user's in the suite's own folder, derived from one of the suite's, is of that very class."""
    shutil.copytree(ROOT / "takd", tmp_path / "takd")
    shutil.copy(ROOT / "model_factory.py", tmp_path)
    checks = ["from takd.files import import_class"]
    for name in ("first", "second"):  # when the suite's module is not imported yet, and when it is
        (tmp_path / f"{name}.py").write_text("import model_factory\nclass Net(model_factory.ResNet):\n    pass\n")
        checks += [f"net = import_class('{name}.py:Net')", "import model_factory as own"]
        checks += ["assert issubclass(net, own.ResNet)"]
    done = subprocess.run([sys.executable, "-c", "\n".join(checks)], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


# --------------------------------------------------------------------------------------------- run once
def test_a_file_is_run_once_and_again_when_it_has_changed(folder, tmp_path, monkeypatch):
    source = f"open({str(tmp_path / 'log')!r}, 'a').write('x')\nclass First: pass\nclass Second: pass\n"
    place = folder("mine", nets=source)
    monkeypatch.chdir(place)
    first = files.import_class(f"{place}/nets.py:First")
    second = files.import_class("nets.py:Second")
    assert files.import_class("../mine/nets.py:First") is first and second.__module__ == first.__module__
    assert (tmp_path / "log").read_text() == "x"
    (place / "nets.py").write_text(source + "class Third: pass\n")
    assert files.import_class("nets.py:Third").__name__ == "Third"
    assert (tmp_path / "log").read_text() == "xx"


# -------------------------------------------------------------------------------------------------- errors
WRONG = {
    "not there": (None, "Mine", "nets.py cannot be read (no such file); give FILE.py:CLASS"),
    "no Python": ("class Mine(:\n", "Mine", "nets.py is not Python: invalid syntax (nets.py, line 1)"),
    "binary": (b"\0\1", "Mine", "nets.py "),
    "not UTF-8": (b"word = '\xff'", "Mine", "nets.py is not Python: "),
    "a missing package": ("\nimport absent\n", "Mine", "No module named 'absent' (line 2); if it is a package: "),
    "an error of several lines": (
        "raise ValueError('two\\nlines')",
        "Mine",
        "cannot be imported: ValueError: two lines",
    ),
    "an end": ("import sys\nsys.exit(3)", "Mine", "nets.py:Mine cannot be imported: SystemExit: 3 (line 2)"),
    "another name": ("import os\nclass Other: pass\ndef f(): pass\n", "Mine", "no 'Mine'; it defines: Other f"),
    "no names": ("import os", "Mine", "defines no 'Mine'; it defines: nothing"),
    "no name": ("class Other: pass", "", "defines no ''; it defines: Other"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_with_a_file_is_an_error_of_one_line(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source, name, message = WRONG[case]
    if source is not None:
        (tmp_path / "nets.py").write_bytes(source if isinstance(source, bytes) else source.encode())
    before = set(sys.modules), sys.path[0]
    for _ in range(2):
        with pytest.raises(UserError) as caught:
            files.import_class(f"nets.py:{name}")
        assert message in str(caught.value) and "\n" not in str(caught.value)
    assert set(sys.modules) - before[0] <= {"user_file_nets"} and sys.path[0] == before[1]


@pytest.mark.parametrize(
    "file, message", [(".", "cannot be read (a folder)"), ("/proc/self/mem", "cannot be read (Input/output error)")]
)
def test_a_folder_and_an_unreadable_file_are_errors_of_one_line(file, message):
    with pytest.raises(UserError) as caught:
        files.import_class(f"{file}:Mine")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_an_error_in_a_neighbour_leaves_the_suites_modules_in_place(folder):
    place = folder("mine", nets="import train\nclass Mine: pass\n", train="import absent\n")
    with pytest.raises(UserError, match="No module named 'absent'"):
        files.import_class(f"{place}/nets.py:Mine")
    assert sys.modules["train"] is train
