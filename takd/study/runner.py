"""Running a plan on this machine: trainings as processes of train.py, several at once, teachers before their
students."""

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from takd.process import threads_each
from takd.run.console import duration
from takd.study.plan import Training, arrows

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class Runner:
    """`command_of(training)` is the command line of a training; `gpus` are ids to spread the trainings over."""

    def __init__(
        self,
        trainings: Sequence[Training],
        jobs: int,
        gpus: Sequence[str] | None,
        command_of: Callable[[Training], list[str]],
    ) -> None:
        self.waiting = [training for training in trainings if not training.finished]
        self.total, self.skipped = len(trainings), len(trainings) - len(self.waiting)
        self.running: dict[Training, tuple[subprocess.Popen, int]] = {}  # process and slot
        self.failed: dict[Training, str] = {}  # with the reason
        self.slots, self.gpus, self.command_of = list(range(jobs)), gpus, command_of
        self.environment = environment_of(jobs)
        self.stopping: int | None = None

    def run(self) -> int | None:
        """Returns the number of the signal that ended it, or None."""
        nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        before = {n: signal.signal(n, self.stop) for n in SIGNALS if not (nohup and n == signal.SIGHUP)}
        progress = Progress(self)
        try:
            while self.running or (self.waiting and not self.stopping):
                self._start_ready(progress.say)
                time.sleep(0.1)
                self._collect(progress.say)
                progress.update()
        finally:
            progress.bar.close()
            for number, handler in before.items():
                signal.signal(number, handler)
        return self.stopping

    def stop(self, number: int, _frame: FrameType | None) -> None:
        """Stop every training, which saves first; on a second signal they end at once."""
        self.stopping = number
        for process, _ in self.running.values():
            process.send_signal(signal.SIGTERM)

    @property
    def finished_count(self) -> int:
        return self.total - len(self.waiting) - len(self.running) - len(self.failed)

    def _start_ready(self, say: Callable[[str], None]) -> None:
        for training in list(self.waiting):
            if training.finished:  # by another process
                self.waiting.remove(training)
                self._report(training, say)
            elif training.teacher and not training.teacher.finished:
                if training.teacher not in self.waiting and training.teacher not in self.running:
                    self.waiting.remove(training)
                    self._fail(training, f"its teacher {training.teacher.name} is not finished")
            elif self.slots and not self.stopping and not training.run.in_use:
                self.waiting.remove(training)
                self._start(training, self.slots.pop(0))

    def _start(self, training: Training, slot: int) -> None:
        own = {}
        if self.gpus:
            visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
            gpu = self.gpus[slot % len(self.gpus)]
            own["CUDA_VISIBLE_DEVICES"] = visible[int(gpu)] if visible and gpu.isdigit() else gpu
        # A session of its own: the terminal's Ctrl-C reaches the study, which passes it on once.
        process = start(self.command_of(training), training.log, self.environment | own, start_new_session=True)
        self.running[training] = process, slot
        if self.stopping:  # the signal came meanwhile
            process.send_signal(signal.SIGTERM)

    def _collect(self, say: Callable[[str], None]) -> None:
        for training, (process, slot) in list(self.running.items()):
            if process.poll() is None:
                continue
            del self.running[training]
            self.slots.append(slot)
            if training.finished:
                self._report(training, say)
            elif self.stopping or training.run.in_use:  # another process has started it: wait for that
                self.waiting.append(training)
            else:
                self._fail(training, exit_reason(process.returncode, training.log))
                say(f"failed    {training.name}: {self.failed[training]}")

    def _fail(self, training: Training, reason: str) -> None:
        self.failed[training] = reason
        training.run.fail(reason)

    def _report(self, training: Training, say: Callable[[str], None]) -> None:
        summary = training.run.summary()
        best, last = (summary[which]["test_accuracy_percent"] for which in ("best", "last"))
        outcome = f"{best:.2f} % at its best epoch, {last:.2f} % at its last, {duration(summary['seconds'])}"
        say(f"{self.finished_count:>3}/{self.total}  {arrows(training.recorded_path)}, seed {training.seed}: {outcome}")


def environment_of(jobs: int) -> dict[str, str]:
    """Variables of each of so many processes at once; by itself each would take all cores."""
    return dict(os.environ) | ({"OMP_NUM_THREADS": threads_each(jobs)} if jobs > 1 else {})


def start(command: list[str], log: Path, environment: Mapping[str, str], **options: Any) -> subprocess.Popen:
    """A process of train.py; the command and what it prints are added to `log`."""
    with open(log, "a", encoding="utf-8", errors="backslashreplace") as file:
        print(f"$ {shlex.join(command)}", file=file, flush=True)
        streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": subprocess.STDOUT}
        return subprocess.Popen(command, env=environment, **streams, **options)


def exit_reason(status: int, log: Path) -> str:
    """Why a training failed: its exit status and the last line it wrote."""
    how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return f"{how}: {lines[-1]} ({log})"


class Progress:
    """One bar for all epochs of all trainings on a terminal; elsewhere only lines."""

    def __init__(self, runner: Runner) -> None:
        from tqdm import tqdm

        self.runner, self.next = runner, 0.0
        look = "{n:.1f}/{total} trainings |{bar}| {elapsed}<{remaining}{postfix}"
        self.bar = tqdm(total=runner.total, initial=runner.skipped, disable=None, leave=False, bar_format=look)

    def say(self, line: str) -> None:
        self.bar.write(line) if not self.bar.disable else print(line, flush=True)

    def update(self) -> None:
        if self.bar.disable or time.monotonic() < self.next:
            return
        self.next = time.monotonic() + 1
        parts, shares = [], 0.0
        for training in list(self.runner.running):
            done, epochs = len(training.run.records()), (training.run.config() or {}).get("epochs")
            shares += done / epochs if epochs else 0
            parts.append(f"{arrows(training.recorded_path)} {done}/{epochs or '?'}")
        failed = len(self.runner.failed)
        self.bar.n = self.runner.finished_count + shares
        self.bar.set_postfix_str(", ".join(parts) + f", {failed} failed" * bool(failed))
