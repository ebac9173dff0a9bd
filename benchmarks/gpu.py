#!/usr/bin/env python3
"""Epochs on a GPU, in parts of less than 9 minutes each on an H200: networks with and without CUDA graphs, precisions,
the teacher's table, a profile, the start of a run, several runs at once, a whole study.

  python3 benchmarks/gpu.py networks --dataset-dir data --out benchmarks/gpu.json
  python3 benchmarks/gpu.py precisions table profile start at-once --dataset-dir data --out benchmarks/gpu.json
  python3 benchmarks/gpu.py study --dataset-dir data --out benchmarks/gpu.json

Where there is no data set, --synthetic 500 in place of --dataset-dir makes learnable images of CIFAR-100's shape and
number. The first four parts train whole epochs as train.py does: medians of --rounds after one that is not counted,
what is compared in turns; the others start train.py and distill_paths.py. Each row has the memory that its training
took besides the data set. --out keeps the other parts that are in the file. --cuda 0 tries the script out on a CPU.
"""

import argparse
import collections
import contextlib
import functools
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

import synthetic
import torch

import data_loader
import model_factory
import train
from takd.config import names, run_config
from takd.distill import evaluation
from takd.distill.teacher import Teacher
from takd.errors import UserError
from takd.process import StopSignals
from takd.run.console import Console
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

    def __init__(self, args, splits, student, *given, teacher=None, table=None, graph=True):
        """`table`: the teacher's checkpoint, as it were, with its table of logits beside it; without, it is live."""
        options = ["--student", student, "--dataset", args.dataset, "--learning-rate", "1e-3", *given]
        options += ["--cuda", str(args.cuda), *(["--teacher", teacher] if teacher else [])]
        config = run_config.parse(options)
        self.splits, self.precision = splits, train.actual_precision(config, None)
        frozen, cpu = None, train.cpu_annex(config)
        if teacher:
            torch.manual_seed(0)
            network = model_factory.create(teacher, len(splits.train.classes))
            frozen = Teacher(network, splits.train.transform, splits.train, self.precision, False, cpu and cpu.pack)
        self.step = train.assemble(config, splits.train, frozen, self.precision, cpu)
        if table:
            config = config.replace(teacher_checkpoint=table)
            train.attach_tables(config, frozen, splits.train, print)
        context = Context(World(), Console(io.StringIO()), StopSignals())
        self.trainer = Trainer(config, splits, self.step, RunDirectory("unused"), context)
        if graph:
            self.trainer.take_step = train.step_graph(config, self.step, 1, print) or self.step

    def epoch(self):
        """Seconds of an epoch's training: (as a run records them, with all that precedes the first step)."""
        trainer, started = self.trainer, time.perf_counter()
        trainer.train(trainer.epoch)
        recorded = trainer.sums.seconds
        trainer.epoch, trainer.steps_done, trainer.sums = trainer.epoch + 1, 0, EpochSums()
        return recorded, time.perf_counter() - started

    def evaluation(self):
        """Seconds to score the test images."""
        started = time.perf_counter()
        evaluation.score(evaluation.predict(self.step.student, self.splits.test), self.splits.test.labels)
        return time.perf_counter() - started


def compare(args, builders):
    """A row for each learner of {how: function that builds it}: seconds to build it, median seconds of an epoch, in
    turns, and memory."""
    learners, rows = [], []
    for how, build in builders.items():
        before, started = memory(), time.perf_counter()
        learners.append(build())
        built = time.perf_counter() - started
        learners[-1].epoch()
        more = {key: value - before[key] for key, value in memory(peak=True).items()}
        rows.append({"how": how, "build_seconds": built} | more)
    rounds = [[learner.epoch() for learner in learners] for _ in range(args.rounds)]
    for row, of_one in zip(rows, zip(*rounds, strict=True), strict=True):
        recorded, wall = map(statistics.median, zip(*of_one, strict=True))
        row |= {"epoch_seconds": recorded, "epoch_wall_seconds": wall}
    return learners, rows


def memory(peak=False):
    """Megabytes of GPU memory in use and reserved, or at most in use since a call without `peak`; nothing on a CPU."""
    if not torch.cuda.is_initialized():
        return {}
    if not peak:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    used = torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    return {"peak_megabytes": used / 1e6, "reserved_megabytes": torch.cuda.memory_reserved() / 1e6}


def networks(args, splits):
    """Seconds of an epoch, as CUDA graphs and kernel by kernel, and of an evaluation of every network alone."""
    found = []
    for name in args.networks:
        builders = {
            how: functools.partial(Learner, args, splits, name, graph=how == "graphs") for how in ("graphs", "eager")
        }
        learners, rows = compare(args, builders)
        learners[0].evaluation()
        rows[0]["evaluation_seconds"] = learners[0].evaluation()
        found += show([{"network": name} | row for row in rows])
    return found


def precisions(args, splits):
    """Seconds of an epoch in each precision; fp32 is IEEE's, tf32 rounds the factors of each product to 10 bits."""
    found = []
    for name in (args.sizes[0], args.sizes[-1]):
        builders = {
            each: functools.partial(Learner, args, splits, name, "--precision", each) for each in args.precisions
        }
        found += show([{"network": name} | row for row in compare(args, builders)[1]])
    return found


def table(args, splits):
    """Seconds of an epoch of the smallest network with labels only, a live teacher, a table that is filled epoch by
    epoch, and a full table, which is filled when it is built."""
    teacher, student = args.sizes[0], args.sizes[-1]
    build = functools.partial(Learner, args, splits, student)
    with tempfile.TemporaryDirectory() as folder:
        builders = {
            "labels": build,
            "live": functools.partial(build, teacher=teacher),
            "lazy table": functools.partial(build, "--teacher-cache", "lazy", teacher=teacher, table=f"{folder}/lazy"),
            "full table": functools.partial(build, "--teacher-cache", "full", teacher=teacher, table=f"{folder}/full"),
        }
        rows = compare(args, builders)[1]
    for row in rows:
        row["over_labels"] = row["epoch_seconds"] / rows[0]["epoch_seconds"]
    return show([{"teacher": teacher, "student": student} | row for row in rows])


def profile(args, splits):
    """Seconds of an epoch by the clock and of kernels on the device, and the latter's per cent by kind of kernel."""
    found = []
    for name in (args.sizes[0], args.sizes[-1]):
        for graph in (True, False):
            learner = Learner(args, splits, name, graph=graph)
            learner.epoch()
            _, wall = learner.epoch()
            kinds = [torch.profiler.ProfilerActivity.CUDA if args.cuda else torch.profiler.ProfilerActivity.CPU]
            with torch.profiler.profile(activities=kinds) as profiled:
                learner.epoch()
            spent = collections.Counter()
            for event in profiled.key_averages():
                spent[kind(event.key)] += event.self_device_time_total if args.cuda else event.self_cpu_time_total
            whole = sum(spent.values()) or 1
            row = {"network": name, "how": "graphs" if graph else "eager", "epoch_wall_seconds": wall}
            row |= {"kernels_seconds": whole / 1e6}
            found += show([row | {each: round(100 * share / whole, 1) for each, share in spent.most_common()}])
    return found


def kind(kernel):
    """The kind of a kernel or operation, by its name."""
    return next((each for each, words in KINDS.items() if any(word in kernel.lower() for word in words)), "other")


def flags(args):
    return ["--dataset", args.dataset, "--dataset-dir", args.dataset_dir, "--no-download", "--cuda", str(args.cuda)]


def start(args, splits):
    """Seconds from the command to the first step of a run of one epoch, to its end, and those that it records."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "train.py"), "--student", args.sizes[0], "--epochs", "1", *flags(args)]
        started, ready = time.perf_counter(), 0.0
        with subprocess.Popen([*command, "--run-dir", folder], stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout:
                ready = ready or (time.perf_counter() - started if line.startswith("run ") else 0.0)
        if process.returncode:
            raise SystemExit(f"failed: {' '.join(command)}")
        row = {"student": args.sizes[0], "start_seconds": ready, "wall_seconds": time.perf_counter() - started}
        return show([row | {"recorded_seconds": sum(map(seconds, records(folder)))}])


def records(folder):
    """The lines of the metrics.jsonl in a folder or in those inside it."""
    files = [*Path(folder).glob("metrics.jsonl"), *Path(folder).glob("*/metrics.jsonl")]
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def seconds(record):
    return record["train_seconds"] + record["evaluation_seconds"]


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
            wall, epoch = time.perf_counter() - started, statistics.median(map(seconds, records(folder)))
        row = {"student": student, "processes": count, "epochs": args.short_epochs, "wall_seconds": wall}
        rows += show([row | {"epoch_seconds": epoch, "epochs_per_second": count / epoch}])
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
    row = {"sizes": " ".join(args.sizes), "trainings": trainings, "epochs": args.study_epochs, "jobs": args.jobs}
    return show([row | {"wall_seconds": wall, "estimate": estimate}])


PARTS = {"networks": networks, "precisions": precisions, "table": table, "profile": profile, "start": start,
         "at-once": at_once, "study": study}  # fmt: skip


def show(rows):
    """Print rows, a line each; returns them."""
    for row in rows:
        cells = (
            f"{key.replace('_', ' ')} {value:.4g}" if isinstance(value, float) else f"{key.replace('_', ' ')} {value}"
            for key, value in row.items()
        )
        print(", ".join(cells), flush=True)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=PARTS, metavar="PART", help=f"any of {' '.join(PARTS)}")
    parser.add_argument("--dataset-dir", default="data")
    parser.add_argument("--synthetic", type=int, metavar="N", help="N images a class in place of CIFAR-100's 500")
    parser.add_argument("--dataset", default="cifar100", choices=("cifar10", "cifar100", "digits"))
    parser.add_argument("--cuda", type=int, default=1, choices=(0, 1), help="0 tries the script out on the CPU")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--networks", nargs="+", default=FAMILIES)
    parser.add_argument("--precisions", nargs="+", help="default: bf16 fp32, and on a GPU tf32")
    study_sizes = ["resnet110", "resnet56", "resnet32", "resnet20", "resnet8"]
    parser.add_argument(
        "--sizes", nargs="+", default=study_sizes, help="networks of all other parts, the largest first"
    )
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 2, 4, 8], help="processes on one GPU")
    parser.add_argument("--short-epochs", type=int, default=20, help="of each run at once")
    parser.add_argument("--study-epochs", type=int, default=20, help="of the paper 160")
    parser.add_argument("--jobs", type=int, default=8, help="trainings of the study at once")
    parser.add_argument("--out", type=Path, help="also store the figures as JSON")
    args = parser.parse_args()
    if args.cuda and not torch.cuda.is_available():
        parser.error("no GPU here; --cuda 0 tries the script out on the CPU")
    args.precisions = args.precisions or ["bf16", *(["tf32"] if args.cuda else []), "fp32"]
    with contextlib.ExitStack() as stack:
        if args.synthetic:
            args.dataset, args.dataset_dir = "cifar100", stack.enter_context(tempfile.TemporaryDirectory())
            synthetic.write(Path(args.dataset_dir) / "cifar100", {"train": args.synthetic, "test": args.synthetic // 5})
        try:
            read = data_loader.read(args.dataset, args.dataset_dir, False, print)
        except UserError as error:
            parser.error(f"{error}; or --synthetic 500")
        measure(args, data_loader.Splits(*(part and part.to("cuda" if args.cuda else "cpu") for part in read)))


def measure(args, splits):
    """All the parts that were named, into --out after each."""
    report = json.loads(args.out.read_text()) if args.out and args.out.exists() else {}
    images = f"synthetic, {len(splits.train)}" if args.synthetic else args.dataset
    report |= {"environment": environment(splits.train.device), "images": images, "rounds": args.rounds}
    print(f"{report['environment']['device']}, torch {torch.__version__}, {images}")
    for part in args.parts:
        print(f"--- {' '.join(PARTS[part].__doc__.split())}")
        report[part] = PARTS[part](args, splits)
        if args.out:
            args.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
