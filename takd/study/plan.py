"""A path study's plan: which networks are trained from which, with which settings and where.

A path is a tuple of networks, teacher first; a path of one is a network alone (the paper's NOKD). Every prefix of a
path is one training, done once, so that five sizes need 16 trainings for all paths, and 4 more of networks alone. Each
training is one run folder of train.py under the study's folder. A network learns from the last one above it or, with
guidance "all", from all of them (Son et al., ICCV 2021); its records then have the `guided` path.
"""

import itertools
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from takd import files
from takd.config import flags, names, run_config
from takd.config.run_config import RunConfig
from takd.errors import UserError
from takd.files import TEXT, WHOLE
from takd.run.run_directory import PATH, RunDirectory

NetworkPath = tuple[str, ...]  # of networks
FAMILIES = {
    "plane": ("plane10", "plane8", "plane6", "plane4", "plane2"),
    "resnet": ("resnet110", "resnet56", "resnet32", "resnet20", "resnet8"),
}
# What the plan sets.
OWNED = ("student", "teacher", "teacher_checkpoint", "seed", "repeat", "run_dir", "json", "measure", "init_from")
PLANNED = {"path": PATH, "seed": WHOLE, "failed?": TEXT}  # the form of a planned training
STUDY_FILE = "study.json"  # what was planned in a folder, so that a report knows what is still to come


def arrows(path: Sequence[str]) -> str:
    return " > ".join(path)


def guided(path: NetworkPath) -> NetworkPath:
    """A path on which each network learns from all above it, as train.py records it: plane10 > plane10 + plane4 >
    plane2 for plane10, plane4, plane2."""
    return *(" + ".join(path[: i + 1]) for i in range(len(path) - 1)), path[-1]


def networks(path: NetworkPath) -> NetworkPath:
    """The networks of a path: of a guided one, those it was made of."""
    return tuple(node.split(" + ")[-1] for node in path)


# --------------------------------------------------------------------------------------------- sizes and paths
def check_sizes(sizes: Sequence[str]) -> str | None:
    """A UserError if the sizes make no study; returns a note for the user if one is due."""
    if len(sizes) < 2:
        given = " ".join(sizes) or "none"
        raise UserError(f"a study needs two or more sizes, the teacher first and the student last; given: {given}")
    if repeated := [name for name in dict.fromkeys(sizes) if sizes.count(name) > 1]:
        again = f"{', '.join(repeated)} is among the sizes more than once"
        raise UserError(f"{again}; name each size once, the teacher first")
    families = list(dict.fromkeys(map(names.family, sizes)))
    for family in (family for family in families if family != "other"):  # in whose names numbers are not sizes
        members = [name for name in sizes if names.family(name) == family]
        if members != (descending := sorted(members, key=size, reverse=True)):
            order = f"{' '.join(descending)}, not {' '.join(members)}"
            raise UserError(f"sizes go from the teacher down to the student: {order}")
    if len(families) > 1:
        return f"note: sizes of {len(families)} families ({', '.join(families)}), taken in the order given"
    return None


def size(network: str) -> int:
    """The number in a network's name, 0 where there is none."""
    return int((re.search(r"\d+", network) or "0")[0])


def one_family(sizes: Sequence[str]) -> bool:
    """Whether the numbers alone tell the sizes apart, and which is the larger."""
    families = set(map(names.family, sizes))
    return len(families) == 1 and families != {"other"} and len(set(map(size, sizes))) == len(sizes)


def _named(word: str, sizes: Sequence[str]) -> str:
    """One of `sizes` by its name or its bare number."""
    if word.strip().isdigit():
        fitting = [name for name in sizes if size(name) == int(word)]
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            raise UserError(f"size {word} may be {' or '.join(fitting)}; write its whole name")
    else:
        network = names.network(word)
        if not sizes or network in sizes:
            return network
    known = " ".join(sizes) or "none are given; write whole names"
    raise UserError(f"size {word.strip()} is not among the sizes: {known}")


def split_path(text: str, sizes: Sequence[str]) -> NetworkPath:
    return tuple(_named(word, sizes) for word in re.split(r"[,>]", text))


def sizes_among(texts: Iterable[str]) -> list[str]:
    """The networks of paths: of one family, largest first; else in the longest path's order, then the others."""
    paths = sorted((split_path(text, ()) for text in texts), key=len, reverse=True)
    sizes = list(dict.fromkeys(itertools.chain.from_iterable(paths)))
    return [sizes[0], *sorted(sizes[1:], key=size, reverse=True)] if one_family(sizes) else sizes


def choose_paths(sizes: Sequence[str], texts: Sequence[str] | None) -> list[NetworkPath]:
    """The paths of a study: the given ones, or all from the first size to the last."""
    if not texts:
        between = sizes[1:-1]
        subsets = (itertools.combinations(between, count) for count in range(len(between), -1, -1))
        return [(sizes[0], *assistants, sizes[-1]) for assistants in itertools.chain.from_iterable(subsets)]
    paths = [split_path(text, sizes) for text in texts]
    for text, path in zip(texts, paths, strict=True):
        if path[0] != sizes[0]:
            raise UserError(f"path {text} skips the teacher: every path begins with {sizes[0]}")
        if len(path) < 2:
            raise UserError(f"path {text} has no student: a path is two or more sizes, such as {sizes[0]},{sizes[-1]}")
        places = [sizes.index(network) for network in path]
        if repeated := [network for network in dict.fromkeys(path) if path.count(network) > 1]:
            raise UserError(f"path {text} visits {', '.join(repeated)} more than once")
        if places != sorted(places):
            raise UserError(f"path {text} is in the wrong order: the sizes go {arrows(sizes)}")
    return list(dict.fromkeys(paths))


def tree(paths: Iterable[NetworkPath]) -> list[NetworkPath]:
    """Every prefix of the paths once, each teacher's students together: its table then stays in memory."""
    prefixes = dict.fromkeys(path[:length] for path in paths for length in range(1, len(path) + 1))
    ordered: list[NetworkPath] = [path for path in prefixes if len(path) == 1]
    for parent in ordered:  # which grows in the loop
        ordered += [path for path in prefixes if path[:-1] == parent]
    return ordered


# ----------------------------------------------------------------------------------------- settings of a step
@dataclass(frozen=True)
class Step:
    """Settings of the trainings whose path ends with `ending`, such as 8, 20,8 or the whole path 110,20,8."""

    text: str
    ending: NetworkPath
    given: dict[str, Any]

    def applies_to(self, path: NetworkPath) -> bool:
        return path[-len(self.ending) :] == self.ending


def parse_step(text: str, sizes: Sequence[str], parser: flags.Parser) -> Step:
    """`8:temperature=5,lambda=.15` as a Step; `parser` is train.py's, and checks keys and values as its flags."""
    ending, colon, pairs = text.rpartition(":")
    if not colon or not pairs:
        example = f"{size(sizes[-1])}:temperature=5,lambda=.15"
        raise UserError(f"--set {text}: write size:setting=value,setting=value, such as {example}")
    allowed = [name for name, action in parser.actions.items() if name not in OWNED and action.nargs != 0]
    words = []
    for pair in pairs.split(","):
        key, equals, value = pair.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or key not in allowed:
            raise UserError(f"--set {text}: '{pair.strip()}' is not setting=value; settings: {' '.join(allowed)}")
        try:
            words += [f"--{key.replace('_', '-')}", *shlex.split(value)]
        except ValueError as error:
            raise UserError(f"--set {text}: {error} in '{pair.strip()}'") from None
    return Step(text, split_path(ending, sizes), parser.given(words)[0])


def settings_of(path: NetworkPath, common: dict[str, Any], steps: Iterable[Step]) -> dict[str, Any]:
    """A training's settings: the study's, overridden by those of steps from the least to the most specific."""
    given = dict(common)
    for step in sorted(steps, key=lambda step: len(step.ending)):
        if step.applies_to(path):
            given |= step.given
    unused = () if len(path) > 1 else run_config.NEED_TEACHER
    return {key: value for key, value in given.items() if key not in unused}


# ------------------------------------------------------------------------------------------------- the trainings
class Training:
    """One run of train.py in the plan: its folder, settings and progress. `above`: the trainings of its path before it,
    of which it learns from the last, or with guidance "all" from each."""

    def __init__(
        self,
        folder: Path,
        path: NetworkPath,
        seed: int,
        given: dict[str, Any],
        above: Sequence["Training"],
        guidance: str = "last",
    ) -> None:
        self.path, self.seed = path, seed
        self.teacher = above[-1] if above else None
        self.teachers = above if guidance == "all" else above[-1:]
        several = len(self.teachers) > 1
        self.recorded_path = guided(path) if several else path
        self.name = "-".join((*map(names.file_name, path), *["all"] * several, f"seed{seed}"))
        self.run = RunDirectory(Path(folder) / self.name)
        self.log = Path(folder) / "logs" / f"{self.name}.log"
        self._given = given

    @property
    def finished(self) -> bool:
        """Whether it has a summary, and nothing was lost that train.py restores from last.pth.tar."""
        kept = self.run.metrics_file, *self.run.path.glob("*_best.pth.tar")
        whole = len(kept) > 1 and all(file.exists() for file in kept)
        return self.run.summary_file.exists() and (whole or not self.run.last_file.exists())

    @property
    def checkpoint(self) -> Path:
        """The best network's file: as in the run's summary, or before there is one, as train.py will name it."""
        summary = self.run.summary()
        expected = f"{names.file_name(self.path[-1])}_seed{self.seed}_best.pth.tar"
        return self.run.path / (Path(summary["checkpoint"]).name if summary else expected)  # the folder may have moved

    @property
    def arguments(self) -> list[str]:
        """For train.py."""
        learn = {
            "teacher": [training.path[-1] for training in self.teachers],
            "teacher_checkpoint": [training.checkpoint for training in self.teachers],
        }
        own = {"seed": self.seed, "run_dir": self.run.path}
        return flags.words({"student": self.path[-1], **(learn if self.teachers else {}), **self._given, **own})

    def config(self, elsewhere: bool) -> RunConfig:
        """Its configuration. Ends with a usage error, or a UserError where its folder holds another run."""
        config = run_config.parse(self.arguments, elsewhere=elsewhere)
        try:
            self.run.check(config)
        except UserError as error:
            raise UserError(str(error).replace("--run-dir", "--runs")) from None
        return config


def plan(
    folder: Path,
    sizes: Sequence[str],
    paths: Sequence[NetworkPath],
    seeds: Iterable[int],
    common: dict[str, Any],
    steps: Sequence[Step],
    guidance: str = "last",
) -> list[Training]:
    """All trainings of a study, teachers before their students; per seed the tree, then the other sizes alone.

    With guidance "all" the method is dgkd, unless another is given.
    """
    in_tree = tree(paths)
    alone = [(network,) for network in sizes[1:] if any(network in path for path in paths)]
    trainings: dict[tuple[NetworkPath, int], Training] = {}
    for seed in seeds:
        for path in (*in_tree, *alone):
            given = settings_of(path, common, steps)
            if guidance == "all" and len(path) > 1:
                given.setdefault("method", "dgkd")
                given = given if len(path) > 2 else run_config.of_one_teacher(given)
            above = [trainings[path[:length], seed] for length in range(1, len(path))]
            trainings[path, seed] = Training(folder, path, seed, given, above, guidance)
    for step in steps:
        if not any(step.applies_to(path) for path, _ in trainings):
            raise UserError(f"--set {step.text}: no training of the plan ends with {','.join(step.ending)}")
    return list(trainings.values())


def missing_images(config: RunConfig, on_slurm: bool) -> Iterator[str]:
    """A line on images that are not there yet. Jobs `on_slurm` download nothing."""
    place, name = Path(config.dataset_dir or "data"), config.dataset
    if name == "folder" and not (place / "train").is_dir():
        yield f"missing  images: no folder {place / 'train'}; give another --dataset-dir"
    if name in names.CIFAR_FOLDERS and not any((place / each).is_dir() for each in (names.CIFAR_FOLDERS[name], name)):
        command = f"python3 data_loader.py --download {name} --dataset-dir {shlex.quote(str(place))}"
        how = f"fetch it with {command}" if on_slurm or config.download is False else "the first training downloads it"
        yield f"missing  {name}: not in {place}; {how}"


def record(folder: Path, trainings: Iterable[Training]) -> None:
    """Record in the study's folder what is planned there, in addition to earlier plans."""
    Path(folder, "logs").mkdir(parents=True, exist_ok=True)
    with files.locked(Path(folder) / ".study.lock", f"the plan in {folder}", wait=True):  # by a job for another seed
        files.remove_leftovers(folder, STUDY_FILE)
        mine = {training.name: {"path": training.recorded_path, "seed": training.seed} for training in trainings}
        files.save_json({"trainings": read(folder) | mine}, Path(folder) / STUDY_FILE)


def read(folder: Path) -> dict[str, Any]:
    """{training name: {"path", "seed"}} planned in a folder; empty if no study was."""
    file = Path(folder) / STUDY_FILE
    contents = files.read_json(file, {"trainings": {...: PLANNED}}, "delete it; the study's command writes it again")
    return contents["trainings"] if contents else {}
