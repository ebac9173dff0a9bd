"""Inside an NNI trial: the tuner's proposal, and the results reported to it. nni is imported only here, and only in a
trial."""

import os
import sys
from typing import Any

from takd.errors import UserError

# The released code's search-space keys, and shorter ones, with our settings' names.
OLD_KEYS = {"T_student": "temperature", "lambda_student": "lambda"}
PARAMETERS = OLD_KEYS | {"T": "temperature", "lambda": "lambda", "seed": "seed"}


def trial() -> str | None:
    """The trial's id, or None outside an experiment (where importing nni would only warn)."""
    return os.environ.get("NNI_TRIAL_JOB_ID") if os.environ.get("NNI_PLATFORM") else None


def experiment() -> str:
    """The experiment's id."""
    return os.environ.get("NNI_EXP_ID", "unknown")


def proposal() -> dict[str, Any]:
    """{setting: value} from the tuner. Unknown keys, and two for one setting, are UserErrors."""
    try:
        import nni
    except ImportError as error:
        raise UserError(
            f"this is an NNI trial and its Python, {sys.executable}, cannot import nni ({error}); "
            "start nnictl from a shell where the environment it belongs to is activated"
        ) from None
    proposed = nni.get_next_parameter() or {}
    if unknown := [key for key in proposed if key not in PARAMETERS]:
        raise UserError(
            f"the tuner proposes {', '.join(sorted(unknown))}; search_space.json may hold {' '.join(PARAMETERS)}"
        )
    settings: dict[str, Any] = {}
    for key, value in proposed.items():
        if PARAMETERS[key] in settings:
            raise UserError(f"the tuner proposes {PARAMETERS[key]} under two names ({' '.join(proposed)}); keep one")
        settings[PARAMETERS[key]] = value
    return settings


def report_epoch(accuracy_percent: float) -> None:
    import nni

    nni.report_intermediate_result(accuracy_percent)


def report_final(accuracy_percent: float) -> None:
    import nni

    nni.report_final_result(accuracy_percent)
