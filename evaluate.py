#!/usr/bin/env python3
"""Score checkpoints on a data set's test images, in float32.

  python3 evaluate.py --checkpoint runs/NAME/plane2_seed1_best.pth.tar --dataset-dir data
  python3 evaluate.py --checkpoint resnet110_XXXX_best.pth.tar --model resnet110 --dataset cifar100 --json
  python3 evaluate.py --checkpoint STUDENT --teacher-checkpoint TEACHER --report scores        pictures, and what the student saves

Reads what train.py, the released TAKD code and RepDistiller write; --model and --dataset are needed only where a file does not say.
Several files give one table, or with --json one object a line. A report is report.html (and .md), comparison.csv and .json, and a
folder for each file: accuracy by class, confusion matrix and classification report as CSV, JSON, PNG and SVG.
"""

import csv
import io
import json
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

from takd.config import flags as arguments
from takd.config import names
from takd.config.names import UserError

BATCHES = (1, 128)  # images a call that latency is measured with
# What a student is to save: the key in a result, its heading, and how it is shown.
COSTS = {
    "parameters": ("parameters", lambda value: f"{value:,}"),
    "multiply_accumulates": ("million MACs", lambda value: f"{value / 1e6:,.2f}"),
    "weights_bytes": ("weights, MB", lambda value: f"{value / 1e6:,.2f}"),
    "file_bytes": ("file, MB", lambda value: f"{value / 1e6:,.2f}"),
    **{f"latency_{images}_milliseconds": (f"ms a call of {images}", lambda value: f"{value:,.2f}") for images in BATCHES},
}


def build_parser():
    parser = arguments.Parser(__doc__)
    add = parser.flag
    add(parser, "--checkpoint", nargs="+", required=True, metavar="FILE", help="files to score")
    add(parser, "--model", type=arguments.network, metavar="NAME", help="the network in the files, where they do not say")
    add(parser, "--dataset", type=arguments.dataset, metavar="NAME",
        help=f"{' '.join(names.DATASETS)} (without: the one the file was trained on)")
    add(parser, "--dataset-dir", default="./data", metavar="DIR", help="where the data set is, or is downloaded to")
    add(parser, "--image-size", type=arguments.number(int, minimum=8), metavar="N", help="of the networks, where the files do not say")
    add(parser, "--no-download", dest="download", action="store_const", const=False, help="never touch the network")
    add(parser, "--teacher-checkpoint", metavar="FILE", help="a teacher to compare with: agreement, and what the student saves")
    add(parser, "--teacher", type=arguments.network, metavar="NAME", help="the network in the teacher's file, where it does not say")
    add(parser, "--report", metavar="DIR", help="write tables and pictures there, as report.html and as files")
    add(parser, "--cuda", type=arguments.cuda, metavar="N", help="1 or yes, 0 or no (without the flag: a GPU if there is one)")
    add(parser, "--json", action="store_const", const=True, help="print JSON; other lines go to standard error")
    return parser  # fmt: skip


def check(args):
    """What can be known to be wrong before anything is read."""
    if args.teacher and not args.teacher_checkpoint:
        raise UserError("--teacher needs --teacher-checkpoint")
    if args.report is not None:
        folder = Path(args.report)
        there = next(path for path in (folder, *folder.parents) if path.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            raise UserError(f"--report {folder}: {there} is {'not a folder' if not there.is_dir() else 'read-only'}; give another folder")


# ------------------------------------------------------------------------------------------------ one file
class Evaluation(NamedTuple):
    """What is known of one file. `result` is what --json prints."""

    result: dict
    logits: object  # float32 (N, C) in the order of the split's images and classes
    split: object  # data_loader.Split


def evaluate(path, model, dataset, args, device, splits):
    """One file's Evaluation. `splits` keeps each data set's test split for the next file."""
    with arguments.requirements("evaluate.py"):
        import torch

        import data_loader
        import model_factory
        from takd.run import engine
        from takd.study import cost

    network, about = model_factory.load_network(path, model, args.image_size)
    dataset = dataset or about.get("dataset")
    if dataset is None:
        raise UserError(f"{path} does not say what it was trained on; name the data set with --dataset")
    key = dataset, about["image_size"]
    if key not in splits:
        download = args.download is not False
        splits[key] = data_loader.load(dataset, args.dataset_dir, download, warn, about["image_size"])[1].to(torch.device(device))
    test = splits[key]
    if about["classes"] != len(test.classes):
        raise UserError(f"{path} tells {about['classes']} classes apart, {dataset} has {len(test.classes)}")
    network.to(test.device, memory_format=torch.channels_last)
    logits = engine.predict(network, test, about["mean"], about["std"])
    if order := data_loader.class_order(about.get("class_names"), test.classes):
        warn(f"note: {path} has the classes of {dataset} in another order: matched by name")
        logits = logits[:, order]
    elif sorted(about.get("class_names", test.classes)) != sorted(test.classes) or about.get("dataset", dataset) != dataset:
        was = f"{about.get('dataset', 'other images')} ({_few(about.get('class_names', ['?']))})"
        warn(f"warning: {path} was trained on {was}, not {dataset} ({_few(test.classes)}): classes are matched by position")
    result = engine.score(logits, test.labels)
    recorded = about.get("test_accuracy_percent") if dataset == about.get("dataset") else None
    if recorded is not None and abs(recorded - result["accuracy_percent"]) > 0.5:
        warn(f"warning: {path} records {recorded:.2f} %, {dataset} here gives {result['accuracy_percent']:.2f} %: other images?")
    if not result["accuracy_percent"] > engine.chance_percent(test.labels):
        warn(f"warning: {path} does not beat guessing: another data set, other normalisation, or not trained")
    size = test.image_size
    told = {
        "checkpoint": str(path),
        "model": about["model"],
        "path": about.get("path", [about["model"]]),
        "dataset": dataset,
        "images": result["images"],
        "test_accuracy_percent": result["accuracy_percent"],
        "test_top5_percent": result["top5_percent"],
        "test_loss": result["loss"],
        "recorded_test_accuracy_percent": recorded,
        "epoch": about.get("epoch"),
        "parameters": model_factory.count_parameters(network),
        **cost.of(network, size, path),
    }
    if args.report is not None or args.teacher_checkpoint:
        told |= {f"latency_{images}_milliseconds": 1000 * cost.latency(network, size, images) for images in BATCHES}
        told |= cost.machine(test.device)
    return Evaluation(told, logits, test)


def compared(student, teacher):
    """The student's Evaluation with its teacher's: how often they agree, and how many times less the student costs."""
    from takd.run import engine

    saving = {key: teacher.result[key] / student.result[key] for key in COSTS}
    more = {"teacher": teacher.result, **engine.agreement(student.logits, teacher.logits), "saving": saving}
    return student._replace(result=student.result | more)


def taught(path, args, dataset, device, splits):
    """The teacher's Evaluation on one data set. One that only guesses is refused: agreeing with it would mean nothing."""
    from takd.run import engine

    teacher = evaluate(path, args.teacher, dataset, args, device, splits)
    if not teacher.result["test_accuracy_percent"] > engine.chance_percent(teacher.split.labels):
        raise UserError(
            f"the teacher {path} scores {teacher.result['test_accuracy_percent']:.2f} % on {dataset}, no better than guessing; "
            f"give a teacher trained on {dataset}"
        )
    return teacher


def _few(classes):
    return ", ".join(classes[:3]) + (", ..." if len(classes) > 3 else "")


# ------------------------------------------------------------------------------------------------- tables
def score_rows(results):
    """Heading and a row of cells for each result."""
    yield "network", "learned from", "data", "parameters", "test %", "top-5 %", "loss"
    for result in results:
        yield (
            result["model"], " > ".join(result["path"][:-1]) or "labels", result["dataset"], f"{result['parameters']:,}",
            f"{result['test_accuracy_percent']:.2f}", f"{result['test_top5_percent']:.2f}", f"{result['test_loss']:.4f}",
        )  # fmt: skip


def cost_rows(results):
    """Heading and rows of what each network costs; in brackets, how many times less than its teacher."""
    with_teacher = any("teacher" in result for result in results)
    yield "network", "learned from", *(["as its teacher %", "KL, nats"] if with_teacher else []), *(name for name, _ in COSTS.values())
    for result in results:
        beside = [f"{result['agreement_percent']:.2f}", f"{result['kl_nats']:.4f}"] if "teacher" in result else ["", ""]
        cells = [
            show(result[key]) + (f" ({result['saving'][key]:.1f})" if "saving" in result else "") for key, (_, show) in COSTS.items()
        ]
        yield result["model"], " > ".join(result["path"][:-1]) or "labels", *(beside if with_teacher else []), *cells


def table(rows, left):
    """Rows as aligned text, the first `left` columns to the left."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(f"{cell:<{width}}" if i < left else f"{cell:>{width}}" for i, (cell, width) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def measured(results):
    """How the costs were taken, as a sentence."""
    result = results[0]
    brackets = "; in brackets how many times less than the teacher's" if any("teacher" in result for result in results) else ""
    return f"Time of a call: median in float32 on {result['device']}, {result['threads']} thread{'s' * (result['threads'] > 1)}{brackets}."


def csv_text(rows):
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def flat(result):
    """A result as one row: {column: value}."""
    row = {}
    for key, value in result.items():
        if key == "teacher":
            row |= {f"teacher_{name}": value[name] for name in ("checkpoint", "model", "test_accuracy_percent")}
        elif key == "saving":
            row |= {f"saving_{name}": ratio for name, ratio in value.items()}
        else:
            row[key] = " > ".join(value) if key == "path" else value
    return row


# ------------------------------------------------------------------------------------------------- the report
def by_class(evaluation):
    """(rows, counts): precision, recall, F1 and images of each class and their averages, and the confusion matrix (C, C)."""
    from sklearn.metrics import classification_report, confusion_matrix

    truth, answers = evaluation.split.labels.cpu().numpy(), evaluation.logits.argmax(1).cpu().numpy()
    labels = range(len(evaluation.split.classes))
    report = classification_report(truth, answers, labels=labels, output_dict=True, zero_division=0)
    accuracy = report.pop("accuracy")
    rows = []
    for key, score in report.items():
        name = evaluation.split.classes[int(key)] if key.isdigit() else key
        rows.append({"class": name, "precision": score["precision"], "recall": score["recall"], "f1": score["f1-score"], "images": int(score["support"])})
    rows.insert(len(labels), {"class": "accuracy", "precision": None, "recall": None, "f1": accuracy, "images": len(truth)})
    return rows, confusion_matrix(truth, answers, labels=labels).tolist()


def accuracies(counts):
    """Per cent of each class's images that are right; None for a class without images."""
    return [100 * row[i] / sum(row) if sum(row) else None for i, row in enumerate(counts)]


def folder_names(paths):
    """A folder name for each file: of its run's folder and its own, without what file systems dislike, each only once."""
    taken = []
    for path in map(Path, paths):
        file = re.sub(r"(\.(pth|pt|tar|ckpt|bin))+$", "", path.name)
        name = re.sub(r"[^\w.-]+", "_", f"{path.resolve().parent.name}-{file}").strip(".-")[:100]
        taken.append(next(free for free in (name, *(f"{name}-{i}" for i in range(2, len(taken) + 3))) if free.lower() not in map(str.lower, taken)))
    return taken


def write_report(folder, evaluations):
    """report.html, report.md, the comparison, and each file's own tables and pictures. Nothing is written before all is made."""
    from takd.study import figures
    from takd.study.document import Document

    document, results = Document(folder), [evaluation.result for evaluation in evaluations]
    document.heading("Evaluation", 1)
    heading, *rows = score_rows(results)
    stems = folder_names(result["checkpoint"] for result in results)
    document.table([*heading, "file"], [[*row, result["checkpoint"]] for row, result in zip(rows, results, strict=True)])
    document.heading("What each costs")
    heading, *rows = cost_rows(results)
    document.table(heading, rows)
    document.text(measured(results), "Multiply-accumulates (MACs) are those of one image's convolutions and matrix products.",
                  *(saved(result) for result in results if "teacher" in result))  # fmt: skip
    columns = list(dict.fromkeys(key for result in results for key in flat(result)))
    document.attach("comparison.csv", csv_text([columns, *([flat(result).get(key) for key in columns] for result in results)]))
    document.attach("comparison.json", json.dumps(results, indent=2) + "\n")
    tables = [by_class(evaluation) for evaluation in evaluations]
    for dataset in dict.fromkeys(result["dataset"] for result in results):
        shown = [i for i, result in enumerate(results) if result["dataset"] == dataset]
        lines = zip(evaluations[shown[0]].split.classes, *(accuracies(tables[i][1]) for i in shown), strict=True)
        document.heading(f"Accuracy by class, {dataset}, %")
        document.table(["class", *(" > ".join(results[i]["path"]) for i in shown)],
                       [[name, *("" if value is None else f"{value:.2f}" for value in values)] for name, *values in lines])  # fmt: skip
    for evaluation, stem, (rows, counts) in zip(evaluations, stems, tables, strict=True):
        result, classes, right = evaluation.result, evaluation.split.classes, accuracies(counts)
        of_teacher = next(
            (accuracies(tables[i][1]) for i, other in enumerate(results) if "teacher" in result and other is result["teacher"]), None
        )
        document.heading(f"{' > '.join(result['path'])}: {result['test_accuracy_percent']:.2f} % on {result['dataset']}")
        document.text(f"{result['checkpoint']}, {result['images']:,} test images; the files are in {stem}/.")
        drawn = figures.class_accuracy(classes, right, result["test_accuracy_percent"], of_teacher)
        document.figure(f"{stem}/class_accuracy", drawn, "Accuracy by class.")
        document.figure(f"{stem}/confusion_matrix", figures.confusion(classes, counts), "Confusion matrix.")
        document.table(["class", "taken for", "images", "of its images, %"], confusions(classes, counts))
        drawn = figures.classification([tuple(row.values()) for row in rows])
        document.figure(f"{stem}/classification_report", drawn, "Classification report.")
        each = [
            {"class": name, "images": sum(row), "right": row[i], "accuracy_percent": right[i]}
            for i, (name, row) in enumerate(zip(classes, counts, strict=True))
        ]
        for i, value in enumerate(of_teacher or ()):
            each[i]["teacher_accuracy_percent"] = value
        for name, lines in {"class_accuracy": each, "classification_report": rows}.items():
            document.attach(f"{stem}/{name}.csv", csv_text([list(lines[0]), *(line.values() for line in lines)]))
        matrix = [["class", *classes], *([name, *row] for name, row in zip(classes, counts, strict=True))]
        document.attach(f"{stem}/confusion_matrix.csv", csv_text(matrix))
        whole = result | {"classes": list(classes), "class_accuracy": each, "confusion_matrix": counts, "classification_report": rows}
        document.attach(f"{stem}/report.json", json.dumps(whole, indent=2) + "\n")
    document.write()


def saved(result):
    """What distillation was for, as a sentence."""
    teacher, saving = result["teacher"], result["saving"]
    return (
        f"Than {teacher['model']} ({teacher['test_accuracy_percent']:.2f} %), {result['model']} ({result['test_accuracy_percent']:.2f} %) has "
        f"{saving['parameters']:.1f} times fewer parameters and {saving['multiply_accumulates']:.1f} times fewer MACs, and answers "
        f"{saving[f'latency_{BATCHES[0]}_milliseconds']:.1f} times as fast alone and {saving[f'latency_{BATCHES[-1]}_milliseconds']:.1f} times "
        f"by {BATCHES[-1]}; they give the same answer to {result['agreement_percent']:.2f} % of the images."
    )


def confusions(classes, counts, most=10):
    """The commonest mistakes as rows of cells."""
    wrong = [(count, y, x) for y, row in enumerate(counts) for x, count in enumerate(row) if x != y and count]
    wrong.sort(key=lambda each: (-each[0], each[1:]))
    return [[classes[y], classes[x], f"{count:,}", f"{100 * count / sum(counts[y]):.1f}"] for count, y, x in wrong[:most]]


def warn(line):
    print(line, file=sys.stderr)


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    args.dataset_dir = args.dataset_dir or parser.defaults["dataset_dir"]
    try:
        check(args)
        device = arguments.device_name(args.cuda)
        splits, teachers, students = {}, {}, []
        for path in args.checkpoint:
            student = evaluate(path, args.model, args.dataset, args, device, splits)
            if args.teacher_checkpoint:
                dataset = student.result["dataset"]
                if dataset not in teachers:
                    teachers[dataset] = taught(args.teacher_checkpoint, args, dataset, device, splits)
                student = compared(student, teachers[dataset])
            students.append(student)
            if args.json:
                print(json.dumps(student.result), flush=True)
        everything = [*teachers.values(), *students]
        if args.report is not None:
            with arguments.requirements("evaluate.py"):
                write_report(args.report, everything)
    except UserError as error:
        sys.exit(arguments.fail("evaluate.py", error, 2))
    except (OSError, MemoryError) as error:
        sys.exit(arguments.fail("evaluate.py", error, 1))
    results = [evaluation.result for evaluation in everything]
    if not args.json:
        print(table(score_rows(results), left=3))
        if "device" in results[0]:
            print(f"\n{table(cost_rows(results), left=2)}\n\n{measured(results)}")
    if args.report is not None:
        print(f"report    {Path(args.report) / 'report.html'}", file=sys.stderr if args.json else sys.stdout)


if __name__ == "__main__":
    main()
