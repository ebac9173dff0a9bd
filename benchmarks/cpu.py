#!/usr/bin/env python3
"""Images per second on the CPU: a plain PyTorch loop as most people write it, ours, and the machine's limit, in turns.

  python3 benchmarks/cpu.py --dataset-dir data --out benchmarks/cpu.json          about 20 minutes on 2 cores
  python3 benchmarks/cpu.py --only "resnet8 none" --rounds 7

(a) plain: DataLoader with 2 workers and per-image transforms, float32, contiguous, a live teacher without no_grad, .item() each step.
(b) ours: engine.train_epoch as train.py calls it. (c) limit: the same convolutions, forward and backward, in our precision and layout,
with nothing around them. All three take turns in one process; figures are medians over the rounds, ratios medians of each round's.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torchvision
from PIL import Image
from torch.nn import functional as F

import data_loader
import model_factory
from takd.config import names
from takd.cpu import kernels
from takd.distill import methods as losses
from takd.distill.teacher import Teacher, attach_table
from takd.run import engine
from takd.run import run_directory as runlog
from takd.run import trainer as training

BATCH = 128
CASES = [  # teacher, student, augmentation, table
    (None, "resnet8", "none", None), (None, "resnet8", "crop-flip", None),
    (None, "resnet20", "none", None), (None, "resnet20", "crop-flip", None),
    (None, "plane10", "none", None), (None, "plane10", "crop-flip", None), (None, "plane2", "none", None),
    ("resnet110", "resnet8", "none", "warm"), ("resnet110", "resnet8", "crop-flip", "cold"), ("resnet110", "resnet8", "crop-flip", "warm"),
    ("resnet56", "resnet20", "none", "warm"), ("resnet56", "resnet20", "crop-flip", "cold"), ("resnet56", "resnet20", "crop-flip", "warm"),
    ("plane10", "plane2", "none", "warm"), ("plane10", "plane2", "crop-flip", "cold"), ("plane10", "plane2", "crop-flip", "warm"),
]  # fmt: skip


class Images(torch.utils.data.Dataset):
    """The split as most people have it: a PIL image and a transform."""

    def __init__(self, split, augment):
        self.images = split.images.permute(0, 2, 3, 1).contiguous().numpy()
        self.labels = split.labels.tolist()
        transforms = torchvision.transforms
        crop = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()] if augment == "crop-flip" else []
        self.transform = transforms.Compose([*crop, transforms.ToTensor(), transforms.Normalize(split.mean, split.std)])

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


class Plain:
    """(a)"""

    def __init__(self, split, teacher, student, augment):
        self.loader = torch.utils.data.DataLoader(Images(split, augment), BATCH, shuffle=True, num_workers=2, drop_last=True)
        self.student = model_factory.create_network(student, len(split.classes))
        self.teacher = model_factory.create_network(teacher, len(split.classes)).eval() if teacher else None
        self.optimizer = torch.optim.SGD(self.student.parameters(), lr=1e-4, momentum=0.9, weight_decay=1e-4)
        self.batches = self._endless()
        next(self.batches)

    def _endless(self):
        while True:
            yield from self.loader

    def steps(self, count):
        self.student.train()
        total, started = 0.0, time.perf_counter()
        with kernels.switched_off():
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
        return time.perf_counter() - started


class Ours:
    """(b), and the share of each phase of its step."""

    def __init__(self, split, teacher, student, augment, table, folder, precision):
        self.split, self.augment, self.table, self.precision = split, augment, table, precision
        device = split.images.device
        self.student = model_factory.create_network(student, len(split.classes)).to(memory_format=torch.channels_last)
        self.teacher, self.method = None, losses.CrossEntropy()
        if teacher:
            torch.manual_seed(0)
            network = model_factory.create_network(teacher, len(split.classes))
            self.teacher = Teacher(network, split.mean, split.std, split, device, precision)
            self.method = losses.METHODS["kd"]()
            attach_table(self.teacher, split, augment, "auto", folder / f"{teacher}.pth.tar", 1, lambda line: None)
        self.optimizer = torch.optim.SGD(self.student.parameters(), lr=1e-4, momentum=0.9, nesterov=True, weight_decay=1e-4, fused=True)
        self.epoch = 0

    def batches(self, count):
        """The first batches of an epoch: a new one where the table shall be cold, always the same where it shall be warm."""
        if self.table == "cold":
            self.epoch += 1
            plan = data_loader.epoch_plan(self.split, self.augment, 1, self.epoch)
            self.teacher.table.expect(plan.order[: count * BATCH], plan.views[: count * BATCH])
        batches = data_loader.train_batches(self.split, BATCH, self.augment, 1, self.epoch)
        for _ in range(count):
            yield next(batches)

    def steps(self, count):
        started = time.perf_counter()
        engine.train_epoch(self.student, self.method, self.teacher, self.optimizer, self.split, self.batches(count),
                           engine.EpochSums(), self.precision)  # fmt: skip
        return time.perf_counter() - started

    def phases(self, count):
        """Share of a step's time, per cent: engine.train_epoch's own lines with a clock between them."""
        spent = dict.fromkeys(("batch", "normalise", "teacher", "forward", "loss", "backward", "optimizer", "sums"), 0.0)
        sums, batches = engine.EpochSums(), self.batches(count)
        self.student.train()

        def clocked(phase, function):
            started = time.perf_counter()
            result = function()
            spent[phase] += time.perf_counter() - started
            return result

        def forward(images):
            with engine.autocast(images.device, self.precision):
                return self.student.forward_features(images)

        for _ in range(count):
            batch = clocked("batch", lambda: next(batches))
            images = clocked("normalise", lambda batch=batch: data_loader.normalise(
                batch.images, self.split.mean, self.split.std, self.split.image_size, engine.input_dtype(self.precision)))  # fmt: skip
            taught = clocked("teacher", lambda batch=batch, images=images: self.teacher and self.teacher(batch, images))
            outputs = clocked("forward", lambda images=images: forward(images))
            parts = clocked("loss", lambda o=outputs, t=taught, batch=batch: self.method(o, t, batch.labels))
            clocked("backward", parts["loss"].backward)
            clocked("optimizer", self.optimizer.step)
            clocked("optimizer", lambda: self.optimizer.zero_grad(set_to_none=True))
            clocked("sums", lambda p=parts, o=outputs, batch=batch: sums.add(
                p, engine.row_of(p, o.logits, batch.labels), len(batch.labels)))  # fmt: skip
        whole = sum(spent.values())
        return {phase: round(100 * seconds / whole, 1) for phase, seconds in spent.items()}


class Limit:
    """(c)"""

    def __init__(self, student, classes, precision):
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        network = model_factory.create_network(student, classes)
        self.calls = []

        def note(module, inputs, output):
            def like(tensor):
                return torch.randn_like(tensor).to(dtype, memory_format=torch.channels_last)

            self.calls.append((like(inputs[0]), like(module.weight.detach()), like(output), module, len(self.calls) > 0))

        for module in network.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.register_forward_hook(note)
        with torch.no_grad():
            network(torch.randn(BATCH, 3, 32, 32))

    def steps(self, count):
        started = time.perf_counter()
        for _ in range(count):
            for x, weight, gradient, conv, needs_input in self.calls:
                F.conv2d(x, weight, None, conv.stride, conv.padding)
                torch.ops.aten.convolution_backward(
                    gradient, x, weight, None, conv.stride, conv.padding, (1, 1), False, (0, 0), 1, (needs_input, True, False)
                )
        return time.perf_counter() - started


def measure(case, split, folder, rounds, precision):
    """One case's row: medians over the rounds in which the contenders took turns."""
    teacher, student, augment, table = case
    torch.manual_seed(0)
    contenders = {
        "plain": Plain(split, teacher, student, augment),
        "ours": Ours(split, teacher, student, augment, table, folder, precision),
        "limit": Limit(student, len(split.classes), precision),
    }
    if teacher and table == "warm":
        contenders["alone"] = Ours(split, None, student, augment, None, folder, precision)
    steps = {}
    for name, contender in contenders.items():  # enough steps for half a second, which also warms up
        contender.steps(1)
        seconds = contender.steps(1)
        steps[name] = max(2, min(12, round(0.6 / seconds)))
        contender.steps(steps[name])
    rates = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, contender in contenders.items():
            time.sleep(0.3)  # the plain loop's workers fill their queue
            rates[name].append(BATCH * steps[name] / contender.steps(steps[name]))

    def ratio(over, under):
        return float(np.median(np.array(rates[over]) / np.array(rates[under])))

    row = {
        "work": f"{teacher} > {student}" if teacher else student,
        "augment": augment,
        "table": table,
        "plain_images_per_second": float(np.median(rates["plain"])),
        "ours_images_per_second": float(np.median(rates["ours"])),
        "ratio": ratio("ours", "plain"),
        "share_of_convolution_limit_percent": 100 * ratio("ours", "limit"),
        "phases_percent": contenders["ours"].phases(steps["ours"]),
    }
    if "alone" in rates:
        row["kd_over_ce"] = ratio("ours", "alone")
    return row


def whole_runs(dataset_dir, dataset, folder):
    """Of real runs of train.py: peak resident memory, megabytes, and the seconds from its start to its first step."""
    root = Path(__file__).resolve().parents[1]
    common = [sys.executable, str(root / "train.py"), "--dataset", dataset, "--dataset-dir", str(dataset_dir), "--epochs", "1"]
    common += ["--no-download", "--cuda", "0"]

    def run(name, *flags):
        started, peak = time.time(), 0
        with subprocess.Popen([*common, *flags, "--run-dir", str(folder / name)], stdout=subprocess.DEVNULL) as process:
            while process.poll() is None:  # the process itself is asked: what it ends with counts its parent's memory as well
                with contextlib.suppress(OSError, StopIteration):
                    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
                    peak = max(peak, int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) / 1024)
                time.sleep(0.05)
        assert process.returncode == 0
        config = folder / name / "config.json"  # written when everything is ready
        return {"peak_megabytes": peak, "start_seconds": config.stat().st_mtime - started}

    run("teacher", "--student", "plane2")
    teacher = ["--teacher", "plane2", "--teacher-checkpoint", str(folder / "teacher" / "plane2_seed1_best.pth.tar")]
    return {augment: run(augment, *teacher, "--student", "resnet8", "--augment", augment) for augment in ("none", "crop-flip")}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset-dir", default="data")
    parser.add_argument("--dataset", default="cifar100", choices=list(names.DATASETS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="*", default=[], help='cases whose row contains one of these, such as "resnet8 none"; "runs" for memory and start')
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--out", type=Path, help="also store the figures as JSON")
    args = parser.parse_args()
    kernels.keep_freed_memory()
    cpu = torch.device("cpu")
    precision = args.precision
    if precision == "auto":
        precision = "bf16" if training.native_bf16(cpu) else "fp32"
    train = data_loader.load(args.dataset, args.dataset_dir, download=False)[0]
    split = train.subset(torch.arange(0, len(train), max(1, len(train) // 5000)), f"{train.name}-5000")  # a full table in seconds
    report = {"environment": runlog.environment(cpu) | {"precision": precision}, "rounds": args.rounds, "rows": []}
    print(f"{report['environment']['device']}, {torch.get_num_threads()} threads, torch {torch.__version__}, {precision}")
    print(f"{'work':22} {'augment':10} {'table':6} {'plain':>7} {'ours':>7} {'ratio':>6} {'limit %':>8} {'KD/CE':>6}  phases %")
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            title = f"{case[0]} > {case[1]} {case[2]} {case[3]}" if case[0] else f"{case[1]} {case[2]}"
            if args.only and not any(word in title for word in args.only):
                continue
            row = measure(case, split, Path(folder), args.rounds, precision)
            report["rows"].append(row)
            phases = " ".join(f"{phase} {share:g}" for phase, share in row["phases_percent"].items() if share)
            print(
                f"{row['work']:22} {row['augment']:10} {row['table'] or '-':6} {row['plain_images_per_second']:7.0f} "
                f"{row['ours_images_per_second']:7.0f} {row['ratio']:6.2f} {row['share_of_convolution_limit_percent']:8.1f} "
                f"{row.get('kd_over_ce', float('nan')):6.3f}  {phases}",
                flush=True,
            )
        if not args.only or "runs" in args.only:
            report["runs"] = whole_runs(args.dataset_dir, args.dataset, Path(folder))
            for augment, figures in report["runs"].items():
                print(f"plane2 > resnet8, {augment}: peak {figures['peak_megabytes']:.0f} MB, first step after {figures['start_seconds']:.1f} s")
    if args.out:
        args.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
