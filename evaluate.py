#!/usr/bin/env python3
"""Score checkpoints on a data set's test images, in float32.

  python3 evaluate.py runs/NAME/plane2_seed1_best.pth.tar --dataset-dir data
  python3 evaluate.py resnet110_XXXX_best.pth.tar --model resnet110 --dataset cifar100 --json
  python3 evaluate.py STUDENT --teacher-checkpoint TEACHER --report scores      with figures and costs

Reads what train.py, the released TAKD code and RepDistiller write; --model and --dataset are needed only where a file
has neither. Several files give one table, or with --json one object per line. A report is report.html (and .md),
comparison.csv and .json, and a folder for each file: accuracy by class, confusion matrix and classification report as
CSV, JSON, PNG and SVG.
"""

from takd import process

if __name__ == "__main__":
    process.start()

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from takd import files
from takd.config import flags, names
from takd.errors import UserError


# fmt: off
def build_parser() -> flags.Parser:
    parser = flags.Parser(__doc__)
    flag, switch = parser.flag, parser.switch
    parser.files, parser.usage = "checkpoint", "%(prog)s FILE [FILE ...] [flags]"
    flag("--checkpoint", nargs="+", metavar="FILE", help="files to score, with or without this flag")
    flag("--model", type=flags.network, metavar="NAME", help="the network in the files, if they do not name it")
    flag("--dataset", type=flags.dataset, metavar="NAME", help=f"{' '.join(names.DATASETS)} (default: the file's own)")
    flag("--dataset-dir", default="./data", metavar="DIR", help="where the data set is, or is downloaded to")
    flag("--image-size", type=flags.number(int, minimum=8, maximum=1024), metavar="N",
         help="input size, if a file lacks it")
    flag("--test-images", type=flags.number(int, minimum=1), metavar="N",
         help="score on only N test images, the same share of each class")
    switch("--no-download", "never download a data set")
    flag("--teacher-checkpoint", metavar="FILE", help="a teacher to compare with: agreement and savings")
    flag("--teacher", type=flags.network, metavar="NAME", help="the network in the teacher's file, if unnamed")
    flag("--report", metavar="DIR", help="folder for a report, with tables and figures as files")
    flag("--cuda", type=flags.cuda, metavar="N", help="1 or yes, 0 or no (default: a GPU if there is one)")
    switch("--json", "print JSON; other lines go to standard error")
    return parser
# fmt: on


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments, with the device. Exits with a usage error if they are wrong, before anything is read."""
    args = build_parser().parse_args(argv)
    with flags.errors_in_one_line("evaluate.py"):
        if not args.checkpoint:
            raise UserError("name the files to score: evaluate.py FILE ...")
        if args.teacher and not args.teacher_checkpoint:
            raise UserError("--teacher needs --teacher-checkpoint")
        if args.report is not None:
            files.check_folder(args.report, "--report")
        args.device = flags.device_name(args.cuda)
    return args


if __name__ == "__main__":  # usage errors are reported before torch is imported, which takes seconds
    ARGUMENTS = parse(sys.argv[1:])
    flags.check_packages(
        "evaluate.py", "torch", "torchvision", "numpy", *(("sklearn", "matplotlib") if ARGUMENTS.report else ())
    )

import torch

import data_loader
import model_factory
from takd.distill import evaluation
from takd.images.split import Split, Transform, class_order, fewer
from takd.run.console import Console
from takd.run.run_directory import processor
from takd.study import score_report
from takd.study.score_report import BATCHES, COSTS, Scored


class Evaluation(NamedTuple):
    """One checkpoint's scores. `result` is what --json prints."""

    result: dict[str, Any]
    logits: torch.Tensor  # float32 (N, C) in the order of the split's images and classes
    split: Split

    @property
    def only_guesses(self) -> bool:
        return not self.result["test_accuracy_percent"] > evaluation.chance_percent(self.split.labels)


def main(argv: list[str] | None = None) -> None:
    args = ARGUMENTS if argv is None else parse(argv)
    splits: dict[Any, Split] = {}
    students: list[Evaluation] = []
    teachers: dict[str, Evaluation] = {}  # by data set
    fix = "--cuda 0 evaluates on the CPU"
    with flags.errors_in_one_line("evaluate.py"), evaluation.out_of_memory(fix):
        evaluation.check_gpu(args.device)
        for path in args.checkpoint:
            student = evaluate(path, args.model, args.dataset, args, splits)
            if args.teacher_checkpoint:
                dataset = student.result["dataset"]
                if dataset not in teachers:
                    teachers[dataset] = evaluate_teacher(dataset, args, splits)
                student = compared(student, teachers[dataset])
            students.append(student)
            if args.json:
                print(json.dumps(student.result), flush=True)
        everything = [*teachers.values(), *students]
        if args.report is not None:
            score_report.write_report(args.report, [scored(each) for each in everything])
    results = [each.result for each in everything]
    if not args.json:
        print(score_report.text_table(score_report.score_rows(results), left=3))
        if "device" in results[0]:
            print(f"\n{score_report.text_table(score_report.cost_rows(results), left=2)}")
            print(f"\n{score_report.measured_sentence(results)}")
    if args.report is not None:
        print(f"report    {Path(args.report) / 'report.html'}", file=sys.stderr if args.json else sys.stdout)


def evaluate(
    path: str, model: str | None, dataset: str | None, args: argparse.Namespace, splits: dict[Any, Split]
) -> Evaluation:
    """One checkpoint's scores. `splits` keeps each data set's test split for the next file."""
    network, metadata = model_factory.load(path, model, args.image_size)
    dataset = dataset or metadata.get("dataset")
    if dataset is None:
        raise UserError(f"{path} does not record its data set; name it with --dataset")
    key = dataset, metadata["image_size"]
    options = {"download": args.download is not False, "image_size": metadata["image_size"] or 0}
    outline = splits.get(key) or data_loader.read(dataset, args.dataset_dir, pixels=False, **options).test
    if metadata["classes"] != len(outline.classes):
        raise UserError(f"{path} was trained for {metadata['classes']} classes; {dataset} has {len(outline.classes)}")
    if key not in splits:
        test = data_loader.read(dataset, args.dataset_dir, say=flags.warn, **options).test
        test = fewer(test, args.test_images) if args.test_images else test
        splits[key] = test.to(torch.device(args.device))
    test = splits[key]
    network.to(test.device, memory_format=torch.channels_last)
    transform = Transform(tuple(metadata["mean"]), tuple(metadata["std"]), test.image_size)
    with Console(sys.stderr).progress(str(path), len(test)) as advance:
        logits = evaluation.predict(network, test, transform, advance=advance)
    logits = in_order(logits, path, metadata, dataset, test)
    score = evaluation.score(logits, test.labels)
    recorded = metadata.get("test_accuracy_percent") if dataset == metadata.get("dataset") else None
    result = {
        "checkpoint": str(path),
        "model": metadata["model"],
        "path": metadata.get("path", [metadata["model"]]),
        "dataset": dataset,
        "split": test.part,
        "images": score["images"],
        "test_accuracy_percent": score["accuracy_percent"],
        "test_top5_percent": score["top5_percent"],
        "test_loss": score["loss"],
        "recorded_test_accuracy_percent": recorded,
        "epoch": metadata.get("epoch"),
        **costs(network, test, path, measure=args.report is not None or bool(args.teacher_checkpoint)),
    }
    found = Evaluation(result, logits, test)
    if recorded is not None and not args.test_images and abs(recorded - score["accuracy_percent"]) > 0.5:
        here = f"{dataset} here gives {score['accuracy_percent']:.2f} %"
        flags.warn(f"warning: {path} records {recorded:.2f} %, {here}: other images?")
    if found.only_guesses:
        flags.warn(f"warning: {path} does not beat guessing: another data set, other normalisation, or not trained")
    return found


def in_order(logits: torch.Tensor, path: str, metadata: dict[str, Any], dataset: str, test: Split) -> torch.Tensor:
    """The logits in the order of the data set's classes; a warning where the file was trained on other classes."""
    class_names = metadata.get("class_names", test.classes)
    if order := class_order(class_names, test.classes):
        flags.warn(f"note: {path} has the classes of {dataset} in another order: matched by name")
        return logits[:, order]
    if sorted(class_names) != sorted(test.classes) or metadata.get("dataset", dataset) != dataset:
        other = f"{metadata.get('dataset', 'other images')} ({few(metadata.get('class_names', ['?']))})"
        here = f"{dataset} ({few(test.classes)})"
        flags.warn(f"warning: {path} was trained on {other}, not {here}: classes are matched by position")
    return logits


def costs(network: torch.nn.Module, test: Split, path: str, measure: bool) -> dict[str, Any]:
    """The network's weights and operations and, if `measure`, its latency on this device."""
    known: dict[str, Any] = {
        "parameters": evaluation.count_parameters(network),
        "multiply_accumulates": evaluation.multiply_accumulates(network, test.image_size),
        "weights_bytes": evaluation.weights_bytes(network),
        "file_bytes": Path(path).stat().st_size,
    }
    if measure:
        for images in BATCHES:
            known[f"latency_{images}_milliseconds"] = 1000 * evaluation.latency(network, test.image_size, images)
        on_gpu = test.device.type == "cuda"
        known["device"] = torch.cuda.get_device_name(test.device) if on_gpu else processor()
        known["threads"] = torch.get_num_threads()
    return known


def evaluate_teacher(dataset: str, args: argparse.Namespace, splits: dict[Any, Split]) -> Evaluation:
    """The teacher's scores. One no better than guessing is refused: agreement with it would mean nothing."""
    path = args.teacher_checkpoint
    teacher = evaluate(path, args.teacher, dataset, args, splits)
    if teacher.only_guesses:
        percent, fix = teacher.result["test_accuracy_percent"], f"give a teacher trained on {dataset}"
        raise UserError(f"the teacher {path} scores {percent:.2f} % on {dataset}, no better than guessing; {fix}")
    return teacher


def compared(student: Evaluation, teacher: Evaluation) -> Evaluation:
    """The student with its comparison: how often it agrees with its teacher, and how many times less it costs."""
    saving = {key: teacher.result[key] / student.result[key] for key in COSTS}
    agreement = evaluation.agreement(student.logits, teacher.logits)
    return student._replace(result=student.result | {"teacher": teacher.result, **agreement, "saving": saving})


def scored(found: Evaluation) -> Scored:
    answers = found.logits.argmax(1)
    return Scored(found.result, found.split.classes, found.split.labels.cpu().numpy(), answers.cpu().numpy())


def few(classes: Sequence[str]) -> str:
    return ", ".join(classes[:3]) + (", ..." if len(classes) > 3 else "")


if __name__ == "__main__":
    main()
