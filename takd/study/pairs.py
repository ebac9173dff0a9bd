"""Methods side by side: tables of one training setup, a row a method, a column a data set and pair of networks."""

import functools
import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field

from takd.study import collect
from takd.study.collect import Collection, Group, Study
from takd.study.formatting import SYMBOLS, folder_of, method_of, seeds_of
from takd.study.plan import NetworkPath, arrows

# What may differ within a table: its rows and columns.
ROWS_AND_COLUMNS = ("student", "teacher", "dataset", "images", "method", "method_options", "method_file", *SYMBOLS)


@dataclass
class Pair:
    """One column: the methods on a data set and path. The row `base` is the student without distillation."""

    dataset: str
    path: NetworkPath
    rows: dict[str, Group] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{arrows(self.path)}, {self.dataset}"

    @functools.cached_property
    def cells(self) -> dict[str, Group]:
        """The rows with finished runs, over the seeds that these have in common."""
        seeds = collect.seeds_in_common(self.rows.values())
        return {name: group.over(seeds) for name, group in self.rows.items() if group.finished}

    @property
    def teacher_sentence(self) -> str:
        summaries = [run.summary or {} for group in self.rows.values() for run in group.runs]
        known = [summary.get("teacher_test_accuracy_percent") for summary in summaries]
        if not (percents := [percent for percent in known if percent is not None]):
            return ""
        low, high = min(percents), max(percents)
        has = f"{low:.2f} %" if high - low < 0.005 else f"{low:.2f} to {high:.2f} %"
        return f"The teacher {arrows(self.path[:-1])} has {has} on {self.dataset}."


@dataclass
class Table:
    """Pairs whose trainings are alike in everything but the networks, the data set and the method."""

    pairs: list[Pair]

    @property
    def methods(self) -> list[str]:
        """The rows: base first, then by the mean over the pairs that have them."""
        names = dict.fromkeys(name for pair in self.pairs for name in pair.cells)
        return sorted(names, key=lambda name: (name != "base", self._rank(name)))

    @property
    def seeds(self) -> list[str]:
        """The different numbers of seeds, finished and not, that its cells have."""
        return sorted({seeds_of(pair.rows[name]) for pair in self.pairs for name in pair.cells})

    @property
    def best(self) -> str:
        """The method with the highest mean among those that the most pairs have."""
        return min(self.methods, key=self._rank)

    def _rank(self, name: str) -> tuple[int, float]:
        found = [pair.cells[name].mean("best") or 0 for pair in self.pairs if name in pair.cells]
        return -len(found), -statistics.fmean(found)


def tables(found: Collection, studies: Iterable[Study]) -> list[Table]:
    """The tables among runs: pairs with two or more methods, or with one and its base where no study shows them.

    Planned studies and searches have sections of their own.
    """
    shown = {(study.dataset, path) for study in studies for path in study.cells}
    setups: dict[str, list[Group]] = {}
    for group in collect.group(run for run in found.runs.values() if not run.search and not run.study):
        setup = {key: value for key, value in group.settings.items() if key not in ROWS_AND_COLUMNS}
        setups.setdefault(json.dumps(setup, sort_keys=True), []).append(group)

    def needed(pair: Pair) -> int:
        return 2 if (pair.dataset, pair.path) in shown or "base" not in pair.cells else 1

    result = []
    for groups in setups.values():
        pairs: dict[tuple[str, NetworkPath], Pair] = {}
        variants = {(group.method, method_of(group)) for group in groups}
        several = {method for method, _ in variants if sum(method == other for other, _ in variants) > 1}
        for group in (group for group in groups if len(group.path) > 1):
            key = collect.data_name(group.runs[0]), group.path
            rows = pairs.setdefault(key, Pair(*key)).rows
            name = method_of(group) if group.method in several else group.method or ""
            rows[f"{name} ({folder_of(group)})" if name in rows else name] = group
        for pair in pairs.values():
            alone = [group for group in groups if group.path == pair.path[-1:]]
            alone = [group for group in alone if collect.data_name(group.runs[0]) == pair.dataset]
            if alone and "base" not in pair.rows:
                pair.rows["base"] = max(alone, key=lambda group: len(group.finished))

        if wide := [pair for pair in pairs.values() if len(pair.cells.keys() - {"base"}) >= needed(pair)]:
            result.append(Table(wide))
    return result
