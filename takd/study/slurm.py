"""A study on SLURM: its trainings as sbatch commands that wait for each other.

Nothing of any site is built in. Jobs run slurm/train.sbatch, which saves, requeues and continues at the time limit.
What was submitted is noted in the study's folder, so that the same command again submits only what is neither finished
nor in the queue.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from takd import files
from takd.errors import UserError
from takd.study.plan import Training

SCRIPT = files.ROOT / "slurm" / "train.sbatch"
WARNING_SECONDS = 180  # before the time limit, as the script's --signal has it
REPORT = "report"  # name of the job


@dataclass
class Job:
    """One sbatch job: a command of the suite, and the trainings that it makes."""

    name: str
    command: list[str]
    trainings: list[Training]


@dataclass(frozen=True)
class Site:
    """Values of the user's cluster; what is None is left to sbatch, its SBATCH_* variables and the site's defaults."""

    account: str | None = None
    gpu_type: str | None = None
    time: str | None = None
    memory: str | None = None
    cpus: int | None = None
    modules: str | None = None
    venv: str | None = None
    stage: list[str] | None = None
    sbatch: list[str] | None = None

    def options(self, trains: bool) -> list[str]:
        """For sbatch; a job that does not train needs little and no GPU."""
        gpus, known = self.gpu_type, dict[str, Any](account=self.account)
        if gpus and not re.search(r":\d+$|^\d+$", gpus):
            gpus += ":1"
        if trains:
            known |= {"gpus-per-node": gpus, "time": self.time, "mem": self.memory, "cpus-per-task": self.cpus}
        else:
            known |= {"time": 10, "mem": "2G", "cpus-per-task": 1}
        return [f"--{key}={value}" for key, value in known.items() if value is not None] + (self.sbatch or [])

    @property
    def environment(self) -> dict[str, str]:
        """Variables for slurm/train.sbatch; sbatch hands its environment on to the job."""
        stage = " ".join(map(str, self.stage)) if self.stage else None
        known = {"TAKD_MODULES": self.modules, "TAKD_VENV": self.venv, "TAKD_STAGE": stage}
        if not (self.venv or os.environ.get("TAKD_VENV")):
            known["TAKD_PYTHON"] = os.environ.get("TAKD_PYTHON", sys.executable)
        return {"TAKD_HOME": str(files.ROOT)} | {key: value for key, value in known.items() if value is not None}


def check_present() -> None:
    for program in ("sbatch", "squeue"):
        if shutil.which(program) is None:
            fix = "run --slurm on a login node of the cluster, or add --dry-run to see the commands"
            raise UserError(f"no {program} on this machine: {fix}")


def check_time(limit: str | None, options: Sequence[str] | None) -> None:
    """Refuse a --time within the warning, which would stop a job as soon as it starts. sbatch checks the spelling."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", limit or "")
    if not found or any(option.startswith("--signal") for option in options or ()):
        return
    days, *parts = (int(part or 0) for part in found.groups())
    if found[1] is None and found[4] is None:  # minutes:seconds
        parts = [0, *parts[:2]]
    hours, minutes, seconds = parts
    if ((24 * days + hours) * 60 + minutes) * 60 + seconds <= WARNING_SECONDS:
        what = f"a job is warned {WARNING_SECONDS} s before its limit, to save, and would make no progress"
        raise UserError(f"--time {limit}: {what}; give more, or the warning another time by --sbatch=--signal=USR1@60")


def _jobs(trainings: Sequence[Training], pack: int, study_command: list[str]) -> Iterator[Job]:
    """Trainings as jobs, up to `pack` students of one teacher (or networks alone, of one seed) together.

    A job of one training is its train.py command; a packed job is the study's own command, restricted to its trainings.
    """
    teachers = {training.teacher for training in trainings}

    def together(one: Training, other: Training) -> bool:
        same = one.seed == other.seed and one.teacher is other.teacher
        return same and bool(one.teacher or not teachers & {one, other})

    packs: list[list[Training]] = []
    for training in trainings:
        if packs and len(packs[-1]) < pack and together(packs[-1][0], training):
            packs[-1].append(training)
        else:
            packs.append([training])
    for group in packs:
        if len(group) == 1:
            yield Job(group[0].name, ["train.py", *group[0].arguments], group)
        else:
            only = ["--only", *(member.name for member in group)]
            yield Job(f"{group[0].name}+{len(group) - 1}", [*study_command, *only], group)


def send(
    trainings: Sequence[Training],
    pack: int,
    study_command: list[str],
    report_command: list[str],
    queued: Mapping[str, str],
    submit: Callable[[Job, str | None], str],
) -> None:
    """Hand every training that is neither finished nor queued to `submit(job, dependency) -> job id`, then the report.

    `queued`: {training name, or REPORT: job id}.
    """
    ids = {name: job_id for name, job_id in queued.items() if name != REPORT}
    known = len(ids)
    for job in _jobs([t for t in trainings if not t.finished and t.name not in queued], pack, study_command):
        teachers = [t.teacher for t in job.trainings if t.teacher and not t.teacher.finished]
        after = dict.fromkeys(ids[teacher.name] for teacher in teachers)
        job_id = submit(job, ":".join(["afterok", *after]) if after else None)
        ids |= {training.name: job_id for training in job.trainings}
    if len(ids) > known or (ids and REPORT not in queued):
        submit(Job(REPORT, report_command, []), ":".join(["afterany", *dict.fromkeys(ids.values())]))


def _sbatch(job: Job, site: Site, folder: Path, dependency: str | None) -> list[str]:
    """The command that submits a job."""
    waits = [f"--dependency={dependency}"] + ["--kill-on-invalid-dep=yes"] * bool(job.trainings) if dependency else []
    named = [f"--job-name={job.name}", f"--output={Path(folder) / 'logs' / f'{job.name}-%j.log'}"]
    return ["sbatch", "--parsable", *named, *waits, *site.options(bool(job.trainings)), str(SCRIPT), *job.command]


class Script:
    """Takes submissions as lines of a shell script, the jobs' ids in variables."""

    def __init__(self, site: Site, folder: Path) -> None:
        self.site, self.folder = site, folder
        self.lines = [f"mkdir -p {shlex.quote(str(Path(folder) / 'logs'))}  # where the jobs' output goes"]
        self.lines += [f"export {key}={shlex.quote(value)}" for key, value in site.environment.items()]

    def __call__(self, job: Job, dependency: str | None) -> str:
        variable, words = re.sub(r"\W", "_", job.name), _sbatch(job, self.site, self.folder, dependency)
        quoted = [word if word.startswith("--dependency=") else shlex.quote(word) for word in words]
        self.lines.append(f"{variable}=$({' '.join(quoted)})")
        return f"${variable}"


class Queue:
    """Submits for real, and remembers in the study's folder what it submitted."""

    def __init__(self, site: Site, folder: Path, say: Callable[[str], None]) -> None:
        self.site, self.folder, self.say = site, folder, say
        self.file = Path(folder) / "slurm.json"
        self.noted = json.loads(files.read_text(self.file)) if self.file.exists() else {}

    def waiting(self) -> dict[str, str]:
        """{training name, or REPORT: job id} of what an earlier call submitted and SLURM still has."""
        present = set(_run(["squeue", "--me", "--noheader", "--format=%F"]).split())
        return {name: job_id for name, job_id in self.noted.items() if job_id in present}

    def __call__(self, job: Job, dependency: str | None) -> str:
        if job.name == REPORT and (earlier := self.waiting().get(REPORT)):  # it waits for too few
            _run(["scancel", earlier])
        command = _sbatch(job, self.site, self.folder, dependency)
        printed = _run(command, os.environ | self.site.environment)
        job_id = printed.strip().split(";")[0]  # id;cluster where there are several
        self.noted |= {training.name: job_id for training in job.trainings} or {REPORT: job_id}
        files.save_json(self.noted, self.file)
        self.say(f"submitted {job.name} as {job_id}" + (f", {dependency}" if dependency else ""))
        return job_id


def _run(command: list[str], environment: Mapping[str, str] | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment)
    if done.returncode:
        raise OSError(f"{command[0]} refused: {done.stderr.strip() or f'exit status {done.returncode}'}")
    return done.stdout
