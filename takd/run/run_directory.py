"""One run's folder and records.

    runs/<name>/config.json                     every setting and where it came from, versions, device
                metrics.jsonl                   one line per epoch, epochs counted from 0
                <model>_<trial>_best.pth.tar    the best epoch's network, in the released code's format
                last.pth.tar                    the state to continue from
                summary.json                    written when the run is finished, and only then
                .failed                         why it ended before that, until it is started again
                events.out.tfevents.*           TensorBoard

Commands communicate through these files; nothing parses console output. Importing this needs no torch, for planning and
reports.
"""

import contextlib
import dataclasses
import json
import os
import platform
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from takd import files
from takd.config import names, recipes
from takd.config.run_config import DIGESTS, UNRECORDED, RunConfig, settings_of
from takd.errors import UserError
from takd.files import COUNT, FLAG, NUMBER, PERCENT, SECONDS, TEXT, WHOLE, Rule

Record = dict[str, Any]

# ------------------------------------------------------------------------------------------- forms of the files
PATH = Rule("a list of networks", lambda value: isinstance(value, list) and bool(value) and all(map(TEXT.holds, value)))
SCALAR = Rule(
    "a number or text", lambda value: value is None or any(rule.holds(value) for rule in (TEXT, NUMBER, FLAG))
)
ONE_OR_MORE = Rule("text or a list of it", lambda value: TEXT.holds(value) or PATH.holds(value))
_OF_TYPE: dict[Any, Any] = {
    str: TEXT,
    int: WHOLE,
    float: NUMBER,
    bool: FLAG,
    list[int]: [WHOLE],
    list[str]: PATH,
    dict[str, Any]: {...: SCALAR},
}


def _setting(field):
    """A field of RunConfig as an entry of the form: "lambda?": a number."""
    union = isinstance(field.type, types.UnionType)
    kinds = [each for each in (typing.get_args(field.type) if union else [field.type]) if each in _OF_TYPE]
    optional = "?" * (field.default is not dataclasses.MISSING)
    return field.name.rstrip("_") + optional, ONE_OR_MORE if len(kinds) > 1 else _OF_TYPE[kinds[0]]


CONFIG = dict(_setting(field) for field in dataclasses.fields(RunConfig) if field.name not in UNRECORDED) | {
    "dataset": Rule("a data set", lambda value: isinstance(value, str) and value in names.DATASETS),
    "recipe": Rule("a recipe", lambda value: isinstance(value, str) and value in recipes.RECIPES),
    "epochs": COUNT,
    "batch_size": COUNT,
    "validation_split": NUMBER,
    "path": PATH,
    "origins": {...: TEXT},
    "environment": {
        "host": TEXT,
        "device": TEXT,
        **dict.fromkeys(("python?", "torch?", "numpy?", "platform?", "commit?", "slurm_job?"), TEXT),
        "threads?": WHOLE,
        "precision?": Rule("bf16, tf32 or fp32", lambda value: value in ("bf16", "tf32", "fp32")),
    },
}
RECORD = {
    "epoch": WHOLE,
    "test_accuracy_percent": PERCENT,
    "train_seconds": SECONDS,
    "evaluation_seconds": SECONDS,
    "validation_accuracy_percent?": PERCENT,
}
_OUTCOME = {"epoch": WHOLE, "split": TEXT, "accuracy_percent": PERCENT, "test_accuracy_percent": PERCENT}
SUMMARY = {
    "model": TEXT,
    "dataset": TEXT,
    "path": PATH,
    "seed": WHOLE,
    "epochs": COUNT,
    "parameters": COUNT,
    "seconds": SECONDS,
    "selection_split": TEXT,
    "best": _OUTCOME,
    "last": _OUTCOME,
    "checkpoint": TEXT,
}


class RunDirectory:
    """The files of one run. Nothing is written before `claim` has found the folder free, or its own."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config_file = self.path / "config.json"
        self.metrics_file = self.path / "metrics.jsonl"
        self.summary_file = self.path / "summary.json"
        self.last_file = self.path / "last.pth.tar"
        self.failure_file = self.path / ".failed"  # hidden: a folder that holds nothing else is still free
        self._events: Any = None

    def config(self) -> Any:
        """The recorded configuration, or None where no run was begun."""
        return files.read_json(self.config_file, CONFIG, "restore it, or give another --run-dir")

    def summary(self) -> Any:
        """The summary, or None of a run that is not finished."""
        return files.read_json(self.summary_file, SUMMARY, "delete it: the run's command writes it again")

    def check(self, config: RunConfig) -> Record | None:
        """The recorded config of an earlier start of the same run, or None; another configuration is a UserError."""
        recorded = self.config()
        if recorded is None:
            if self.path.is_dir() and any(
                not entry.name.startswith(".") for entry in self.path.iterdir() if entry.name != "teacher"
            ):
                raise UserError(f"{self.path} holds files but no run; give a new or empty folder with --run-dir")
            return None
        if changes := differences(*self._compared(recorded, config)):
            raise UserError(f"{self.path} holds another run ({changes}); give another --run-dir or delete that folder")
        return recorded

    def check_length(self, config: RunConfig) -> None:
        """A UserError with the command to use, where this is a finished run of fewer epochs and otherwise the same."""
        recorded, summary = self.config(), self.summary()
        if not recorded or not summary:
            return
        there, now = self._compared(recorded, config)
        differ = {key for key in there | now if there.get(key) != now.get(key)}
        if differ <= {"epochs", "milestones"} and there["epochs"] < now["epochs"]:
            what = f"{self.path} is finished, and its learning rate was scheduled for its {there['epochs']} epochs"
            epochs = now["epochs"]
            command = f"{config.command(f'{self.path}-{epochs}')} --init-from {summary['checkpoint']}"
            raise UserError(f"{what}; another run can start from its weights: {command}")

    @staticmethod
    def _compared(recorded: Record, config: RunConfig) -> tuple[Record, Record]:
        """(recorded settings, present ones), without milestones that neither run comes to, which earlier versions
        recorded, and without digests of files that were not read yet for `config`."""
        later = [key for key, file in DIGESTS.items() if getattr(config, file) and getattr(config, key) is None]
        there, now = (
            {key: value for key, value in settings.items() if key not in later}
            | {"milestones": recipes.reached(settings.get("milestones", []), settings.get("epochs", 0))}
            for settings in (settings_of(recorded), config.identity())
        )
        return there, now

    def claim(self, wait: bool = False, say: Callable[[str], None] = lambda line: None) -> AbstractContextManager[int]:
        """A lock on the folder for as long as the context lasts."""
        return files.locked(self.path / ".lock", f"run {self.path}", wait, say)

    @property
    def in_use(self) -> bool:
        return files.is_locked(self.path / ".lock")

    def start(self, config: Record) -> None:
        """Record the configuration, and remove what killed processes left. Only inside `claim`."""
        self.failure_file.unlink(missing_ok=True)
        files.remove_leftovers(self.path)
        files.save_json(config, self.config_file)

    def records(self) -> list[Record]:
        """The epochs recorded so far, from 0 on. A last line cut off by a crash is left out; others are UserErrors."""
        lines: list[Record] = []
        try:
            for line in files.read_text(self.metrics_file).splitlines(keepends=True):
                if line.endswith("\n"):
                    lines.append(json.loads(line))
        except FileNotFoundError:
            return []
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{self.metrics_file} cannot be read (line {len(lines) + 1}: {error})") from None
        if wrong := misfit_of_records(lines):
            raise UserError(f"{self.metrics_file} is damaged: {wrong}")
        return lines

    def restore_records(self, records: Sequence[Record]) -> bool:
        """Make metrics.jsonl hold these epochs and no others. Returns whether any of them was not there."""
        try:
            found = self.records()
        except UserError:
            found = []
        if found != records:
            with files.replacing(self.metrics_file) as temporary:
                temporary.write_text("".join(json.dumps(line) + "\n" for line in records), encoding="utf-8")
        return found[: len(records)] != records

    def log(self, record: Record) -> None:
        """One epoch's record, to metrics.jsonl and TensorBoard."""
        try:
            with open(self.metrics_file, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.metrics_file)) from None
        if self._events is None:
            from torch.utils.tensorboard import SummaryWriter  # when the first epoch is over: it takes a second or two

            self._events = SummaryWriter(str(self.path), purge_step=record["epoch"])
        for key, value in record.items():
            if isinstance(value, int | float) and key != "epoch":
                self._events.add_scalar(_tag(key), value, record["epoch"])
        self._events.flush()

    def finish(self, summary: Record) -> None:
        if self._events:
            self._events.close()
        files.save_json(summary, self.summary_file)

    def fail(self, reason: str) -> None:
        """Record for reports why the run ended before it was finished."""
        self.path.mkdir(parents=True, exist_ok=True)
        with files.replacing(self.failure_file) as temporary:
            temporary.write_text(reason, encoding="utf-8")

    @property
    def failure(self) -> str | None:
        """The reason, of a run that is not finished."""
        if self.failure_file.is_file() and not self.summary_file.exists():
            return self.failure_file.read_text(encoding="utf-8", errors="replace")
        return None


def misfit_of_records(records: Any) -> str | None:
    """What is wrong with the records of a run's epochs, or None."""
    if wrong := files.misfit(records, [RECORD], "epochs"):
        return wrong
    for i, record in enumerate(records):
        if record["epoch"] != i:
            return f"the record of epoch {i} is missing"
        if ("validation_accuracy_percent" in record) != ("validation_accuracy_percent" in records[0]):
            return f"epoch {i} has other values than epoch 0"
    return None


def best_of(records: Sequence[Record]) -> Record:
    """The record of the best epoch, the first of equals, on the split that selects it: validation if there is one."""
    split = "validation" if "validation_accuracy_percent" in records[0] else "test"
    return max(records, key=lambda record: record[f"{split}_accuracy_percent"])


def _tag(key: str) -> str:
    """train_loss -> loss/train, so that TensorBoard shows train and test in one group."""
    part, _, rest = key.partition("_")
    return f"{rest}/{part}" if part in ("train", "test", "validation") else key


def differences(there: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs between a recorded configuration and the present one, as 'epochs 2 there, 3 now'."""
    differ = [key for key in {**now, **there} if there.get(key) != now.get(key)]
    return ", ".join(f"{key} {_short(there.get(key))} there, {_short(now.get(key))} now" for key in differ)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 40 else text[:36] + '..."'


# ---------------------------------------------------------------------------------------------- where it ran
def environment(device: Any) -> Record:
    """Hardware and versions of a run, to judge its times and to repeat it. `device` is a torch.device."""
    import numpy
    import torch

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "platform": platform.platform(),
        "host": platform.node(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "commit": files.commit(),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
    }


def processor() -> str:
    """The processor's model name."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()
