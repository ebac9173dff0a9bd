"""Inside an NNI trial: the tuner's proposal, and the results reported to it. nni is imported only here, and only in a
trial."""

import contextlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from takd.config import names, recipes
from takd.errors import UserError

# The released code's search-space keys, and shorter ones, with our settings' names.
OLD_KEYS = {"T_student": "temperature", "lambda_student": "lambda"}
PARAMETERS = OLD_KEYS | {"T": "temperature", "lambda": "lambda", "seed": "seed"} | {key: key for key in recipes.OFF}
TYPES = "choice randint uniform quniform loguniform qloguniform normal qnormal lognormal qlognormal".split()  # NNI's


def trial() -> str | None:
    """The trial's id, or None outside an experiment (where importing nni would only warn)."""
    return os.environ.get("NNI_TRIAL_JOB_ID") if os.environ.get("NNI_PLATFORM") else None


def experiment() -> str:
    """The experiment's id."""
    return os.environ.get("NNI_EXP_ID", "unknown")


def check_types() -> None:
    """Refuse a misspelt `_type` in the search space, which NNI takes for a uniform range from the first value on.

    The space is read from NNI's own database, where the trial is on the machine that has it.
    """
    import sqlite3

    database = Path(os.environ["NNI_SYS_DIR"]).resolve().parents[1] / "db" / "nni.sqlite"
    space: dict[str, Any] = {}
    with (
        contextlib.suppress(sqlite3.Error),
        contextlib.closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True)) as connection,
    ):
        for (profile,) in connection.execute("select params from ExperimentProfile order by revision"):
            space = json.loads(profile)["searchSpace"]
    try:
        kinds = {key: str(spec["_type"]) for key, spec in space.items()}
    except (AttributeError, KeyError, TypeError):
        form = '{"T": {"_type": "choice", "_value": [1, 4]}}'
        raise UserError(f"the search space is {json.dumps(space)}; it must look like {form}") from None
    for key, kind in kinds.items():
        if kind not in TYPES:
            hint = names.nearest(kind, TYPES)
            raise UserError(f"the search space has {key} of _type '{kind}'{hint}; types: {' '.join(TYPES)}")


def proposal() -> dict[str, Any]:
    """{setting: value} from the tuner."""
    check_types()
    try:
        import nni
    except ImportError as error:
        raise UserError(
            f"this is an NNI trial and its Python, {sys.executable}, cannot import nni ({error}); "
            "start nnictl from a shell where the environment it belongs to is activated"
        ) from None
    try:
        proposed = nni.get_next_parameter()
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"NNI's file of the tuner's proposal is damaged ({type(error).__name__}: {error})") from None
    if not isinstance(proposed, dict | None):
        raise UserError(f"the tuner proposes {json.dumps(proposed)}, not an object; correct search_space.json")
    return settings(proposed or {})


def settings(proposed: Mapping[str, Any]) -> dict[str, Any]:
    """The same under the suite's names; METHOD.OPTION, an option of a method, keeps its own.

    Keys that mean nothing here, or the same twice, are UserErrors.
    """
    if unknown := [key for key in proposed if key not in PARAMETERS and "." not in key]:
        known = f"{' '.join(PARAMETERS)}, and options of the method such as dkd.beta"
        raise UserError(f"the tuner proposes {', '.join(sorted(unknown))}; search_space.json may hold {known}")
    renamed: dict[str, Any] = {}
    for key, value in proposed.items():
        name = PARAMETERS.get(key, key)
        if name in renamed:
            raise UserError(f"the tuner proposes {name} under two names ({' '.join(proposed)}); keep one")
        renamed[name] = value
    return renamed


def report_epoch(epoch: int, accuracy_percent: float) -> None:
    """Epochs are counted from 0, also by a trial that NNI resumed: NNI itself would count from 0 again."""
    import nni.trial

    nni.trial.overwrite_intermediate_seq(epoch)
    nni.report_intermediate_result(accuracy_percent)


def report_final(accuracy_percent: float) -> None:
    import nni

    nni.report_final_result(accuracy_percent)
