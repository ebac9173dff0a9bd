"""evaluate.py's report: what a network costs, how it compares with its teacher, and its answers class by class."""

import csv
import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

import data_loader
import evaluate
import model_factory
import train
from takd.config import names
from takd.run import engine
from takd.study import cost, figures

# Million multiply-accumulates of one 32x32 image at 10 and at 100 classes: counted by hand from the layers.
MACS = {
    "plane2": (1.04, 3.45), "plane4": (6.36, 24.89), "plane6": (9.89, 39.45), "plane8": (13.45, 52.86), "plane10": (71.80, 72.24),
    "resnet8": (12.50, 12.51), "resnet14": (26.66, 26.66), "resnet20": (40.81, 40.82), "resnet26": (54.97, 54.97),
    "resnet32": (69.12, 69.13), "resnet44": (97.44, 97.44), "resnet56": (125.75, 125.75), "resnet110": (253.15, 253.16),
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------- cost
@pytest.mark.parametrize("name", MACS)
def test_multiply_accumulates(name):
    counted = [cost.multiply_accumulates(model_factory.create_network(name, classes), 32) / 1e6 for classes in (10, 100)]
    assert [f"{value:.2f}" for value in counted] == [f"{value:.2f}" for value in MACS[name]]


@pytest.mark.parametrize(
    "name, size, classes, expected",
    [
        ("resnet20a", 32, 10, 40_813_184 - 16 * 32 * 16**2 - 32 * 64 * 8**2),  # resnet20 without its two projections
        ("cnn5", 224, 10, 676_083_576),
        ("resnet50", 224, 1000, 4_089_184_256),  # torchvision's own figure is 4.09 billion
    ],
)
def test_multiply_accumulates_at_other_sizes(name, size, classes, expected):
    assert cost.multiply_accumulates(model_factory.create_network(name, classes, size), size) == expected


def test_every_network_of_the_paper_is_counted():
    assert set(MACS) == {f"resnet{depth}" for depth in names.RESNET_DEPTHS} | {f"plane{size}" for size in names.PLANES_10}


def test_multiply_accumulates_of_attention():
    """PyTorch's fast path for attention is one operation to a counter that does not know it."""

    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.TransformerEncoderLayer(12, 3, dim_feedforward=20, batch_first=True)

        def forward(self, images):
            return self.layer(images.reshape(len(images), -1, 12)).mean(1)

    tokens = 3 * 8 * 8 // 12
    expected = tokens * (4 * 12 * 12 + 2 * 12 * 20) + 2 * tokens * tokens * 12
    assert cost.multiply_accumulates(Attention(), 8) == expected


def test_latency_is_the_median_after_a_warm_up(monkeypatch):
    class Slow(torch.nn.Linear):
        def forward(self, images):
            seen.append(tuple(images.shape))
            clock.now += durations[len(seen) - 1]
            return images

    durations, seen, clock = [90, 90, 1, 50, 2], [], SimpleNamespace(now=0.0)
    monkeypatch.setattr(cost, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    assert cost.latency(Slow(1, 1), 8, 5) == 2
    assert seen == [(5, 3, 8, 8)] * 5


def test_bytes(tmp_path):
    network = model_factory.create_network("plane2", 10)
    torch.save(network.state_dict(), tmp_path / "file")
    known = cost.of(network, 32, tmp_path / "file")
    # 13,082 trained values, two statistics of two batch norms of 16 channels, each with a counter of 8 bytes
    assert known["weights_bytes"] == 4 * (13_082 + 2 * 2 * 16) + 2 * 8
    assert known["file_bytes"] == (tmp_path / "file").stat().st_size


# --------------------------------------------------------------------------------------------- with a teacher
def test_agreement():
    random = np.random.default_rng(0)
    student, teacher = random.normal(0, 3, (50, 7)), random.normal(0, 3, (50, 7))
    softmax = [np.exp(each) / np.exp(each).sum(1, keepdims=True) for each in (student, teacher)]
    kl = (softmax[1] * (np.log(softmax[1]) - np.log(softmax[0]))).sum(1).mean()
    found = engine.agreement(torch.tensor(student).float(), torch.tensor(teacher).float())
    assert found["kl_nats"] == pytest.approx(kl, rel=1e-5)
    assert found["agreement_percent"] == pytest.approx(100 * (student.argmax(1) == teacher.argmax(1)).mean())
    same = engine.agreement(torch.tensor(student), torch.tensor(student))
    assert same == {"agreement_percent": 100, "kl_nats": pytest.approx(0, abs=1e-12)}


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
    """A report written into a folder that holds an older one and a file of somebody else's, and what the command printed."""
    folder = tmp_path_factory.mktemp("report")
    for name in ("comparison.csv", "notes.txt"):
        (folder / name).write_text("old")
    command = ("--checkpoint", student_file, "--teacher-checkpoint", teacher, "--cuda", "0")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost, "LEAST_SECONDS", 0)
        outcome = call(evaluate, *command, "--report", folder, "--json")
        assert outcome.status == 0 and outcome.err == f"report    {folder / 'report.html'}\n", outcome.err
        itself = call(evaluate, "--checkpoint", teacher, *command[2:])
    return SimpleNamespace(folder=folder, result=json.loads(outcome.out), printed=itself.out)


def table(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def test_json_tells_the_teacher_and_what_is_saved(report, student_file, teacher, call):
    result = report.result
    assert (result["checkpoint"], result["teacher"]["checkpoint"]) == (str(student_file), str(teacher))
    assert 50 < result["agreement_percent"] < 100 and result["kl_nats"] > 0
    assert result["saving"] == {key: pytest.approx(result["teacher"][key] / result[key]) for key in evaluate.COSTS}
    assert result["parameters"] == 13_082 and result["multiply_accumulates"] == 1_042_432
    assert result["latency_1_milliseconds"] > 0 and result["latency_128_milliseconds"] > 0 and result["threads"] == 1
    plain = json.loads(call(evaluate, "--checkpoint", student_file, "--json", "--cuda", "0").out)
    assert plain.items() <= result.items() and "latency_1_milliseconds" not in plain  # nothing is measured unasked


def test_agreement_is_of_the_test_images(report, student_file, teacher):
    test = data_loader.load("digits")[1]
    answers = [engine.predict(model_factory.load_network(path)[0], test).argmax(1) for path in (student_file, teacher)]
    assert report.result["agreement_percent"] == pytest.approx(100 * float((answers[0] == answers[1]).double().mean()))


def test_the_tables_printed(report):
    """A teacher beside itself: the teacher's row first."""
    scores, costs, how = report.printed.split("\n\n")
    assert [line.split()[0] for line in scores.splitlines()] == ["network", "plane2", "plane2"]
    assert "as its teacher %" in costs and "100.00    0.0000" in costs and costs.count("(1.0)") >= 4 and "1 thread;" in how


# ------------------------------------------------------------------------------------------------ the report
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


def test_tables_agree_with_the_answers(report, student_file):
    folder = report.folder / "run-plane2_seed2_best"
    test = data_loader.load("digits")[1]
    answers = engine.predict(model_factory.load_network(student_file)[0], test).argmax(1).numpy()
    labels = test.labels.numpy()
    counts = [[int(((labels == y) & (answers == x)).sum()) for x in range(10)] for y in range(10)]
    matrix = table(folder / "confusion_matrix.csv")
    assert matrix[0] == ["class", *map(str, range(10))] and [[int(cell) for cell in row[1:]] for row in matrix[1:]] == counts
    for y, row in enumerate(table(folder / "class_accuracy.csv")[1:]):
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
    assert listed[0]["agreement_percent"] == "" and float(listed[1]["agreement_percent"]) == whole[1]["agreement_percent"]
    assert float(listed[1]["saving_parameters"]) == 1


def test_the_page_needs_nothing_else(report):
    page = (report.folder / "report.html").read_text()
    assert page.count("<svg") == 6 and not re.search(r'(src|href)="(?!#|data:)', page)
    identifiers = re.findall(r'\sid="([^"]+)"', page)
    assert len(identifiers) == len(set(identifiers))
    for reference in re.findall(r"url\(#([^)]+)\)", page) + re.findall(r'href="#([^"]+)"', page):
        assert reference in identifiers
    assert "times fewer parameters" in page and "Accuracy by class, digits" in page
    pictures = re.findall(r"\]\(([^)]+\.png)\)", (report.folder / "report.md").read_text())
    assert len(pictures) == 6 and all((report.folder / picture).is_file() for picture in pictures)


def test_a_class_without_images_and_one_called_accuracy():
    classes = ("cat", "accuracy", "dog")
    split = SimpleNamespace(classes=classes, labels=torch.tensor([0, 0, 1, 1]))
    rows, counts = evaluate.by_class(SimpleNamespace(split=split, logits=torch.eye(3)[[0, 1, 1, 1]]))
    assert counts == [[1, 1, 0], [0, 2, 0], [0, 0, 0]] and evaluate.accuracies(counts) == [50, 100, None]
    assert [row["class"] for row in rows] == [*classes, "accuracy", "macro avg", "weighted avg"]
    assert rows[1]["recall"] == 1 and rows[3]["f1"] == 0.75 and rows[2]["images"] == 0
    assert evaluate.confusions(classes, counts) == [["cat", "accuracy", "1", "50.0"]]
    for svg, _ in (
        figures.class_accuracy(classes, evaluate.accuracies(counts), 75.0, [None, 1.0, 2.0]),
        figures.confusion(classes, counts),
        figures.classification([tuple(row.values()) for row in rows]),
    ):
        assert "dog" in svg


@pytest.mark.parametrize("count, labelled", [(2, 2), (10, 10), (100, 100), (250, 125), (1000, 160)])
@pytest.mark.parametrize("largest, longest", [(0.34, 18), (0.5, 14)])
def test_many_classes_stay_readable(count, labelled, largest, longest):
    """A figure grows to a bound, its letters shrink to five points, and then only some classes are labelled: none upon another."""
    axes = Figure().subplots()
    cell = figures._cell(count, largest, longest)
    figures._label(axes.yaxis, list(range(count)), [f"a class with a long name {i}" for i in range(count)], cell)
    labels = axes.get_yticklabels()
    size = labels[0].get_fontsize()
    assert cell * count <= longest + 1e-9 and size >= 5 and labelled <= len(labels) <= count
    assert size * len(labels) <= cell * count * 72 * 1.01
    assert max(len(label.get_text()) for label in labels) <= 24


def test_folder_names(tmp_path):
    files = ["a/x_best.pth.tar", "b/x_best.pth.tar", "a/x_best.pt", "a/../a/x_best.pth.tar", "odd ß/.net:work?.pth", "A/X_best.pth"]
    made = evaluate.folder_names(tmp_path / file for file in files)
    assert made[:4] == ["a-x_best", "b-x_best", "a-x_best-2", "a-x_best-3"] and made[5] == "A-X_best-4"
    assert all(re.fullmatch(r"\w[\w.-]*", name) for name in made)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--teacher", "plane2"], "--teacher needs --teacher-checkpoint"),
        (["--report", "file.txt"], "file.txt is not a folder"),
        (["--report", "file.txt/deeper/report"], "file.txt is not a folder"),
        (["--report", "report", "--teacher-checkpoint", "absent.pth.tar"], "absent.pth.tar does not exist"),
        (["--report", "report", "--teacher-checkpoint", "good.pth.tar", "--teacher", "plane4"], "holds a plane2, not a plane4"),
        (["--report", "report", "--checkpoint", "good.pth.tar", "absent.pth.tar"], "absent.pth.tar does not exist"),
    ],
)
def test_nothing_is_written_where_an_argument_is_wrong(argv, message, student_file, tmp_path, monkeypatch, call):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cost, "LEAST_SECONDS", 0)
    (tmp_path / "file.txt").write_text("kept")
    (tmp_path / "good.pth.tar").symlink_to(student_file)
    outcome = call(evaluate, "--checkpoint", "good.pth.tar", "--cuda", "0", *argv)
    assert outcome.status == 2 and outcome.err.count("\n") == 1 and message in outcome.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.txt", "good.pth.tar"]
    assert (tmp_path / "file.txt").read_text() == "kept"


def test_losses_are_finite_in_nats():
    """Logits that one network is sure of and the other is sure against: a large number, not infinity."""
    sure = torch.tensor([[500.0, -500.0]])
    assert math.isfinite(engine.agreement(-sure, sure)["kl_nats"])
