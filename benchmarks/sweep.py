#!/usr/bin/env python3
"""What the shared table of the teacher's logits saves a sweep: 12 trials with it, and the same number without.

  python3 benchmarks/sweep.py --teacher plane10 --student plane2 --dataset digits --epochs 10 --cuda 0

The flags are train.py's. Prints a JSON line each: seconds from the start of the worker to its end, and the sum of the
trials' own. The teacher is trained before, once for both.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TRIALS = 12
SPACE = {  # as many settings and seeds as there are trials
    "T": {"_type": "choice", "_value": [1, 4, 10]},
    "lambda": {"_type": "choice", "_value": [0.5, 0.9]},
    "seed": {"_type": "choice", "_value": [1, 2]},
}


def run(command: str, *words: object) -> None:
    subprocess.run([sys.executable, str(ROOT / command), *map(str, words)], check=True, stdout=sys.stderr)


def main(flags: list[str]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "space.json").write_text(json.dumps(SPACE))
        search = ("sweep.py", *flags, "--space", folder / "space.json")
        run(*search, "--runs", folder / "live", "--teacher-cache", "live", "--trials", 1)
        (teacher,) = (folder / "live" / "teacher").glob("*_best.pth.tar")
        for cache in ("full", "live"):
            runs, started = folder / f"{cache}-{TRIALS}", time.perf_counter()
            cached = ("--teacher-checkpoint", teacher, "--teacher-cache", cache)
            run(*search, *cached, "--runs", runs, "--trials", TRIALS)
            seconds = time.perf_counter() - started
            summaries = [json.loads(file.read_text()) for file in (runs / "trials").glob("*/summary.json")]
            assert len(summaries) == TRIALS
            own = sum(summary["seconds"] for summary in summaries)
            print(json.dumps({"teacher_cache": cache, "seconds": seconds, "seconds_of_trials": own}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
