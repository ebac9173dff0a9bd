"""What runs recorded, gathered and compared: groups of seeds, studies of paths, paired tests, published numbers. No torch.

Accuracies are of the test images, in percent: `best` at the epoch chosen on the run's selection split, `last` at the last one.
Means, deviations and tests take finished runs only.
"""

import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path

from takd.config import run_config as settings
from takd.config.names import UserError
from takd.run import run_directory as runlog
from takd.study import plan as study

HERE = Path(__file__).resolve().parent
OUTCOMES = ("best", "last")
# What may differ between runs that are the same but for their seed: where and when they ran, not what was asked for.
APART = {"seed", "teacher_weights", "origins", "argv", "environment", "path", "trial", *settings.INCIDENTAL}


@dataclass(frozen=True)
class Run:
    """One run folder of train.py, finished or not."""

    folder: Path
    config: dict
    records: tuple
    summary: dict | None

    @property
    def path(self):
        return tuple(self.config["path"])

    @property
    def seed(self):
        return self.config["seed"]

    @property
    def finished(self):
        return self.summary is not None

    @property
    def seconds(self):
        return sum(record["train_seconds"] + record["evaluation_seconds"] for record in self.records)

    def accuracy(self, which):
        """Test accuracy, None before the first epoch is over."""
        if not self.records:
            return None
        split = "validation" if self.config["validation_split"] else "test"
        best = max(self.records, key=lambda record: record[f"{split}_accuracy_percent"])  # the first of equals, as train.py
        return (best if which == "best" else self.records[-1])["test_accuracy_percent"]

    @property
    def progress(self):
        return f"epoch {len(self.records)} of {self.config['epochs']}"


def collect(folders):
    """(every run below the folders, [what could not be read])."""
    runs, unreadable = {}, []
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder; give folders with runs of train.py, such as runs/paths")
        for file in sorted(folder.rglob("config.json")):
            directory = runlog.RunDirectory(file.parent)
            try:
                config, summary = directory.read(file), directory.read(directory.summary_file)
                run = Run(file.parent, config, tuple(directory.records()), summary)
                run.path, run.seed, run.accuracy("best"), run.seconds, config["dataset"], config["environment"]["host"]
            except (UserError, KeyError, TypeError) as error:
                unreadable.append(f"{file.parent}: {error}")
                continue
            runs[file.parent.resolve()] = run
    return list(runs.values()), unreadable


# ----------------------------------------------------------------------------------------------------- groups
@dataclass
class Group:
    """Runs that differ in their seed alone."""

    path: tuple
    config: dict  # of one of them
    runs: list = field(default_factory=list)

    @property
    def finished(self):
        return {run.seed: run for run in self.runs if run.finished}

    def values(self, which):
        """{seed: accuracy} of the finished runs."""
        return {seed: run.accuracy(which) for seed, run in self.finished.items()}

    def mean(self, which):
        values = self.values(which).values()
        return statistics.fmean(values) if values else None

    def deviation(self, which):
        values = list(self.values(which).values())
        return statistics.stdev(values) if len(values) > 1 else None

    @property
    def epoch_seconds(self):
        """Median training and evaluation of one epoch, over all runs; None before the first is over."""
        seconds = [record["train_seconds"] + record["evaluation_seconds"] for run in self.runs for record in run.records]
        return statistics.median(seconds) if seconds else None

    @property
    def method(self):
        return self.config.get("method")

    @property
    def options(self):
        return self.config.get("method_options") or {}


def group(runs):
    """Runs by everything but the seed. A run whose seed its group has already begins another group."""
    groups = {}
    for run in sorted(runs, key=lambda run: (run.seed, str(run.folder))):
        key = (run.path, json.dumps({k: v for k, v in run.config.items() if k not in APART}, sort_keys=True))
        for again in range(len(runs)):
            members = groups.setdefault((key, again), Group(run.path, run.config)).runs
            if all(member.seed != run.seed for member in members):
                members.append(run)
                break
    return list(groups.values())


# ---------------------------------------------------------------------------------------------------- studies
@dataclass
class Study:
    """Paths from one teacher on one data set: {path: Group}, the sizes alone among them, and what was planned."""

    folder: Path | None
    dataset: str
    sizes: tuple
    cells: dict
    planned: dict  # {path: number of seeds}
    ambiguous: list  # paths run under several settings, of which the cells hold one

    @property
    def teacher(self):
        return self.sizes[0]

    @property
    def student(self):
        return self.sizes[-1]

    @property
    def title(self):
        return f"From {self.teacher} to {self.student} on {self.dataset}"

    @property
    def ends(self):
        """Paths from the teacher to the student, most assistants first."""
        paths = [path for path in {**self.planned, **self.cells} if len(path) > 1 and path[-1] == self.student]
        return sorted(paths, key=lambda path: (-len(path), [self.sizes.index(network) for network in path]))

    @property
    def rows(self):
        """Those, and paths that end before the student."""
        paths = [path for path in {**self.planned, **self.cells} if len(path) > 1]
        leaves = [path for path in paths if not any(other[: len(path)] == path and other != path for other in paths)]
        return self.ends + [path for path in leaves if path[-1] != self.student]

    def mean(self, path, which="best"):
        return self.cells[path].mean(which) if path in self.cells else None

    def best(self, which="best"):
        """The path to the student with the highest mean, None before one is finished."""
        done = [path for path in self.ends if self.mean(path, which) is not None]
        return max(done, key=lambda path: self.mean(path, which), default=None)

    def short(self, path):
        """A path in bare numbers where one family makes them plain."""
        return " > ".join(str(study.size(network)) if study.one_family(self.sizes) else network for network in path)


def studies(runs):
    """Studies among runs: one a study folder, data set and teacher; runs of other folders by data set, recipe and length."""
    planned, found = {}, {}
    for run in runs:
        folder = run.folder.parent if (run.folder.parent / study.STUDY_FILE).is_file() else None
        key = (folder, run.config["dataset"], None if folder else (run.config["recipe"], run.config["epochs"]))
        found.setdefault(key, []).append(run)
        if folder and folder not in planned:
            planned[folder] = [(tuple(training["path"]), training["seed"]) for training in study.read(folder).values()]
    result = []
    for (folder, dataset, _), members in found.items():
        paths = {run.path for run in members} | {path for path, _ in planned.get(folder, ())}
        for teacher in dict.fromkeys(path[0] for path in sorted(paths, key=len, reverse=True) if len(path) > 1):
            taught = {path for path in paths if path[0] == teacher and len(path) > 1}
            sizes = _sizes(taught)
            of_it = [run for run in members if run.path in taught or (len(run.path) == 1 and run.path[0] in sizes)]
            cells, ambiguous = {}, []
            for candidate in sorted(group(of_it), key=lambda g: (len(g.finished), g.mean("best") or 0)):
                if candidate.path in cells:
                    ambiguous.append(candidate.path)
                cells[candidate.path] = candidate
            wanted = [path for path, _ in planned.get(folder, ()) if path in taught or (len(path) == 1 and path[0] in sizes)]
            result.append(Study(folder, dataset, sizes, cells, {path: wanted.count(path) for path in wanted}, ambiguous))
    return result


def _sizes(paths):
    """The networks of paths, so that every path walks them from left to right."""
    networks = list(dict.fromkeys(network for path in sorted(paths, key=len, reverse=True) for network in path))
    ordered = []
    while networks:  # the first that no other of those left comes before
        free = [n for n in networks if not any(n in path and set(path[: path.index(n)]) & set(networks) for path in paths)]
        chosen = max(free or networks, key=study.size)
        ordered.append(chosen)
        networks.remove(chosen)
    return tuple(ordered)


# ------------------------------------------------------------------------------------------------ comparisons
@dataclass(frozen=True)
class Difference:
    """One group minus another over the seeds that both have, in points."""

    mean: float
    deviation: float | None
    seeds: int
    p: float | None  # of a paired t-test; None where there is none: one seed, or no spread at all


def difference(group, reference, which):
    """None where the two share no finished seed."""
    ours, theirs = group.values(which), reference.values(which)
    pairs = [round(ours[seed] - theirs[seed], 9) for seed in ours if seed in theirs]  # rounding errors are no spread
    if not pairs:
        return None
    deviation = statistics.stdev(pairs) if len(pairs) > 1 else None
    p = None
    if deviation:
        from scipy.special import stdtr  # Student's distribution; scipy.stats takes a second to import

        t = statistics.fmean(pairs) / (deviation / len(pairs) ** 0.5)
        p = float(2 * stdtr(len(pairs) - 1, -abs(t)))
    return Difference(statistics.fmean(pairs), deviation, len(pairs), p)


def holm(differences):
    """p values of several tests, corrected after Holm so that a false alarm among all of them stays as rare as of one."""
    ranked = sorted((d.p, i) for i, d in enumerate(differences) if d and d.p is not None)
    corrected, highest = [None] * len(differences), 0.0
    for rank, (p, i) in enumerate(ranked):
        highest = max(highest, min(1.0, p * (len(ranked) - rank)))
        corrected[i] = highest
    return corrected


def standard_error(percent, images):
    """Of an accuracy measured on so many test images, in points."""
    share = percent / 100
    return 100 * (share * (1 - share) / images) ** 0.5


def rule_of_thumb(found):
    """(mean of teacher and student alone, {assistant: its own accuracy}, the nearest), or None where one is missing."""
    own = {network: found.mean((network,)) for network in found.sizes}
    if own[found.teacher] is None or own[found.student] is None:
        return None
    middle = (own[found.teacher] + own[found.student]) / 2
    tried = {path[1] for path in found.ends if len(path) == 3}
    assistants = {network: own[network] for network in found.sizes[1:-1] if own[network] is not None and network in tried}
    if not assistants:
        return None
    return middle, assistants, min(assistants, key=lambda network: abs(assistants[network] - middle))


# -------------------------------------------------------------------------------------------------- published
def published():
    """[{source, title, dataset, method, percent: {path as text: number}}] of published.json."""
    return json.loads((HERE / "published.json").read_text(encoding="utf-8"))


def published_for(dataset, path, method):
    """{source: percent} of the same cell: data set, path and, where something was distilled, method."""
    return {
        entry["source"]: entry["percent"][study.arrows(path)]
        for entry in published()
        if entry["dataset"] == dataset and study.arrows(path) in entry["percent"] and (len(path) == 1 or entry["method"] == method)
    }
