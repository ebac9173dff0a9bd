"""last.pth.tar: the state that a run continues from, and that its other files are made whole from.

An epoch's state is saved in one step, with all records and the best network in it; metrics.jsonl and the best network's
file follow from it. Files of earlier versions have neither: there metrics.jsonl and the best file must be whole.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from takd.config.run_config import RunConfig, settings_of
from takd.errors import UserError
from takd.files import ANYTHING, COUNT, SECONDS, TEXT, WHOLE, Rule, digest, misfit
from takd.run import checkpoint
from takd.run.checkpoint import TENSOR
from takd.run.run_directory import RECORD, Record, RunDirectory, best_of, differences, misfit_of_records


def _is_generator_state(value):
    try:
        return bool(torch.Generator().set_state(value))
    except (RuntimeError, TypeError):
        return False


NETWORK = {"model": TEXT, "model_state_dict": {...: TENSOR}, "epoch": WHOLE, "seed": WHOLE}
STATE = NETWORK | {
    "step": WHOLE,
    "optimizer_state_dict": {"state": {...: {...: ANYTHING}}},
    "method_state_dict": {...: TENSOR},
    "sums": {"parts": [TEXT], "rows": [TENSOR], "images": [COUNT], "seconds": SECONDS},
    "random_state": Rule("the state of a generator", _is_generator_state),
    "cuda_random_state?": TENSOR,
    "records?": [RECORD],
    "best_network?": NETWORK,
    "settings?": {...: ANYTHING},
}


def read(config: RunConfig, directory: RunDirectory) -> dict[str, Any] | None:
    """The state in a run's last.pth.tar, None where there is none; a UserError if it is damaged or another run's."""
    file = directory.last_file
    if not os.path.lexists(file):
        return None
    state = checkpoint.read(file)
    again = f"restore it, or delete {directory.path} to train again"
    if wrong := misfit(state, STATE):
        raise UserError(f"{file} is no state to continue from: {wrong}; {again}")
    now = config.identity()
    if changes := differences(settings_of(state.get("settings") or now), now):
        raise UserError(f"{file} is of another run ({changes}); {again}")
    if "records" not in state:  # an earlier version's
        state["records"] = directory.records()[: state["epoch"]]
        state["best_network"] = checkpoint.read(config.best_file) if state["records"] else None
    records, step, sums = state["records"], state["step"], state["sums"]
    best = best_of(records)["epoch"] if records else None
    wrong = misfit_of_records(records)
    if not wrong and len(records) != state["epoch"]:
        wrong = f"it is after {state['epoch']} epochs, and {len(records)} are recorded"
    if not wrong and best is not None and (state["best_network"] or {}).get("epoch") not in (best, state["epoch"]):
        wrong = f"the best epoch is {best + 1}, and its network is gone"
    if wrong or state["epoch"] > config.epochs or not len(sums["rows"]) == len(sums["images"]) == step:
        raise UserError(f"{file} does not fit the run's other files: {wrong or 'wrong lengths'}; {again}")
    return state


def check_shapes(state: Mapping[str, Any], student: Any, method: Any, optimizer: Any, file: Any) -> None:
    """A UserError where a state's tensors have other names or shapes than those of the run they are loaded into."""

    def shapes(values):
        return {key: tuple(value.shape) for key, value in values.items()}

    fits = shapes(student.state_dict()) == shapes(state["model_state_dict"])
    fits = fits and shapes(method.state_dict()) == shapes(state["method_state_dict"])
    parameters = [value for group in optimizer.param_groups for value in group["params"]]
    for number, kept in state["optimizer_state_dict"]["state"].items():
        momentum = kept.get("momentum_buffer")
        fits = fits and number in range(len(parameters))
        fits = fits and (momentum is None or TENSOR.holds(momentum) and momentum.shape == parameters[number].shape)
    width = {len(state["sums"]["parts"]) + 1}
    if not fits or {row.numel() for row in state["sums"]["rows"]} - width:
        raise UserError(f"{file} holds tensors of other shapes than this run's; restore it, or give another --run-dir")


def restore_files(
    state: Mapping[str, Any], config: RunConfig, directory: RunDirectory, say: Callable[[str], None]
) -> None:
    """Make metrics.jsonl and the best network's file what the state says that they are."""
    if directory.restore_records(state["records"]):
        say(f"restored  {directory.metrics_file} from {directory.last_file.name}")
    best = state["best_network"]
    if best and not _holds(config.best_file, best):
        checkpoint.save(best, config.best_file)
        say(f"restored  {config.best_file} from {directory.last_file.name}")


def _holds(file, network):
    """Whether a file is there, undamaged, and of this network and epoch."""
    try:
        found = checkpoint.read(file)
    except UserError:
        return False
    same = not misfit(found, NETWORK) and all(found[key] == network[key] for key in ("model", "epoch", "seed"))
    return same and digest(found["model_state_dict"]) == digest(network["model_state_dict"])


def check_finished(config: RunConfig, directory: RunDirectory, summary: Record, say: Callable[[str], None]) -> None:
    """Before a run is called finished: restores its files from last.pth.tar, or raises a UserError that names what is
    gone."""
    try:
        state = read(config, directory)
    except UserError:  # not needed any more if the others are whole
        state = None
    if state and state["epoch"] == config.epochs:
        restore_files(state, config, directory, say)
    try:
        records, best = directory.records(), checkpoint.read(config.best_file)
        if len(records) != config.epochs:
            raise UserError(f"{directory.metrics_file} has {len(records)} of {config.epochs} epochs")
        if misfit(best, NETWORK) or (best["model"], best["epoch"]) != (config.student, best_of(records)["epoch"]):
            raise UserError(f"{config.best_file} does not hold {config.student} of the best epoch")
    except UserError as error:
        reason = str(error).partition(";")[0]
        raise UserError(
            f"{reason}, and last.pth.tar cannot restore it; delete {directory.path} to train again"
        ) from None
    if not _agree(summary, records):
        raise UserError(f"{directory.summary_file} and metrics.jsonl differ; delete the former: it is written again")


def _agree(summary: Record, records: Sequence[Record]) -> bool:
    """Whether a summary's outcomes are those of the records."""
    for outcome, record in ((summary["best"], best_of(records)), (summary["last"], records[-1])):
        there = record | {"split": outcome["split"]}
        there["accuracy_percent"] = record.get(f"{outcome['split']}_accuracy_percent")
        if any(there.get(key) != value for key, value in outcome.items()):
            return False
    return True
