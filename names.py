"""What can be asked for by name: networks, data sets, methods and their options.

Tables and spelling only, on the standard library alone: `--help` and every usage error answer before torch is imported.
The networks themselves are in model_factory.py, the images in data_loader.py, the methods in losses.py.
"""

import ast
import difflib
import functools
import importlib.util
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
CNN5 = "C64 MP C64 MP C64 MP C24 MP C12 MP"  # the student beside a ResNet50 in a well-known exercise: 98,446 parameters at 224x224
NETWORKS = [
    *(f"resnet{depth}" for depth in RESNET_DEPTHS),
    *(f"plane{size}" for size in PLANES_100),
    *(f"resnet{depth}a" for depth in RESNET_DEPTHS),  # He et al.'s option A: shortcuts without weights
    "cnn5",
    "resnet50",  # torchvision's
]
MORE_NETWORKS = "torchvision:NAME, or FILE.py:CLASS of your own"


def network(name):
    """The network's own spelling: any case, `plain10`, `cnn10` and `resnet-20` are understood.

    `torchvision:NAME` is one of torchvision's classifiers, `FILE.py:CLASS` a user's; the file is looked into, and not run.
    """
    prefix, colon, rest = str(name).strip().rpartition(":")
    if prefix.lower() == "torchvision":
        spelled, known = re.sub(r"[\s_-]", "", rest.lower()), torchvision_networks()
        if same := [each for each in known if each.replace("_", "") == spelled]:
            return f"torchvision:{same[0]}"
        raise UserError(f"unknown network '{name}'{_nearest(spelled, known)}; torchvision's networks: {' '.join(known)}")
    if colon and prefix.endswith(".py"):
        return user_class(name)
    spelled = re.sub(r"[\s_-]", "", str(name).lower())
    for spelling in (spelled, re.sub(r"^(plain|cnn)(?=\d)", "plane", spelled)):
        if spelling in NETWORKS:
            return spelling
    raise UserError(f"unknown network '{name}'{_nearest(spelling, NETWORKS)}; networks: {' '.join(NETWORKS)}, {MORE_NETWORKS}")


@functools.cache
def torchvision_networks():
    """Names of torchvision's classifiers, read from its source without importing it."""
    found = importlib.util.find_spec("torchvision")
    if found is None or not found.submodule_search_locations:
        raise UserError("torchvision is not installed; pip install -r requirements.txt")
    files = sorted(Path(found.submodule_search_locations[0], "models").glob("*.py"))
    builder = re.compile(r"^@register_model\(\)$.*?^def (\w+)", re.MULTILINE | re.DOTALL)
    return sorted(name for file in files for name in builder.findall(file.read_text(encoding="utf-8")))


def torchvision_name(network_name):
    """Torchvision's name of a network that is built there, else None."""
    return "resnet50" if network_name == "resnet50" else network_name.partition("torchvision:")[2] or None


def user_class(text):
    """`FILE.py:CLASS`, looked up in the file without running it: a UserError where there is no such file, or no such name in it."""
    file, _, name = str(text).strip().rpartition(":")
    try:
        tree = ast.parse(Path(file).read_bytes(), file)
    except OSError as error:
        raise UserError(f"{text}: {file} cannot be read ({error.strerror}); give FILE.py:CLASS") from None
    except (SyntaxError, ValueError) as error:
        raise UserError(f"{text}: {file} is not Python: {error}") from None
    defined = [getattr(node, "name", None) for node in tree.body]
    defined += [alias.asname or alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    if name not in filter(None, defined):
        classes = " ".join(node.name for node in tree.body if isinstance(node, ast.ClassDef)) or "none"
        raise UserError(f"{text}: {file} defines no '{name}'; its classes: {classes}")
    return f"{os.path.normpath(file)}:{name}"


def imported(text):
    """What `FILE.py:CLASS` names. This runs the file; its own errors become one line."""
    file, _, name = text.rpartition(":")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        return getattr(module, name)
    except Exception as error:
        raise UserError(f"{text} cannot be imported: {type(error).__name__}: {error}") from None


def file_name(network_name):
    """A network's name as a part of file names."""
    return re.sub(r"[^\w.]+", "-", network_name).strip("-.")


def family(network_name):
    """'plane', 'resnet' (He's for 32x32 images) or 'other': what a recipe distinguishes."""
    if network_name.startswith("plane"):
        return "plane"
    return "resnet" if re.fullmatch(r"resnet\d+a?", network_name) and network_name != "resnet50" else "other"


# ------------------------------------------------------------------------------------------------ data sets
@dataclass(frozen=True)
class Dataset:
    """What is known of a data set before it is read. Mean and std are per channel, of pixels in 0..1."""

    classes: int  # None where only the folder tells
    train_images: int
    test_images: int
    mean: tuple
    std: tuple
    flips: bool = True  # whether a mirrored image keeps its label; a mirrored digit does not
    image_size: int = 32  # height and width that networks get where no other is asked for


# The released code uses these four digits for both CIFARs, and its checkpoints expect them.
RELEASED_MEAN, RELEASED_STD = (0.507, 0.487, 0.441), (0.267, 0.256, 0.276)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DATASETS = {
    "cifar10": Dataset(10, 50_000, 10_000, RELEASED_MEAN, RELEASED_STD),
    "cifar100": Dataset(100, 50_000, 10_000, RELEASED_MEAN, RELEASED_STD),
    "digits": Dataset(10, 1_438, 359, (0.306,) * 3, (0.376,) * 3, flips=False),
    "folder": Dataset(None, None, None, IMAGENET_MEAN, IMAGENET_STD, image_size=224),
}


def dataset(name):
    """The data set's own spelling: any case, `CIFAR-100` is understood. Unknown names are errors, never CIFAR-10."""
    spelled = re.sub(r"[\s_-]", "", str(name).lower())
    if spelled in DATASETS:
        return spelled
    raise UserError(f"unknown data set '{name}'{_nearest(spelled, DATASETS)}; data sets: {' '.join(DATASETS)}")


# Ways that an augmentation shows one image, None where they are endless: see augmentation.py.
VIEWS = {"none": 1, "flip": 2, "crop-flip": 9 * 9 * 2, "rotate-crop-flip": None}


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
