"""One run's folder, records and console.

    runs/<name>/config.json                     what was asked for and where each value came from, versions, device
                metrics.jsonl                   a line an epoch
                <model>_<trial>_best.pth.tar    the best epoch's network, in the released code's format
                last.pth.tar                    everything that continuing needs
                summary.json                    written when the run is finished, and only then
                events.out.tfevents.*           TensorBoard

Commands talk to each other through these files. Nothing parses the console.
"""

import contextlib
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

from takd import files
from takd.config.names import UserError

HERE = Path(__file__).resolve().parent


class RunDirectory:
    """The files of one run. Nothing is written before `claim` has found the folder free, or its own."""

    def __init__(self, path):
        self.path = Path(path)
        self.config_file = self.path / "config.json"
        self.metrics_file = self.path / "metrics.jsonl"
        self.summary_file = self.path / "summary.json"
        self.last_file = self.path / "last.pth.tar"
        self._events = None

    def read(self, file):
        """A JSON file of this run, or None where there is none."""
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise UserError(f"{file} cannot be read ({error}); restore it, or give another --run-dir") from None

    def check(self, identity):
        """The recorded config of an earlier start of the same run, or None. Another configuration's folder is refused."""
        recorded = self.read(self.config_file)
        if recorded is None:
            if self.path.is_dir() and any(not entry.name.startswith(".") for entry in self.path.iterdir()):
                if not (self.path / "teacher").is_dir():
                    raise UserError(f"{self.path} holds files but no run; give a new or empty folder with --run-dir")
            return None
        differ = [key for key in identity if recorded.get(key) != identity[key]]
        if differ:
            changes = ", ".join(f"{key} {_short(recorded.get(key))} there, {_short(identity[key])} now" for key in differ)
            raise UserError(f"{self.path} holds another run ({changes}); give another --run-dir or delete that folder")
        return recorded

    def claim(self, wait=False, say=lambda line: None):
        """A lock on the folder for as long as the context lasts."""
        return files.locked(self.path / ".lock", f"run {self.path}", wait, say)

    @property
    def in_use(self):
        return files.is_locked(self.path / ".lock")

    def start(self, config, first_epoch):
        """Record the configuration and drop records of epochs that will be run again."""
        files.save_json(config, self.config_file)
        kept = [line for line in self.records() if line["epoch"] < first_epoch]
        with files.replacing(self.metrics_file) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")

    def records(self):
        """The epochs recorded so far. A last line cut off by a crash is left out."""
        lines = []
        with contextlib.suppress(FileNotFoundError):
            for line in self.metrics_file.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError):
                    lines.append(json.loads(line))
        return lines

    def log(self, record):
        """One epoch's record, to metrics.jsonl and TensorBoard."""
        with open(self.metrics_file, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if self._events is None:
            self._events = _event_writer(self.path, purge_step=record["epoch"])
        for key, value in record.items():
            if isinstance(value, int | float) and key != "epoch":
                self._events.add_scalar(_tag(key), value, record["epoch"])
        self._events.flush()

    def finish(self, summary):
        files.save_json(summary, self.summary_file)

    def close(self):
        if self._events:
            self._events.close()


def _event_writer(path, purge_step):
    """torch's SummaryWriter, imported when the first epoch is over: it takes a second or two."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(path), purge_step=purge_step)


def _tag(key):
    """train_loss -> loss/train, so that TensorBoard draws train and test into one group."""
    part, _, rest = key.partition("_")
    return f"{rest}/{part}" if part in ("train", "test", "validation") else key


def _short(value):
    text = json.dumps(value)
    return text if len(text) < 40 else text[:36] + "...\""


def environment(device):
    """Where a run ran: what a reader needs to judge its times and to repeat it."""
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
        "commit": _commit(),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
    }


def processor():
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


def _commit():
    """This suite's commit, with a mark where files were changed since; None outside a clone."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        git = ["git", "-C", str(HERE)]
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True).stdout
        return commit + (" (changed)" if changed else "")
    return None


# -------------------------------------------------------------------------------------------------- console
class Console:
    """Lines for people. On a terminal a bar shows the steps of the epoch; elsewhere a plain line a minute does."""

    def __init__(self, stream=None):
        self.stream = stream or sys.stdout
        self.columns = None
        self._bar = None

    def say(self, line):
        print(line, file=self.stream, flush=True)

    def row(self, record, epochs, eta_seconds):
        """An epoch's record as one aligned row, under a heading before the first."""
        cells = _cells(record, epochs, eta_seconds)
        if self.columns != list(cells):
            self.columns = list(cells)
            self.say("  ".join(f"{name:>{_width(name)}}" for name in cells))
        self.say("  ".join(f"{text:>{_width(name)}}" for name, text in cells.items()))

    @contextlib.contextmanager
    def progress(self, epoch, steps, done, batch_size):
        """A function to call after each step."""
        if self.stream.isatty():
            from tqdm import tqdm

            with tqdm(
                total=steps * batch_size, initial=done * batch_size, desc=f"epoch {epoch}", unit=" img", leave=False, file=self.stream
            ) as bar:
                yield lambda: bar.update(batch_size)
        else:
            yield _MinuteLines(self.say, epoch, steps, done)


class _MinuteLines:
    def __init__(self, say, epoch, steps, done):
        self.say, self.epoch, self.steps, self.done = say, epoch, steps, done
        self.next = time.monotonic() + 60

    def __call__(self):
        self.done += 1
        if time.monotonic() > self.next:
            self.next = time.monotonic() + 60
            self.say(f"epoch {self.epoch}: step {self.done} of {self.steps}")


def _cells(record, epochs, eta_seconds):
    parts = [key for key in record if key.startswith("train_") and key.removeprefix("train_") not in _RECORDED_APART]
    cells = {"epoch": f"{record['epoch']}/{epochs - 1}", "lr": f"{record['learning_rate']:g}", "loss": f"{record['train_loss']:.4f}"}
    cells |= {key.removeprefix("train_"): f"{record[key]:.4f}" for key in parts}
    cells |= {"train %": f"{record['train_accuracy_percent']:.2f}"}
    for split in ("validation", "test"):
        if f"{split}_accuracy_percent" in record:
            cells |= {f"{split} loss": f"{record[f'{split}_loss']:.4f}", f"{split} %": f"{record[f'{split}_accuracy_percent']:.2f}"}
    return cells | {"img/s": f"{record['train_images_per_second']:.0f}", "left": duration(eta_seconds)}


_RECORDED_APART = ("loss", "accuracy_percent", "images_per_second", "seconds")


def _width(name):
    return max(len(name), 7)


def duration(seconds):
    """3:07 or 1:02:45."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
