#!/usr/bin/env python3
"""Images per second on the CPU: ours, ours without takd.cpu, and a plain PyTorch loop as commonly written.

  python3 benchmarks/cpu.py --dataset-dir data --out benchmarks/cpu.json          about 40 minutes on 2 cores
  python3 benchmarks/cpu.py --only "resnet8 none" --rounds 7

Each is a process of its own, and they take turns; figures are medians over rounds, ratios medians of each round's.
The plain loop: DataLoader with 2 workers and per-image transforms, float32, a live teacher without no_grad, .item()
each step.
"""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
import torchvision
from torch.nn import functional as F

import data_loader
import model_factory
import train
from takd.config import names, run_config
from takd.distill.teacher import Teacher, Teachers
from takd.images.batches import batches
from takd.images.split import epoch_plan
from takd.run.distributed import part_of
from takd.run.run_directory import environment

BATCH = 128
FAMILIES = [f"resnet{depth}" for depth in names.RESNET_DEPTHS] + [f"plane{size}" for size in names.PLANE_SIZES]
CASES = [  # teacher (or several), student, augmentation, table
    *((None, student, "none", None) for student in FAMILIES),
    *((None, student, "crop-flip", None) for student in ("resnet8", "plane2")),
    *((*pair, *how) for pair in (("resnet110", "resnet8"), ("resnet56", "resnet20"), ("plane10", "plane2"))
      for how in (("none", "warm"), ("crop-flip", "cold"), ("crop-flip", "warm"))),
    *((*pair, augment, "warm") for pair in ((("resnet56", "resnet20", "resnet14"), "resnet8"),
      (("plane10", "plane6", "plane4"), "plane2")) for augment in ("none", "crop-flip")),
]  # fmt: skip


class Images(torch.utils.data.Dataset):
    """The split as a common map-style data set: PIL images and a transform."""

    def __init__(self, split, augment):
        self.images, self.labels, transforms = split.images, split.labels.tolist(), torchvision.transforms
        crop_flip = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
        normalise = transforms.Normalize(split.transform.mean, split.transform.std)
        augmentation = crop_flip if augment == "crop-flip" else []
        self.transform = transforms.Compose([transforms.ToPILImage(), *augmentation, transforms.ToTensor(), normalise])

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.transform(self.images[index]), self.labels[index]


class Plain:
    """The plain loop."""

    def __init__(self, case, split, **_):
        teacher, student, augment, _ = case
        data = Images(split, augment)
        self.loader = torch.utils.data.DataLoader(data, BATCH, shuffle=True, num_workers=2, drop_last=True)
        self.student = model_factory.create(student, len(split.classes))
        self.teacher = model_factory.create(teacher, len(split.classes)).eval() if teacher else None
        self.optimizer = torch.optim.SGD(self.student.parameters(), lr=1e-4, momentum=0.9, weight_decay=1e-4)
        self.batches = self._endless()

    def _endless(self):
        while True:
            yield from self.loader

    def steps(self, count):
        self.student.train()
        total = 0.0
        for _ in range(count):
            images, labels = next(self.batches)
            self.optimizer.zero_grad()
            logits = self.student(images)
            loss = F.cross_entropy(logits, labels)
            if self.teacher:
                taught = self.teacher(images)
                kl = F.kl_div(F.log_softmax(logits / 4, 1), F.softmax(taught / 4, 1), reduction="batchmean")
                loss = 0.5 * loss + 0.5 * 16 * kl
            loss.backward()
            self.optimizer.step()
            total += loss.item()


class Ours:
    """The steps of train.py, with takd.cpu or without."""

    def __init__(self, case, split, precision, folder, annex):
        teacher, student, self.augment, self.how = case
        self.split, self.epoch, self.tables = split, 0, []
        given = ["--teacher", *run_config.one_or_more(teacher)] if teacher else []
        config = run_config.parse(["--student", student, *given, "--cuda", "0", "--learning-rate", "1e-4"])
        cpu = train.cpu_annex(config) if annex else None
        if teacher:
            torch.manual_seed(0)
            networks = [model_factory.create(name, len(split.classes)) for name in config.teachers]
            frozen = [Teacher(each, split.transform, split, precision, False, cpu and cpu.pack) for each in networks]
            for each, name in zip(frozen, config.teachers, strict=True):
                each.attach_table(split, self.augment, "auto", str(folder / name), lambda line: None)
            self.tables = [each.table for each in frozen]
            teacher = Teachers(frozen) if len(frozen) > 1 else frozen[0]
        self.step = train.assemble(config, split, teacher, precision, cpu)
        self.step.student.train()

    def steps(self, count):
        """An epoch's first steps: of a new epoch if the table is to be cold, else always of the same one."""
        self.epoch += self.how == "cold"
        plan = epoch_plan(self.split, self.augment, 1, self.epoch)
        parts = [part_of(slice(first, first + BATCH)) for first in range(0, count * BATCH, BATCH)]
        for table in self.tables:
            table.expect(plan.order[: count * BATCH], plan.views[: count * BATCH])
        for part, batch in zip(parts, batches(self.split, self.augment, plan, [p.rows for p in parts]), strict=True):
            self.step(batch, part)


CONTENDERS = {
    "ours": (Ours, {"annex": True}),
    "without takd.cpu": (Ours, {"annex": False}),
    "plain": (Plain, {}),
    "labels alone": (Ours, {"annex": True}),  # the same student with no teacher
    "one teacher": (Ours, {"annex": True}),  # the same student with the first teacher only
}


def serve(pipe, contender, case, split, precision, folder):
    """A contender's process: seconds for every number of steps that comes through the pipe."""
    kind, more = CONTENDERS[contender]
    if contender == "labels alone":
        case = (None, *case[1:3], None)
    if contender == "one teacher":
        case = (case[0][0], *case[1:])
    steps = kind(case, split, precision=precision, folder=folder, **more).steps
    while count := pipe.recv():
        started = time.perf_counter()
        steps(count)
        pipe.send(time.perf_counter() - started)


class Contender:
    def __init__(self, *what):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, *what))
        self.process.start()
        self.seconds(1)
        self.count = max(2, min(12, round(0.6 / self.seconds(1))))  # about half a second
        self.rate()

    def seconds(self, count):
        self.pipe.send(count)
        return self.pipe.recv()

    def rate(self):
        """Images per second."""
        return BATCH * self.count / self.seconds(self.count)

    def end(self):
        self.pipe.send(0)
        self.process.join()


def work(case):
    """A case's networks, such as plane10 + plane4 > plane2."""
    return " > ".join([" + ".join(run_config.one_or_more(case[0])), case[1]] if case[0] else [case[1]])


def measure(case, split, folder, rounds, precision):
    """A case's row."""
    teacher, student, augment, table = case
    several = isinstance(teacher, tuple)
    names_ = ["ours", "one teacher"] if several else [*CONTENDERS][: 4 if table == "warm" else 3]
    running = {}
    for name in names_:
        own = folder / name.replace(" ", "-")  # with and without takd.cpu a table's values differ in rounding
        own.mkdir(exist_ok=True)
        running[name] = Contender(name, case, split, precision, own)
    rates = {name: [] for name in names_}
    for _ in range(rounds):
        for name in names_:
            time.sleep(0.3)  # the plain loop's workers fill their queue
            rates[name].append(running[name].rate())
    for contender in running.values():
        contender.end()
    ratios = {name: np.median(np.array(rates["ours"]) / np.array(rates[name])) for name in names_[1:]}
    return {
        "work": work(case),
        "augment": augment,
        "table": table,
        "images_per_second": {name: float(np.median(values)) for name, values in rates.items()},
        "ratio_of_ours": {name: float(value) for name, value in ratios.items()},
    }


HEADER = """
| work | augmentation | table | images/s | vs. without takd.cpu | vs. plain loop | vs. labels alone | vs. one teacher |
|---|---|---|--:|--:|--:|--:|--:|"""


def markdown(row):
    """A case's line in docs/performance.md."""
    ratios = [row["ratio_of_ours"].get(name) for name in list(CONTENDERS)[1:]]
    cells = [row["work"], row["augment"], row["table"] or "", f"{row['images_per_second']['ours']:.0f}"]
    return f"| {' | '.join([*cells, *('' if ratio is None else f'{ratio:.2f}' for ratio in ratios)])} |"


def whole_runs(dataset, dataset_dir, folder):
    """Peak resident memory in megabytes, and seconds from start to first step, of real runs of train.py."""
    common = [sys.executable, str(ROOT / "train.py"), "--dataset", dataset, "--dataset-dir", str(dataset_dir)]
    common += ["--epochs", "1", "--no-download", "--cuda", "0"]

    def run(name, *flags):
        started = time.time()
        process = subprocess.Popen([*common, *flags, "--run-dir", str(folder / name)], stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        assert status == 0
        ready = (folder / name / "config.json").stat().st_mtime  # written when everything is ready
        return {"peak_megabytes": usage.ru_maxrss / 1024, "start_seconds": ready - started}

    run("teacher", "--student", "plane2")
    taught = ["--teacher", "plane2", "--teacher-checkpoint", str(folder / "teacher" / "plane2_seed1_best.pth.tar")]
    return {
        augment: run(augment, *taught, "--student", "resnet8", "--augment", augment)
        for augment in ("none", "crop-flip")
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset-dir", default="data")
    parser.add_argument("--dataset", default="cifar100", choices=list(names.DATASETS))
    parser.add_argument("--rounds", type=int, default=7)
    only = 'cases whose row contains one of these, such as "resnet8 none"; "runs" for memory and start'
    parser.add_argument("--only", nargs="*", default=[], help=only)
    parser.add_argument("--out", type=Path, help="also store the figures as JSON")
    args = parser.parse_args()
    precision = train.actual_precision(run_config.parse(["--cuda", "0"]), None)
    whole = data_loader.read(args.dataset, args.dataset_dir, False, print)[0]
    split = whole.subset(torch.arange(0, len(whole), max(1, len(whole) // 5000)), "5000")  # a full table in seconds
    report = {"environment": environment(split.device) | {"precision": precision}, "rounds": args.rounds, "rows": []}
    print(
        f"{report['environment']['device']}, {torch.get_num_threads()} threads, torch {torch.__version__}, {precision}"
    )
    print(HEADER)
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            title = " ".join(filter(None, [work(case), *case[2:]]))
            if args.only and not any(word in title for word in args.only):
                continue
            row = measure(case, split, Path(folder), args.rounds, precision)
            report["rows"].append(row)
            print(markdown(row), flush=True)
        if not args.only or "runs" in args.only:
            report["runs"] = whole_runs(args.dataset, args.dataset_dir, Path(folder))
            for augment, figures in report["runs"].items():
                peak, start = figures["peak_megabytes"], figures["start_seconds"]
                print(f"plane2 > resnet8, {augment}: peak {peak:.0f} MB, first step after {start:.1f} s")
    if args.out:
        args.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
