#!/usr/bin/env python3
"""Train every path from a teacher to a student through assistants, each prefix once, and report which path is best.

  python3 distill_paths.py --sizes resnet110 resnet56 resnet32 resnet20 resnet8 --dataset cifar100 --epochs 160 --cuda 1
  python3 distill_paths.py --family plane --dataset digits --epochs 3 --batch-size 32 --runs runs/digits      5 minutes on a CPU
  python3 distill_paths.py --family resnet --paths 110,20,8 110,8 --set 8:temperature=5,lambda=.15 --seeds 1 2 3 --dry-run
  python3 distill_paths.py --family resnet --cuda 1 --slurm --account def-me --gpu-type h100 --time 3:00:00 --memory 8G

The sizes alone (the paper's NOKD) are trained as well. Everything lands under --runs, the report beside it. The same command again
continues: what is finished is skipped, what failed is repeated. Every other flag of train.py (--dataset, --epochs, --recipe,
--temperature, --cuda ...) is passed on to each training.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from takd.config import flags as arguments
from takd.config import run_config as settings
from takd.config.flags import number
from takd.config.names import DATASETS, UserError
from takd.run import run_directory as runlog
from takd.study import plan as study
from takd.study import slurm as cluster

HERE = Path(__file__).resolve().parent


# ------------------------------------------------------------------------------------------------ arguments
# fmt: off
def build_parser():
    parser = arguments.Parser(__doc__)
    group = parser.add_argument_group("study")
    parser.flag(group, "--sizes", nargs="+", type=arguments.network, metavar="NAME",
                help="networks, the teacher first, the student last")
    parser.flag(group, "--family", choices=tuple(study.FAMILIES), help="the paper's sizes of a family")
    parser.flag(group, "--paths", nargs="+", metavar="A,B,C", help="only these paths, such as 110,20,8 (without: all)")
    parser.flag(group, "--set", nargs="+", action="extend", metavar="SIZE:KEY=VALUE,...",
                help="settings of single steps: 8:temperature=5,lambda=.15 for each training of size 8, 20,8:... for those "
                "from 20, 110,20,8:... for that path; @FILE reads them from a file")
    parser.flag(group, "--seeds", nargs="+", type=number(int, minimum=0), default=(settings.DEFAULT_SEED,), metavar="N",
                help="the whole study once for each")
    parser.flag(group, "--runs", metavar="DIR", default="runs/paths", help="folder for the runs and the report")
    parser.flag(group, "--only", nargs="+", metavar="RUN",
                help="only these trainings of the plan, and no report (packed SLURM jobs use it)")
    parser.flag(group, "--dry-run", action="store_const", const=True, help="show plan, estimate and commands; train nothing")
    group = parser.add_argument_group("here")
    parser.flag(group, "--jobs", type=number(int, minimum=1), metavar="N",
                help="trainings at once (default: 1, or one a GPU of --gpus)")
    parser.flag(group, "--gpus", nargs="+", metavar="ID", help="GPUs to spread the trainings over, such as 0 1")
    group = parser.add_argument_group("on SLURM")
    parser.flag(group, "--slurm", action="store_const", const=True, help="submit with sbatch (with --dry-run: print the commands)")
    parser.flag(group, "--pack", type=number(int, minimum=1), metavar="N",
                help="up to N students of one teacher in a job (default: 1)")
    parser.flag(group, "--account", metavar="NAME", help="what is not given is left to SBATCH_* variables and the site's defaults")
    parser.flag(group, "--gpu-type", metavar="TYPE[:N]", help="GPU of a job, such as h100")
    parser.flag(group, "--time", metavar="H:MM:SS", help="limit of a job; one that reaches it saves, is requeued and continues")
    parser.flag(group, "--memory", "--mem", metavar="SIZE", help="of a job, such as 8G")
    parser.flag(group, "--cpus", type=number(int, minimum=1), metavar="N", help="of a job")
    parser.flag(group, "--modules", metavar="NAMES", help='to load in a job, such as "python/3.11" (or $TAKD_MODULES)')
    parser.flag(group, "--venv", metavar="DIR", help="to activate in a job (or $TAKD_VENV; without: this Python)")
    parser.flag(group, "--stage", nargs="+", metavar="FILE", help="archives or folders for $SLURM_TMPDIR/data (or $TAKD_STAGE)")
    parser.flag(group, "--sbatch", action="append", metavar="OPTION",
                help="any further option of sbatch, such as --sbatch=--partition=gpu")
    return parser
# fmt: on


def read_arguments(argv):
    """(args, sizes, paths, steps, what every training is given). Ends with a usage error where something is wrong."""
    parser = build_parser()
    args, passed_on = parser.parse_known_args(argv)
    trainer = settings.build_parser()
    common = {key: value for key, value in vars(trainer.parse_args(passed_on)).items() if value is not None}
    try:
        if mine := [key for key in study.OWNED if key in common]:
            hint = {"seed": "use --seeds", "repeat": "use --seeds", "run_dir": "use --runs"}.get(mine[0], "use --sizes, --family and --paths")
            raise UserError(f"--{mine[0].replace('_', '-')} is the plan's to give; {hint}")
        if args.sizes and args.family:
            raise UserError("--sizes and --family both name the sizes; give one of them")
        if not (args.sizes or args.family or args.paths):
            raise UserError("name the sizes: --sizes plane10 plane4 plane2, or --family plane, or --paths plane10,plane4,plane2")
        sizes = tuple(args.sizes or study.FAMILIES.get(args.family) or study.sizes_among(args.paths))
        note = study.check_sizes(sizes)
        paths = study.choose_paths(sizes, args.paths)
        steps = [study.parse_step(text, sizes, trainer) for text in args.set or ()]
        args.seeds = args.seeds or list(parser.defaults["seeds"])
        if len(set(args.seeds)) < len(args.seeds):
            raise UserError(f"--seeds {' '.join(map(str, args.seeds))}: each seed once")
        args.runs = Path(args.runs or parser.defaults["runs"])
        if args.runs.exists() and not args.runs.is_dir():
            raise UserError(f"--runs {args.runs} is a file; give a folder")
        check_places(args, common)
    except UserError as error:
        parser.error(str(error))
    if note:
        print(note)
    return args, sizes, paths, steps, common


def check_places(args, common):
    """Flags that would have no effect where the study is to run, GPUs and programs that are not there."""
    if args.slurm:
        if args.gpus:
            raise UserError("--gpus is for trainings here; on SLURM name the GPU of a job with --gpu-type")
        if not args.dry_run:
            cluster.check_present()
        return
    for key in ("pack", *cluster.Site.__dataclass_fields__):
        if getattr(args, key) is not None:
            raise UserError(f"--{key.replace('_', '-')} needs --slurm")
    if args.gpus and common.get("cuda") == 0:
        raise UserError("--gpus and --cuda 0 contradict each other")
    if args.gpus and not args.dry_run:
        present = arguments.gpus_present()
        if absent := [gpu for gpu in args.gpus if gpu.isdigit() and int(gpu) >= present]:
            raise UserError(f"--gpus {' '.join(absent)}: this machine has {present} GPU{'s' * (present != 1)}, counted from 0")


# --------------------------------------------------------------------------------------------------- the plan
def show_plan(args, sizes, trainings, resolved):
    """The tree, the numbers, the estimate and the commands."""
    any_have = next(iter(resolved.values()))
    costs = known_costs(args, sizes, resolved)
    jobs = args.jobs or len(args.gpus or ()) or 1
    seconds, total, disk = study.estimate(trainings, resolved, costs, jobs) if costs else ({}, None, None)
    count, done = len(trainings), sum(training.finished for training in trainings)
    print(f"{study.arrows((sizes[0], '...', sizes[-1]))} on {any_have['dataset']}: {count} trainings"
          f" ({count // len(args.seeds)} a seed, seeds {' '.join(map(str, args.seeds))}), {done} finished; {args.runs}\n")  # fmt: skip
    by_path = {}
    for training in trainings:
        by_path.setdefault(training.path, []).append(training)
    for text, path in drawn_tree(list(by_path)):
        members = by_path[path]
        finished = sum(training.finished for training in members)
        state = "finished" if finished == len(members) else f"{finished} of {len(members)} finished" if finished else ""
        takes = runlog.duration(seconds[members[0]]) if seconds else ""
        print(f"{text:<40} {takes:>10}  {'alone' if len(path) == 1 and path != (sizes[0],) else ''}{state}".rstrip())
    if costs:
        print(f"\nestimate: {runlog.duration(total)} for what is left, {jobs} at once, and some seconds to start each; "
              f"{disk / 1e9:.2f} GB on disk at the end, tables included")  # fmt: skip
    print("\ncommands:")
    for training in trainings:
        if not training.finished:
            print(shlex.join(command_of(training)))


def drawn_tree(paths):
    """(line, path) for each path, as a tree drawn with lines."""

    def walk(path, indent):
        children = [other for other in paths if other[:-1] == path]
        for child in children:
            last = child is children[-1]
            yield f"{indent}{'└── ' if last else '├── '}{child[-1]}", child
            yield from walk(child, indent + ("    " if last else "│   "))

    for path in paths:
        if len(path) == 1:
            yield path[0], path
            yield from walk(path, "")


def known_costs(args, sizes, resolved):
    """{network: Cost} from earlier runs of this machine, else measured now; empty where neither works."""
    have = next(iter(resolved.values()))
    if DATASETS[have["dataset"]].classes is None:
        print("no estimate: how many images a folder holds is known when it is read\n")
        return {}
    try:
        device = arguments.device_name(have.get("cuda"))
    except UserError as error:
        print(f"no estimate: {error}\n")
        return {}
    costs = study.earlier_costs([args.runs, "runs"], have, device)
    networks = {training.path[-1] for training in resolved}
    if missing := [network for network in sizes if network in networks and network not in costs]:
        print(f"measuring {', '.join(missing)} for some seconds ...", flush=True)
        chosen = ["--dataset", have["dataset"], "--batch-size", have["batch_size"], "--precision", have["precision"]]
        chosen += ["--image-size", have["image_size"]] if "image_size" in have else []
        command = [sys.executable, HERE / "calibrate.py", "--networks", *missing, *chosen, "--cuda", int(device == "cuda")]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        if done.returncode:
            print(f"no estimate: {done.stderr.strip().splitlines()[-1]}\n")
            return {}
        for line in map(json.loads, done.stdout.splitlines()):
            costs[line["network"]] = study.measured_cost(line, have)
    return costs


# ---------------------------------------------------------------------------------------------- running here
def command_of(training):
    return [sys.executable, str(HERE / "train.py"), *training.arguments]


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class Runner:
    """Runs trainings as processes of train.py, their teachers first, `jobs` at once."""

    def __init__(self, trainings, jobs, gpus):
        self.waiting = [training for training in trainings if not training.finished]
        self.skipped = len(trainings) - len(self.waiting)
        self.running, self.failed = {}, {}  # {training: (process, slot)}, {training: reason}
        self.slots, self.gpus = list(range(jobs)), gpus
        self.environment = dict(os.environ)
        if jobs > 1:  # otherwise each would take all cores
            self.environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
        self.stopping = None
        self.total = len(trainings)

    def run(self):
        """Returns the number of the signal that ended it, or None."""
        heard = [number for number in SIGNALS if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]  # nohup
        before = {number: signal.signal(number, self.stop) for number in heard}
        try:
            with Progress(self) as progress:
                while self.running or (self.waiting and not self.stopping):
                    self.start_ready(progress.say)
                    time.sleep(0.1)
                    self.collect(progress.say)
                    progress.update()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        return self.stopping

    def stop(self, number, _frame):
        """Every training is asked to save and end; a second signal asks again, and they end at once."""
        self.stopping = number
        for process, _ in self.running.values():
            process.send_signal(signal.SIGTERM)

    def start_ready(self, say):
        for training in list(self.waiting):
            if training.finished:  # by another process
                self.waiting.remove(training)
                self.tell(training, say)
            elif training.teacher and not training.teacher.finished:
                if training.teacher not in self.waiting and training.teacher not in self.running:
                    self.waiting.remove(training)
                    self.failed[training] = f"its teacher {training.teacher.name} is not finished"
            elif self.slots and not self.stopping and not training.run.in_use:
                self.waiting.remove(training)
                self.start(training, self.slots.pop(0))

    def start(self, training, slot):
        environment = dict(self.environment)
        if self.gpus:
            visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
            gpu = self.gpus[slot % len(self.gpus)]
            environment["CUDA_VISIBLE_DEVICES"] = visible[int(gpu)] if visible and gpu.isdigit() else gpu
        with open(training.log, "a", encoding="utf-8") as log:
            print(f"$ {shlex.join(command_of(training))}", file=log, flush=True)
            # A session of its own: the terminal's Ctrl-C reaches the study, which passes it on once.
            process = subprocess.Popen(
                command_of(training),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        self.running[training] = process, slot
        if self.stopping:  # the signal came between
            process.send_signal(signal.SIGTERM)

    def collect(self, say):
        for training, (process, slot) in list(self.running.items()):
            if process.poll() is None:
                continue
            del self.running[training]
            self.slots.append(slot)
            if training.finished:
                self.tell(training, say)
            elif self.stopping or training.run.in_use:  # another process was quicker: wait for it
                self.waiting.append(training)
            else:
                self.failed[training] = reason(process.returncode, training.log)
                say(f"failed    {training.name}: {self.failed[training]}")

    def tell(self, training, say):
        summary = training.run.read(training.run.summary_file)
        best, last = (summary[which]["test_accuracy_percent"] for which in ("best", "last"))
        done = self.total - len(self.waiting) - len(self.running) - len(self.failed)
        say(f"{done:>3}/{self.total}  {study.arrows(training.path)}, seed {training.seed}: {best:.2f} % at its best epoch, "
            f"{last:.2f} % at its last, {runlog.duration(summary['seconds'])}")  # fmt: skip


def reason(status, log):
    """Why a training failed: its exit status and the last line it wrote."""
    how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return f"{how}: {lines[-1]} ({log})"


class Progress:
    """All epochs of all trainings as one bar on a terminal; elsewhere only the lines that are said."""

    def __init__(self, runner):
        from tqdm import tqdm

        self.runner, self.next = runner, 0
        self.bar = tqdm(total=runner.total, initial=runner.skipped, unit=" training", disable=None, leave=False,
                        bar_format="{n:.1f}/{total} trainings |{bar}| {elapsed}<{remaining}{postfix}")  # fmt: skip

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()

    def say(self, line):
        self.bar.write(line) if not self.bar.disable else print(line, flush=True)

    def update(self):
        if self.bar.disable or time.monotonic() < self.next:
            return
        self.next = time.monotonic() + 1
        parts, shares = [], 0.0
        for training in list(self.runner.running):
            done, epochs = len(training.run.records()), (training.run.read(training.run.config_file) or {}).get("epochs")
            shares += done / epochs if epochs else 0
            parts.append(f"{study.arrows(training.path)} {done}/{epochs or '?'}")
        finished = self.runner.total - len(self.runner.waiting) - len(self.runner.running) - len(self.runner.failed)
        self.bar.n = finished + shares
        self.bar.set_postfix_str(", ".join(parts) + f", {len(self.runner.failed)} failed" * bool(self.runner.failed))


def run_here(args, trainings):
    """Train what is not finished; returns the exit status."""
    (args.runs / "logs").mkdir(parents=True, exist_ok=True)
    runner = Runner(trainings, args.jobs or len(args.gpus or ()) or 1, args.gpus)
    print(f"{len(trainings)} trainings, {runner.skipped} finished; logs in {args.runs / 'logs'}", flush=True)
    if stopped := runner.run():
        done = sum(training.finished for training in trainings)
        print(f"stopped by {signal.Signals(stopped).name}: {done} of {len(trainings)} finished; the same command continues")
        return 128 + stopped
    reported = True
    if not args.only and any(training.finished for training in trainings):
        reported = subprocess.run([sys.executable, str(HERE / "report.py"), str(args.runs)]).returncode == 0
    for training, why in runner.failed.items():
        print(f"failed: {training.name}: {why}", file=sys.stderr)
    return 0 if reported and not runner.failed else 1


def on_slurm(args, common, trainings):
    """Submit, or with --dry-run print; returns the exit status."""
    site = cluster.Site(**{key: getattr(args, key) for key in cluster.Site.__dataclass_fields__})
    own = {key: getattr(args, key) for key in ("sizes", "family", "paths", "set", "seeds", "runs", "jobs")}
    own = settings.flags({key: value for key, value in own.items() if value is not None} | common)
    submit = cluster.Script(site, args.runs) if args.dry_run else cluster.Queue(site, args.runs, print)
    queued = {} if args.dry_run else submit.waiting()
    for name, job_id in queued.items():
        print(f"in queue  {name} ({job_id})")
    cluster.send(trainings, args.pack or 1, ["distill_paths.py", *own], ["report.py", str(args.runs)], queued, submit)
    if args.dry_run:
        print("\n".join(submit.lines))
    return 0


def chosen(names, trainings):
    known = {training.name: training for training in trainings}
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"--only {unknown[0]} is not a training of this plan: {' '.join(known)}")
    return [known[name] for name in names]


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    args, sizes, paths, steps, common = read_arguments(argv)
    try:
        trainings = study.plan(args.runs, sizes, paths, args.seeds, common, steps)
        elsewhere = bool(args.slurm or args.dry_run)
        resolved = {training: training.resolve(elsewhere) for training in trainings}
        if args.only:
            trainings = chosen(args.only, trainings)
        elif not args.dry_run:
            study.record(args.runs, trainings)
        if args.slurm:
            sys.exit(on_slurm(args, common, trainings))
        if args.dry_run:
            sys.exit(show_plan(args, sizes, trainings, resolved))
        sys.exit(run_here(args, trainings))
    except UserError as error:
        sys.exit(arguments.fail("distill_paths.py", error, 2))
    except OSError as error:
        sys.exit(arguments.fail("distill_paths.py", error, 1))
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
