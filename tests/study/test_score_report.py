"""Scores by class as tables and figures: classes without images, many classes, and names of folders."""

import csv
import re

import numpy as np
import pytest

from takd.study import figures, score_report
from takd.study.score_report import Scored

CLASSES = ("cat", "accuracy", "dog")


@pytest.fixture
def scored():
    """Three classes, one without images, and one named like a row of the classification report."""
    result = {"checkpoint": "run/net.pth.tar", "model": "plane2", "path": ["plane2"], "dataset": "pets"}
    result |= {
        "split": "val",
        "images": 4,
        "test_accuracy_percent": 75.0,
        "test_top5_percent": 100.0,
        "test_loss": 0.5,
        "device": "CPU",
        "threads": 1,
    }
    return Scored(
        result | dict.fromkeys(score_report.COSTS, 1.0), CLASSES, np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1])
    )


def test_a_class_without_images_and_one_called_accuracy(scored):
    found = score_report.by_class(scored)
    assert found.counts == [[1, 1, 0], [0, 2, 0], [0, 0, 0]] and found.accuracies == [50, 100, None]
    assert [row["class"] for row in found.rows] == [*CLASSES, "accuracy", "macro avg", "weighted avg"]
    assert found.rows[1]["recall"] == 1 and found.rows[3]["f1"] == 0.75 and found.rows[2]["images"] == 0
    for svg, *_ in (
        figures.class_accuracy(CLASSES, found.accuracies, 75.0, [None, 1.0, 2.0]),
        figures.confusion(CLASSES, found.counts),
        figures.classification([tuple(row.values()) for row in found.rows]),
    ):
        assert "dog" in svg


def test_the_report_lists_the_commonest_confusions(scored, tmp_path):
    score_report.write_report(tmp_path, [scored])
    rows = [line for line in (tmp_path / "report.md").read_text().splitlines() if line.startswith("| cat | accuracy")]
    assert rows == ["| cat | accuracy | 1 | 50.0 |"]


# Figures of many classes: (function of the class names, largest height in inches).
DRAWN = {
    "class accuracy": (lambda names: figures.class_accuracy(names, [50.0] * len(names), 50.0), 19.5),
    "confusion": (lambda names: figures.confusion(names, [[1] * len(names)] * len(names)), 15.8),
    "classification": (lambda names: figures.classification([(name, 0.5, 0.5, 0.5, 3) for name in names]), 19.3),
}


@pytest.mark.parametrize(
    "figure, count, labelled",
    [
        *((figure, count, count) for figure in DRAWN for count in (2, 10)),
        *((figure, 250, 125) for figure in DRAWN),
        ("confusion", 100, 100),
        ("class accuracy", 1000, 200),
        ("classification", 1000, 200),
        pytest.param("confusion", 1000, 167, marks=pytest.mark.slow),
    ],
)
def test_many_classes_stay_readable(figure, count, labelled):
    """The height is bounded, labels have at least 5 points and never overlap: of very many classes some have none."""
    draw, inches = DRAWN[figure]
    svg, *_ = draw([f"a class with a long name {i}" for i in range(count)])
    assert float(re.search(r'height="([\d.]+)pt"', svg)[1]) <= 72 * inches + 1e-6
    # Labels of the vertical axis are not rotated; text as SVG text has its size in points.
    label = r'font-size: ([\d.]+)px[^>]*? y="([\d.]+)" transform="rotate\(-?0 [^>]*>(a class[^<]*)<'
    sizes, places, names = zip(*re.findall(label, svg), strict=True)
    size, places = float(sizes[0]), sorted(map(float, places))
    assert len(names) == labelled and set(sizes) == {sizes[0]} and 5 <= size <= 9
    assert min(below - above for above, below in zip(places, places[1:], strict=False)) >= size
    assert max(map(len, names)) <= 24


def test_folder_names(tmp_path):
    files = ["a/x_best.pth.tar", "b/x_best.pth.tar", "a/x_best.pt", "a/../a/x_best.pth.tar", "odd ß/.net:work?.pth"]
    made = score_report.folder_names(tmp_path / file for file in [*files, "A/X_best.pth"])
    assert made[:4] == ["a-x_best", "b-x_best", "a-x_best-2", "a-x_best-3"] and made[5] == "A-X_best-4"
    assert all(re.fullmatch(r"\w[\w.-]*", name) for name in made)


HOSTILE = ("$x_{$", "=cmd|'/C calc'!A0", "+1", "@SUM(A1)", "<script>a|b", "[a](b)", "*_`\\")


def test_names_are_text_and_never_markup_or_formulas(scored, tmp_path):
    result = scored.result | {"path": [HOSTILE[4]], "model": HOSTILE[4], "checkpoint": "<script>/=1\x1b\udce9.pth.tar"}
    ones = np.ones(4, int)
    score_report.write_report(tmp_path, [Scored(result, HOSTILE, ones, 3 * ones)])
    page, text = ((tmp_path / f"report.{kind}").read_text(encoding="utf-8") for kind in ("html", "md"))
    assert "<script" not in page + text and "$x_{$" in page
    assert r"=1\\x1b\\udce9.pth.tar" in text
    table = text.split("## Accuracy by class")[1].split("## ")[0]
    for shown in (r"| \$x\_{\$ |", r"| &lt;script>a\|b |", r"| \[a\](b) |", r"| \*\_\`\\ |"):
        assert shown in table, table
    (file,) = tmp_path.glob("*/class_accuracy.csv")
    names = [row[0] for row in csv.reader(file.open(encoding="utf-8", newline=""))][1:]
    assert names[1:4] == ["'=cmd|'/C calc'!A0", "'+1", "'@SUM(A1)"] and not {name[0] for name in names} & set("=+-@")
