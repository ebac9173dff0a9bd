"""A sweep's folder, and the runs that make it.

    study.json       the command, the search space, the number of trials, and why trials failed
    journal.log      Optuna's journal of the settings drawn (takd/study/search.py)
    claims/          a lock per trial, held while a worker runs it
    teacher/         the run that trains the trials' teacher; of several, the last one's, with the others inside it
    trials/NNN/      each trial, a run of train.py like any other
    logs/            their output

A setting is trained once with each seed of the space; each of these runs is a trial, as in NNI.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from takd import files
from takd.config import flags, run_config
from takd.errors import UserError
from takd.files import ANYTHING, TEXT, WHOLE
from takd.run.run_directory import RunDirectory, differences
from takd.study.collect import TRIALS
from takd.study.plan import STUDY_FILE
from takd.study.space import Parameter

OWNED = ("repeat", "run_dir", "json", "measure")  # train.py's flags that the sweep sets
SWEEP = {"sweep": {...: ANYTHING}, "trials": WHOLE, "failed": {...: TEXT}}  # the form of study.json
Setting = dict[str, Any]  # {searched setting: value}


class Sweep:
    """`common` are train.py's settings in every trial; errors in them or in the space are found here."""

    def __init__(
        self, folder: Path, space: Mapping[str, Parameter], seeds: Sequence[int | None], common: dict[str, Any]
    ) -> None:
        self.folder, self.space, self.seeds = folder, space, seeds
        self.study_file, self.journal, self.claims = folder / STUDY_FILE, folder / "journal.log", folder / "claims"
        self._common, self._parser = common, flags.train_parser()
        self._given_teacher = common.get("teacher_checkpoint")
        self.base = run_config.parse(flags.words(common | {"run_dir": folder}), elsewhere=True)
        self.teacher = RunDirectory(folder / "teacher") if self.base.teacher and not self._given_teacher else None
        ends = {key: parameter.values or [parameter.low, parameter.high] for key, parameter in space.items()}
        first = {key: values[0] for key, values in ends.items()}
        for setting in [first, *({**first, key: value} for key, values in ends.items() for value in values)]:
            run_config.parse(self.arguments(0, setting, seeds[0]), elsewhere=True)
        for seed in seeds:
            self.arguments(0, first, seed)

    # ------------------------------------------------------------------------------------------ what is to be made
    def record(self, trials: int) -> None:
        """Record the sweep in its folder; a different one there is a UserError. `trials` never decreases."""
        now = self.base.identity() | {"teacher_checkpoint": self._given_teacher}
        now |= {key: parameter.form for key, parameter in self.space.items()}
        if self.seeds != [None]:
            now["seed"] = self.seeds
        with self.lock():
            new: dict[str, Any] = {"sweep": now, "trials": 0, "failed": {}}
            noted = self.read() if self.study_file.exists() else new
            if changes := differences(noted["sweep"], now):
                fix = "give another --runs or delete that folder"
                raise UserError(f"{self.folder} holds another sweep ({changes}); {fix}")
            (self.folder / "logs").mkdir(exist_ok=True)
            files.remove_leftovers(self.folder, STUDY_FILE)
            files.save_json(noted | {"trials": max(trials, noted["trials"])}, self.study_file)

    def read(self) -> dict[str, Any]:
        return read(self.folder)

    def lock(self) -> Any:
        """Held while a worker looks for a trial, so that no trial is taken twice."""
        return files.locked(self.claims / ".lock", str(self.folder), wait=True)

    def trial(self, number: int) -> RunDirectory:
        return RunDirectory(self.folder / TRIALS / f"{number:03}")

    def arguments(self, number: int, setting: Setting, seed: int | None) -> list[str]:
        """train.py's for a trial."""
        proposal = setting if seed is None else setting | {"seed": seed}
        given = self._common | run_config.proposed_settings(self._parser, self._common, proposal)
        if self.teacher:
            given["teacher_checkpoint"] = self.teacher_files
        return flags.words(given | {"run_dir": self.trial(number).path})

    @property
    def teacher_files(self) -> list[Path]:
        """The checkpoint of each teacher that is trained here."""
        config = self.base
        found: list[Path] = []
        while config.teacher:
            config = config.teacher_config()
            run = RunDirectory(config.run_path)
            summary = run.summary()  # None while the trials are only planned
            found.insert(0, run.path / (Path(summary["checkpoint"]).name if summary else config.best_file.name))
        return found

    @property
    def teacher_arguments(self) -> list[str]:
        """train.py's for the teacher, the last of several; the others are trained first."""
        config = self.base.teacher_config()
        return [*run_config.command(config.record(), config.origins), "--run-dir", str(config.run_dir)]

    # ------------------------------------------------------------------------------------------ what there is of it
    def accuracy(self, number: int) -> float | None:
        """Best accuracy of a finished trial, in percent, on the split that selects the epoch."""
        summary = self.trial(number).summary()
        return summary and summary["best"]["accuracy_percent"]

    def note_failure(self, trial: str, reason: str) -> None:
        with self.lock():
            noted = self.read()
            files.save_json(noted | {"failed": noted["failed"] | {trial: reason}}, self.study_file)


def read(folder: Path) -> dict[str, Any]:
    """A sweep's study.json."""
    contents = files.read_json(folder / STUDY_FILE, SWEEP, f"{folder} holds no sweep; give another --runs")
    if contents is None:
        raise UserError(f"{folder} holds no sweep; start one with sweep.py --runs {folder} and train.py's flags")
    return contents


class State(NamedTuple):
    """A sweep's progress: numbers of trials, and {failed trial: reason}."""

    finished: int
    running: int
    trials: int
    failed: dict[str, str]


def state(folder: Path) -> State:
    noted, finished = read(folder), len(list((folder / TRIALS).glob("*/summary.json")))
    running = sum(map(files.is_locked, (folder / "claims").glob("[0-9]*")))
    return State(finished, running, noted["trials"], noted["failed"])
