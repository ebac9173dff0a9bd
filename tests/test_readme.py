"""What the README and the documents say can be typed is typed, in a copy of the tracked files, where no data set must be fetched."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def commands(text):
    """The lines of indented or fenced blocks that start a command of this suite, continuation lines joined."""
    return re.findall(r"^ {4,}(python3 (?:train|evaluate)\.py .*)$", text.replace("\\\n", " "), re.MULTILINE)


def documents():
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("copy")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, tracked.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.mark.slow
def test_the_readmes_chain_on_digits(copy, run_in):
    """Teacher, assistant, student and the scores, typed one after the other."""
    typed = [line for line in commands((ROOT / "README.md").read_text()) if "digits" in line]
    assert len(typed) >= 4
    for line in typed:
        run_in(copy, line)


@pytest.mark.parametrize("document", documents(), ids=lambda path: path.name)
def test_every_command_in_the_documents_is_understood(document, tmp_path, monkeypatch):
    """Parsed by the command's own parser, beside the Python that the document shows: flags and names that are shown exist."""
    for block in re.findall(r"```python\n(.+?)```", document.read_text(), re.DOTALL):
        (tmp_path / "my_losses.py").write_text(block)
    monkeypatch.chdir(tmp_path)
    import evaluate
    from takd.config import run_config as settings

    parsers = {"train.py": settings.build_parser(), "evaluate.py": evaluate.build_parser()}
    for line in commands(document.read_text()):
        _, script, *argv = shlex.split(line, comments=True)
        parsers[script].parse_args(argv)


@pytest.mark.parametrize("document", documents(), ids=lambda path: path.name)
def test_files_that_the_documents_name_exist(document):
    named = set(re.findall(r"`((?:docs|tests|benchmarks|slurm)/[\w./]+|[\w]+\.(?:py|c|yml|txt)|Makefile)`", document.read_text()))
    links = set(re.findall(r"\]\(((?!http)[\w./]+)\)", document.read_text()))
    missing = [name for name in named if not (ROOT / name).exists()]
    missing += [link for link in links if not (document.parent / link).exists()]
    assert not missing


@pytest.fixture(scope="module")
def run_in():
    def run(folder, line):
        argv = [sys.executable, *shlex.split(line, comments=True)[1:]]
        argv = [found for word in argv for found in (sorted(map(str, folder.glob(word))) if "*" in word else [word])]
        outcome = subprocess.run(argv, cwd=folder, capture_output=True, text=True)
        assert outcome.returncode == 0, f"{line}\n{outcome.stderr}"
        return outcome.stdout

    return run
