"""Records of runs, gathered: runs, groups of seeds, studies of paths, published numbers.

Runs are read from their folders, or from a JSON-lines file that `report.py --keep` made of such folders. Accuracies are
of the test images, in percent: `best` at the epoch chosen on the run's selection split, `last` at the last one. Means
and deviations take finished runs only.
"""

import functools
import json
import os
import statistics
from collections import Counter
from collections.abc import Collection as Seeds
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from takd import files
from takd.config import names
from takd.config.run_config import INCIDENTAL
from takd.errors import UserError
from takd.files import ANYTHING, TEXT
from takd.run.run_directory import CONFIG, SUMMARY, RunDirectory, best_of, misfit_of_records
from takd.study import plan
from takd.study.plan import NetworkPath

OUTCOMES = ("best", "last")
TRIALS = "trials"  # the subfolder of a sweep that holds its trials
# What may differ between runs that are equal except for their seed: where and when they ran, not how they were trained.
APART = {"seed", "teacher_weights", "origins", "argv", "environment", "path", "trial", *INCIDENTAL}
# The forms of a kept file's lines.
KEPT_PLAN = {"planned": [plan.PLANNED], "study?": TEXT}
KEPT_RUN = {"run": TEXT, "study?": TEXT, "config": CONFIG, "epochs": [ANYTHING], "summary?": SUMMARY, "failed?": TEXT}


@dataclass(frozen=True)
class Run:
    """One run of train.py, finished or not."""

    folder: Path
    study: Path | None  # the study folder, or kept file, that it belongs to
    config: dict[str, Any]
    records: Sequence[dict[str, Any]]
    summary: dict[str, Any] | None
    failed: str | None = None  # why it ended before it was finished

    @property
    def path(self) -> NetworkPath:
        return tuple(self.config["path"])

    @property
    def seed(self) -> int:
        return self.config["seed"]

    @property
    def finished(self) -> bool:
        return self.summary is not None

    @property
    def data(self) -> tuple[str, str | None]:
        """The data set and, of folders of images, their digest."""
        return self.config["dataset"], self.config.get("images")

    @property
    def train_images(self) -> int | None:
        """The number that it was limited to, None where it had them all."""
        whole, limit = names.DATASETS[self.config["dataset"]].train_images, self.config.get("train_images")
        return None if whole and limit and limit >= whole else limit

    @property
    def test_images(self) -> int | None:
        """None where neither the run nor the data set's name tells."""
        return (self.summary or {}).get("test_images") or names.DATASETS[self.config["dataset"]].test_images

    @property
    def test_split(self) -> str:
        """Called "test", or "val" where a folder of that name was what there is to test on."""
        return (self.summary or {}).get("test_split", "test")

    @property
    def selection(self) -> str:
        """The split that the best epoch is chosen on: "validation" or "test"."""
        first = self.records[0] if self.records else {}
        return "validation" if "validation_accuracy_percent" in first or self.config["validation_split"] else "test"

    @property
    def settings(self) -> dict[str, Any]:
        """What a run is but for its path and seed: two runs that differ here are two experiments."""
        given = {key: value for key, value in self.config.items() if key not in APART}
        used = self.config["environment"].get("precision", self.config.get("precision"))  # which "auto" was
        return given | {"precision": used, "train_images": self.train_images}

    @property
    def seconds(self) -> float:
        return sum(record["train_seconds"] + record["evaluation_seconds"] for record in self.records)

    @property
    def search(self) -> Path | None:
        """The folder of the search that this run is a trial of: an NNI experiment's, or sweep.py's."""
        if self.config.get("trial"):
            return self.folder.parent
        return self.folder.parent.parent if self.folder.parent.name == TRIALS else None

    def accuracy(self, which: str) -> float | None:
        """Of the test images at the "best" or "last" epoch, of the selection split at the best: "selection".

        None before the first epoch is over.
        """
        if not self.records:
            return None
        if which == "selection":
            return self.best_record[f"{self.selection}_accuracy_percent"]
        return (self.best_record if which == "best" else self.records[-1])["test_accuracy_percent"]

    @functools.cached_property
    def best_record(self) -> dict[str, Any]:
        return best_of(self.records)

    @property
    def progress(self) -> str:
        return f"epoch {len(self.records)} of {self.config['epochs']}"


@dataclass
class Collection:
    """Runs, what could not be read, and {study: {(path, seed): why it failed, or None}} that was planned."""

    runs: dict[Path, Run] = field(default_factory=dict)
    unreadable: list[str] = field(default_factory=list)
    planned: dict[Path, dict[tuple[NetworkPath, int], str | None]] = field(default_factory=dict)

    def add(self, run: Run) -> None:
        """A run as it was read: its files each have their form, but may contradict each other."""
        records, epochs, wrong = run.records, run.config["epochs"], None
        if len(records) > epochs or (run.summary and len(records) < epochs):
            wrong = f"metrics.jsonl has {len(records)} of {epochs} epochs"
        elif records and run.config["validation_split"] and "validation_accuracy_percent" not in records[0]:
            wrong = "metrics.jsonl has no validation_accuracy_percent"
        elif run.summary and run.summary["path"] != run.config["path"]:
            wrong = "summary.json is of another run"
        if wrong:
            self.unreadable.append(f"{run.folder}: {wrong}")
        else:
            self.runs[run.folder.resolve()] = run

    def plan(self, study: Path, planned: Iterable[Mapping[str, Any]]) -> None:
        self.planned[study] = {
            (tuple(training["path"]), training["seed"]): training.get("failed") for training in planned
        }


def collect(places: Iterable[str | Path]) -> Collection:
    """Every run below the folders and in the JSON-lines files."""
    found = Collection()
    for place in map(Path, places):
        if place.suffix == ".jsonl" and place.is_file():
            _read_kept(place, found)
        elif place.is_dir():
            _read_folders(place, found)
        else:
            fix = "give folders with runs of train.py, such as runs/paths"
            raise UserError(f"{place} is neither a folder nor a .jsonl file; {fix}")
    return found


def _read_folders(folder: Path, found: Collection) -> None:
    for file in sorted(folder.rglob("config.json")):
        directory = RunDirectory(file.parent)
        above = file.parent.parent
        study = above if (above / plan.STUDY_FILE).is_file() and not (above / TRIALS).is_dir() else None
        if study and study not in found.planned:
            planned = plan.read(study).items()
            found.plan(study, (training | {"failed": RunDirectory(study / name).failure} for name, training in planned))
        try:
            contents = directory.config(), directory.records(), directory.summary()
        except UserError as error:
            found.unreadable.append(str(error).partition(";")[0])
        else:
            found.add(Run(file.parent, study, *contents, directory.failure))


# --------------------------------------------------------------------------------------------------- kept runs
def keep(collection: Collection, file: Path) -> None:
    """Write runs to one JSON-lines file: one line per study with its plan, and one line per run."""
    above = os.path.commonpath([run.folder.resolve().parent for run in collection.runs.values()])

    def name(folder: Path) -> str:
        return os.path.relpath(folder.resolve(), above)

    def failed(why: str | None) -> dict[str, Any]:
        return {"failed": why} if why else {}

    lines: list[dict[str, Any]] = []
    for study, planned in collection.planned.items():
        trainings = [{"path": path, "seed": seed} | failed(why) for (path, seed), why in planned.items()]
        lines.append({"study": name(study), "planned": trainings})
    for run in collection.runs.values():
        place = {"run": name(run.folder), "study": run.study and name(run.study)} | failed(run.failed)
        lines.append(place | {"config": run.config, "summary": run.summary, "epochs": run.records})
    with files.replacing(file) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def _read_kept(file: Path, found: Collection) -> None:
    try:
        for number, line in enumerate(map(json.loads, files.read_text(file).splitlines()), 1):
            planned = isinstance(line, dict) and "planned" in line
            wrong = files.misfit(line, KEPT_PLAN if planned else KEPT_RUN)
            if wrong := wrong or (None if planned else misfit_of_records(line["epochs"])):
                raise ValueError(f"line {number}: {wrong}")
            if planned:
                found.plan(file / (line.get("study") or "."), line["planned"])
            else:
                name = line.get("study", "." if file in found.planned else None)
                study = None if name is None else file / name
                contents = line["config"], line["epochs"], line.get("summary"), line.get("failed")
                found.add(Run(file / line["run"], study, *contents))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read ({error}); report.py --keep writes such files") from None


# ----------------------------------------------------------------------------------------------------- groups
@dataclass
class Group:
    """Runs that differ only in their seed."""

    path: NetworkPath
    config: dict[str, Any]  # of one of them
    runs: list[Run] = field(default_factory=list)

    @property
    def finished(self) -> dict[int, Run]:
        return {run.seed: run for run in self.runs if run.finished}

    def over(self, seeds: Seeds[int]) -> "Group":
        """The runs with these seeds; all, if none is among them."""
        return Group(self.path, self.config, [run for run in self.runs if run.seed in seeds] or self.runs)

    def values(self, which: str) -> dict[int, float]:
        """{seed: accuracy} of the finished runs."""
        return {seed: run.accuracy(which) or 0.0 for seed, run in self.finished.items()}

    def mean(self, which: str) -> float | None:
        values = self.values(which).values()
        return statistics.fmean(values) if values else None

    def deviation(self, which: str) -> float | None:
        values = list(self.values(which).values())
        return statistics.stdev(values) if len(values) > 1 else None

    @property
    def test_images(self) -> int | None:
        return next((run.test_images for run in self.finished.values()), None)

    @property
    def settings(self) -> dict[str, Any]:
        return self.runs[0].settings

    @property
    def epoch_seconds(self) -> float | None:
        """Median time of training and evaluating one epoch, over all runs; None before the first is over."""
        seconds = [
            record["train_seconds"] + record["evaluation_seconds"] for run in self.runs for record in run.records
        ]
        return statistics.median(seconds) if seconds else None

    @property
    def method(self) -> str | None:
        return self.config.get("method")

    @property
    def options(self) -> dict[str, Any]:
        return self.config.get("method_options") or {}


def group(runs: Iterable[Run]) -> list[Group]:
    """Runs by everything but the seed. A run whose seed its group has already begins another group."""
    groups: dict[Any, Group] = {}
    seen: Counter[Any] = Counter()
    for run in sorted(runs, key=lambda run: (run.seed, str(run.folder))):
        alike = run.path, json.dumps(run.settings, sort_keys=True)
        again = seen[alike, run.seed]
        seen[alike, run.seed] += 1
        groups.setdefault((alike, again), Group(run.path, run.config)).runs.append(run)
    return list(groups.values())


def seeds_in_common(groups: Iterable[Group]) -> set[int]:
    """The seeds that every group with finished runs has finished: what comparisons are made over."""
    finished = [set(group.finished) for group in groups if group.finished]
    return set.intersection(*finished) if finished else set()


# ---------------------------------------------------------------------------------------------------- studies
@dataclass
class Study:
    """Paths from one teacher on one data set: {path: Group}, the sizes alone among them, and what was planned.

    With guidance "all" each network of a path learned from all above it; the groups have their guided paths.
    """

    folder: Path | None
    dataset: str
    sizes: NetworkPath
    cells: dict[NetworkPath, Group]
    planned: dict[NetworkPath, int]  # number of seeds
    ambiguous: list[NetworkPath]  # paths run with several settings; the cells hold one of these
    failed: dict[tuple[NetworkPath, int], str]  # {(path, seed): why}
    guidance: str = "last"

    @property
    def teacher(self) -> str:
        return self.sizes[0]

    @property
    def student(self) -> str:
        return self.sizes[-1]

    @property
    def title(self) -> str:
        how = ", each network from all above it" if self.guidance == "all" else ""
        return f"From {self.teacher} to {self.student} on {self.dataset}{how}"

    @functools.cached_property
    def seeds(self) -> set[int]:
        """What paths are compared over: the seeds that all of them to the student have finished."""
        return seeds_in_common(self.cells[path] for path in self.ends if path in self.cells)

    def cell(self, path: NetworkPath) -> Group | None:
        """A path's runs over the seeds in common; over its own, where it has none of these."""
        return self.cells[path].over(self.seeds) if path in self.cells else None

    @property
    def ends(self) -> list[NetworkPath]:
        """Paths from the teacher to the student, most assistants first."""
        paths = [path for path in {**self.planned, **self.cells} if len(path) > 1 and path[-1] == self.student]
        return sorted(paths, key=lambda path: (-len(path), [self.sizes.index(network) for network in path]))

    @property
    def rows(self) -> list[NetworkPath]:
        """The paths in `ends`, and those that end before the student."""
        paths = [path for path in {**self.planned, **self.cells} if len(path) > 1]
        leaves = [path for path in paths if not any(other[: len(path)] == path and other != path for other in paths)]
        return self.ends + [path for path in leaves if path[-1] != self.student]

    def mean(self, path: NetworkPath) -> float | None:
        """Of the best epochs, over the seeds in common."""
        cell = self.cell(path)
        return cell.mean("best") if cell else None

    def best(self) -> NetworkPath | None:
        """The path to the student with the highest mean, None before one is finished."""
        means = {path: mean for path in self.ends if (mean := self.mean(path)) is not None}
        return max(means, key=lambda path: means[path], default=None)

    def short(self, path: NetworkPath) -> str:
        """A path in numbers only if these are unambiguous, as within one family."""
        return " > ".join(str(plan.size(network)) if plan.one_family(self.sizes) else network for network in path)


def studies(found: Collection) -> list[Study]:
    """The studies among runs: those planned in a folder, and other runs where two paths end in one student. These are
    of one study if they agree in their images, recipe, epochs and guidance. Networks alone and with one teacher belong
    to both guidances; a search's trials to none, nor do paths in which a network teaches one of its own kind.
    """
    parts: dict[Any, list[Run]] = {}
    for run in found.runs.values():
        if run.search or len(set(plan.networks(run.path))) < len(run.path):
            continue
        alike = ("recipe", "epochs", "image_size", "validation_split")
        comparable = None if run.study else (run.train_images, *map(run.config.get, alike))
        for guidance in _guidances(run.path):
            parts.setdefault((run.study, run.data, comparable, guidance), []).append(run)
    result = []
    for (folder, _, _, guidance), members in parts.items():
        noted = found.planned.get(folder, {})
        planned = [plan.networks(path) for path, _ in noted if guidance in _guidances(path)]
        reasons = {training: why for training, why in noted.items() if why}
        reasons |= {(run.path, run.seed): run.failed for run in members if run.failed}
        failed = {(plan.networks(path), seed): why for (path, seed), why in reasons.items()}
        paths = {plan.networks(run.path) for run in members} | {*planned}
        if guidance == "all" and max(map(len, paths)) < 3:
            continue
        for teacher in dict.fromkeys(path[0] for path in sorted(paths, key=len, reverse=True) if len(path) > 1):
            taught = {path for path in paths if path[0] == teacher and len(path) > 1}
            sizes = _sizes(taught)
            of_it = [run for run in members if plan.networks(run.path) in {*taught, *zip(sizes, strict=True)}]
            cells: dict[NetworkPath, Group] = {}
            ambiguous = []
            for candidate in sorted(group(of_it), key=lambda g: (len(g.finished), g.mean("best") or 0)):
                path = plan.networks(candidate.path)
                if path in cells:
                    ambiguous.append(path)
                cells[path] = candidate
            wanted = [path for path in planned if path in taught or (len(path) == 1 and path[0] in sizes)]
            seeds = {path: wanted.count(path) for path in wanted}
            of_these = {key: why for key, why in failed.items() if key[0] in {*wanted, *cells}}
            study = Study(folder, data_name(members[0]), sizes, cells, seeds, ambiguous, of_these, guidance)
            if planned or len(study.ends) > 1:
                result.append(study)
    return result


def _guidances(path: NetworkPath) -> list[str]:
    """The guidances of the studies that a path belongs to."""
    networks = plan.networks(path)
    return [name for name, form in {"last": networks, "all": plan.guided(networks)}.items() if path == form]


def data_name(run: Run) -> str:
    """A data set; folders of images by their name and the digest of their contents."""
    dataset, digest = run.data
    place = Path(run.config.get("dataset_dir") or "").name
    return f"{dataset} {place} (images {digest[:8]})" if digest else dataset


def _sizes(paths: Iterable[NetworkPath]) -> NetworkPath:
    """The networks of paths, ordered so that every path goes through them from left to right."""
    networks = list(dict.fromkeys(network for path in sorted(paths, key=len, reverse=True) for network in path))
    ordered: list[str] = []
    while networks:  # next, one that no remaining network precedes in a path
        remaining = [[network for network in path if network in networks] for path in paths]
        preceded = {network for path in remaining for network in path[1:]}
        chosen = max([each for each in networks if each not in preceded] or networks, key=plan.size)
        ordered.append(chosen)
        networks.remove(chosen)
    return tuple(ordered)
