"""Formatting of numbers and settings in reports."""

import dataclasses

from takd.config import names, recipes
from takd.study.collect import Group


def percent(mean: float | None, deviation: float | None = None) -> str:
    if mean is None:
        return ""
    return f"{mean:.2f}" + (f" ± {deviation:.2f}" if deviation is not None else "")


def points(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


def p_value(p: float | None) -> str:
    return "" if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"


def settings_of(group: Group) -> str:
    symbols, hidden = {"temperature": "T", "lambda": "λ"}, ("reduction",)
    ordered = sorted(
        group.options.items(), key=lambda item: list(symbols).index(item[0]) if item[0] in symbols else len(symbols)
    )
    shown = {symbols.get(key, key): value for key, value in ordered if key not in hidden}
    return ", ".join(
        f"{key} {value:g}" if isinstance(value, int | float) else f"{key} {value}" for key, value in shown.items()
    )


def seeds_of(group: Group | None, planned: int = 0) -> str:
    done = len(group.finished) if group else 0
    expected = max(planned, len(group.runs) if group else 0)
    return f"{done}" if done == expected else f"{done} of {expected}"


def recipe_of(group: Group) -> str:
    """The recipe, the epochs, and settings that differ from the recipe."""
    config = group.config
    recipe = recipes.recipe(config["recipe"], group.path[-1])
    usual = dataclasses.asdict(recipe) | {"milestones": recipes.milestone_epochs(recipe, config["epochs"])}
    usual |= recipes.OFF
    del usual["epochs"], usual["method_options"]  # shown apart
    if config.get("schedule"):
        del usual["milestones"]
    if not names.DATASETS[config["dataset"]].flips:
        usual["augment"] = "none"
    changed = {key: config[key] for key, value in usual.items() if key in config and config[key] != value}
    if isinstance(changed.get("milestones"), list):
        changed["milestones"] = " ".join(map(str, changed["milestones"])) or "none"
    differences = (f"{key.replace('_', ' ')} {value}" for key, value in changed.items())
    return ", ".join([config["recipe"], str(config["epochs"]), *differences])
