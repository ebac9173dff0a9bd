#!/usr/bin/env python3
"""Golden losses: what every method computes on both families, to tell a computation-neutral change from any other.

  python3 tests/golden/golden.py             compare this machine's losses with losses.json
  python3 tests/golden/golden.py --write     replace losses.json; a decision, to be explained in the commit

Each case is 20 steps of the real train.py on 640 digits, and the accuracy after them: one thread, float32, PyTorch's
own operations. On the machine that wrote the file losses are equal bit for bit; elsewhere rounding grows from step to
step, and the first five are equal to 1e-4. The teachers beside this file were trained once and are part of the fixture.
"""

import argparse
import contextlib
import hashlib
import io
import json
import shutil
import sys
import tempfile
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

import train
from takd.distill import methods
from takd.run import engine

HERE = Path(__file__).resolve().parent
FILE = HERE / "losses.json"
FAMILIES = {"plane": "plane2", "resnet": "resnet8"}
CASES = [f"{network}, {method}" for network in FAMILIES.values() for method in ("alone", *methods.METHODS)]
COMMON = "--dataset digits --train-images 640 --batch-size 32 --epochs 1 --learning-rate 0.001 --cuda 0".split()
COMMON += ["--precision", "fp32"]

# Weights small enough for rounding to stay small for five steps; the methods' own are large, and meant for decaying
# learning rates.
OPTIONS = {
    "at": ["beta=100"],
    "at_st": ["beta=30"],
    "fitnet": ["beta=10"],
    "sp": ["beta=30"],
    "rkd": ["beta=0.1"],
    "lskd": ["weight=1"],
    "dgkd": ["drop=0.25"],
}


def machine():
    """A digest of what rounding depends on: the processor, its caches, and PyTorch."""
    about = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    lines = {line for line in about.splitlines() if line.startswith(("model name", "flags", "cache size"))}
    return hashlib.blake2b(f"{sorted(lines)} {torch.__version__}".encode(), digest_size=8).hexdigest()


@contextlib.contextmanager
def plain_pytorch():
    """PyTorch's own operations, in the student and in the teacher, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with mock.patch.object(train, "cpu_annex", lambda config: None):
        yield
    torch.set_num_threads(threads)


def measure(case, folder):
    """{"losses": one of each step, "test_accuracy_percent"} of a case, its run made in `folder`."""
    network, method = case.split(", ")
    command = [*COMMON, "--student", network, "--run-dir", str(folder)]
    if method != "alone":
        teachers = [*FAMILIES.values()] if method == "dgkd" else [network]
        files = [shutil.copy(HERE / f"{each}.pth.tar", Path(folder).parent) for each in teachers]  # tables beside them
        command += ["--teacher", *teachers, "--teacher-checkpoint", *files, "--method", method]
        command += ["--method-option", *OPTIONS[method]] if method in OPTIONS else []
    rows, summarise = [], engine.EpochSums.summary

    def noting(sums):
        rows.extend(sums.rows)
        return summarise(sums)

    with (
        plain_pytorch(),
        mock.patch.object(engine.EpochSums, "summary", noting),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        train.main(command)
    summary = json.loads((Path(folder) / "summary.json").read_text())
    return {
        "losses": [float(row[0]) for row in rows],
        "test_accuracy_percent": summary["last"]["test_accuracy_percent"],
    }


def differences(case, found, expected, same_machine):
    """Differences from the golden losses beyond the tolerance, as lines."""
    if same_machine:
        return [] if found == expected else [f"{case}: {found} is not {expected}, bit for bit"]
    pairs = zip(found["losses"][:5], expected["losses"], strict=False)
    return [f"{case}: step {step}: {a} is not {b}" for step, (a, b) in enumerate(pairs) if abs(a - b) > 1e-4 * abs(b)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="replace losses.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = {case: measure(case, Path(folder) / case.replace(", ", "-")) for case in CASES}
    if args.write:
        FILE.write_text(json.dumps({"machine": machine(), "cases": found}, indent=1) + "\n")
        print(f"wrote {len(found)} cases to {FILE}")
        return
    golden = json.loads(FILE.read_text())
    same = machine() == golden["machine"]
    lines = [line for case in CASES for line in differences(case, found[case], golden["cases"][case], same)]
    print("\n".join(lines) or f"{len(CASES)} cases: {'equal bit for bit' if same else 'first five steps within 1e-4'}")
    sys.exit(bool(lines))


if __name__ == "__main__":
    main()
