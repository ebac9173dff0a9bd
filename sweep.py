#!/usr/bin/env python3
"""Search temperature, lambda and options of the method with Optuna: one machine, or many workers on a shared folder.

  python3 sweep.py --teacher plane10 --student plane2 --dataset digits --epochs 3 --trials 12 --runs runs/digits
  python3 sweep.py --teacher resnet110 --student resnet8 --epochs 160 --validation-split 0.1 --cuda 1 --trials 120 \\
      --slurm --workers 10 --account def-me --gpu-type h100 --time 3:00:00      two jobs: the teacher, then the workers
  python3 sweep.py runs/digits                                                  the settings so far, ranked, at any time

The search space is search_space.json, in NNI's format. Its seeds are replicates: each setting is trained once with each
seed, and judged by the mean. The same command again, here or on another machine, is one more worker: it continues what
was interrupted, then begins new trials. All other flags are train.py's and are passed on to each training.
"""

from takd import process

if __name__ == "__main__":
    process.start()

import argparse
import dataclasses
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from takd import files
from takd.config import flags, run_config
from takd.config.flags import number
from takd.errors import UserError
from takd.study import collect, plan, ranking, slurm, space, sweep
from takd.study.score_report import text_table
from takd.study.sweep import Sweep

HERE = Path(__file__).resolve().parent
SITE = tuple(slurm.Site.__dataclass_fields__)  # settings that are sbatch's


def build_parser() -> flags.Parser:
    parser = flags.Parser(__doc__)
    flag, whole, some = parser.flag, number(int, minimum=1, maximum=10**6), number(int, minimum=1, maximum=1000)
    parser.section("search")
    flag("--runs", metavar="DIR", default="runs/sweep", help="folder for the trials, the teacher and the report")
    flag("--space", metavar="FILE", help="search space, in NNI's format (default: the suite's search_space.json)")
    flag("--trials", type=whole, metavar="N", default=120, help="trainings in total, counting each seed of a setting")
    flag("--jobs", type=some, metavar="N", default=1, help="trainings at once in each worker")
    flags.slurm_flags(parser)
    flag("--workers", type=some, metavar="N", help="number of workers, the tasks of a job array (default: 1)")
    parser.switch("--dry-run", "print the commands of --slurm; submit nothing")
    return parser


def read_arguments(argv: list[str]) -> argparse.Namespace:
    """The flags, those for train.py in `common` (None if only a folder is given). Exits on a usage error."""
    parser = build_parser()
    if len(argv) == 1 and not argv[0].startswith(("-", "@")):
        return argparse.Namespace(runs=Path(argv[0]), common=None)
    args, passed_on = parser.parse_known_args(argv)
    trainer = flags.train_parser()
    trainer.others = list(parser.actions)
    args.common, _ = trainer.given(passed_on)
    args.runs, args.space = Path(args.runs), args.space or HERE / "search_space.json"
    try:
        files.check_folder(args.runs, "--runs")
        if owned := [key for key in sweep.OWNED if key in args.common]:
            hints = {"repeat": "let the search space have seeds", "run_dir": "use --runs"}
            fix = hints.get(owned[0], "leave it out")
            raise UserError(f"--{owned[0].replace('_', '-')} is not for a search; {fix}")
        for key in () if args.slurm else ("workers", "dry_run", *SITE):
            if getattr(args, key) is not None:
                raise UserError(f"--{key.replace('_', '-')} needs --slurm")
    except UserError as error:
        parser.error(str(error))
    return args


def sweep_of(args: argparse.Namespace) -> Sweep:
    return Sweep(args.runs, *space.read(args.space), args.common)


# ---------------------------------------------------------------------------------------------- what is done
def show(folder: Path) -> sweep.State:
    """Print the ranking and the sweep's progress."""
    state = sweep.state(folder)
    for search in ranking.searches(collect.collect([folder])):
        header, rows = search.table()
        ranks = [str(rank) if group.finished else "" for rank, group in enumerate(search.groups, 1)]
        table = [["", *header], *([rank, *row] for rank, row in zip(ranks, rows, strict=True))]
        print(text_table(table, left=0))
        if search.best:
            print(f"\nbest      {search.command}")
    progress = f"{state.running} in progress, {len(state.failed)} failed"
    print(f"{state.finished} of {state.trials} trials finished, {progress}")
    for trial, why in state.failed.items():
        print(f"failed    {trial}: {why}", file=sys.stderr)
    return state


def work(args: argparse.Namespace, searched: Sweep) -> int:
    """Be a worker until no trial is left; returns the exit status."""
    flags.check_packages("sweep.py", "torch", "torchvision", "numpy")
    flags.check_packages("sweep.py", "optuna", file="requirements-sweep.txt")
    import train  # torch, which takes seconds
    from takd.study.search import Worker  # Optuna

    flags.device_name(args.common.get("cuda"))
    for file in run_config.one_or_more(args.common.get("teacher_checkpoint")):
        if not Path(file).is_file():
            raise UserError(f"--teacher-checkpoint {file}: no such file")
    train.check_fit(searched.base)
    searched.record(args.trials)
    command = [sys.executable, str(HERE / "train.py")]
    if stopped := Worker(searched, command, args.jobs, lambda line: print(line, flush=True)).run():
        print(f"stopped by {signal.Signals(stopped).name}; the same command continues")
        return 128 + stopped
    state = show(args.runs)
    if state.running:  # in other workers; the last one writes the report
        return 0
    if state.finished + len(state.failed) < state.trials:
        print("the search space has no setting left")
    reported = subprocess.run([sys.executable, str(HERE / "report.py"), str(args.runs)]).returncode == 0
    return 0 if reported and not state.failed else 1


def submit(args: argparse.Namespace, searched: Sweep) -> None:
    """Submit a job for the teacher unless it is finished, then an array of workers."""

    def job(name: str, command: list[str]) -> slurm.Job:
        return slurm.Job(name, command, [SimpleNamespace(name=name)])  # noted in the queue under this name

    site = slurm.Site(**{key: getattr(args, key) for key in SITE})
    slurm.check_time(args.time, args.sbatch)
    if args.dry_run:
        send: Any = slurm.Script(site, args.runs)
        queued = {}
    else:
        slurm.check_present()
        searched.record(args.trials)
        send = slurm.Queue(site, args.runs, print)
        queued = send.waiting()
    for name, job_id in queued.items():
        print(f"in queue  {name} ({job_id})")
    if "workers" in queued:
        return
    teacher = queued.get("teacher")
    if not teacher and searched.teacher and not searched.teacher.summary_file.exists():
        teacher = send(job("teacher", ["train.py", *searched.teacher_arguments]), None)
    own = {key: getattr(args, key) for key in ("runs", "trials", "jobs", "space")}
    send.site = dataclasses.replace(site, sbatch=[*(site.sbatch or []), f"--array=1-{args.workers or 1}"])
    send(job("workers", ["sweep.py", *flags.words(own | args.common)]), teacher and f"afterok:{teacher}")
    if args.dry_run:
        print("\n".join([*(f"# {line}" for line in plan.missing_images(searched.base, on_slurm=True)), *send.lines]))


def main(argv: list[str] | None = None) -> None:
    args = read_arguments(sys.argv[1:] if argv is None else argv)
    with flags.errors_in_one_line("sweep.py"):
        if args.common is None:
            show(args.runs)
        elif args.slurm:
            submit(args, sweep_of(args))
        else:
            sys.exit(work(args, sweep_of(args)))


if __name__ == "__main__":
    main()
