"""Arms: the ways in which one student was trained, over chains.

A chain is a seed: the student's run, and those of its teacher and assistants. An arm is what runs of several chains
have in common: alone, directly from the teacher, through assistants, from all networks above it, each with its
settings and those of the networks above.
"""

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from takd.config import names
from takd.config.run_config import one_or_more
from takd.study import plan
from takd.study.collect import APART, Group, Run
from takd.study.formatting import SYMBOLS, setting_text, value_text
from takd.study.pairs import Table
from takd.study.plan import NetworkPath

# Equal in all arms that are compared:
DATA = ("dataset", "images", "image_size", "train_images", "test_images", "validation_split")

SAME_STEPS = 0.02  # numbers of training steps that differ by less are equal


@dataclass(frozen=True)
class Lineage:
    """The runs above one, nearest first, as far as they are recorded: `complete` up to the networks on labels."""

    runs: tuple[Run, ...]
    complete: bool


@dataclass
class Arm:
    """Runs of one student that differ only in their chain. `name` is unique among the arms that it is compared with."""

    group: Group
    above: dict[int, Lineage] = field(default_factory=dict)  # by seed
    name: str = ""

    @property
    def path(self) -> NetworkPath:
        return self.group.path

    @property
    def teachers(self) -> list[str]:
        return one_or_more(self.group.config.get("teacher"))

    @property
    def direct(self) -> bool:
        return len(self.path) == 2 and not self.assisted

    @property
    def assisted(self) -> bool:
        return any(teacher != self.path[0] for teacher in self.teachers)

    @property
    def method(self) -> str:
        """dgkd of one teacher is kd."""
        return "kd" if self.group.method == "dgkd" else self.group.method or ""

    @property
    def values(self) -> dict[int, float]:
        """{seed: test accuracy at the last epoch, in percent} of the finished runs."""
        return dict(sorted(self.group.values("last").items()))

    @property
    def lineage(self) -> Lineage:
        """Of one chain, the most complete: settings are the same in all."""
        return max(self.above.values(), key=lambda each: (each.complete, len(each.runs)))

    @property
    def trainings(self) -> list[dict[str, Any]]:
        """The configurations of one chain's runs below the teacher, as far as recorded, the student's last."""
        below = [run.config for run in reversed(self.lineage.runs) if run.path != self.path[:1]]
        return [*below, self.group.config]

    @property
    def epochs(self) -> list[int]:
        return [config["epochs"] for config in self.trainings]

    @property
    def steps(self) -> float | None:
        """Training steps below the teacher, per training image; None where an assistant's run is not recorded."""
        assistants = {*_networks(self.path[1:-1]), *self.teachers} - {self.path[0]}
        if assistants - {config["student"] for config in self.trainings}:
            return None
        return sum(config["epochs"] / config["batch_size"] for config in self.trainings)

    def length(self, other: "Arm") -> float | None:
        """Its training steps as a multiple of another arm's, 1 where they differ little; None if unknown."""
        if not self.steps or not other.steps:
            return None
        ratio = self.steps / other.steps
        return 1.0 if abs(ratio - 1) < SAME_STEPS else ratio


@dataclass
class Question:
    """One student of one teacher on one data set, and its arms: alone and direct first."""

    dataset: str
    teacher: str | None
    student: str
    arms: list[Arm]
    repeated: list[Run]  # of a seed that its arm has already
    runs: Sequence[Run]  # all on these data

    @property
    def seeds(self) -> list[int]:
        """Of every finished run."""
        return sorted({seed for arm in self.arms for seed in arm.values})

    @property
    def chains(self) -> int:
        """The largest number that two arms share."""
        pairs = itertools.combinations((set(arm.values) for arm in self.arms), 2)
        return max((len(ours & theirs) for ours, theirs in pairs), default=0)

    def accuracies(self, paths: Iterable[NetworkPath], seed: int) -> dict[NetworkPath, float]:
        """Of the chain's runs with these paths, at the last epoch; of several, those above an arm, or with fewest
        settings.
        """
        above = [run for arm in self.arms if seed in arm.above for run in arm.above[seed].runs]
        plain = sorted(self.runs, key=lambda run: -len(run.config))
        known = [run for run in [*plain, *above] if run.seed == seed and run.finished]
        own = {run.path: run.accuracy("last") for run in known}
        return {path: value for path in paths if (value := own.get(path)) is not None}


def questions(runs: Iterable[Run], tables: Iterable[Table] = ()) -> list[Question]:
    """Every student with two or more arms in the same chain, most arms first. Left out are a search's trials, and arms
    of different methods that stand side by side in one of the tables.
    """
    by_data: dict[Any, list[Run]] = {}
    for run in (run for run in runs if not run.search):
        by_data.setdefault(json.dumps([run.config.get(key) for key in DATA]), []).append(run)
    found = []
    for members in by_data.values():
        above = {id(run): lineage(run, members) for run in members}
        for student in dict.fromkeys(run.path[-1] for run in members):
            of_it = [run for run in members if run.path[-1] == student]
            for teacher in dict.fromkeys(run.path[0] for run in of_it if len(run.path) > 1) or [None]:
                taught = [run for run in of_it if len(run.path) == 1 or run.path[0] == teacher]
                arms, repeated = arms_of(taught, above)
                found.append(Question(members[0].config["dataset"], teacher, student, arms, repeated, members))
    asked = [question for question in found if question.chains and not _shown(question.arms, tables)]
    return sorted(asked, key=lambda question: -len(question.arms))


def _shown(arms: Sequence[Arm], tables: Iterable[Table]) -> bool:
    """Whether a table of methods has all arms with a teacher, each by a method of its own."""
    taught = [arm for arm in arms if arm.teachers]
    runs = {run.folder for arm in taught for run in arm.group.runs}
    rows = (
        {run.folder for group in pair.rows.values() for run in group.runs} for table in tables for pair in table.pairs
    )
    return 1 < len(taught) == len({arm.method for arm in taught}) and any(runs <= each for each in rows)


# ---------------------------------------------------------------------------------------------------- lineage
def lineage(run: Run, runs: Sequence[Run]) -> Lineage:
    """The runs whose checkpoints it learned from, and those above them."""
    above: list[Run] = []
    complete, waiting = True, [run]
    while waiting:
        below = waiting.pop(0)
        files = one_or_more(below.config.get("teacher_checkpoint"))
        parents = [_written_by(Path(file).parent, below, runs) for file in files]
        complete = complete and all(parents) and len(files) == len(one_or_more(below.config.get("teacher")))
        fresh = [parent for parent in parents if parent and parent not in above]
        above += fresh
        waiting += fresh
    return Lineage(tuple(sorted(above, key=lambda each: -len(each.path))), complete)


def _written_by(folder: Path, below: Run, runs: Sequence[Run]) -> Run | None:
    """The run that was made in a folder, which may have been moved, or recorded by another path."""

    def same(place: str | Path | None) -> bool:
        ours, theirs = Path(place or "").parts, folder.parts
        length = min(len(ours), len(theirs))
        return length > 0 and ours[-length:] == theirs[-length:]

    def near(run: Run) -> tuple[int, bool]:
        shared = sum(a == b for a, b in zip(run.folder.parts, below.folder.parts, strict=False))
        return shared, run.seed == below.seed

    teachers = one_or_more(below.config.get("teacher"))
    able = [run for run in runs if run.path[-1] in teachers and run is not below]
    made = [run for run in able if same(run.config.get("run_dir") or (run.summary or {}).get("run_dir"))]
    return max(made or [run for run in able if run.folder.resolve() == folder.resolve()], key=near, default=None)


def digests(run: Run, above: Lineage) -> set[str]:
    """Of the weights of every network above it, as far as they are recorded."""
    return {digest for each in (run, *above.runs) for digest in one_or_more(each.config.get("teacher_weights"))}


def top_digest(run: Run, above: Lineage) -> set[str]:
    """Of the weights of its path's first network; empty where that is not recorded."""
    found = set()
    for config in (each.config for each in (run, *above.runs)):
        networks, weights = one_or_more(config.get("teacher")), one_or_more(config.get("teacher_weights"))
        found |= {digest for network, digest in zip(networks, weights, strict=False) if network == run.path[0]}
    return found


# ------------------------------------------------------------------------------------------------------- arms
def arms_of(runs: Iterable[Run], above: Mapping[int, Lineage]) -> tuple[list[Arm], list[Run]]:
    """Runs by everything but their chain, and the runs of a seed that their arm has already."""
    found: dict[str, dict[str, Arm]] = {}
    repeated = []
    # Where the runs above are not recorded, one cannot tell which they were: after those where they are.
    for run in sorted(runs, key=lambda run: (not above[id(run)].complete, run.seed, str(run.folder))):
        up = above[id(run)]
        variants = found.setdefault(_settings([run]), {})
        key = _settings(up.runs) if up.complete or not variants else next(iter(variants))
        arm = variants.setdefault(key, Arm(Group(run.path, run.config)))
        if run.seed in arm.above:
            repeated.append(run)
        else:
            arm.group.runs.append(run)
            arm.above[run.seed] = up
    arms = [arm for variants in found.values() for arm in variants.values()]
    _name(arms)
    arms.sort(key=lambda arm: (arm.assisted, len(arm.path), len(arm.teachers), arm.epochs, arm.name))
    return arms, repeated


def _networks(path: Iterable[str]) -> list[str]:
    """Of a path's nodes; several teachers of one network are a node such as plane10 + plane4."""
    return [network for node in path for network in node.split(" + ")]


def _settings(runs: Iterable[Run]) -> str:
    """What determined the runs' outcome, their seeds aside."""
    kept = [(run.path, {key: value for key, value in run.config.items() if key not in APART}) for run in runs]
    return json.dumps(kept, sort_keys=True)


def _name(arms: Sequence[Arm]) -> None:
    """A name for each, with the settings that differ between arms of the same route."""
    networks = list(dict.fromkeys(network for arm in arms for network in _networks(arm.path)))
    numbers = plan.one_family(networks)

    def short(node: str) -> str:
        return " + ".join(str(plan.size(network)) if numbers else network for network in _networks([node]))

    routes: dict[str, list[tuple[Arm, dict[str, str]]]] = {}
    for arm in arms:
        if len(arm.teachers) > 1:
            route = " and ".join(map(short, arm.teachers)) + " together"
        else:
            through = " > ".join(map(short, arm.path[1:-1]))
            route = f"through {through}" if through else "direct" if arm.teachers else "alone"
        routes.setdefault(route, []).append((arm, _words(arm)))
    for route, members in routes.items():
        taken: Counter[str] = Counter()
        others = [other for _, other in members]
        for arm, words in members:
            alike = [other for other in others if other.get("method") == words.get("method")]  # these share options
            differ = [
                text
                for key, text in words.items()
                if any(other.get(key) != text for other in (alike if key.startswith("option") else others))
            ]
            name = f"{route} ({', '.join(differ)})" if differ else route
            taken[name] += 1
            arm.name = name if taken[name] == 1 else f"{name}, variant {taken[name]}"


def _words(arm: Arm) -> dict[str, str]:
    """Its settings in words, and those of the networks above it; what follows from others is left out."""
    words = _own_words(arm.group.config)
    for run in arm.lineage.runs:
        above = names.file_name("-".join(run.path))
        words |= {f"{above} {key}": f"{run.path[-1]} with {text}" for key, text in _own_words(run.config).items()}
    return words


def _own_words(config: Mapping[str, Any]) -> dict[str, str]:
    words = {"epochs": f"{config['epochs']} epochs"}
    if config.get("method"):
        words["method"] = config["method"]
    for key, value in (config.get("method_options") or {}).items():
        words[f"option {key}"] = f"{SYMBOLS.get(key, key)} {value_text(value)}"
    hidden = {"epochs", "student", "teacher", "method", "method_options", *SYMBOLS, *DATA, *APART}
    for key, value in config.items():
        derived = str((config.get("origins") or {}).get(key, "")).startswith(("recipe", "data set", "its"))
        if key not in hidden and not derived:
            words[key] = setting_text(key, value)
    return words
