"""Recipes: the optimisation settings that a training takes where the user gives none. Standard library only.

`paper` is Mirzadeh et al. (AAAI 2020) with what its text leaves out settled by measurement (docs/recipes.md);
`released-code` is what the authors' published program really does, faults included, to reproduce other people's runs of it.
`repdistiller` is the setting of Tian et al. (ICLR 2020) and of most tables since; `cifar200` the 200 epochs of hankyul2's
KnowledgeDistillation, which compares methods between networks of one size.
"""

import math
from dataclasses import dataclass, field

from takd.config import names


@dataclass(frozen=True)
class Recipe:
    """One network family's settings. Milestones are fractions of the run's epochs: the learning rate falls there."""

    learning_rate: float
    milestones: tuple
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
    method_options: dict = field(default_factory=dict)  # {method: {option: value}} that differ from the method's own


RELEASED = {"kd": {"reduction": "mean"}}  # KLDivLoss() divides by the classes
RECIPES = {
    "paper": {
        # 0.1, 0.01 and 0.001, falling at 80 and 120 of 160 epochs; pad 4, crop and flip as in He et al. 2016.
        "resnet": Recipe(0.1, (1 / 2, 3 / 4), 1e-4, nesterov=True, augment="crop-flip"),
        # The paper says 0.1 throughout; its numbers are those of 0.01, and falling helps (measured: docs/recipes.md).
        "plane": Recipe(0.01, (1 / 2, 3 / 4), 1e-4, nesterov=True, augment="none"),
        # Not the paper's. 0.01: torchvision's own rate for its networks without batch norm, and the usual one after --pretrained.
        "other": Recipe(0.01, (1 / 2, 3 / 4), 1e-4, nesterov=True, augment="flip"),
    },
    "released-code": {
        # `epoch < int(epoch / 2.0)` is never true there, so its 0.1 is never used.
        "resnet": Recipe(0.01, (3 / 4,), 1e-4, nesterov=False, augment="none", precision="fp32", round_down=True, method_options=RELEASED),
        "plane": Recipe(0.01, (), 1e-4, nesterov=False, augment="none", precision="fp32", round_down=True, method_options=RELEASED),
    },
    # Falling at 150, 180 and 210 of 240; losses are .1 CE + .9 KD, or CE and a feature method's own weight.
    "repdistiller": dict.fromkeys(
        ("resnet", "plane"),
        Recipe(0.05, (5 / 8, 3 / 4, 7 / 8), 5e-4, nesterov=False, augment="crop-flip", epochs=240, batch_size=64,
               method_options={"kd": {"lambda": 0.9}}),
    ),
    # Falling at 100 and 150 of 200.
    "cifar200": dict.fromkeys(
        ("resnet", "plane"),
        Recipe(0.1, (1 / 2, 3 / 4), 1e-4, nesterov=False, augment="crop-flip-reflect", epochs=200, initialisation="kaiming-xavier"),
    ),
}  # fmt: skip


def recipe(name, network):
    """The settings of recipe `name` for a network (a canonical name); for those that it says nothing of, what it says of ResNets."""
    return RECIPES[name].get(names.family(network), RECIPES[name]["resnet"])


def milestone_epochs(recipe, epochs):
    """Epochs, counted from 0, at which the rate falls: (1/2, 3/4) of 160 is [80, 120], of 1 it is never."""
    return [(math.floor if recipe.round_down else math.ceil)(fraction * epochs) for fraction in recipe.milestones]


def learning_rate_at(epoch, learning_rate, milestones, decay):
    """The rate of one epoch, counted from 0. Stateless, so a continued run needs no scheduler's memory."""
    return learning_rate * decay ** sum(epoch >= milestone for milestone in milestones)
