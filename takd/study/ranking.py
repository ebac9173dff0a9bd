"""Searches, sweep.py's and NNI's: settings ranked by their mean over seeds, on the split that epochs are chosen on."""

import shlex
from dataclasses import dataclass
from pathlib import Path

from takd.config import run_config
from takd.study import collect
from takd.study.collect import Collection, Group, Run
from takd.study.formatting import SYMBOLS, outcome, seeds_of


@dataclass
class Search:
    """Trials of one folder, grouped by everything but the seed: the best group first, what is not finished last."""

    folder: Path
    groups: list[Group]

    @property
    def best(self) -> Group | None:
        """None before a trial is finished."""
        return self.groups[0] if self.groups[0].finished else None

    @property
    def searched(self) -> list[str]:
        """The method's options that differ between the groups, temperature and lambda first."""
        keys = dict.fromkeys([*SYMBOLS, *(key for group in self.groups for key in group.options)])
        return [key for key in keys if len({group.options.get(key) for group in self.groups}) > 1]

    @property
    def selection(self) -> str:
        """'validation' or 'test': the split that trials are judged on."""
        return self.groups[0].runs[0].selection

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Header, and a row a setting. Accuracies are of the best epoch."""
        judged = ["validation, %"] if self.selection == "validation" else []
        header = [*(SYMBOLS.get(key, key) for key in self.searched), "seeds", *judged, "test, %"]
        rows = []
        for group in self.groups:
            values = [group.options.get(key) for key in self.searched]
            cells = [f"{value:g}" if isinstance(value, int | float) else f"{value or ''}" for value in values]
            outcomes = [outcome(group, which) for which in ("selection", "best")]
            rows.append([*cells, seeds_of(group), *outcomes[-len(judged) - 1 :]])
        return header, rows

    @property
    def command(self) -> str:
        """The train.py command of the best setting's first run."""
        config = min(self.groups[0].finished.items())[1].config
        return shlex.join(["python3", "train.py", *run_config.command(config, config["origins"])])


def searches(found: Collection) -> list[Search]:
    """A search a folder, data set and path."""
    parts: dict[tuple[Path, str, collect.NetworkPath], list[Run]] = {}
    for run in found.runs.values():
        if run.search:
            parts.setdefault((run.search, run.config["dataset"], run.path), []).append(run)
    by_mean = [sorted(collect.group(runs), key=lambda g: -(g.mean("selection") or -1)) for runs in parts.values()]
    return [Search(folder, groups) for (folder, *_), groups in zip(parts, by_mean, strict=True)]
