"""evaluate.py beside a teacher and with a report: costs, agreement, and the predictions by class."""

import csv
import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import shorten_latency, softmax
from PIL import Image

import data_loader
import evaluate
import model_factory
import train
from takd.distill import evaluation
from takd.study import score_report


def test_bytes(tmp_path):
    network = model_factory.create("plane2", 10)
    torch.save(network.state_dict(), tmp_path / "file")
    known = evaluate.costs(network, data_loader.random_split("digits"), tmp_path / "file", measure=False)
    # 13,082 trained values, two statistics of two batch norms of 16 channels, each with a counter of 8 bytes
    assert known["weights_bytes"] == 4 * (13_082 + 2 * 2 * 16) + 2 * 8
    assert known["file_bytes"] == (tmp_path / "file").stat().st_size


# --------------------------------------------------------------------------------------------- with a teacher
def test_agreement():
    random = np.random.default_rng(0)
    student, teacher = random.normal(0, 3, (50, 7)), random.normal(0, 3, (50, 7))
    q, p = softmax(student), softmax(teacher)
    kl = (p * (np.log(p) - np.log(q))).sum(1).mean()
    found = evaluation.agreement(torch.tensor(student).float(), torch.tensor(teacher).float())
    assert found["kl_nats"] == pytest.approx(kl, rel=1e-5)
    assert found["agreement_percent"] == pytest.approx(100 * (student.argmax(1) == teacher.argmax(1)).mean())
    same = evaluation.agreement(torch.tensor(student), torch.tensor(student))
    assert same == {"agreement_percent": 100, "kl_nats": pytest.approx(0, abs=1e-12)}


def test_the_divergence_is_finite():
    """Where one network gives a probability of 0 to the other's certain class: a large number, not infinity."""
    sure = torch.tensor([[500.0, -500.0]])
    assert math.isfinite(evaluation.agreement(-sure, sure)["kl_nats"])


@pytest.fixture(scope="module")
def student_file(tmp_path_factory, call, tiny):
    folder = tmp_path_factory.mktemp("student") / "run"
    assert call(train, *tiny, "--seed", "2", "--run-dir", folder).status == 0
    return folder / "plane2_seed2_best.pth.tar"


@pytest.fixture(scope="module")
def teacher(teacher_run):
    return teacher_run / "plane2_seed1_best.pth.tar"


@pytest.fixture(scope="module")
def report(student_file, teacher, tmp_path_factory, call):
    """A report, written into a folder with an older one and another file, and what the command printed."""
    folder = tmp_path_factory.mktemp("report")
    for name in ("comparison.csv", "notes.txt"):
        (folder / name).write_text("old")
    command = ("--checkpoint", student_file, "--teacher-checkpoint", teacher, "--cuda", "0")
    with pytest.MonkeyPatch.context() as patch:
        shorten_latency(patch)
        outcome = call(evaluate, *command, "--report", folder, "--json")
        assert outcome.status == 0 and outcome.err == f"report    {folder / 'report.html'}\n", outcome.err
        itself = call(evaluate, "--checkpoint", teacher, *command[2:])
    return SimpleNamespace(folder=folder, result=json.loads(outcome.out), printed=itself.out)


def table(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def test_json_has_the_teacher_and_the_savings(report, student_file, teacher, call):
    result = report.result
    assert (result["checkpoint"], result["teacher"]["checkpoint"]) == (str(student_file), str(teacher))
    assert 50 < result["agreement_percent"] < 100 and result["kl_nats"] > 0
    assert result["saving"] == {key: pytest.approx(result["teacher"][key] / result[key]) for key in score_report.COSTS}
    assert result["parameters"] == 13_082 and result["multiply_accumulates"] == 1_042_432
    assert result["latency_1_milliseconds"] > 0 and result["latency_128_milliseconds"] > 0 and result["threads"] == 1
    plain = json.loads(call(evaluate, "--checkpoint", student_file, "--json", "--cuda", "0").out)
    assert plain.items() <= result.items()
    assert "latency_1_milliseconds" not in plain, "measured only beside a teacher or for a report"


def test_agreement_is_of_the_test_images(report, student_file, teacher):
    test = data_loader.read("digits").test
    answers = [evaluation.predict(model_factory.load(path)[0], test).argmax(1) for path in (student_file, teacher)]
    assert report.result["agreement_percent"] == pytest.approx(100 * float((answers[0] == answers[1]).double().mean()))


def test_the_printed_tables(report):
    """The teacher is compared with itself; its row is first."""
    scores, costs, how = report.printed.split("\n\n")
    assert [line.split()[0] for line in scores.splitlines()] == ["network", "plane2", "plane2"]
    assert "agreement %" in costs and "100.00    0.0000" in costs and costs.count("(1.0)") >= 4
    assert "1 thread;" in how


# -------------------------------------------------------------------------------------------- a whole report
def test_the_reports_files(report):
    stems = sorted(path.name for path in report.folder.iterdir() if path.is_dir())
    assert stems == ["run-plane2_seed1_best", "run-plane2_seed2_best"]
    kinds = {
        f"{name}.{kind}"
        for name in ("class_accuracy", "confusion_matrix", "classification_report")
        for kind in ("csv", "png", "svg")
    }
    for stem in stems:
        assert {path.name for path in (report.folder / stem).iterdir()} == kinds | {"report.json"}
        for picture in (report.folder / stem).glob("*.png"):
            with Image.open(picture) as image:
                assert min(image.size) > 500 and len(image.convert("L").getcolors()) > 10
    assert {path.name for path in report.folder.iterdir() if path.is_file()} == {
        "report.html", "report.md", "comparison.csv", "comparison.json", "notes.txt",
    }  # fmt: skip


def test_tables_by_class_agree_with_the_predictions(report, student_file):
    folder = report.folder / "run-plane2_seed2_best"
    test = data_loader.read("digits").test
    answers = evaluation.predict(model_factory.load(student_file)[0], test).argmax(1).numpy()
    labels = test.labels.numpy()
    counts = [[int(((labels == y) & (answers == x)).sum()) for x in range(10)] for y in range(10)]
    matrix = table(folder / "confusion_matrix.csv")
    assert matrix[0] == ["class", *map(str, range(10))]
    assert [[int(cell) for cell in row[1:]] for row in matrix[1:]] == counts
    *by_class, overall = table(folder / "class_accuracy.csv")[1:]
    assert overall[:3] == ["Overall", "359", str(sum(counts[i][i] for i in range(10)))]
    for y, row in enumerate(by_class):
        assert row[:3] == [str(y), str(sum(counts[y])), str(counts[y][y])]
        assert float(row[3]) == pytest.approx(100 * counts[y][y] / sum(counts[y]))
    scores = {row[0]: row[1:] for row in table(folder / "classification_report.csv")}
    for c in range(10):
        precision, recall = counts[c][c] / max(sum(row[c] for row in counts), 1), counts[c][c] / sum(counts[c])
        f1 = 2 * precision * recall / max(precision + recall, 1e-9)
        assert [float(cell) for cell in scores[str(c)]] == pytest.approx([precision, recall, f1, sum(counts[c])])
    assert scores["accuracy"] == ["", "", scores["accuracy"][2], "359"]
    assert float(scores["accuracy"][2]) == pytest.approx(float((answers == labels).mean()))
    whole = json.loads((folder / "report.json").read_text())
    assert whole["confusion_matrix"] == counts and whole["class_accuracy"][3]["right"] == counts[3][3]
    assert {"precision", "recall", "f1", "images", "class"} == set(whole["classification_report"][0])


def test_the_comparison(report):
    heading, *rows = table(report.folder / "comparison.csv")
    listed = [dict(zip(heading, row, strict=True)) for row in rows]
    whole = json.loads((report.folder / "comparison.json").read_text())
    assert len(listed) == len(whole) == 2
    for row, result in zip(listed, whole, strict=True):
        for key in ("test_accuracy_percent", "multiply_accumulates", "file_bytes"):
            assert float(row[key]) == result[key]
    assert listed[0]["agreement_percent"] == ""
    assert float(listed[1]["agreement_percent"]) == whole[1]["agreement_percent"]
    assert float(listed[1]["saving_parameters"]) == 1


def test_the_html_page_is_self_contained(report):
    page = (report.folder / "report.html").read_text()
    assert page.count("<svg") == 6 and not re.search(r'(src|href)="(?!#|data:)', page)
    identifiers = re.findall(r'\sid="([^"]+)"', page)
    assert len(identifiers) == len(set(identifiers))
    for reference in re.findall(r"url\(#([^)]+)\)", page) + re.findall(r'href="#([^"]+)"', page):
        assert reference in identifiers
    assert "times fewer parameters" in page and "Accuracy by class, digits" in page
    pictures = re.findall(r"\]\(([^)]+\.png)\)", (report.folder / "report.md").read_text())
    assert len(pictures) == 6 and all((report.folder / picture).is_file() for picture in pictures)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--teacher", "plane2"], "--teacher needs --teacher-checkpoint"),
        (["--report", "file.txt"], "file.txt is not a folder"),
        (["--report", "file.txt/deeper/report"], "file.txt is not a folder"),
        (["--report", "report", "--teacher-checkpoint", "absent.pth.tar"], "absent.pth.tar does not exist"),
        (
            ["--report", "report", "--teacher-checkpoint", "good.pth.tar", "--teacher", "plane4"],
            "holds a plane2, not a plane4",
        ),
        (["--report", "report", "--checkpoint", "good.pth.tar", "absent.pth.tar"], "absent.pth.tar does not exist"),
    ],
)
def test_nothing_is_written_where_an_argument_is_wrong(argv, message, student_file, tmp_path, monkeypatch, call):
    monkeypatch.chdir(tmp_path)
    shorten_latency(monkeypatch)
    (tmp_path / "file.txt").write_text("kept")
    (tmp_path / "good.pth.tar").symlink_to(student_file)
    outcome = call(evaluate, "--checkpoint", "good.pth.tar", "--cuda", "0", *argv)
    assert outcome.status == 2 and outcome.err.count("\n") == 1 and message in outcome.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.txt", "good.pth.tar"]
    assert (tmp_path / "file.txt").read_text() == "kept"
