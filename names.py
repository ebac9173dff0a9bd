"""What can be asked for by name: networks, data sets, methods and their options.

Tables and spelling only, on the standard library alone: `--help` and every usage error answer before torch is imported.
The networks themselves are in model_factory.py, the images in data_loader.py, the methods in losses.py.
"""

import ast
import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent


class UserError(ValueError):
    """A mistake in what the user gave: one line that says what was given, what is allowed and what to do."""


# ------------------------------------------------------------------------------------------------- networks
# Layers of the plain CNNs (Mirzadeh et al. 2020, appendix): 'C32' a 3x3 convolution with batch norm and ReLU,
# 'MP' a 2x2 max-pool, 'FC64' a hidden linear layer with ReLU; the last linear layer follows from the classes.
# The paper draws one column for CIFAR-10 and one for CIFAR-100: up to ten classes take the first.
PLANES_10 = {
    2: "C16 MP C16 MP",
    4: "C16 C16 MP C32 C32 MP",
    6: "C16 C16 MP C32 C32 MP C64 C64 MP",
    8: "C16 C16 MP C32 C32 MP C64 C64 MP C128 C128 MP FC64",
    10: "C32 C32 MP C64 C64 MP C128 C128 MP C256 C256 C256 C256 MP FC128",
}
PLANES_100 = {
    2: "C32 MP C32 MP",
    4: "C32 C32 MP C64 C64 MP",
    6: "C32 C32 MP C64 C64 MP C128 C128",
    8: "C32 C32 MP C64 C64 MP C128 C128 MP C256 C256 MP FC64",
    10: "C32 C32 MP C64 C64 MP C128 C128 MP C256 C256 C256 C256 MP FC512",
}
RESNET_DEPTHS = (8, 14, 20, 26, 32, 44, 56, 110)  # 6n + 2, He et al. 2016, section 4.2
NETWORKS = [f"resnet{depth}" for depth in RESNET_DEPTHS] + [f"plane{size}" for size in PLANES_100]


def network(name):
    """The network's own spelling: any case, `plain10`, `cnn10` and `resnet-20` are understood."""
    spelled = re.sub(r"[\s_-]", "", str(name).lower())
    spelled = re.sub(r"^(plain|cnn)(?=\d)", "plane", spelled)
    if spelled in NETWORKS:
        return spelled
    raise UserError(f"unknown network '{name}'{_nearest(spelled, NETWORKS)}; networks: {' '.join(NETWORKS)}")


def family(network_name):
    """'plane' or 'resnet': what a recipe distinguishes."""
    return "plane" if network_name.startswith("plane") else "resnet"


# ------------------------------------------------------------------------------------------------ data sets
@dataclass(frozen=True)
class Dataset:
    """What is known of a data set before it is read. Mean and std are per channel, of pixels in 0..1."""

    classes: int
    train_images: int
    test_images: int
    mean: tuple
    std: tuple
    flips: bool = True  # whether a mirrored image keeps its label; a mirrored digit does not


# The released code uses these four digits for both CIFARs, and its checkpoints expect them.
RELEASED_MEAN, RELEASED_STD = (0.507, 0.487, 0.441), (0.267, 0.256, 0.276)
DATASETS = {
    "cifar10": Dataset(10, 50_000, 10_000, RELEASED_MEAN, RELEASED_STD),
    "cifar100": Dataset(100, 50_000, 10_000, RELEASED_MEAN, RELEASED_STD),
    "digits": Dataset(10, 1_438, 359, (0.306,) * 3, (0.376,) * 3, flips=False),
}


def dataset(name):
    """The data set's own spelling: any case, `CIFAR-100` is understood. Unknown names are errors, never CIFAR-10."""
    spelled = re.sub(r"[\s_-]", "", str(name).lower())
    if spelled in DATASETS:
        return spelled
    raise UserError(f"unknown data set '{name}'{_nearest(spelled, DATASETS)}; data sets: {' '.join(DATASETS)}")


VIEWS = {"none": 1, "crop-flip": 9 * 9 * 2}  # ways that an augmentation shows one image: see augmentation.py


# -------------------------------------------------------------------------------------------------- methods
def methods(source=HERE / "losses.py"):
    """{method name: {option: default}}, read from the constructors in losses.py without importing it (or torch).

    The constructors' keyword arguments are the only declaration of a method's options; this reads them there.
    """
    tree = ast.parse(Path(source).read_text(encoding="utf-8"))
    options = {}
    table = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            init = next((f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == "__init__"), None)
            keywords = zip(init.args.kwonlyargs, init.args.kw_defaults, strict=True) if init else ()
            options[node.name] = {word.arg.rstrip("_"): ast.literal_eval(default) for word, default in keywords}
        elif isinstance(node, ast.Assign) and node.targets[0].id == "METHODS":
            table = {key.value: value.id for key, value in zip(node.value.keys, node.value.values, strict=True)}
    return {name: options[cls] for name, cls in table.items()}


def method(name):
    """The method's own spelling, or a UserError with the nearest name and the whole list."""
    known = methods()
    if name.lower() in known:
        return name.lower()
    raise UserError(f"unknown method '{name}'{_nearest(name.lower(), known)}; methods: {' '.join(known)}")


def _nearest(word, known):
    """The likeliest of the known words; of several equally like, the one that begins like it: resnet21 means resnet20, not 32."""

    def likeness(name):
        return difflib.SequenceMatcher(None, word, name).ratio(), len(os.path.commonprefix([word, name]))

    close = max(known, key=likeness)
    return f" (did you mean {close}?)" if likeness(close)[0] > 0.3 else ""
