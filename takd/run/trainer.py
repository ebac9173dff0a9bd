"""The epochs of one run: training, evaluation, records, and continuing where it stopped.

A run continues from its last.pth.tar: weights, optimizer, position (epoch and step), the epoch's sums so far, the
records, the best network (takd/run/saved.py) and the generators. Order and views are functions of (seed, epoch), so
they need no saving. On the CPU with the same number of threads and processes a continued run ends with the same bits as
an uninterrupted one.
"""

import copy
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch

from takd.config import nni_trial
from takd.config.run_config import RunConfig
from takd.distill import evaluation
from takd.distill.teacher import members, path_of
from takd.errors import UserError
from takd.images.batches import batches, usual_workers
from takd.images.split import Split, epoch_plan
from takd.process import Stopped, StopSignals
from takd.run import checkpoint, saved
from takd.run.console import Console, duration
from takd.run.distributed import World
from takd.run.engine import Diverged, EpochSums, TrainStep
from takd.run.run_directory import Record, RunDirectory, best_of, environment

# Decisions after a step; stopping is STOP + the signal's number. All processes follow the greatest of theirs.
CONTINUE, SAVE, STOP = 0, 1, 2


class Context(NamedTuple):
    """What all runs of this process share."""

    world: World
    console: Console
    signals: StopSignals


class Trainer:
    """Runs a TrainStep over the epochs of its configuration, and keeps its records in the run's folder."""

    def __init__(
        self, config: RunConfig, splits: Any, step: TrainStep, directory: RunDirectory, context: Context
    ) -> None:
        self.config, self.splits, self.step, self.directory = config, splits, step, directory
        self.world, self.console, self.signals = context
        self.take_step: Any = step  # or a StepGraph in its place
        self.teachers = members(step.teacher)
        self.path = [*path_of(self.teachers, config.teachers), config.student]
        self.epoch, self.steps_done = 0, 0  # the next step to train
        self.sums = EpochSums()
        self.records: list[Record] = []  # of the epochs that are over
        self.best_network: dict[str, Any] | None = None  # what the best epoch's file holds

    # -------------------------------------------------------------------------------- starting and continuing
    def resume(self, recorded: Record | None, extra_environment: Record) -> None:
        """Continue an earlier start, whose config is `recorded` (None for a new run), and record this one."""
        if recorded:
            self._restore()
        where = f" (continuing at {self.position})" if recorded else ""
        self.console.say(f"run       {self.directory.path}{where}")
        here = environment(self.step.split.device) | {"precision": self.step.precision} | extra_environment
        before = {"processes": 1} | recorded["environment"] if recorded else here
        compared = ("threads", "kernels", "torch", "processes")
        if changed := [key for key in compared if key in here and before.get(key) != here[key]]:
            what = " and ".join(changed)
            self.console.say(f"note: {what} changed since the run began: rounding will differ")
        if self.world.is_rank_zero:
            more = {"origins": self.config.origins, "path": self.path, "argv": sys.argv, "environment": here}
            self.directory.start(self.config.record() | more)
            state = {"records": self.records, "best_network": self.best_network}
            saved.restore_files(state, self.config, self.directory, self.console.say)

    @property
    def position(self) -> str:
        """The next step, for people, who count epochs from 1."""
        return f"epoch {self.epoch + 1}, step {self.steps_done}"

    # ------------------------------------------------------------------------------------------------ an epoch
    def train(self, epoch: int) -> None:
        """The epoch's remaining steps. A signal ends it after a step, with everything saved: Stopped."""
        config, train, step = self.config, self.step.split, self.step
        if hasattr(type(step.method), "epoch"):
            step.method.epoch = epoch
        for group in step.optimizer.param_groups:
            group["lr"] = config.learning_rate_at(epoch)
        step.student.train()
        plan = epoch_plan(train, config.augment, config.seed, epoch)
        parts = self.world.parts(len(train), config.batch_size, self.steps_done)
        if parts and (tables := [teacher.table for teacher in self.teachers if teacher.table]):
            rows = torch.cat([torch.arange(part.rows.start, part.rows.stop) for part in parts])
            for table in tables:
                table.expect(plan.order[rows], plan.views[rows])
        workers = usual_workers() if config.workers is None else config.workers
        epoch_batches = batches(train, config.augment, plan, [part.rows for part in parts], workers)
        self._saved, done = time.monotonic(), min(self.steps_done * config.batch_size, len(train))
        with self.console.progress(f"epoch {epoch + 1}/{config.epochs}", len(train), done) as advance:
            started = time.perf_counter()
            for part, batch in zip(parts, epoch_batches, strict=False):
                self.world.track_split(part)
                names, row = self.take_step(batch, part)
                self.sums.add(names, row, part.images)
                self.steps_done += 1
                advance(part.images)
                if self._save_or_stop():
                    break
            if train.device.type == "cuda":
                torch.cuda.synchronize()
            self.sums.seconds += time.perf_counter() - started
            stop = self.world.all_reduce_max(self.signals.received or 0)
            if stop:
                self.save_state()
            elif self.world.size > 1:
                self.sums.all_reduce(self.world.all_reduce_sum)
        if stop:
            self._stop(stop)

    def _save_or_stop(self) -> bool:
        """After a step: save where that is due. Returns whether to stop."""
        due = time.monotonic() - self._saved > 60 * (self.config.save_minutes or 0)
        wanted = STOP + self.signals.received if self.signals.received else SAVE if due else CONTINUE
        decision = self.world.all_reduce_max(wanted)
        if decision == SAVE:
            self.save_state()
            self._saved = time.monotonic()
        return decision > SAVE

    def _stop(self, number: int) -> NoReturn:
        self.console.say(f"stopped at {self.position}; the same command continues")
        raise Stopped(number)

    def evaluate(self, epoch: int) -> Record:
        """The epoch's line for metrics.jsonl. Evaluation is always float32, so that evaluate.py agrees."""
        started, rate = time.perf_counter(), self.config.learning_rate_at(epoch)
        try:
            record = {"epoch": epoch, "learning_rate": rate, **self.sums.summary()}
            for name in ("validation", "test"):
                split: Split | None = getattr(self.splits, name)
                if split is not None:
                    with self.console.progress(
                        f"epoch {epoch + 1}/{self.config.epochs}, {name}", len(split)
                    ) as advance:
                        logits = evaluation.predict(self.step.student, split, advance=advance)
                    result = evaluation.score(logits, split.labels)
                    record |= {f"{name}_loss": result["loss"], f"{name}_accuracy_percent": result["accuracy_percent"]}
        except Diverged as error:
            advice = f"a lower --learning-rate (now {rate:g}) usually helps"
            raise Diverged(f"the loss is no longer a number at epoch {epoch + 1}, {error}; {advice}") from None
        except Stopped as stop:
            self.save_state()
            self._stop(stop.number)
        return record | {"evaluation_seconds": time.perf_counter() - started}

    def save(self, record: Record) -> None:
        """The record, then the state, which commits the epoch: after a crash before it the epoch is repeated, after a
        crash behind it the best network's file is written from it."""
        self.records.append(record)
        best = best_of(self.records) is record
        if best:
            self.best_network = copy.deepcopy(checkpoint.to_cpu(self._network_contents(record)))
        if self.world.is_rank_zero:
            self.directory.log(record)
            if self.config.trial:  # not for the teacher that a trial trains first: the tuner would score that
                key = f"{self.splits.selection}_accuracy_percent"
                nni_trial.report_epoch(self.epoch, record[key])
        self.epoch, self.steps_done, self.sums = self.epoch + 1, 0, EpochSums()
        self.save_state()
        if self.world.is_rank_zero:
            if best and self.best_network:
                checkpoint.save(self.best_network, self.config.best_file)
            left = _seconds(self.records) / self.epoch * (self.config.epochs - self.epoch)
            self.console.row(record, self.config.epochs, left, self.splits.test.part)
        if stop := self.world.all_reduce_max(self.signals.received or 0):
            self._stop(stop)

    # ---------------------------------------------------------------------------------------------------- files
    def _network_contents(self, record: Record) -> dict[str, Any]:
        """A checkpoint of the student as the released code writes it, and what evaluate.py and later runs need."""
        config, train = self.config, self.step.split
        return {
            "model_state_dict": {key: value.contiguous() for key, value in self.step.student.state_dict().items()},
            "optimizer_state_dict": self.step.optimizer.state_dict(),
            "epoch": self.epoch,
            "model": config.student,
            "classes": len(train.classes),
            "class_names": list(train.classes),
            "image_size": train.image_size,
            "dataset": config.dataset,
            "mean": list(train.transform.mean),
            "std": list(train.transform.std),
            "path": self.path,
            "seed": config.seed,
        } | {key: record[key] for key in ("validation_accuracy_percent", "test_accuracy_percent") if key in record}

    def save_state(self) -> None:
        """Save everything needed to continue. Every process calls this; rank 0 writes while the others wait."""
        if self.world.size > 1:
            self.sums.all_reduce(self.world.all_reduce_sum)
        if self.world.is_rank_zero:
            contents = self._network_contents(best_of(self.records) if self.records else {}) | {
                "method_state_dict": self.step.method.state_dict(),
                "step": self.steps_done,
                "sums": self.sums.state(),
                "records": self.records,
                "best_network": self.best_network,
                "settings": self.config.identity(),
                "random_state": torch.get_rng_state(),
            }
            if self.step.split.device.type == "cuda":
                contents["cuda_random_state"] = torch.cuda.get_rng_state()
            checkpoint.save(contents, self.directory.last_file)
            if marker := os.environ.get("TAKD_PROGRESS"):  # for slurm/train.sbatch
                Path(marker).touch()
        self.world.barrier()

    def _restore(self) -> None:
        """Go on from last.pth.tar. Without one a run begins anew, unless more than its first epoch would be lost."""
        file, step, device = self.directory.last_file, self.step, self.step.split.device
        state = saved.read(self.config, self.directory)
        if not state:
            if (epochs := len(self.directory.records())) > 1:
                again = f"restore it, or delete {self.directory.path} to train again"
                raise UserError(f"{file} is gone, and with it the state after {epochs} epochs; {again}")
            return
        saved.check_shapes(state, step.student, step.method, step.optimizer, file)
        checkpoint.load_weights(step.student, state["model_state_dict"])
        groups = step.optimizer.state_dict()["param_groups"]
        step.optimizer.load_state_dict(state["optimizer_state_dict"] | {"param_groups": groups})
        step.method.load_state_dict(state["method_state_dict"])
        self.epoch, self.steps_done = state["epoch"], state["step"]
        self.records, self.best_network = state["records"], state["best_network"]
        sums = state["sums"]
        self.sums = EpochSums(**sums | {"rows": [row.to(device) for row in sums["rows"]]})
        torch.set_rng_state(state["random_state"])
        if device.type == "cuda" and "cuda_random_state" in state:
            torch.cuda.set_rng_state(state["cuda_random_state"])

    def summary(self) -> Record:
        """summary.json: the run's settings, its best and its last epoch, and on which split the best was selected."""
        summary = self.world.broadcast(self._summarise)
        if self.world.is_rank_zero:
            self.directory.finish(summary)
        self.console.say(f"done      {outcome_line(summary)} in {duration(summary['seconds'])}; {self.directory.path}")
        return summary

    def _summarise(self) -> Record:
        config, records = self.config, self.records
        scores = [teacher.accuracy_percent for teacher in self.teachers]
        return {
            "model": config.student,
            "dataset": config.dataset,
            "path": self.path,
            "teacher": config.teacher,
            "teacher_test_accuracy_percent": scores if len(scores) > 1 else scores[0] if scores else None,
            "method": config.method,
            "method_options": config.method_options,
            "recipe": config.recipe,
            "seed": config.seed,
            "epochs": config.epochs,
            "parameters": evaluation.count_parameters(self.step.student),
            "selection_split": self.splits.selection,
            "test_split": self.splits.test.part,
            "test_images": len(self.splits.test),
            "best": self._outcome(best_of(records)),
            "last": self._outcome(records[-1]),
            "seconds": _seconds(records),
            "checkpoint": str(config.best_file),
            "run_dir": str(self.directory.path),
        }

    def _outcome(self, record: Record) -> Record:
        values = [
            f"{split}_{value}" for split in ("train", "validation", "test") for value in ("loss", "accuracy_percent")
        ]
        kept = {key: record[key] for key in ("epoch", *values) if key in record}
        selection = self.splits.selection
        return kept | {"split": selection, "accuracy_percent": record[f"{selection}_accuracy_percent"]}


def _seconds(records: list[Record]) -> float:
    return sum(line["train_seconds"] + line["evaluation_seconds"] for line in records)


def hardware_notes(device: str | None, precision: str, processes: int, image_size: int) -> Iterator[str]:
    """What would be faster here."""
    if precision == "bf16" and not evaluation.native_bf16(torch.device(device or "cpu")):
        yield "warning: this hardware emulates bf16: --precision fp32 is faster"
    if device == "cuda" and processes > 1 and image_size <= 64:
        yield "note: for networks this small, one run per GPU is more efficient: distill_paths.py --gpus 0 1"


def repetition_line(summaries: list[dict[str, Any]]) -> str:
    """Several runs in one line: mean and standard deviation."""
    outcomes = []
    for which in ("best", "last"):
        values = [summary[which]["test_accuracy_percent"] for summary in summaries]
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        outcomes.append(f"{statistics.fmean(values):.2f}{spread} % at the {which} epoch")
    seeds = " ".join(str(summary["seed"]) for summary in summaries)
    runs, part = f"{len(summaries)} run{'s' * (len(summaries) > 1)}", summaries[0].get("test_split", "test")
    return f"repeated  {runs}, seeds {seeds}: {part} {', '.join(outcomes)}"


def outcome_line(summary: Record) -> str:
    """A finished run in one line."""
    best, last = summary["best"], summary["last"]
    selected = f", selected on {best['split']}" if best["split"] != "test" else ""
    highest, final = best["test_accuracy_percent"], last["test_accuracy_percent"]
    split = summary.get("test_split", "test")
    outcome = f"{split} {highest:.2f} % at its best epoch ({best['epoch'] + 1}{selected}), {final:.2f} % at its last"
    return f"{' > '.join(summary['path'])} on {summary['dataset']}: {outcome}"
