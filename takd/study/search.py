"""A worker of a sweep: draws settings with Optuna's TPE and runs trials as processes of train.py.

This is the only module that imports Optuna, and only workers import it. Workers share the sweep's folder and nothing
else. Optuna's journal holds the settings drawn. A trial's accuracy is read from its own records, and whether a worker
has it from its claim: the journal is reliable for neither, as workers are killed and network file systems tear lines.
"""

import contextlib
import json
import os
import random
import subprocess
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, TrialState

from takd import files
from takd.errors import UserError
from takd.process import STOP_SIGNALS, StopSignals
from takd.study.runner import environment_of, exit_reason, start
from takd.study.space import Parameter, combinations
from takd.study.sweep import Setting, Sweep

REDRAWS = 10  # attempts to draw a new setting: the same setting and seed would give the same run


class Draws:
    """The settings drawn so far, in Optuna's journal. Use it under the sweep's lock only."""

    def __init__(self, sweep: Sweep) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        self.space, journal = sweep.space, str(sweep.journal)
        self.distributions = {key: _distribution(parameter) for key, parameter in sweep.space.items()}
        if sweep.journal.exists() and not (content := sweep.journal.read_bytes()).endswith(b"\n"):
            os.truncate(journal, content.rfind(b"\n") + 1)  # a writer was killed, or the disk was full
        # No seed: workers with the same one would draw the same settings.
        sampler = optuna.samplers.TPESampler(constant_liar=True)
        storage = JournalStorage(JournalFileBackend(journal, JournalFileOpenLock(journal)))
        self.study = optuna.create_study(
            storage=storage, sampler=sampler, study_name="sweep", direction="maximize", load_if_exists=True
        )

    def settings(self) -> list[tuple[Setting, FrozenTrial]]:
        """Settings in the order drawn, each with Optuna's trial of it; repeated draws are left out."""
        found: dict[str, tuple[Setting, FrozenTrial]] = {}
        for trial in self.study.get_trials(deepcopy=False):
            if trial.params.keys() == self.space.keys():  # not where a worker was killed while it drew
                setting = {key: parameter.value(trial.params[key]) for key, parameter in self.space.items()}
                found.setdefault(json.dumps(setting), (setting, trial))
        return list(found.values())

    def settle(self, trial: FrozenTrial, accuracies: list[float | None]) -> None:
        """Report the accuracies of a setting's trials to the sampler; None marks a failed one."""
        if None in accuracies:
            self.study.tell(trial.number, state=TrialState.FAIL)
        else:
            self.study.tell(trial.number, sum(filter(None, accuracies)) / len(accuracies))

    def draw(self) -> bool:
        """Draw a new setting; False if the space has none left."""
        before = [setting for setting, _ in self.settings()]
        if len(before) == combinations(self.space.values()):
            return False
        for _ in range(REDRAWS):
            trial = self.study.ask(self.distributions)
            if len(self.settings()) > len(before):
                return True
            self.study.tell(trial, state=TrialState.FAIL)
        while (setting := {key: random.choice(each.values or []) for key, each in self.space.items()}) in before:
            pass  # TPE repeats itself like this only in a small space
        self.study.enqueue_trial(setting)
        self.study.ask(self.distributions)
        return True


def _distribution(parameter: Parameter) -> Any:
    if parameter.choices:
        return optuna.distributions.CategoricalDistribution(parameter.choices)
    if parameter.whole:
        return optuna.distributions.IntDistribution(int(parameter.low), int(parameter.high))
    return optuna.distributions.FloatDistribution(parameter.low, parameter.high, log=parameter.log)


@dataclass
class Trial:
    """A trial that this worker has claimed, and the lock on it."""

    number: int
    setting: Setting
    seed: int | None
    claim: contextlib.ExitStack
    descriptor: int  # of the claim's file
    starts: int = 0

    @property
    def name(self) -> str:
        return f"{self.number:03}"

    def __str__(self) -> str:
        settings = self.setting if self.seed is None else self.setting | {"seed": self.seed}
        return f"{self.name}  {', '.join(f'{key} {value}' for key, value in settings.items())}"


class Worker:
    """`train` is train.py's command line before its arguments; `jobs` trials run at once."""

    def __init__(self, sweep: Sweep, train: list[str], jobs: int, say: Callable[[str], None]) -> None:
        self.sweep, self.train, self.jobs, self.say = sweep, train, jobs, say
        self.environment = environment_of(jobs)
        self.stopped: int | None = None
        self.refused = ""  # train.py's reason for refusing a trial, a user error: it would refuse the others too

    def run(self) -> int | None:
        """Train the teacher, then trials until none is left. Returns the signal that stopped it, or None."""
        with StopSignals() as self.signals:
            self._make_teacher()
            with self.signals.deferred():
                self._make_trials()
        if self.refused:
            raise OSError(self.refused)  # trials before it are kept
        return self.stopped

    def _make_teacher(self) -> None:
        if not (teacher := self.sweep.teacher):
            return
        with files.locked(self.sweep.claims / "teacher", f"run {teacher.path}", wait=True, say=self.say) as claim:
            if teacher.summary_file.exists():
                return
            self.say(f"teacher   {' + '.join(self.sweep.base.teachers)}, for all trials")
            with self.signals.deferred():
                status = self._ended([self._start("teacher", self.sweep.teacher_arguments, claim)]).returncode
        if status and not self._is_stop(status):
            raise OSError(f"teacher: {self._reason('teacher', status)}")

    def _make_trials(self) -> None:
        running: dict[subprocess.Popen, Trial] = {}
        while True:
            while not self.stopped and not self.refused and len(running) < self.jobs and (trial := self.next_trial()):
                continued = self.sweep.trial(trial.number).config_file.exists()
                self.say(f"{'continue' if continued else 'begin':<8}  {trial}")
                running[self._begin(trial)] = trial
            if not running:
                return
            process = self._ended(list(running))
            trial, status = running.pop(process), process.returncode
            if not status:
                self.say(f"finished  {trial}: {self.sweep.accuracy(trial.number):.2f} %")
            elif self._is_stop(status):
                pass  # another worker, or this one when it is started again, continues the trial
            elif status == 2:
                self.refused = f"trial {trial.name}: {self._reason(trial.name, status)}"
            elif trial.starts == 1:
                self.say(f"repeat    {trial}: {self._reason(trial.name, status)}")
                running[self._begin(trial)] = trial
                continue
            else:
                reason = self._reason(trial.name, status)
                self.say(f"failed    {trial}: {reason}")
                self.sweep.note_failure(trial.name, reason)
            trial.claim.close()

    def next_trial(self) -> Trial | None:
        """A trial to continue or begin that no worker has claimed; None if there is none."""
        sweep, seeds = self.sweep, self.sweep.seeds
        with sweep.lock():
            draws, noted = Draws(sweep), sweep.read()
            while True:
                settings = draws.settings()
                for i, (setting, drawn) in enumerate(settings):
                    if drawn.state != TrialState.RUNNING:
                        continue
                    numbers = range(i * len(seeds), (i + 1) * len(seeds))
                    reached = {number: sweep.accuracy(number) for number in numbers}
                    open_ = [n for n in numbers if reached[n] is None and f"{n:03}" not in noted["failed"]]
                    if not open_:
                        draws.settle(drawn, list(reached.values()))
                    for number in open_:
                        if number < noted["trials"] and (claim := self._claim(number)):
                            return Trial(number, setting, seeds[number % len(seeds)], *claim)
                if len(settings) * len(seeds) >= noted["trials"] or not draws.draw():
                    return None

    def _claim(self, number: int) -> tuple[contextlib.ExitStack, int] | None:
        """The lock on a trial and its file's descriptor; None if another worker has it."""
        file, claim = self.sweep.claims / f"{number:03}", contextlib.ExitStack()
        try:
            descriptor = claim.enter_context(files.locked(file, f"trial {number:03}"))
        except files.Busy:
            return None
        if not files.is_locked(file):
            raise UserError(
                f"{self.sweep.folder} is on a file system without locks, so workers would make the same "
                "trials; give --runs on another, such as a project's folder"
            )
        return claim, descriptor

    # ---------------------------------------------------------------------------------------------- processes
    def _begin(self, trial: Trial) -> subprocess.Popen:
        trial.starts += 1
        return self._start(trial.name, self.sweep.arguments(trial.number, trial.setting, trial.seed), trial.descriptor)

    def _start(self, name: str, arguments: list[str], claim: int) -> subprocess.Popen:
        """Start train.py, which holds the claim too: if only the worker is killed, nobody else begins the same run."""
        return start([*self.train, *arguments], self._log(name), self.environment, pass_fds=(claim,))

    def _ended(self, processes: list[subprocess.Popen]) -> subprocess.Popen:
        """The first of them to end. A signal is forwarded to all: they save and end."""
        while True:
            if self.signals.received and not self.stopped:
                self.stopped = self.signals.received
                for process in processes:
                    process.send_signal(self.stopped)
            for process in processes:
                if process.poll() is not None:
                    return process
            time.sleep(0.1)

    def _is_stop(self, status: int) -> bool:
        if status - 128 in STOP_SIGNALS:
            self.stopped = self.stopped or status - 128
        return bool(self.stopped)

    def _log(self, name: str) -> Path:
        return self.sweep.folder / "logs" / f"{name}.log"

    def _reason(self, name: str, status: int) -> str:
        return exit_reason(status, self._log(name))
