#!/usr/bin/env python3
"""Epochs on a GPU: every network with and without CUDA graphs, the teacher live and as a table, several runs at once, a whole study.

  python3 benchmarks/gpu.py --dataset-dir data --out benchmarks/gpu.json        all of it on the real CIFAR-100, a full study at the end
  python3 benchmarks/gpu.py --dataset-dir data --parts networks table           without runs of their own

`networks` and `table` call engine.train_epoch over the whole training set: medians of --rounds epochs after one that is not counted, and
what is compared takes turns. `at-once` starts train.py, `study` distill_paths.py: whole processes, their start included. --cuda 0 with
--dataset digits and smaller networks tries the script out without a GPU.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import data_loader
import model_factory
from takd.config import names, recipes
from takd.cpu import kernels
from takd.distill import methods as losses
from takd.distill.teacher import Teacher, attach_table
from takd.run import cuda_graph as graphs
from takd.run import engine
from takd.run import run_directory as runlog
from takd.run import trainer as training

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("networks", "table", "at-once", "study")
BATCH = 128


class Learner:
    """A student that trains epoch after epoch with its family's augmentation, as train.py does."""

    def __init__(self, split, name, precision, teacher=None, graph=True):
        self.split, self.teacher, self.precision, self.epochs = split, teacher, precision, 0
        self.augment = "none" if split.name.startswith("digits") else recipes.recipe("paper", name).augment
        torch.manual_seed(0)
        self.student = model_factory.create_network(name, len(split.classes)).to(split.device, memory_format=torch.channels_last)
        self.method = losses.METHODS["kd"]() if teacher else losses.CrossEntropy()
        self.optimizer = torch.optim.SGD(self.student.parameters(), lr=1e-3, momentum=0.9, nesterov=True, weight_decay=1e-4, fused=True)
        self.graph = None
        if graph and split.device.type == "cuda":
            self.graph = graphs.StepGraph((self.student, self.method), self.optimizer, lambda line: print(f"{name}: {line}"))

    def epoch(self):
        """Seconds of one epoch's training."""
        order, sums = (self.split, BATCH, self.augment, 1, self.epochs), engine.EpochSums()
        self.epochs += 1
        batches = (data_loader.train_draws if self.graph else data_loader.train_batches)(*order)
        engine.train_epoch(self.student, self.method, self.teacher, self.optimizer, self.split, batches, sums, self.precision,
                           graph=self.graph)  # fmt: skip
        return sums.seconds


def medians(learners, rounds):
    """Median seconds of an epoch of each, in turns."""
    for learner in learners:
        learner.epoch()
    rounds = [[learner.epoch() for learner in learners] for _ in range(rounds)]
    return [statistics.median(column) for column in zip(*rounds, strict=True)]


def networks(args, split, test, precision):
    """Seconds of an epoch and of an evaluation of every network alone."""
    print(f"{'network':10} {'graph s':>9} {'plain s':>9} {'evaluation s':>13}")
    rows = []
    for name in args.networks:
        learners = [Learner(split, name, precision), Learner(split, name, precision, graph=False)]
        graphed, plain = medians(learners, args.rounds)

        def evaluation(student=learners[0].student):
            started = time.perf_counter()
            engine.score(engine.predict(student, test), test.labels)
            return time.perf_counter() - started

        evaluation()
        rows.append({"network": name, "epoch_seconds": graphed, "plain_epoch_seconds": plain, "evaluation_seconds": evaluation()})
        print(f"{name:10} {graphed:9.3f} {plain:9.3f} {rows[-1]['evaluation_seconds']:13.3f}", flush=True)
    return rows


def table(args, split, precision):
    """Seconds to fill the largest network's table, and of an epoch of the smallest: labels alone, live teacher, table."""
    name, student = args.sizes[0], args.sizes[-1]

    def teacher():
        torch.manual_seed(0)
        return Teacher(model_factory.create_network(name, len(split.classes)), split.mean, split.std, split, split.device, precision)

    alone, live = Learner(split, student, precision), Learner(split, student, precision, teacher())
    tabled = Learner(split, student, precision, teacher())
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        attach_table(tabled.teacher, split, tabled.augment, "full", Path(folder) / "teacher.pth.tar", 160, print)
        filled = time.perf_counter() - started
        seconds = dict(zip(("alone", "live", "table"), medians([alone, live, tabled], args.rounds), strict=True))
    views = names.VIEWS[tabled.augment]
    print(f"{name} > {student}: {views} views filled in {filled:.1f} s; an epoch alone {seconds['alone']:.3f} s, from the live teacher "
          f"{seconds['live']:.3f} s, from the table {seconds['table']:.3f} s ({seconds['table'] / seconds['alone']:.3f} of alone)")  # fmt: skip
    return {"teacher": name, "student": student, "views": views, "fill_seconds": filled, "epoch_seconds": seconds}


def flags(args):
    return ["--dataset", args.dataset, "--dataset-dir", args.dataset_dir, "--no-download", "--cuda", str(int(args.device == "cuda"))]


def at_once(args):
    """Short runs of the smallest network, so many processes at once on the one GPU."""
    rows = []
    for count in args.at_once:
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            processes = [
                subprocess.Popen([
                    sys.executable, str(ROOT / "train.py"), "--student", args.sizes[-1], "--epochs", str(args.short_epochs), "--seed", str(seed),
                    "--run-dir", f"{folder}/{seed}", *flags(args),
                ], stdout=subprocess.DEVNULL)
                for seed in range(count)
            ]  # fmt: skip
            failed = [process.args for process in processes if process.wait()]
            wall = time.perf_counter() - started
            if failed:
                raise SystemExit(f"failed: {failed[0]}")
            lines = [json.loads(line) for path in Path(folder).glob("*/metrics.jsonl") for line in path.read_text().splitlines()]
        epoch = statistics.median(line["train_seconds"] + line["evaluation_seconds"] for line in lines)
        rows.append({"processes": count, "epochs": args.short_epochs, "wall_seconds": wall, "epoch_seconds": epoch,
                     "epochs_per_second": count / epoch})  # fmt: skip
        print(f"{count} at once: an epoch {epoch:.3f} s, {count / epoch:.2f} epochs a second, {wall:.1f} s for all", flush=True)
    return rows


def study(args, jobs):
    """Wall seconds of all paths through --sizes, and what distill_paths.py had estimated."""
    command = [sys.executable, str(ROOT / "distill_paths.py"), "--sizes", *args.sizes, "--epochs", str(args.study_epochs), *flags(args),
               "--jobs", str(jobs), "--runs"]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        plan = subprocess.run([*command, folder, "--dry-run"], check=True, capture_output=True, text=True).stdout
        estimate = next(line for line in plan.splitlines() if line.startswith("estimate"))
        print(estimate, flush=True)
        started = time.perf_counter()
        subprocess.run([*command, folder], check=True)
        wall = time.perf_counter() - started
        trainings = len(list(Path(folder).glob("*/summary.json")))
    print(f"{trainings} trainings of {args.study_epochs} epochs, {jobs} at once: {runlog.duration(wall)}")
    return {"sizes": args.sizes, "trainings": trainings, "epochs": args.study_epochs, "jobs": jobs, "wall_seconds": wall, "estimate": estimate}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset-dir", default="data")
    parser.add_argument("--dataset", default="cifar100", choices=("cifar10", "cifar100", "digits"))
    parser.add_argument("--cuda", type=int, default=1, choices=(0, 1), help="0 tries the script out on the CPU")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--rounds", type=int, default=7)
    both = [f"resnet{depth}" for depth in names.RESNET_DEPTHS] + [f"plane{size}" for size in names.PLANES_100]
    parser.add_argument("--networks", nargs="+", default=both)
    parser.add_argument("--sizes", nargs="+", default=["resnet110", "resnet56", "resnet32", "resnet20", "resnet8"], help="of the study")
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 2, 4, 8], help="processes on one GPU")
    parser.add_argument("--short-epochs", type=int, default=20, help="of each run at once")
    parser.add_argument("--study-epochs", type=int, default=160)
    parser.add_argument("--jobs", type=int, help="of the study (default: what at-once found fastest, else 4)")
    parser.add_argument("--out", type=Path, help="also store the figures as JSON")
    args = parser.parse_args()
    args.device = "cuda" if args.cuda else "cpu"
    if args.cuda and not torch.cuda.is_available():
        parser.error("no GPU here; --cuda 0 tries the script out on the CPU")
    device = torch.device(args.device)
    torch.backends.cudnn.benchmark = True
    kernels.keep_freed_memory()
    precision = "bf16" if training.native_bf16(device) else "fp32"
    split, test = (part.to(device) for part in data_loader.load(args.dataset, args.dataset_dir, download=False))
    report = {"environment": runlog.environment(device) | {"precision": precision}, "dataset": args.dataset, "rounds": args.rounds}
    print(f"{report['environment']['device']}, torch {torch.__version__}, {precision}, {args.dataset}")
    jobs = args.jobs or 4
    for part in args.parts:
        if part == "networks":
            report[part] = networks(args, split, test, precision)
        elif part == "table":
            report[part] = table(args, split, precision)
        elif part == "at-once":
            report[part] = at_once(args)
            jobs = args.jobs or max(report[part], key=lambda row: row["epochs_per_second"])["processes"]
        else:
            report[part] = study(args, jobs)
        if args.out:
            args.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
