"""Scores of networks as tables, for the console and as a report with figures. Results are dicts, as evaluate.py --json
prints them."""

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from takd.study.document import Document
from takd.study.formatting import learned_from
from takd.study.plan import arrows

Result = dict[str, Any]
BATCHES = (1, 128)  # batch sizes that latency is measured with
# The costs that a student should save: the key in a result, its heading, and its format.
# fmt: off
COSTS = {
    "parameters": ("parameters", lambda value: f"{value:,}"),
    "multiply_accumulates": ("million MACs", lambda value: f"{value / 1e6:,.2f}"),
    "weights_bytes": ("weights, MB", lambda value: f"{value / 1e6:,.2f}"),
    "file_bytes": ("file, MB", lambda value: f"{value / 1e6:,.2f}"),
    **{f"latency_{n}_milliseconds": (f"ms (batch {n})", lambda value: f"{value:,.2f}") for n in BATCHES},
}
# fmt: on


class Scored(NamedTuple):
    """One network's result, with every image's label and prediction for the tables by class."""

    result: Result
    classes: Sequence[str]
    labels: Any  # int64 (N,), as numpy arrays
    answers: Any


def score_rows(results: Iterable[Result]) -> Iterator[list[str]]:
    """Heading and a row of cells for each result."""
    results = list(results)
    parts = "/".join(dict.fromkeys(result["split"] for result in results))
    yield ["network", "learned from", "data", "parameters", f"{parts} %", "top-5 %", "loss"]
    for result in results:
        scores = [f"{result[key]:.2f}" for key in ("test_accuracy_percent", "test_top5_percent")]
        parameters, loss = f"{result['parameters']:,}", f"{result['test_loss']:.4f}"
        yield [result["model"], learned_from(result["path"]), result["dataset"], parameters, *scores, loss]


def cost_rows(results: Sequence[Result]) -> Iterator[list[str]]:
    """Heading and rows of each network's costs; in brackets, how many times less than its teacher's."""
    compared = any("teacher" in result for result in results)
    agreement = ["agreement %", "KL, nats"] if compared else []
    yield ["network", "learned from", *agreement, *(name for name, _ in COSTS.values())]
    for result in results:
        beside = [f"{result['agreement_percent']:.2f}", f"{result['kl_nats']:.4f}"] if "teacher" in result else ["", ""]
        cells = [show(result[key]) for key, (_, show) in COSTS.items()]
        if "saving" in result:
            cells = [f"{cell} ({result['saving'][key]:.1f})" for cell, key in zip(cells, COSTS, strict=True)]
        yield [result["model"], learned_from(result["path"]), *(beside if compared else []), *cells]


def text_table(rows: Iterable[Sequence[str]], left: int) -> str:
    """Rows as aligned text, the first `left` columns to the left."""
    table = list(rows)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    sides = ["<"] * left + [">"] * (len(widths) - left)
    forms = [f"{side}{width}" for side, width in zip(sides, widths, strict=True)]
    return "\n".join("  ".join(map(format, row, forms)).rstrip() for row in table)


def measured_sentence(results: Sequence[Result]) -> str:
    """How the costs were measured."""
    result, compared = results[0], any("teacher" in result for result in results)
    brackets = "; in brackets how many times less than the teacher's" if compared else ""
    threads = f"{result['threads']} thread{'s' * (result['threads'] > 1)}"
    return f"Time of a forward pass: median in float32 on {result['device']}, {threads}{brackets}."


def saving_sentence(result: Result) -> str:
    """What the student saves, in one sentence."""
    teacher, saving = result["teacher"], result["saving"]
    alone, together = (saving[f"latency_{images}_milliseconds"] for images in BATCHES)
    networks = [f"{each['model']} ({each['test_accuracy_percent']:.2f} %)" for each in (teacher, result)]
    return (
        f"Compared with {networks[0]}, {networks[1]} has {saving['parameters']:.1f} times fewer parameters and "
        f"{saving['multiply_accumulates']:.1f} times fewer MACs, and is {alone:.1f} times as fast on one image and "
        f"{together:.1f} times on a batch of {BATCHES[-1]}; they agree on {result['agreement_percent']:.2f} % of the "
        "images."
    )


# ------------------------------------------------------------------------------------------------- the report
class ByClass(NamedTuple):
    """A network's predictions class by class."""

    rows: list[dict[str, Any]]  # class, precision, recall, f1, images; averages last
    counts: list[list[int]]  # (C, C): images of each class by prediction

    @property
    def accuracies(self) -> list[float | None]:
        """Accuracy on each class's images, in percent; None for a class without images."""
        return [100 * row[i] / sum(row) if sum(row) else None for i, row in enumerate(self.counts)]


def by_class(scored: Scored) -> ByClass:
    from sklearn.metrics import classification_report, confusion_matrix

    labels = range(len(scored.classes))
    report = classification_report(scored.labels, scored.answers, labels=labels, output_dict=True, zero_division=0)
    accuracy, rows = report.pop("accuracy"), []
    for key, score in report.items():
        name = scored.classes[int(key)] if key.isdigit() else key
        scores = {"precision": score["precision"], "recall": score["recall"], "f1": score["f1-score"]}
        rows.append({"class": name, **scores, "images": int(score["support"])})
    overall = {"class": "accuracy", "precision": None, "recall": None, "f1": accuracy, "images": len(scored.labels)}
    rows.insert(len(labels), overall)
    return ByClass(rows, confusion_matrix(scored.labels, scored.answers, labels=labels).tolist())


def write_report(folder: str | Path, networks: Sequence[Scored]) -> None:
    """report.html, report.md, the comparison, and each file's tables and figures; written when all are ready."""
    document, results = Document(folder), [scored.result for scored in networks]
    stems = folder_names(result["checkpoint"] for result in results)
    document.heading("Evaluation", 1)
    heading, *rows = score_rows(results)
    files = (result["checkpoint"] for result in results)
    document.table([*heading, "file"], [[*row, file] for row, file in zip(rows, files, strict=True)])
    document.heading("Costs")
    heading, *rows = cost_rows(results)
    document.table(heading, rows)
    macs = "Multiply-accumulates (MACs) are those of one image's convolutions and matrix products."
    savings = [saving_sentence(result) for result in results if "teacher" in result]
    document.text(measured_sentence(results), macs, *savings)
    lines = [_flat(result) for result in results]
    columns = list(dict.fromkeys(key for line in lines for key in line))
    document.attach("comparison.csv", _csv([columns, *([line.get(key) for key in columns] for line in lines)]))
    document.attach("comparison.json", json.dumps(results, indent=2) + "\n")
    tables = [by_class(scored) for scored in networks]
    for dataset in dict.fromkeys(result["dataset"] for result in results):
        shown = [i for i, result in enumerate(results) if result["dataset"] == dataset]
        by_name = zip(networks[shown[0]].classes, *(tables[i].accuracies for i in shown), strict=True)
        document.heading(f"Accuracy by class, {dataset}, %")
        header = ["class", *(arrows(results[i]["path"]) for i in shown)]
        rows = [[name, *("" if v is None else f"{v:.2f}" for v in values)] for name, *values in by_name]
        document.table(header, [*rows, ["Overall", *(f"{results[i]['test_accuracy_percent']:.2f}" for i in shown)]])
    for scored, stem, table in zip(networks, stems, tables, strict=True):
        teacher = scored.result.get("teacher")
        of_teacher = next((tables[i].accuracies for i, result in enumerate(results) if result is teacher), None)
        _network_section(document, scored, stem, table, of_teacher)
    document.write()


def _network_section(
    document: Document, scored: Scored, stem: str, table: ByClass, of_teacher: list[float | None] | None
) -> None:
    """One network's tables and figures, also as files in a folder of its own."""
    from takd.study import figures

    result, classes, right = scored.result, scored.classes, table.accuracies
    document.heading(f"{arrows(result['path'])}: {result['test_accuracy_percent']:.2f} % on {result['dataset']}")
    document.text(f"{result['checkpoint']}, {result['images']:,} images ({result['split']}); the files are in {stem}/.")
    drawn = figures.class_accuracy(classes, right, result["test_accuracy_percent"], of_teacher)
    document.figure(f"{stem}/class_accuracy", drawn, "Accuracy by class.")
    document.figure(f"{stem}/confusion_matrix", figures.confusion(classes, table.counts), "Confusion matrix.")
    document.table(["class", "predicted as", "images", "% of its images"], _confusions(classes, table.counts))
    drawn = figures.classification([tuple(row.values()) for row in table.rows])
    document.figure(f"{stem}/classification_report", drawn, "Classification report.")
    each: list[dict[str, Any]] = [
        {"class": name, "images": sum(row), "right": row[i], "accuracy_percent": right[i]}
        for i, (name, row) in enumerate(zip(classes, table.counts, strict=True))
    ]
    hits, percent = sum(line["right"] for line in each), result["test_accuracy_percent"]
    each.append({"class": "Overall", "images": result["images"], "right": hits, "accuracy_percent": percent})
    if of_teacher:
        for line, value in zip(each, [*of_teacher, result["teacher"]["test_accuracy_percent"]], strict=True):
            line["teacher_accuracy_percent"] = value
    for name, lines in {"class_accuracy": each, "classification_report": table.rows}.items():
        document.attach(f"{stem}/{name}.csv", _csv([list(lines[0]), *(line.values() for line in lines)]))
    matrix = [[name, *row] for name, row in zip(classes, table.counts, strict=True)]
    document.attach(f"{stem}/confusion_matrix.csv", _csv([["class", *classes], *matrix]))
    by_name = {"class_accuracy": each, "confusion_matrix": table.counts, "classification_report": table.rows}
    whole = result | {"classes": list(classes)} | by_name
    document.attach(f"{stem}/report.json", json.dumps(whole, indent=2) + "\n")


def folder_names(paths: Iterable[str]) -> list[str]:
    """A unique folder name for each file, made of its run's folder and its own name."""
    taken: list[str] = []
    for path in map(Path, paths):
        file = re.sub(r"(\.(pth|pt|tar|ckpt|bin))+$", "", path.name)
        name = re.sub(r"[^\w.-]+", "_", f"{path.resolve().parent.name}-{file}").strip(".-")[:100]
        lower = {other.lower() for other in taken}
        candidates = (name, *(f"{name}-{i}" for i in range(2, len(taken) + 3)))
        taken.append(next(free for free in candidates if free.lower() not in lower))
    return taken


def _confusions(classes: Sequence[str], counts: Sequence[Sequence[int]], most: int = 10) -> list[list[str]]:
    """The commonest mistakes as rows of cells."""
    wrong = [(count, y, x) for y, row in enumerate(counts) for x, count in enumerate(row) if x != y and count]
    wrong = sorted(wrong, key=lambda each: (-each[0], each[1:]))[:most]
    return [[classes[y], classes[x], f"{count:,}", f"{100 * count / sum(counts[y]):.1f}"] for count, y, x in wrong]


def _csv(rows: Iterable[Iterable[Any]]) -> str:
    """A name that a spreadsheet would run as a formula gets a ' before it, which makes it text there."""
    text, formula = io.StringIO(), re.compile(r"\s*[=+@\-\uff1d\uff0b\uff20\uff0d]")
    escaped = ([f"'{cell}" if isinstance(cell, str) and formula.match(cell) else cell for cell in row] for row in rows)
    csv.writer(text, lineterminator="\n").writerows(escaped)
    return text.getvalue()


def _flat(result: Result) -> dict[str, Any]:
    """A result as one row: {column: value}."""
    row: dict[str, Any] = {}
    for key, value in result.items():
        if key == "teacher":
            row |= {f"teacher_{name}": value[name] for name in ("checkpoint", "model", "test_accuracy_percent")}
        elif key == "saving":
            row |= {f"saving_{name}": ratio for name, ratio in value.items()}
        else:
            row[key] = arrows(value) if key == "path" else value
    return row
