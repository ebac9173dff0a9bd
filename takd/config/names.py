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
import traceback
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
        raise UserError(f"unknown network '{name}'{nearest(spelled, known)}; torchvision's networks: {' '.join(known)}")
    if colon and prefix.endswith(".py"):
        return user_class(name)
    spelled = re.sub(r"[\s_-]", "", str(name).lower())
    for spelling in (spelled, re.sub(r"^(plain|cnn)(?=\d)", "plane", spelled)):
        if spelling in NETWORKS:
            return spelling
    raise UserError(f"unknown network '{name}'{nearest(spelling, NETWORKS)}; networks: {' '.join(NETWORKS)}, {MORE_NETWORKS}")


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
    tree = _parsed(file)
    defined = [getattr(node, "name", None) for node in tree.body]
    defined += [alias.asname or alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    if name not in filter(None, defined):
        classes = " ".join(node.name for node in tree.body if isinstance(node, ast.ClassDef)) or "none"
        raise UserError(f"{text}: {file} defines no '{name}'; its classes: {classes}")
    return f"{os.path.normpath(file)}:{name}"


def _parsed(file):
    """A Python file's syntax tree, without running it."""
    try:
        return ast.parse(Path(file).read_bytes(), str(file))
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); give FILE.py:CLASS") from None
    except (SyntaxError, ValueError) as error:
        raise UserError(f"{file} is not Python: {error}") from None


def imported(text):
    """What `FILE.py:CLASS` names. This runs the file; its own errors become one line."""
    file, _, name = text.rpartition(":")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        return getattr(module, name)
    except Exception as error:
        line = traceback.extract_tb(error.__traceback__)[-1].lineno
        raise UserError(f"{text} cannot be imported: {type(error).__name__}: {error} (line {line})") from None


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
    raise UserError(f"unknown data set '{name}'{nearest(spelled, DATASETS)}; data sets: {' '.join(DATASETS)}")


# Ways that an augmentation shows one image, None where they are endless: see augmentation.py.
VIEWS = {"none": 1, "flip": 2, "crop-flip": 9 * 9 * 2, "crop-flip-reflect": 9 * 9 * 2, "rotate-crop-flip": None}


# -------------------------------------------------------------------------------------------------- methods
@dataclass(frozen=True)
class Option:
    """One option of a method, as its constructor and its docstring declare it."""

    default: object  # its type is the option's
    bounds: str  # such as "above 0", "0 to 1", "at least 1", "batchmean or mean"; empty: numbers from 0
    meaning: str


@dataclass(frozen=True)
class Method:
    """What is known of a method before torch is imported."""

    summary: str  # the first line of its docstring
    options: dict  # {name: Option}
    one_process: bool  # whether processes cannot share a batch, as its loss is no mean over images


@functools.cache
def methods():
    """{method name: Method}, read from losses.py: the classes there are the only declaration of methods and their options."""
    tree = _parsed(HERE.parent / "distill" / "methods.py")
    table = next(node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "METHODS")
    classes = _classes(tree)
    return {key.value: _declared(classes[value.id]) for key, value in zip(table.keys, table.values, strict=True)}


def method(name):
    """The method's own spelling: a name in any case, or `file.py:Class` of a user's own. What is wrong with it is a UserError."""
    if ":" in name:
        method_of(name)
        return name
    if name.lower() in methods():
        return name.lower()
    raise UserError(f"unknown method '{name}'{nearest(name.lower(), methods())}; methods: {' '.join(methods())}, or my_file.py:MyClass")


def method_of(name):
    """The Method of a name as `method` spells it."""
    if ":" not in name:
        return methods()[name]
    path, _, spelled = name.rpartition(":")
    classes = _classes(_parsed(path))
    if spelled not in classes:
        raise UserError(f"{path} has no class '{spelled}'{nearest(spelled, classes)}; classes there: {' '.join(classes) or 'none'}")
    try:
        return _declared(classes[spelled])
    except ValueError as error:
        raise UserError(f"--method {name}: {error}") from None


def help_methods():
    """Every method with its options, their defaults and their meaning, as --help-methods prints them."""
    lines = []
    for name, about in methods().items():
        lines.append(f"{name:<7} {about.summary}")
        for key, option in about.options.items():
            bounds = f" ({option.bounds})" if option.bounds else ""
            lines.append(f"          {key:<12} {str(option.default):<10} {option.meaning}{bounds}")
    return "\n".join(lines)


def _classes(tree):
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


def _declared(node):
    """The Method that a class declares. Raises ValueError where it is none."""
    doc = ast.get_docstring(node) or ""
    meanings = {found[1]: (found[2] or "", found[3]) for found in re.finditer(r"^(\w+)(?: \((.+?)\))?: (.+)$", doc, re.MULTILINE)}
    init = next((f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == "__init__"), None)
    options, said = {}, _said(node)
    if init:
        if odd := [word.arg for word in init.args.args[1:] if word.arg not in ("student", "teacher", "labels")]:
            raise ValueError(f"its constructor asks for {odd[0]}; options stand behind a *, before it only student, teacher and labels")
        for word, default in zip(init.args.kwonlyargs, init.args.kw_defaults, strict=True):
            key = word.arg.rstrip("_")
            try:
                value = ast.literal_eval(default)
            except (ValueError, TypeError):
                value = None
            if not isinstance(value, bool | int | float | str):
                raise ValueError(f"its option {key} needs a default that is a number, a word, True or False")
            options[key] = Option(value, *meanings.get(key, ("", "")))
    return Method(doc.partition("\n")[0], options, bool({"needs_index", "one_process"} & said))


def _said(node):
    """Names that a class body sets to True."""
    found = set()
    for line in node.body:
        if isinstance(line, ast.Assign):
            keys, values = ([part.elts if isinstance(part, ast.Tuple) else [part]][0] for part in (line.targets[0], line.value))
            found |= {key.id for key, value in zip(keys, values, strict=False) if isinstance(value, ast.Constant) and value.value is True}
    return found


def nearest(word, known):
    """The likeliest of the known words; of several equally like, the one that begins like it: resnet21 means resnet20, not 32."""

    def likeness(name):
        return difflib.SequenceMatcher(None, word, name).ratio(), len(os.path.commonprefix([word, name]))

    close = max(known, key=likeness)
    return f" (did you mean {close}?)" if likeness(close)[0] > 0.3 else ""
