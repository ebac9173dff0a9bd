#!/usr/bin/env python3
"""Train every path from a teacher to a student through assistants, each prefix once, and report which path is best.

  python3 distill_paths.py --sizes resnet110 resnet56 resnet32 resnet20 resnet8 --dataset cifar100 --epochs 160 --cuda 1
  python3 distill_paths.py --family plane --dataset digits --epochs 3 --batch-size 32 --runs runs/digits
  python3 distill_paths.py --family resnet --paths 110,20,8 110,8 --set 8:temperature=5 --seeds 1 2 3 --dry-run
  python3 distill_paths.py --family resnet --cuda 1 --slurm --account def-me --gpu-type h100 --time 3:00:00 --memory 8G

Each size is also trained alone (the paper's NOKD). The runs and the report are written to --runs. The same command
again continues: finished trainings are skipped, failed ones repeated. Every other flag of train.py (--dataset,
--epochs, --recipe, --temperature, --cuda ...) is passed on to each training.
"""

from takd import process

if __name__ == "__main__":
    process.start()

import argparse
import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from takd import files
from takd.config import flags
from takd.config.flags import number
from takd.config.names import DATASETS
from takd.config.run_config import RunConfig
from takd.errors import UserError
from takd.run.console import duration
from takd.study import estimate, plan, slurm
from takd.study.plan import Training
from takd.study.runner import Runner

HERE = Path(__file__).resolve().parent
SITE = tuple(slurm.Site.__dataclass_fields__)  # settings for sbatch


# ------------------------------------------------------------------------------------------------ arguments
# fmt: off
def build_parser() -> flags.Parser:
    parser = flags.Parser(__doc__)
    flag, switch, section = parser.flag, parser.switch, parser.section
    section("study")
    flag("--sizes", nargs="+", type=flags.network, metavar="NAME", help="networks, the teacher first, the student last")
    flag("--family", choices=tuple(plan.FAMILIES), help="the paper's sizes of a family")
    flag("--paths", nargs="+", metavar="A,B,C", help="only these paths, such as 110,20,8 (default: all)")
    flag("--guidance", choices=("last", "all"),
         help="each network learns from the last one above it on its path, or from all above it, by dgkd unless "
         "--method names another (default: last)")
    flag("--set", nargs="+", action="extend", metavar="SIZE:KEY=VALUE,...",
         help="settings of single steps: 8:temperature=5,lambda=.15 for each training of size 8, 20,8:... for those "
         "from 20, 110,20,8:... for that path; @FILE reads them from a file")
    flag("--seeds", nargs="+", type=number(int, minimum=0), default=(flags.DEFAULT_SEED,), metavar="N",
         help="run the whole study once per seed")
    flag("--runs", metavar="DIR", default="runs/paths", help="folder for the runs and the report")
    flag("--only", nargs="+", metavar="RUN", help="only these trainings, no report (for packed SLURM jobs)")
    switch("--dry-run", "show plan, estimate and commands; train nothing")
    section("on this machine")
    flag("--jobs", type=number(int, minimum=1, maximum=1000), metavar="N",
         help="trainings at once (default: 1, or one per GPU)")
    flag("--gpus", nargs="+", metavar="ID", help="GPUs to spread the trainings over, such as 0 1")
    flags.slurm_flags(parser)
    flag("--pack", type=number(int, minimum=1), metavar="N", help="train up to N students of one teacher in one job")
    return parser
# fmt: on


class Study(NamedTuple):
    """The command line's study: sizes, paths, settings of single steps and of all trainings."""

    args: argparse.Namespace
    sizes: tuple[str, ...]
    paths: list[plan.NetworkPath]
    steps: list[plan.Step]
    common: dict[str, Any]


def read_arguments(argv: list[str]) -> Study:
    """Exits with a usage error if something is wrong."""
    parser = build_parser()
    args, passed_on = parser.parse_known_args(argv)
    trainer = flags.train_parser()
    trainer.others = list(parser.actions)
    common, _ = trainer.given(passed_on)
    try:
        if owned := [key for key in plan.OWNED if key in common]:
            hints = {
                "seed": "use --seeds",
                "repeat": "use --seeds",
                "run_dir": "use --runs",
                "measure": "use --dry-run",
                "init_from": "train.py has it, for one network",
            }
            hint = hints.get(owned[0], "use --sizes, --family and --paths")
            raise UserError(f"--{owned[0].replace('_', '-')} is set by the plan; {hint}")
        if args.sizes and args.family:
            raise UserError("--sizes and --family both name the sizes; give one of them")
        if not (args.sizes or args.family or args.paths):
            example = "--sizes plane10 plane4 plane2, or --family plane, or --paths plane10,plane4,plane2"
            raise UserError(f"name the sizes: {example}")
        sizes = tuple(args.sizes or plan.FAMILIES.get(args.family) or plan.sizes_among(args.paths))
        note = plan.check_sizes(sizes)
        paths = plan.choose_paths(sizes, args.paths)
        if args.guidance == "all" and max(map(len, paths)) < 3:
            raise UserError("--guidance all: no path has an assistant, so that each network has one teacher at most")
        steps = [plan.parse_step(text, sizes, trainer) for text in args.set or ()]
        if len(set(args.seeds)) < len(args.seeds):
            raise UserError(f"--seeds {' '.join(map(str, args.seeds))}: each seed once")
        args.runs = Path(args.runs)
        files.check_folder(args.runs, "--runs")
        check_places(args, common)
    except UserError as error:
        parser.error(str(error))
    if note:
        print(note)
    return Study(args, sizes, paths, steps, common)


def check_places(args: argparse.Namespace, common: Mapping[str, Any]) -> None:
    """Refuse flags without effect where the study is to run, and GPUs and programs that are missing."""
    if args.slurm:
        if args.gpus:
            raise UserError("--gpus is for trainings here; on SLURM name the GPU of a job with --gpu-type")
        slurm.check_time(args.time, args.sbatch)
        if not args.dry_run:
            slurm.check_present()
        return
    for key in ("pack", *SITE):
        if getattr(args, key) is not None:
            raise UserError(f"--{key.replace('_', '-')} needs --slurm")
    if args.gpus and common.get("cuda") == 0:
        raise UserError("--gpus and --cuda 0 contradict each other")
    if args.gpus and not args.dry_run:
        present = flags.gpus_present()
        if absent := [gpu for gpu in args.gpus if gpu.isdigit() and int(gpu) >= present]:
            raise UserError(
                f"--gpus {' '.join(absent)}: this machine has {present} GPU{'s' * (present != 1)}, counted from 0"
            )


# --------------------------------------------------------------------------------------------------- the plan
def show_plan(study: Study, trainings: Sequence[Training], configs: Mapping[Training, RunConfig]) -> None:
    """What is missing, the commands, the tree and, at the end, the numbers."""
    args, dataset = study.args, next(iter(configs.values())).dataset
    for line in missing(study, trainings, configs):
        print(line)
    costs = known_costs(study, configs)
    jobs = args.jobs or len(args.gpus or ()) or 1
    seconds, total, disk = estimate.estimate(trainings, configs, costs, jobs) if costs else ({}, 0.0, 0.0)
    left = [training for training in trainings if not training.finished]
    print("\n".join(["commands:", *(shlex.join(command_of(training)) for training in left), ""]))
    seeds, each, done = " ".join(map(str, args.seeds)), len(trainings) // len(args.seeds), len(trainings) - len(left)
    alone = len({training.path for training in trainings if len(training.path) == 1}) - 1
    print(f"{study.sizes[0]} > ... > {study.sizes[-1]} on {dataset}, in {args.runs}: ", end="")
    print(f"{len(trainings)} trainings ({each} per seed, seeds {seeds}), {done} finished")
    print(f"per seed {each - alone} of the teacher and the paths, and {alone} of the other sizes alone (NOKD)\n")
    by_path: dict[plan.NetworkPath, list[Training]] = {}
    for training in trainings:
        by_path.setdefault(training.path, []).append(training)
    for text, path in drawn_tree(list(by_path)):
        members = by_path[path]
        finished = sum(training.finished for training in members)
        state = "finished" if finished == len(members) else f"{finished} of {len(members)} finished" if finished else ""
        takes = duration(seconds[members[0]]) if seconds else ""
        alone = "alone" if len(path) == 1 and path != (study.sizes[0],) else ""
        print(f"{text:<40} {takes:>10}  {alone:<7}{state}".rstrip())
    if costs:
        print(
            f"\nestimate: {duration(total)} for what is left, {jobs} at once, plus some seconds to start each;", end=" "
        )
        print(f"{disk / 1e9:.2f} GB on disk at the end, tables included")


def missing(study: Study, trainings: Sequence[Training], configs: Mapping[Training, RunConfig]) -> Iterator[str]:
    """A line for the images, and one for the teacher, where they are not there yet."""
    yield from plan.missing_images(next(iter(configs.values())), study.args.slurm)
    if seeds := [str(each.seed) for each in trainings if each.path == study.sizes[:1] and not each.finished]:
        yield f"missing  {study.sizes[0]}, the teacher, of seed {' '.join(seeds)}: trained first"


def drawn_tree(paths: Sequence[plan.NetworkPath]) -> Iterator[tuple[str, plan.NetworkPath]]:
    """(line, path) for each path, as a tree drawn with lines."""

    def walk(path: plan.NetworkPath, indent: str) -> Iterator[tuple[str, plan.NetworkPath]]:
        children = [other for other in paths if other[:-1] == path]
        for child in children:
            last = child is children[-1]
            yield f"{indent}{'└── ' if last else '├── '}{child[-1]}", child
            yield from walk(child, indent + ("    " if last else "│   "))

    for path in paths:
        if len(path) == 1:
            yield path[0], path
            yield from walk(path, "")


def known_costs(study: Study, configs: Mapping[Training, RunConfig]) -> dict[str, estimate.Cost]:
    """{network: Cost} from earlier runs on this machine, else measured now; empty if neither works."""
    config = next(iter(configs.values()))
    if DATASETS[config.dataset].classes is None:
        print("no estimate: the number of images in a folder is known only when it is read\n")
        return {}
    try:
        device = flags.device_name(config.cuda)
    except UserError as error:
        print(f"no estimate: {error}\n")
        return {}
    costs = estimate.earlier_costs([study.args.runs, "runs"], config, device)
    networks = {training.path[-1] for training in configs}
    if missing := [network for network in study.sizes if network in networks and network not in costs]:
        print(f"measuring {', '.join(missing)} for some seconds ...", flush=True)
        keys = ("dataset", "batch_size", "precision", "image_size")
        given = {key: value for key in keys if (value := getattr(config, key)) is not None}
        words = flags.words({"measure": missing, **given, "cuda": int(device == "cuda")})
        done = subprocess.run([sys.executable, str(HERE / "train.py"), *words], capture_output=True, text=True)
        if done.returncode:
            print(f"no estimate: {done.stderr.strip().splitlines()[-1]}\n")
            return {}
        for line in map(json.loads, done.stdout.splitlines()):
            costs[line["network"]] = estimate.measured_cost(line, config)
    return costs


# ---------------------------------------------------------------------------------------------- running it
def command_of(training: Training) -> list[str]:
    return [sys.executable, str(HERE / "train.py"), *training.arguments]


def run_here(args: argparse.Namespace, trainings: Sequence[Training]) -> int:
    """Train what is not finished; returns the exit status."""
    (args.runs / "logs").mkdir(parents=True, exist_ok=True)
    runner = Runner(trainings, args.jobs or len(args.gpus or ()) or 1, args.gpus, command_of)
    print(f"{len(trainings)} trainings, {runner.skipped} finished; logs in {args.runs / 'logs'}", flush=True)
    if stopped := runner.run():
        done = sum(training.finished for training in trainings)
        name = signal.Signals(stopped).name
        print(f"stopped by {name}: {done} of {len(trainings)} finished; the same command continues")
        return 128 + stopped
    reported = True
    if not args.only and any(training.finished for training in trainings):
        reported = subprocess.run([sys.executable, str(HERE / "report.py"), str(args.runs)]).returncode == 0
    for training, why in runner.failed.items():
        print(f"failed: {training.name}: {why}", file=sys.stderr)
    return 0 if reported and not runner.failed else 1


def on_slurm(study: Study, trainings: Sequence[Training], configs: Mapping[Training, RunConfig]) -> int:
    """Submit, or with --dry-run print; returns the exit status."""
    args = study.args
    site = slurm.Site(**{key: getattr(args, key) for key in SITE})
    own = {key: getattr(args, key) for key in ("sizes", "family", "paths", "guidance", "set", "seeds", "runs", "jobs")}
    words = flags.words({key: value for key, value in own.items() if value is not None} | study.common)
    submit: Any = slurm.Script(site, args.runs) if args.dry_run else slurm.Queue(site, args.runs, print)
    queued = {} if args.dry_run else submit.waiting()
    for name, job_id in queued.items():
        print(f"in queue  {name} ({job_id})")
    slurm.send(trainings, args.pack or 1, ["distill_paths.py", *words], ["report.py", str(args.runs)], queued, submit)
    if args.dry_run:
        print("\n".join([*(f"# {line}" for line in missing(study, trainings, configs)), *submit.lines]))
    return 0


def check_fit(configs: Mapping[Training, RunConfig]) -> None:
    """A UserError if networks, methods and images do not fit: not after the teachers have been trained for hours."""
    flags.check_packages("distill_paths.py", "torch", "torchvision", "numpy")
    import train  # and torch, which takes seconds

    left = {training.path: config for training, config in configs.items() if not training.finished}
    for config in left.values():
        train.check_fit(config.replace(teacher_checkpoint=None))


def chosen(only: Sequence[str], trainings: Sequence[Training]) -> list[Training]:
    known = {training.name: training for training in trainings}
    if unknown := [name for name in only if name not in known]:
        raise UserError(f"--only {unknown[0]} is not a training of this plan: {' '.join(known)}")
    return [known[name] for name in only]


def main(argv: list[str] | None = None) -> None:
    study = read_arguments(sys.argv[1:] if argv is None else argv)
    args = study.args
    with flags.errors_in_one_line("distill_paths.py"):
        trainings = plan.plan(args.runs, study.sizes, study.paths, args.seeds, study.common, study.steps, args.guidance)
        elsewhere = bool(args.slurm or args.dry_run)
        configs = {training: training.config(elsewhere) for training in trainings}
        if args.only:
            trainings = chosen(args.only, trainings)
        if not elsewhere:
            check_fit(configs)
        if not args.only and not args.dry_run:
            plan.record(args.runs, trainings)
        if args.slurm:
            sys.exit(on_slurm(study, trainings, configs))
        if args.dry_run:
            sys.exit(show_plan(study, trainings, configs))
        sys.exit(run_here(args, trainings))


if __name__ == "__main__":
    main()
