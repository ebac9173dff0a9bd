"""Names of networks, data sets and augmentations. The networks themselves are in model_factory.py."""

import contextlib
import difflib
import functools
import importlib.util
import inspect
import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from takd.errors import UserError
from takd.files import import_class

# ------------------------------------------------------------------------------------------------- networks
RESNET_DEPTHS = (8, 14, 20, 26, 32, 44, 56, 110)  # 6n + 2, He et al. 2016, section 4.2
PLANE_SIZES = (2, 4, 6, 8, 10)
NETWORKS = [
    *(f"resnet{depth}" for depth in RESNET_DEPTHS),
    *(f"plane{size}" for size in PLANE_SIZES),
    *(f"resnet{depth}a" for depth in RESNET_DEPTHS),  # He et al.'s option A: shortcuts without weights
    *("cnn5", "resnet50"),  # the latter torchvision's
]
MORE_NETWORKS = "torchvision:NAME, or FILE.py:CLASS of your own"


def network(name: str) -> str:
    """The canonical spelling of a network's name: any case, `plain10`, `cnn10` and `resnet-20` are accepted.

    `torchvision:NAME` imports torchvision, `FILE.py:CLASS` the user's file.
    """
    prefix, _, rest = str(name).strip().rpartition(":")
    if prefix.lower() == "torchvision":
        spelling, known = re.sub(r"[\s_-]", "", rest.lower()), torchvision_networks()
        if same := [each for each in known if each.replace("_", "") == spelling]:
            return f"torchvision:{same[0]}"
        hint = nearest(spelling, known)
        raise UserError(f"unknown network '{name}'{hint}; torchvision's networks: {' '.join(known)}")
    if is_file(name):
        import_class(name)
        return f"{os.path.normpath(prefix)}:{rest}"
    spelling = re.sub(r"[\s_-]", "", re.sub(r"^resnet_32_", "resnet", str(name).lower()))  # hankyul2's, of 32x32 images
    for candidate in (spelling, re.sub(r"^(plain|cnn)(?=\d)", "plane", spelling)):
        if candidate in NETWORKS:
            return candidate
    widened = re.search(r"\dx\d", spelling)  # resnet8x4 is no resnet8
    hint = _torchvision_hint(spelling) or ("" if widened else nearest(candidate, NETWORKS))
    raise UserError(f"unknown network '{name}'{hint}; networks: {' '.join(NETWORKS)}, {MORE_NETWORKS}")


def _torchvision_hint(spelling: str) -> str:
    with contextlib.suppress(UserError):
        known = {name.replace("_", ""): name for name in torchvision_networks()}
        return f" (did you mean torchvision:{known[spelling]}?)" if spelling in known else ""
    return ""


def is_file(name: str) -> bool:
    """Whether a network's name is FILE.py:CLASS, a user's own."""
    return str(name).strip().rpartition(":")[0].endswith(".py")


@functools.cache
def torchvision_networks() -> list[str]:
    """Names of torchvision's classifiers, as its source registers them: importing it takes seconds."""
    found = importlib.util.find_spec("torchvision")
    files = Path(found.origin).parent.glob("models/*.py") if found and found.origin else ()
    text = "".join(file.read_text(encoding="utf-8") for file in files)
    if names := re.findall(r"^@register_model\(\)\n(?:@.*\n)*def (\w+)\(", text, re.MULTILINE):
        return sorted(names)
    raise UserError("torchvision is not installed; pip install -r requirements.txt")


def torchvision_name(network_name: str) -> str | None:
    """Torchvision's own name of one of its networks, else None."""
    return "resnet50" if network_name == "resnet50" else network_name.partition("torchvision:")[2] or None


def has_pretrained(network_name: str) -> bool:
    """Whether --pretrained applies: to torchvision's networks, and to a user's class with a parameter `pretrained`."""
    if is_file(network_name):
        return "pretrained" in inspect.signature(import_class(network_name)).parameters
    return torchvision_name(network_name) is not None


def declared_input(network_name: str) -> dict[str, Any]:
    """What a user's class declares of its network's input, as far as it does: `mean` and `std` per channel, of pixels
    in 0..1, and `image_size`. Raises a UserError for other values.
    """

    def three(values):
        return isinstance(values, list | tuple) and len(values) == 3 and all(map(math.isfinite, values))

    checks = {
        "mean": (three, "three numbers, of pixels in 0..1"),
        "std": (lambda values: three(values) and min(values) > 0, "three numbers above 0, of pixels in 0..1"),
        "image_size": (lambda size: type(size) is int and 8 <= size <= 1024, "a whole number from 8 to 1024"),
    }
    own, declared = import_class(network_name) if is_file(network_name) else None, {}
    for key, (fits, what) in checks.items():
        if (value := getattr(own, key, None)) is not None:
            with contextlib.suppress(TypeError):  # not numbers
                if fits(value):
                    declared[key] = value
            if key not in declared:
                raise UserError(f"{network_name}: {key} must be {what}, not {value!r}")
    return declared


def file_name(network_name: str) -> str:
    """A network's name in a form for file names."""
    return re.sub(r"[^\w.]+", "-", network_name).strip("-.")


def family(network_name: str) -> str:
    """'plane', 'resnet' (He et al.'s for 32x32 images) or 'other': what recipes distinguish."""
    if network_name.startswith("plane"):
        return "plane"
    return "resnet" if re.fullmatch(r"resnet\d+a?", network_name) and network_name != "resnet50" else "other"


# ------------------------------------------------------------------------------------------------ data sets
@dataclass(frozen=True)
class Dataset:
    """What is known of a data set before it is read; None where it depends on the files."""

    classes: int | None
    train_images: int | None
    test_images: int | None
    mean: tuple[float, ...]  # per channel, of pixels in 0..1
    std: tuple[float, ...]
    flips: bool = True  # whether a mirrored image keeps its label; a mirrored digit does not
    image_size: int = 32  # height and width that networks get by default


# The released code uses these for both CIFARs, and its checkpoints expect them.
RELEASED_MEAN, RELEASED_STD = (0.507, 0.487, 0.441), (0.267, 0.256, 0.276)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DATASETS = {
    "cifar10": Dataset(10, 50_000, 10_000, RELEASED_MEAN, RELEASED_STD),
    "cifar100": Dataset(100, 50_000, 10_000, RELEASED_MEAN, RELEASED_STD),
    "digits": Dataset(10, 1_438, 359, (0.306,) * 3, (0.376,) * 3, flips=False),
    "folder": Dataset(None, None, None, IMAGENET_MEAN, IMAGENET_STD, image_size=224),
}

CIFAR_FOLDERS = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}  # torchvision's layout


def dataset(name: str) -> str:
    """The canonical spelling of a data set's name: any case, `CIFAR-100` is accepted. Unknown names are UserErrors."""
    spelling = re.sub(r"[\s_-]", "", str(name).lower())
    if spelling in DATASETS:
        return spelling
    raise UserError(f"unknown data set '{name}'{nearest(spelling, DATASETS)}; data sets: {' '.join(DATASETS)}")


# Number of views of an augmentation, None where transforms are drawn at random: takd/images/augmentation.py.
VIEWS = {"none": 1, "flip": 2, "crop-flip": 9 * 9 * 2, "crop-flip-reflect": 9 * 9 * 2, "rotate-crop-flip": None}


def nearest(word: str, known: Iterable[str]) -> str:
    """' (did you mean ...?)' with the closest known word; ties go to the longest common prefix. '' if none is close."""

    def likeness(name):
        return difflib.SequenceMatcher(None, word, name).ratio(), len(os.path.commonprefix([word, name]))

    close = max(known, key=likeness)
    # Of a short word only its letters in another order: vid, nst and nkd are other methods, no misspellings of ours.
    alike = likeness(close)[0] >= 0.75 if len(word) > 4 else sorted(word) == sorted(close)
    return f" (did you mean {close}?)" if alike else ""
