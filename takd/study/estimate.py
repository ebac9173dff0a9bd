"""Time and disk space that a plan will take, from earlier runs on this machine or from `train.py --measure`."""

import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from takd.config import names
from takd.config.run_config import RunConfig
from takd.errors import UserError
from takd.run.run_directory import RunDirectory, processor
from takd.study.plan import Training


@dataclass(frozen=True)
class Cost:
    """What one network takes on this machine."""

    epoch_seconds: float
    parameters: int


def measured_cost(line: Mapping[str, Any], config: RunConfig) -> Cost:
    """A line of train.py --measure as a Cost on this data set."""
    data = names.DATASETS[config.dataset]
    assert data.train_images and data.test_images
    training = (config.train_images or data.train_images) / line["train_images_per_second"]
    evaluation = (config.test_images or data.test_images) / line["evaluation_images_per_second"]
    return Cost(training + evaluation, line["parameters"])


def earlier_costs(folders: Iterable[str | Path], config: RunConfig, device: str) -> dict[str, Cost]:
    """{network: Cost} from finished runs on the same data set, batch size, machine and kind of device."""
    found: dict[str, list[Cost]] = {}
    keys = ("dataset", "batch_size", "image_size", "train_images", "test_images")
    comparable = {key: config.record().get(key) for key in keys}
    for place in (place for folder in folders for depth in ("*/", "*/*/") for place in Path(folder).glob(depth)):
        run = RunDirectory(place)
        try:
            recorded, summary = run.config(), run.summary()
        except UserError:
            continue
        if recorded and summary and all(recorded.get(key) == value for key, value in comparable.items()):
            where = recorded["environment"]
            if where["host"] == platform.node() and (where["device"] == processor()) == (device == "cpu"):
                cost = Cost(summary["seconds"] / summary["epochs"], summary["parameters"])
                found.setdefault(summary["model"], []).append(cost)
    means = {network: fmean(cost.epoch_seconds for cost in costs) for network, costs in found.items()}
    return {network: Cost(seconds, found[network][0].parameters) for network, seconds in means.items()}


def estimate(
    trainings: Sequence[Training], configs: Mapping[Training, RunConfig], costs: Mapping[str, Cost], jobs: int
) -> tuple[dict[Training, float], float, float]:
    """(seconds of each training, seconds of all that is left with `jobs` at once, bytes on disk at the end).

    A teacher computes each image's logits once per view and seed, for the first student that needs them, at a third of
    the cost of a training step.
    """
    seconds: dict[Training, float] = {}
    disk = 0.0
    for training in trainings:
        cost = costs[training.path[-1]]
        seconds[training] = configs[training].epochs * cost.epoch_seconds
        disk += 3 * 8 * cost.parameters  # weights and momentum in float32: the best file's, and in last.pth.tar both
    for teacher in {training.teacher for training in trainings if training.teacher}:
        student = next(training for training in trainings if training.teacher is teacher)
        config, views = configs[student], names.VIEWS[configs[student].augment]
        data = names.DATASETS[config.dataset]
        assert data.train_images and data.classes
        seconds[student] += min(config.epochs, views or config.epochs) * costs[teacher.path[-1]].epoch_seconds / 3
        if views:  # those drawn for an image are kept
            disk += 2 * data.train_images * data.classes * views * (1 - (1 - 1 / views) ** config.epochs)
    longest: dict[Training | None, float] = {None: 0}
    for training in trainings:
        longest[training] = (0 if training.finished else seconds[training]) + longest.get(training.teacher, 0)
    left = [training for training in trainings if not training.finished]
    total = sum(seconds[training] for training in left)
    chain = max((longest[training] for training in left), default=0) if jobs > 1 else 0
    return seconds, max(total / jobs, chain), disk
