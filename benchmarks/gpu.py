#!/usr/bin/env python3
"""Epochs on a GPU, in parts of a few minutes: networks with and without CUDA graphs, precisions, the teacher's table, a
profile, several runs at once, a whole study.

  python3 benchmarks/gpu.py networks --dataset-dir data --out benchmarks/gpu.json
  python3 benchmarks/gpu.py precisions table profile at-once --dataset-dir data --out benchmarks/gpu.json
  python3 benchmarks/gpu.py study --dataset-dir data --out benchmarks/gpu.json

Without a data set: python3 benchmarks/synthetic.py data. The first four parts train whole epochs as train.py does,
medians of --rounds after one that is not counted, what is compared in turns; the others start train.py and
distill_paths.py. --out keeps the other parts that are in the file. --cuda 0 tries the script out on a CPU.
"""

import argparse
import collections
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch

import data_loader
import model_factory
import train
from takd.config import names, run_config
from takd.distill import evaluation
from takd.distill.teacher import Teacher
from takd.process import StopSignals
from takd.run.console import Console, duration
from takd.run.distributed import World
from takd.run.engine import EpochSums
from takd.run.run_directory import RunDirectory, environment
from takd.run.trainer import Context, Trainer

FAMILIES = [f"resnet{depth}" for depth in names.RESNET_DEPTHS] + [f"plane{size}" for size in names.PLANE_SIZES]
# Of CUDA kernels' names, the first that fits; what fits none is "other".
KINDS = {
    "convolution": ("conv", "cudnn", "xmma", "gemm", "cutlass", "dgrad", "wgrad", "fprop", "winograd", "nchw", "nhwc"),
    "batch norm": ("batch_norm", "batchnorm", "bn_"),
    "optimizer": ("multi_tensor", "fused_sgd", "fusedsgd"),
    "gather": ("index", "gather"),
    "reduction": ("reduce", "softmax", "argmax", "norm"),
    "pointwise": ("elementwise", "pool", "vectorized", "relu", "copy", "memcpy", "memset", "fill"),
}


class Learner:
    """A student that trains epoch after epoch with its family's recipe, as train.py does; the teacher is untrained."""

    def __init__(self, args, splits, student, *flags, teacher=None, graph=True):
        given = ["--student", student, "--dataset", args.dataset, "--learning-rate", "1e-3", *flags]
        given += ["--cuda", str(args.cuda), *(["--teacher", teacher] if teacher else [])]
        config = run_config.parse(given)
        self.splits, self.precision = splits, train.actual_precision(config, None)
        frozen, cpu = None, train.cpu_annex(config)
        if teacher:
            torch.manual_seed(0)
            network = model_factory.create(teacher, len(splits.train.classes))
            frozen = Teacher(network, splits.train.transform, splits.train, self.precision, False, cpu and cpu.pack)
        self.step = train.assemble(config, splits.train, frozen, self.precision, cpu)
        context = Context(World(), Console(io.StringIO()), StopSignals())
        self.trainer = Trainer(config, splits, self.step, RunDirectory("unused"), context)
        self.augment = config.augment
        if graph:
            self.trainer.take_step = train.step_graph(config, self.step, 1, print) or self.step

    def epoch(self):
        """Seconds of an epoch's training."""
        trainer = self.trainer
        trainer.train(trainer.epoch)
        seconds = trainer.sums.seconds
        trainer.epoch, trainer.steps_done, trainer.sums = trainer.epoch + 1, 0, EpochSums()
        return seconds

    def evaluation(self):
        """Seconds to score the test images."""
        started = time.perf_counter()
        evaluation.score(evaluation.predict(self.step.student, self.splits.test), self.splits.test.labels)
        return time.perf_counter() - started


def medians(learners, rounds):
    """Median seconds of an epoch of each, in turns."""
    for learner in learners:
        learner.epoch()
    rounds = [[learner.epoch() for learner in learners] for _ in range(rounds)]
    return [statistics.median(column) for column in zip(*rounds, strict=True)]


def memory():
    """Peak and reserved GPU memory since the last call, megabytes."""
    if not torch.cuda.is_available():
        return {}
    found = {"peak_megabytes": torch.cuda.max_memory_allocated() / 1e6,
             "reserved_megabytes": torch.cuda.memory_reserved() / 1e6}  # fmt: skip
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return found


def networks(args, splits):
    """Seconds of an epoch, as CUDA graphs and kernel by kernel, and of an evaluation of every network alone."""
    rows = []
    for name in args.networks:
        learners = [Learner(args, splits, name), Learner(args, splits, name, graph=False)]
        graph, eager = medians(learners, args.rounds)
        learners[0].evaluation()
        row = {"network": name, "graph_seconds": graph, "eager_seconds": eager}
        rows.append(row | {"evaluation_seconds": learners[0].evaluation()} | memory())
        show(rows[-1])
    return rows


def precisions(args, splits):
    """Seconds of an epoch in each precision."""
    rows = []
    for name in (args.sizes[0], args.sizes[-1]):
        seconds = medians([Learner(args, splits, name, "--precision", each) for each in args.precisions], args.rounds)
        rows.append(
            {"network": name} | {f"{each}_seconds": s for each, s in zip(args.precisions, seconds, strict=True)}
        )
        show(rows[-1] | memory())
    return rows


def table(args, splits):
    """Seconds to fill the largest network's table, and of an epoch of the smallest: alone, live teacher, table."""
    teacher, student = args.sizes[0], args.sizes[-1]
    alone, live, tabled = (Learner(args, splits, student, teacher=each) for each in (None, teacher, teacher))
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        checkpoint = str(Path(folder) / "teacher.pth.tar")
        tabled.step.teacher.attach_table(splits.train, tabled.augment, "full", 160, checkpoint, print)
        filled = time.perf_counter() - started
        seconds = medians([alone, live, tabled], args.rounds)
    row = {"teacher": teacher, "student": student, "augment": tabled.augment, "fill_seconds": filled}
    row |= dict(zip(("alone_seconds", "live_seconds", "table_seconds"), seconds, strict=True)) | memory()
    show(row | {"table over alone": seconds[2] / seconds[0]})
    return row


def profile(args, splits):
    """Per cent of the device's time by kind of kernel, an epoch kernel by kernel."""
    rows = []
    for name in (args.sizes[0], args.sizes[-1]):
        learner = Learner(args, splits, name, graph=False)
        learner.epoch()
        kinds = [torch.profiler.ProfilerActivity.CUDA if args.cuda else torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=kinds) as profiled:
            learner.epoch()
        spent = collections.Counter()
        for event in profiled.key_averages():
            time_ = event.self_device_time_total if args.cuda else event.self_cpu_time_total
            key = event.key.lower()
            spent[next((kind for kind, words in KINDS.items() if any(map(key.__contains__, words))), "other")] += time_
        whole = sum(spent.values()) or 1
        rows.append({"network": name} | {kind: round(100 * share / whole, 1) for kind, share in spent.most_common()})
        show(rows[-1])
    return rows


def flags(args):
    return ["--dataset", args.dataset, "--dataset-dir", args.dataset_dir, "--no-download", "--cuda", str(args.cuda)]


def at_once(args, splits):
    """Short runs of the smallest network, so many processes at once on the one GPU."""
    rows, student = [], args.sizes[-1]
    for count in args.at_once:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, str(ROOT / "train.py"), "--student", student, "--epochs", str(args.short_epochs)]
            started, processes = time.perf_counter(), []
            for seed in range(count):
                more = ["--seed", str(seed), "--run-dir", f"{folder}/{seed}", *flags(args)]
                processes.append(subprocess.Popen([*command, *more], stdout=subprocess.DEVNULL))
            if failed := [process.args for process in processes if process.wait()]:
                raise SystemExit(f"failed: {' '.join(failed[0])}")
            wall = time.perf_counter() - started
            lines = [json.loads(line) for path in Path(folder).glob("*/metrics.jsonl") for line in path.open()]
        epoch = statistics.median(line["train_seconds"] + line["evaluation_seconds"] for line in lines)
        row = {"student": student, "processes": count, "epochs": args.short_epochs, "wall_seconds": wall}
        rows.append(row | {"epoch_seconds": epoch, "epochs_per_second": count / epoch})
        show(rows[-1])
    return rows


def study(args, splits):
    """Wall seconds of all paths through --sizes, and what distill_paths.py had estimated."""
    command = [sys.executable, str(ROOT / "distill_paths.py"), "--sizes", *args.sizes, *flags(args)]
    command += ["--epochs", str(args.study_epochs), "--jobs", str(args.jobs), "--runs"]
    with tempfile.TemporaryDirectory() as folder:
        plan = subprocess.run([*command, folder, "--dry-run"], check=True, capture_output=True, text=True).stdout
        estimate = next(line for line in plan.splitlines() if line.startswith("estimate"))
        print(estimate, flush=True)
        started = time.perf_counter()
        subprocess.run([*command, folder], check=True)
        wall = time.perf_counter() - started
        trainings = len(list(Path(folder).glob("*/summary.json")))
    print(f"{trainings} trainings of {args.study_epochs} epochs, {args.jobs} at once: {duration(wall)}")
    return {"sizes": args.sizes, "trainings": trainings, "epochs": args.study_epochs, "jobs": args.jobs,
            "wall_seconds": wall, "estimate": estimate}  # fmt: skip


PARTS = {"networks": networks, "precisions": precisions, "table": table, "profile": profile, "at-once": at_once,
         "study": study}  # fmt: skip


def show(row):
    """A row as one line."""
    cells = (
        f"{key.replace('_', ' ')} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in row.items()
    )
    print(", ".join(cells), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=PARTS, metavar="PART", help=f"any of {' '.join(PARTS)}")
    parser.add_argument("--dataset-dir", default="data")
    parser.add_argument("--dataset", default="cifar100", choices=("cifar10", "cifar100", "digits"))
    parser.add_argument("--cuda", type=int, default=1, choices=(0, 1), help="0 tries the script out on the CPU")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--networks", nargs="+", default=FAMILIES)
    parser.add_argument("--precisions", nargs="+", default=["bf16", "fp32"])
    study_sizes = ["resnet110", "resnet56", "resnet32", "resnet20", "resnet8"]
    parser.add_argument(
        "--sizes", nargs="+", default=study_sizes, help="networks of all other parts, the largest first"
    )
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 2, 4, 8], help="processes on one GPU")
    parser.add_argument("--short-epochs", type=int, default=20, help="of each run at once")
    parser.add_argument("--study-epochs", type=int, default=160)
    parser.add_argument("--jobs", type=int, default=4, help="of the study, at once")
    parser.add_argument("--out", type=Path, help="also store the figures as JSON")
    args = parser.parse_args()
    if args.cuda and not torch.cuda.is_available():
        parser.error("no GPU here; --cuda 0 tries the script out on the CPU")
    read = data_loader.read(args.dataset, args.dataset_dir, False, print)
    splits = data_loader.Splits(*(part and part.to("cuda" if args.cuda else "cpu") for part in read))
    report = json.loads(args.out.read_text()) if args.out and args.out.exists() else {}
    report |= {"environment": environment(splits.train.device), "dataset": args.dataset, "rounds": args.rounds}
    print(f"{report['environment']['device']}, torch {torch.__version__}, {args.dataset}")
    for part in args.parts:
        print(f"--- {PARTS[part].__doc__}")
        report[part] = PARTS[part](args, splits)
        if args.out:
            args.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
