"""search_space.json: the search space, in NNI's format."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from takd import files
from takd.config import nni_trial
from takd.errors import UserError

FORMS = {  # of _value
    "choice": "[VALUE, ...]",
    "randint": "[LOWEST, HIGHEST + 1]",
    "uniform": "[LOWEST, HIGHEST]",
    "loguniform": "[LOWEST, HIGHEST], both above 0",
    "quniform": "[LOWEST, HIGHEST, STEP]",
    "qloguniform": "[LOWEST, HIGHEST, STEP], all above 0",
}


@dataclass(frozen=True)
class Parameter:
    """One searched setting: one of `choices`, or a number from `low` to `high`, its logarithm uniform where `log`."""

    form: str  # as written in the file, for messages
    choices: tuple[Any, ...] = ()
    low: float = 0
    high: float = 0
    step: float = 0  # values are multiples of it, except the ends; 0: any value
    log: bool = False
    whole: bool = False

    def value(self, drawn: Any) -> Any:
        """The setting's value for a draw: numbers are rounded as NNI does."""
        if not self.step:
            return drawn
        rounded = min(max(round(drawn / self.step) * self.step, self.low), self.high)
        return rounded if self.whole else float(f"{rounded:.12g}")  # 0.15, not 0.15000000000000002

    @property
    def values(self) -> list[Any] | None:
        """All possible values; None for a continuum."""
        if self.choices or self.low == self.high:
            return list(self.choices or [self.low])
        if not self.step:
            return None
        steps = range(round(self.low / self.step), round(self.high / self.step) + 1)
        return list(dict.fromkeys(self.value(step * self.step) for step in steps))


def read(file: str | Path) -> tuple[dict[str, Parameter], list[int | None]]:
    """({setting: Parameter}, seeds) of a search space; [None] where the seed is not in it."""
    try:
        entries = json.loads(files.read_text(file))
        kinds = {key: (entry["_type"], entry["_value"]) for key, entry in entries.items()}
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        form = '{"T": {"_type": "choice", "_value": [1, 4]}}'
        why = f"{type(error).__name__}: {error}"
        raise UserError(f"{file} cannot be read as a search space ({why}); it looks like {form}") from None
    space = {key: _parameter(f"{file}: {key}", *kind) for key, kind in kinds.items()}
    renamed = nni_trial.settings(space)
    seed = renamed.pop("seed", Parameter("", (None,)))
    if seed.values is None:
        raise UserError(f"{file}: seed: seeds are counted; give a choice of them, such as [1, 2, 3]")
    return renamed, seed.values


def _parameter(where: str, kind: Any, values: Any) -> Parameter:
    if kind not in FORMS:
        raise UserError(f"{where}: _type {json.dumps(kind)} is not known here; known: {' '.join(FORMS)}")
    wrong = UserError(f"{where}: _value {json.dumps(values)} of a {kind} is not {FORMS[kind]}")
    plain = bool | int | float | str if kind == "choice" else int if kind == "randint" else int | float
    if not isinstance(values, list) or not all(isinstance(value, plain) for value in values):
        raise wrong
    form = f"{kind} {json.dumps(values)}"
    if kind == "choice":
        if not values or len(set(map(json.dumps, values))) < len(values):
            raise wrong
        return Parameter(form, tuple(values))
    if len(values) != FORMS[kind].split("]")[0].count(",") + 1:
        raise wrong
    low, high, step = (values[0], values[1] - 1, 1) if kind == "randint" else (*values, 0)[:3]
    log = "log" in kind
    if low > high or (log and low <= 0) or step < 0 or (step == 0 and len(values) == 3):
        raise wrong
    return Parameter(form, (), low, high, step, log, kind == "randint")


def combinations(parameters: Iterable[Parameter]) -> int | None:
    """The number of settings; None for a continuum."""
    count = 1
    for parameter in parameters:
        if parameter.values is None:
            return None
        count *= len(parameter.values)
    return count
