"""Console output: setup lines, one row per epoch, and progress in between. Epochs are counted from 1 here."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from takd.config.run_config import RunConfig

_RECORDED_APART = ("loss", "accuracy_percent", "images_per_second", "seconds")  # these have columns of their own


class Console:
    """Shows how far training and evaluation are as a bar on a terminal, elsewhere as one plain line per minute."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.columns: list[str] = []

    def say(self, line: str) -> None:
        print(line, file=self.stream, flush=True)

    def row(self, record: dict[str, Any], epochs: int, seconds_left: float, test: str = "test") -> None:
        """An epoch's record as one aligned row, with a heading above the first. `test` is the test split's name."""
        cells = {name.replace("test", test): cell for name, cell in _cells(record, epochs, seconds_left).items()}
        if self.columns != list(cells):
            self.columns = list(cells)
            self.say("  ".join(f"{name:>{_width(name)}}" for name in cells))
        self.say("  ".join(f"{text:>{_width(name)}}" for name, text in cells.items()))

    @contextlib.contextmanager
    def progress(self, title: str, images: int, done: int = 0) -> Iterator[Callable[[int], object]]:
        """A function to call with the number of images that were done since."""
        if self.stream.isatty():
            from tqdm import tqdm

            with tqdm(total=images, initial=done, desc=title, unit=" img", leave=False, file=self.stream) as bar:
                yield bar.update
        else:
            yield _MinuteLines(self.say, title, images, done)


class _MinuteLines:
    def __init__(self, say: Callable[[str], None], title: str, images: int, done: int) -> None:
        self.say, self.title, self.images, self.done = say, title, images, done
        self.next = time.monotonic() + 60

    def __call__(self, images: int) -> None:
        self.done += images
        if time.monotonic() > self.next:
            self.next = time.monotonic() + 60
            self.say(f"{self.title}: {self.done:,} of {self.images:,} images")


def defaults_line(config: RunConfig) -> str | None:
    """What a command without --student or --dataset takes; None where both are given."""
    taken = [key for key in ("student", "dataset") if config.origins[key] == "default"]
    if not taken:
        return None
    what = " and ".join(f"--{key} {getattr(config, key)}" for key in taken)
    return f"defaults  {what}, as in the released code; recipe {config.recipe}, {counted(config.epochs, 'epoch')}"


def setup_lines(config: RunConfig, hardware: str, parameters: int) -> Iterator[str]:
    """The first lines of a run: device, student, method and recipe."""
    yield f"device    {hardware}"
    source = f", from {config.init_from}" if config.init_from else ""
    yield f"student   {config.student}, {parameters:,} parameters{source}"
    if config.teacher:
        options = ", ".join(f"{key} {value}" for key, value in (config.method_options or {}).items())
        source = (
            f" from {' + '.join(config.teachers)}"
            if config.method != "base"
            else ", labels only: the teacher is unused"
        )
        yield f"method    {config.method}{source}{f' ({options})' * bool(options)}"
    milestones = ", ".join(map(str, config.milestones))
    decay = f" x{config.learning_rate_decay:g} after epoch {milestones}" if milestones else ""
    decay += f" to 0 along a {config.schedule}" if config.schedule else ""
    decay += f" after a warm-up of {config.warmup_epochs}" if config.warmup_epochs else ""
    smoothing = f"label smoothing {config.label_smoothing:g}, " if config.label_smoothing else ""
    yield (
        f"recipe    {config.recipe}: {counted(config.epochs, 'epoch')}, batch size {config.batch_size}, learning rate "
        f"{config.learning_rate:g}{decay}, momentum {config.momentum:g}{' (Nesterov)' * config.nesterov}, "
        f"weight decay {config.weight_decay:g}, {smoothing}augmentation {config.augment}, seed {config.seed}"
    )


def _cells(record: dict[str, Any], epochs: int, seconds_left: float) -> dict[str, str]:
    parts = [key for key in record if key.startswith("train_") and key.removeprefix("train_") not in _RECORDED_APART]
    cells = {
        "epoch": f"{record['epoch'] + 1}/{epochs}",
        "lr": f"{record['learning_rate']:.4g}",
        "loss": f"{record['train_loss']:.4f}",
    }
    cells |= {key.removeprefix("train_"): f"{record[key]:.4f}" for key in parts}
    cells |= {"train %": f"{record['train_accuracy_percent']:.2f}"}
    for split in ("validation", "test"):
        if f"{split}_accuracy_percent" in record:
            cells[f"{split} loss"] = f"{record[f'{split}_loss']:.4f}"
            cells[f"{split} %"] = f"{record[f'{split}_accuracy_percent']:.2f}"
    return cells | {"img/s": f"{record['train_images_per_second']:.0f}", "left": duration(seconds_left)}


def _width(name: str) -> int:
    return max(len(name), 7)


def counted(number: int, what: str) -> str:
    """1 epoch, 2 epochs."""
    return f"{number} {what}{'s' * (number != 1)}"


def duration(seconds: float) -> str:
    """3:07 or 1:02:45."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
