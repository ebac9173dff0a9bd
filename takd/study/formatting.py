"""Formatting of numbers and settings in reports."""

import dataclasses
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from takd.config import names, recipes
from takd.config.run_config import RunConfig
from takd.study.collect import Group
from takd.study.plan import arrows

SYMBOLS = {"temperature": "T", "lambda": "λ"}
# Settings that reports show in columns of their own, or that follow from them.
APART = ("student", "teacher", "dataset", "images", "recipe", "epochs", "method", "method_options", *SYMBOLS)


def percent(mean: float | None, deviation: float | None = None) -> str:
    if mean is None:
        return ""
    return f"{mean:.2f}" + (f" ± {deviation:.2f}" if deviation is not None else "")


def outcome(group: Group, which: str) -> str:
    return percent(group.mean(which), group.deviation(which))


def points(value: float, deviation: float | None = None) -> str:
    return f"{value:+.2f}".replace("-", "−") + (f" ± {deviation:.2f}" if deviation is not None else "")


def p_value(p: float | None) -> str:
    return "" if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"


def listed(words: Sequence[str]) -> str:
    """'a', 'a and b' or 'a, b and c'."""
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def seeds_text(seeds: Collection[int]) -> str:
    """'seed 1' or '3 seeds (1, 2 and 3)'."""
    names = listed([str(seed) for seed in sorted(seeds)])
    return f"seed {names}" if len(seeds) == 1 else f"{len(seeds)} seeds ({names})"


def options_text(options: Mapping[str, Any]) -> str:
    ordered = sorted(options.items(), key=lambda item: list(SYMBOLS).index(item[0]) if item[0] in SYMBOLS else 2)
    shown = {SYMBOLS.get(key, key): value for key, value in ordered if (key, value) != ("reduction", "batchmean")}
    return ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in shown.items()
    )


def method_of(group: Group) -> str:
    """Such as 'kd (T 4, λ 0.5)'; empty for a network alone."""
    options = options_text(group.options)
    return (group.method or "") + f" ({options})" * bool(options)


def seeds_of(group: Group | None, planned: int = 0) -> str:
    done = len(group.finished) if group else 0
    expected = max(planned, len(group.runs) if group else 0)
    return f"{done}" if done == expected else f"{done} of {expected}"


def changed_settings(config: Mapping[str, Any], used: Mapping[str, Any]) -> list[str]:
    """The settings that are not the recipe's or the default, in words; `used` are Run.settings."""
    recipe = recipes.recipe(config["recipe"], config["student"])
    usual = {field.name: field.default for field in dataclasses.fields(RunConfig)} | dataclasses.asdict(recipe)
    usual["milestones"] = recipes.milestone_epochs(recipe, config["epochs"]) if not config.get("schedule") else []
    if not names.DATASETS[config["dataset"]].flips:
        usual["augment"] = "none"
    shown = {**used} | {"precision": config.get("precision", "auto")}
    shown["milestones"] = recipes.reached(config["milestones"], config["epochs"])
    hidden = (*APART, "method_file", "without_effect")
    changed = {key: value for key, value in shown.items() if key not in hidden and value != usual.get(key)}
    return [setting_text(key, value) for key, value in changed.items() if value or usual.get(key)]


def setting_text(key: str, value: Any) -> str:
    match key, value:
        case "train_images", int():
            return f"{value:,} training images"
        case "image_size", int():
            return f"{value} pixels"
        case _, bool():
            return "no " * (not value) + key.replace("_", " ")
    return f"{key.replace('_', ' ')} {value_text(value)}"


def value_text(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(value_text, value)) or "none"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def recipe_of(group: Group) -> str:
    """The recipe, the epochs, and settings that differ from the recipe and the defaults."""
    config = group.config
    return ", ".join([config["recipe"], str(config["epochs"]), *changed_settings(config, group.settings)])


def recipes_of(groups: Sequence[Group]) -> list[str]:
    """recipe_of each group of one table. Where two rows would look alike, what differs is added, or their folders."""
    texts = [recipe_of(group) for group in groups]
    for differing in (_differing, lambda group, alike: [f"run {folder_of(group)}"]):
        rows: dict[Any, list[int]] = {}
        for i, group in enumerate(groups):
            rows.setdefault((group.runs[0].data, group.path, method_of(group), texts[i]), []).append(i)
        for members in rows.values():
            if len(members) > 1:
                alike = [groups[i] for i in members]
                added = [differing(group, alike) for group in alike]
                for i, more in zip(members, added, strict=True):
                    texts[i] = ", ".join([texts[i], *more])
    return texts


def folder_of(group: Group) -> str:
    """The end of its first run's folder, as seed1 alone, in which --repeat puts a run, would name none."""
    return "/".join(part for part in group.runs[0].folder.parts[-2:] if not part.endswith(".jsonl"))


def _differing(group: Group, alike: Sequence[Group]) -> list[str]:
    """The group's values of settings in which groups of the same description differ."""
    keys = dict.fromkeys(key for each in alike for key in each.settings if key not in APART)
    differ = [key for key in keys if len({json.dumps(each.settings.get(key)) for each in alike}) > 1]
    return [setting_text(key, group.settings.get(key)) for key in differ]


def learned_from(path: Sequence[str]) -> str:
    return arrows(path[:-1]) or "labels"
