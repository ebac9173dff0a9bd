"""README.md and docs: their commands are parsed by the commands themselves or run, and the files they name exist."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, parse_command

import report

DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = "train|evaluate|distill_paths|sweep|report|export|data_loader"
# A line that runs a command of the suite, also through torchrun, srun, sbatch or docker, after settings of variables.
COMMAND = re.compile(rf"(?:\w+=\S+ )*(?:python3?|torchrun|srun|sbatch|docker run)\b.*?\b((?:{SCRIPTS})\.py)\b(.*)")


def blocks(text):
    """The lines of indented and fenced blocks, continuation lines joined."""
    fenced = False
    for line in text.replace("\\\n", " ").splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            yield line.strip()


def commands(text):
    """(line, script, arguments) of each command of the suite in the blocks."""
    for line in blocks(text):
        if found := COMMAND.match(line):
            yield line, found[1], shlex.split(found[2].replace("%a", "1"), comments=True)  # as slurm/train.sbatch does


def test_commands_are_found_in_indented_and_fenced_blocks():
    text = """In prose: python3 train.py --a.

    python3 train.py --b \\
        --c 'd e'    # comment
    python distill_paths.py --f
    train.py report.py     commands

```bash
OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 train.py --g
sbatch --time 3:00:00 slurm/train.sbatch report.py runs
```
"""
    assert [found[1:] for found in commands(text)] == [
        ("train.py", ["--b", "--c", "d e"]),
        ("distill_paths.py", ["--f"]),
        ("train.py", ["--g"]),
        ("report.py", ["runs"]),
    ]


@pytest.mark.parametrize(
    "line",
    [
        "train.py --student plane2",
        "evaluate.py --checkpoint file",
        "distill_paths.py --family plane",
        "sweep.py --teacher plane4",
        "report.py runs",
        "export.py --checkpoint file --output student.onnx",
        "data_loader.py --download cifar10",
    ],
)
def test_a_wrong_flag_is_an_error(line, capsys):
    """Otherwise the check of the documents' commands would always pass."""
    script, *argv = line.split()
    parse_command(script, argv)
    with pytest.raises(SystemExit):
        parse_command(script, [*argv, "--temprature", "4"])
    assert "unrecognized arguments: --temprature 4" in capsys.readouterr().err


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_in_the_documents_is_valid(document, tmp_path, monkeypatch):
    """Every flag and every name exists, also names in the document's Python code."""
    monkeypatch.chdir(tmp_path)
    text = document.read_text()
    for block in re.findall(r"^```python\n(.+?)^```", text, re.DOTALL | re.MULTILINE):
        if "import timm" in block:
            pytest.importorskip("timm", reason="needs requirements-dev.txt")
        (tmp_path / ("vit.py" if "import timm" in block else "my_losses.py")).write_text(block)
    for line, script, argv in commands(text):
        try:
            parse_command(script, argv)
        except SystemExit as end:
            pytest.fail(f"{line}: exit status {end.code}")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_that_the_documents_name_exist(document):
    """In backticks and in blocks; a name without a folder may be any file of the suite."""
    text = document.read_text().replace("~/takd/", "")
    folders = ("takd", "tests", "docs", "benchmarks", "slurm")
    present = {path.name for folder in folders for path in (ROOT / folder).rglob("*")} | set(os.listdir(ROOT))
    named = re.findall(rf"`((?:{'|'.join(folders)})/[\w./]+|\w+\.(?:py|c|yml|txt)|Makefile)`", text)
    in_blocks = r"(?<![\w./-])([\w/]+\.(?:py|c|sh|sbatch)|results/[\w./-]+)(?![\w:-])"
    named += re.findall(in_blocks, "\n".join(blocks(text)))
    if not (ROOT / "takd" / "cpu").exists():  # it can be deleted
        present |= {"takd/cpu", "kernels.c", "fused.py"}
    missing = [
        name
        for name in named
        if not ((ROOT / name).exists() or name in present or name.startswith("takd/cpu/") and "takd/cpu" in present)
    ]
    links = re.findall(r"\]\(((?!http)[\w./]+)\)", text)
    missing += [link for link in links if not (document.parent / link).exists()]
    assert not missing


TABLES = [
    (document, argv) for document in DOCUMENTS for _, _, argv in commands(document.read_text()) if "--table" in argv
]


@pytest.mark.parametrize("document, argv", TABLES, ids=[f"{document.name}-{argv[0]}" for document, argv in TABLES])
def test_tables_in_the_documents_are_made_from_the_kept_records(document, argv, call, monkeypatch):
    monkeypatch.chdir(ROOT)
    outcome = call(report, *argv)
    assert outcome.status == 0 and outcome.out.startswith("| network") and f"\n{outcome.out}\n" in document.read_text()


def test_the_benchmarks_table_is_made_from_its_figures():
    path = ROOT / "benchmarks" / "cpu.py"
    spec = importlib.util.spec_from_file_location("cpu_benchmark", path)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    rows = [benchmark.markdown(row) for row in json.loads(path.with_suffix(".json").read_text())["rows"]]
    assert "\n".join([benchmark.HEADER, *rows, ""]) in (ROOT / "docs" / "performance.md").read_text()


@pytest.mark.slow
def test_the_commands_on_digits_in_the_readme_run(tmp_path):
    """Teacher, assistant, student and their scores, in order, in a copy of the tracked files."""
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, tracked.split("\0")):
        if (ROOT / name).is_file():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / name)
    typed = [found for found in commands((ROOT / "README.md").read_text()) if "digits" in found[0]]
    assert len(typed) >= 4
    for line, script, argv in typed:
        argv = [file for word in argv for file in (sorted(map(str, tmp_path.glob(word))) if "*" in word else [word])]
        outcome = subprocess.run([sys.executable, script, *argv], cwd=tmp_path, capture_output=True, text=True)
        assert outcome.returncode == 0, f"{line}\n{outcome.stderr}"
