"""Recipes: the optimisation settings that a training takes where the user gives none.

`paper` is Mirzadeh et al. (AAAI 2020) with what its text leaves out settled by measurement (docs/recipes.md);
`released-code` is what the authors' published program really does, bugs included, to reproduce other people's runs;
`repdistiller` is the setting of Tian et al. (ICLR 2020) and of most tables since; `cifar200` the 200 epochs of
hankyul2's KnowledgeDistillation, which compares methods between networks of one size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from takd.config import names


@dataclass(frozen=True)
class Recipe:
    """One network family's settings. Milestones, at which the learning rate decays, are fractions of the epochs."""

    learning_rate: float
    milestones: tuple[float, ...]
    weight_decay: float
    nesterov: bool
    augment: str
    learning_rate_decay: float = 0.1
    momentum: float = 0.9
    epochs: int = 160
    batch_size: int = 128
    precision: str = "auto"  # bf16 where the hardware has it
    initialisation: str | None = None  # model_factory.INITIALISATIONS; None: the network's own
    round_down: bool = False  # where a milestone falls between two epochs
    method_options: dict[str, dict[str, Any]] = field(default_factory=dict)  # {method: {option: value}}


# Settings that no recipe changes and a run has only where they differ: config.json is then an earlier version's too.
OFF = {"schedule": "steps", "warmup_epochs": 0, "label_smoothing": 0.0}

# fmt: off
RELEASED: dict[str, Any] = {
    "nesterov": False, "augment": "none", "precision": "fp32", "round_down": True,
    "method_options": {"kd": {"reduction": "mean"}},  # KLDivLoss() divides by the classes
}
RECIPES = {
    "paper": {
        # 0.1, 0.01 and 0.001, decaying at 80 and 120 of 160 epochs; pad 4, crop and flip as in He et al. 2016.
        "resnet": Recipe(0.1, (1 / 2, 3 / 4), 1e-4, nesterov=True, augment="crop-flip"),
        # The paper says 0.1 throughout; its numbers are those of 0.01, and decay helps (measured: docs/recipes.md).
        "plane": Recipe(0.01, (1 / 2, 3 / 4), 1e-4, nesterov=True, augment="none"),
        # Not the paper's: torchvision's rate for networks without batch norm, and the usual one for fine-tuning.
        "other": Recipe(0.01, (1 / 2, 3 / 4), 1e-4, nesterov=True, augment="flip"),
    },
    "released-code": {
        # `epoch < int(epoch / 2.0)` is never true there, so its 0.1 is never used.
        "resnet": Recipe(0.01, (3 / 4,), 1e-4, **RELEASED),
        "plane": Recipe(0.01, (), 1e-4, **RELEASED),
    },
    # Decaying at 150, 180 and 210 of 240; losses are .1 CE + .9 KD, or CE and a feature method's own weight.
    "repdistiller": dict.fromkeys(("resnet", "plane"), Recipe(
        0.05, (5 / 8, 3 / 4, 7 / 8), 5e-4, nesterov=False, augment="crop-flip", epochs=240, batch_size=64,
        method_options={"kd": {"lambda": 0.9}})),
    # Decaying at 100 and 150 of 200; its FSP term is the mean over pairs of MSE / 3.
    "cifar200": dict.fromkeys(("resnet", "plane"), Recipe(
        0.1, (1 / 2, 3 / 4), 1e-4, nesterov=False, augment="crop-flip-reflect", epochs=200,
        initialisation="kaiming-xavier", method_options={"fsp": {"beta": 1 / 3}})),
}
# fmt: on


def recipe(name: str, network: str) -> Recipe:
    """The settings of recipe `name` for a network; for a family without a row, its ResNets'."""
    return RECIPES[name].get(names.family(network), RECIPES[name]["resnet"])


def milestone_epochs(recipe: Recipe, epochs: int) -> list[int]:
    """Epochs, counted from 0, from which the rate is lower: (1/2, 3/4) of 160 is [80, 120], of 2 [1], of 1 []."""
    rounded = math.floor if recipe.round_down else math.ceil
    return reached(sorted({rounded(fraction * epochs) for fraction in recipe.milestones}), epochs)


def reached(milestones: Sequence[int], epochs: int) -> list[int]:
    """The milestones that a run of so many epochs comes to: the others make no difference."""
    return [milestone for milestone in milestones if milestone < epochs]
