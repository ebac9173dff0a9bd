"""Names -> networks: the plain CNNs and the CIFAR ResNets of the paper, torchvision's, a user's own; and loading
one from a file.

    network = create("resnet20", classes=100)
    logits = network(images)                                # (B, 3, H, W) -> (B, C)
    stages, pooled, logits = network.forward_features(images)

Parameter counts, state-dict keys and initialisation are those of the released TAKD code, so either can load the
other's files; the ResNets also have RepDistiller's keys. A new network is a class here, a branch of `create` and a name
in takd/config/names.py. Legend: B batch, C classes, H W height and width.
"""

import inspect
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from takd.config import names
from takd.distill.methods import Features
from takd.errors import UserError, first_line
from takd.files import import_class, misfit
from takd.process import downloading
from takd.run import checkpoint
from takd.run.checkpoint import load_weights

State = Mapping[str, torch.Tensor]


# ------------------------------------------------------------------------------------------ the CIFAR ResNets
class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; where the shape changes, the shortcut is a 1x1 convolution with batch norm.

    `padded` makes it He et al.'s option A instead: every other pixel, and zeros in the new channels, half on either
    side.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, padded: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample = None
        self.new_channels = out_channels - in_channels if padded else 0
        if not padded and (stride != 1 or in_channels != out_channels):
            conv = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(out_channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = self.shortcut(x)
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + shortcut)

    def shortcut(self, x: torch.Tensor) -> torch.Tensor:
        if self.downsample is not None:
            return self.downsample(x)
        half = self.new_channels // 2
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, half, half)) if half else x


class ResNet(nn.Module):
    """ResNet of depth 6n + 2 for 32x32 images (He et al. 2016, section 4.2), stages of 16, 32 and 64 channels.

    `padded`: shortcuts without weights (option A there), else projections (option B), as in the released code.
    """

    def __init__(self, depth: int, classes: int, padded: bool = False) -> None:
        super().__init__()
        self.padded = padded
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, blocks=(depth - 2) // 6, stride=1)
        self.layer2 = self._stage(16, 32, blocks=(depth - 2) // 6, stride=2)
        self.layer3 = self._stage(32, 64, blocks=(depth - 2) // 6, stride=2)
        self.fc = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # He et al. 2015, fan out
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def _stage(self, in_channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
        first = BasicBlock(in_channels, out_channels, stride, self.padded)
        return nn.Sequential(
            first, *(BasicBlock(out_channels, out_channels, 1, self.padded) for _ in range(blocks - 1))
        )

    def stem(self, images: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn1(self.conv1(images)))

    def forward_features(self, images: torch.Tensor) -> Features:
        stem = self.stem(images)  # (B, 16, 32, 32)
        stage1 = self.layer1(stem)  # (B, 16, 32, 32)
        stage2 = self.layer2(stage1)  # (B, 32, 16, 16)
        stage3 = self.layer3(stage2)  # (B, 64, 8, 8)
        pooled = stage3.mean(dim=(2, 3))  # (B, 64)
        return Features((stem, stage1, stage2, stage3), pooled, self.fc(pooled))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.forward_features(images).logits


# --------------------------------------------------------------------------------------------- the plain CNNs
# Mirzadeh et al. 2020, appendix: 'C32' a 3x3 convolution with batch norm and ReLU, 'MP' a 2x2 max-pool, 'FC64' a hidden
# linear layer with ReLU; the last linear layer has one output per class. The paper has one column for CIFAR-10 and one
# for CIFAR-100: up to ten classes take the first.
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
CNN5 = "C64 MP C64 MP C64 MP C24 MP C12 MP"  # 98,446 parameters at 224x224: the student in an exercise with a ResNet50


class PlaneCNN(nn.Module):
    """A plain CNN from a row of the tables above: `conv_layers` is convolution, batch norm, ReLU and pool in turn."""

    def __init__(self, layers: str, classes: int, image_size: int = 32) -> None:
        super().__init__()
        convolutions: list[nn.Module] = []
        linears: list[nn.Module] = []
        channels, size, features = 3, image_size, None
        for layer in layers.split():
            if layer == "MP":
                convolutions.append(nn.MaxPool2d(2, 2))
                size //= 2
            elif layer.startswith("FC"):
                width = int(layer[2:])
                linears += [nn.Linear(features or channels * size * size, width), nn.ReLU(inplace=True)]
                features = width
            else:
                width = int(layer[1:])
                conv = nn.Conv2d(channels, width, 3, padding=1)
                convolutions += [conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
                channels = width
        if size < 1:
            poolings = layers.count("MP")
            raise UserError(f"{image_size}x{image_size} images are too small for this network's {poolings} poolings")
        linears.append(nn.Linear(features or channels * size * size, classes))
        self.conv_layers = nn.Sequential(*convolutions)
        self.fc_layers = nn.Sequential(*linears)

    def stages(self, images: torch.Tensor) -> list[torch.Tensor]:
        """The output of each pool, and of the last layer if that is not a pool."""
        x, stages = images, []
        for layer in self.conv_layers:
            x = layer(x)
            if isinstance(layer, nn.MaxPool2d):
                stages.append(x)
        return stages if isinstance(layer, nn.MaxPool2d) else [*stages, x]

    def forward_features(self, images: torch.Tensor) -> Features:
        stages = self.stages(images)
        pooled = self.fc_layers[:-1](stages[-1].flatten(1))
        return Features(tuple(stages), pooled, self.fc_layers[-1](pooled))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.forward_features(images).logits


# ------------------------------------------------------------------------------------------------ by name
def create(name: str, classes: int, image_size: int = 32, pretrained: bool = False) -> nn.Module:
    """A freshly initialised network by name, drawing from torch's global generator. Unknown names are UserErrors.

    `pretrained`: with torchvision's weights except for the last layer, which is new for these classes, or with those
    that a user's own class loads.
    """
    name = names.network(name)
    torchvision_name = names.torchvision_name(name)
    if pretrained and not names.has_pretrained(name):
        whose = "torchvision's networks (resnet50, torchvision:NAME) and classes of your own that take `pretrained`"
        raise UserError(f"there are no pretrained weights of {name}, only of {whose}")
    if torchvision_name:
        network = _from_torchvision(torchvision_name, classes, image_size, pretrained)
        return _with_features(network, name, classes, image_size)
    if ":" in name:
        return _with_features(_from_file(name, classes, image_size, pretrained), name, classes, image_size)
    if found := re.fullmatch(r"resnet(\d+)(a?)", name):
        return ResNet(int(found[1]), classes, padded=found[2] == "a")
    planes = PLANES_10 if classes <= 10 else PLANES_100
    return PlaneCNN(CNN5 if name == "cnn5" else planes[int(name.removeprefix("plane"))], classes, image_size)


def kaiming_xavier(network: nn.Module) -> None:
    """He et al. 2015 (fan out) for convolutions, Glorot and Bengio 2010 (uniform) for linear layers, in place."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)


INITIALISATIONS = {"kaiming-xavier": kaiming_xavier}  # besides the networks' own


# ---------------------------------------------------------------------------------- other people's networks
class _HookedFeatures:
    """Mixed into the class of a network that only has `forward`: forward_features by hooks on its modules."""

    def forward_features(self: Any, images: torch.Tensor) -> Features:
        """Stages: the last square map at each size in the network's sequence, and none from before a transformer's
        tokens. Pooled: the classifier's input.
        """
        maps, inputs_of = {}, {}  # by size; of the last linear layer (True) and convolution (False)

        def note_map(module, _, output):
            shape = output.shape if isinstance(output, torch.Tensor) else ()
            if len(shape) == 3 or len(shape) == 4 and shape[2] != shape[3]:  # tokens: (B, N, D) or (B, h, w, D)
                maps.clear()
            elif len(shape) == 4 and not isinstance(module, nn.AdaptiveAvgPool2d):
                maps[shape[2]] = output

        def note_input(module, inputs, _):
            inputs_of[isinstance(module, nn.Linear)] = inputs[0]

        layers = [module for module in self.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
        handles = [module.register_forward_hook(note_map) for module in _in_sequence(self)]
        handles += [layer.register_forward_hook(note_input) for layer in layers]
        try:
            logits = self(images)
        finally:
            for handle in handles:
                handle.remove()
        pooled = inputs_of.get(True, inputs_of.get(False, logits))  # SqueezeNet's last layer is a convolution
        return Features(tuple(maps.values()), pooled.mean((2, 3)) if pooled.dim() == 4 else pooled.flatten(1), logits)


class _OwnForward:
    """Mixed in besides where the network has a forward_features of another meaning, which its `forward` calls."""

    def forward(self: Any, images: torch.Tensor) -> torch.Tensor:
        own = object.__new__(type(self).__bases__[-1])
        own.__dict__ = self.__dict__  # the same network before anything was mixed into its class
        return own.forward(images)


def _in_sequence(module):
    """The modules that a network applies one after the other: a ResNet's blocks, a VGG's layers."""
    for child in module.children():
        single = len(list(module.children())) == 1
        if (single or isinstance(child, nn.Sequential | nn.ModuleList)) and any(True for _ in child.children()):
            yield from _in_sequence(child)
        else:
            yield child


def _with_features(network, name, classes, image_size):
    """The network, with forward_features added if it has none or one that returns a tensor, as timm's networks have.

    A UserError if its output is not (B, C) logits.
    """
    size, images = f"{image_size}x{image_size}", torch.zeros(2, 3, image_size, image_size)
    try:
        with torch.no_grad():
            found = network.eval().forward_features(images) if hasattr(network, "forward_features") else None
            if found is None or isinstance(found, torch.Tensor | list):
                own = type(network)  # whose __module__ is kept: takd/cpu recognises our classes by it
                bases = (_HookedFeatures, own) if found is None else (_HookedFeatures, _OwnForward, own)
                network.__class__ = type(own.__name__, bases, {"__module__": own.__module__})
                found = network.forward_features(images)
            logits = found.logits
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{name} does not work with {size} images ({reason}); another --image-size?") from None
    if not isinstance(logits, torch.Tensor) or logits.shape != (2, classes):
        shape = tuple(logits.shape) if isinstance(logits, torch.Tensor) else f"a {type(logits).__name__}"
        fix = "its last layer must have one output per class"
        raise UserError(f"{name} returns {shape} for 2 images, not logits (2, {classes}): {fix}")
    return network.train()


def _from_torchvision(name, classes, image_size, pretrained):
    import torchvision.models

    options: dict[str, Any] = {"num_classes": classes}
    if name.startswith("vit_"):
        options["image_size"] = image_size
    elif name.startswith("maxvit"):
        options["input_size"] = (image_size, image_size)
    elif name in ("googlenet", "inception_v3"):  # auxiliary classifiers would be a second loss
        options |= {"aux_logits": False, "init_weights": True, "transform_input": True}
    size = f"{image_size}x{image_size}"
    try:
        network = torchvision.models.get_model(name, weights=None, **options)
    except (AssertionError, ValueError, RuntimeError) as error:
        raise UserError(f"torchvision's {name} cannot take {size} images ({error}); another --image-size?") from None
    if pretrained:
        *_, head = (key for key, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d))
        new = f"{head}.weight", f"{head}.bias"
        try:
            load_weights(network, {key: value for key, value in _pretrained_state(name).items() if key not in new})
        except RuntimeError:  # a transformer's position embeddings
            raise UserError(
                f"--pretrained: torchvision's {name} was trained on images of another size than {size}"
            ) from None
    return network


def _pretrained_state(name):
    """Torchvision's default weights, from torch's cache or the network."""
    import torchvision.models

    weights = torchvision.models.get_model_weights(name).DEFAULT
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
    try:
        if file.is_file():
            checkpoint.weights_of(checkpoint.read(file), file)  # executes nothing
        with downloading():
            return torchvision.models.get_model(name, weights=weights, progress=False).state_dict()
    except OSError as error:
        reason, fix = getattr(error, "reason", error), f"fetch {weights.url} and put it at {file}"
        raise UserError(f"--pretrained: no weights of {name} and no download ({reason}); {fix}") from None
    except RuntimeError as error:  # other keys, or another checksum
        why = first_line(error)
        raise UserError(f"--pretrained: {file} does not hold torchvision's {name} ({why}); delete it") from None


def _from_file(name, classes, image_size, pretrained):
    """`FILE.py:CLASS`, called with the number of classes: as `classes` or `num_classes` if it has these, else first;
    and with `image_size` and `pretrained` if it has these."""
    maker = import_class(name)
    try:
        known = inspect.signature(maker).parameters
        given = {"classes": classes, "num_classes": classes, "image_size": image_size, "pretrained": pretrained}
        options = {key: value for key, value in given.items() if key in known}
        network = maker(**options) if options.keys() & {"classes", "num_classes"} else maker(classes, **options)
    except Exception as error:
        raise UserError(f"{name} cannot be made for {classes} classes: {type(error).__name__}: {error}") from None
    if not isinstance(network, nn.Module):
        raise UserError(f"{name} returns a {type(network).__name__}, not a torch.nn.Module")
    return network


# ------------------------------------------------------------------------------------------ weights from files
def from_state(
    name: str, state_dict: State, source: Any, image_size: int = 32, classes: int | None = None
) -> nn.Module:
    """The named network holding exactly `state_dict`, without wrappers' prefixes; classes are read off the classifier.

    Raises a UserError naming `source` if a key is missing, unexpected or of another shape: loading is always strict.
    """
    whole, state_dict = state_dict, checkpoint.strip_prefixes(state_dict)
    if re.fullmatch(r"resnet\d+a", name):  # its name in most option-A files
        state_dict = {re.sub(r"^linear\.", "fc.", key): value for key, value in state_dict.items()}
    classes = classes_of(state_dict, name, classes)
    if classes is None or classes > checkpoint.MOST_CLASSES:
        raise UserError(f"{source} holds no classifier weights that {name} has (keys like {_some(state_dict)})")
    try:
        network = create(name, classes, image_size)
    except (RuntimeError, MemoryError):  # 1024x1024 images of 90,000 classes
        raise UserError(
            f"{source} is for {classes} classes and images of {image_size}x{image_size}: too large"
        ) from None
    own = network.state_dict()
    if own.keys() <= whole.keys():  # a module of the network itself has a wrapper's name
        state_dict = whole
    counters = {key: own[key] for key in own if key.endswith("num_batches_tracked")}  # missing in old files
    state_dict = {**counters, **state_dict}
    if missing := own.keys() - state_dict.keys():
        raise UserError(f"{source} is not {name}: {len(missing)} of its {len(own)} keys are missing ({_some(missing)})")
    if left_over := state_dict.keys() - own.keys():
        raise UserError(f"{source} is not {name}: {len(left_over)} keys are left over ({_some(left_over)})")
    for key, value in own.items():
        if value.shape != state_dict[key].shape:
            shapes = f"{tuple(state_dict[key].shape)}, {name} has {tuple(value.shape)}"
            raise UserError(f"{source} is not {name}: {key} is {shapes}")
    load_weights(network, state_dict)
    return network


def start_from(path: str | Path, name: str, network: nn.Module, classes: Sequence[str]) -> None:
    """Put a checkpoint's weights into a fresh network; its last layer stays new where the file's classes differ."""
    there, metadata = load(path, name)
    *_, head = (key for key, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d))
    same = metadata["classes"] == len(classes) and metadata.get("class_names", list(classes)) == list(classes)
    state = {key: value for key, value in there.state_dict().items() if same or not key.startswith(f"{head}.")}
    own = network.state_dict()
    if odd := [key for key, value in state.items() if key not in own or own[key].shape != value.shape]:
        what = f"its {name}, for {metadata['classes']} classes, has other layers than that for {len(classes)}"
        raise UserError(f"--init-from {path}: {what} ({_some(odd)})")
    load_weights(network, state)


def classes_of(state_dict: State, name: str, recorded: int | None = None) -> int | None:
    """The number of classes that the named network's classifier has in a state dict, or None where it holds none.

    Torchvision's networks and timm's register the classifier last. In a user's network it may be anywhere: what the
    checkpoint records counts.
    """
    if recorded and names.is_file(name):
        return recorded
    if names.torchvision_name(name) or names.is_file(name):
        classifiers = [key for key, value in state_dict.items() if value.dim() > 1][-1:]
    else:
        weights = [key for key, value in state_dict.items() if value.dim() == 2]
        linears = [key for key in weights if re.fullmatch(r"fc\.weight|fc_layers\..*weight", key)]
        classifiers = [max(linears)] if linears else []
    return state_dict[classifiers[0]].shape[0] if classifiers else recorded


def _some(keys):
    keys = sorted(keys)
    return ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")


def load(path: str | Path, name: str | None = None, image_size: int | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """(network, metadata) from a checkpoint file: ours, the released code's, RepDistiller's or a bare state dict.

    `name` and `image_size` are needed only where the file has none. The metadata have at least `model`, `classes`,
    `image_size` (None: the data set's usual one), `mean` and `std`. Files without a normalisation get the one that such
    files were made with: the released code's, or ImageNet's for torchvision's networks, option A's published files and
    larger images; or what a user's class declares. A user's own network is made by running its file: only if `name`
    names that. Raises UserErrors.
    """
    contents = checkpoint.read(path)
    recorded = contents.get("model") if isinstance(contents.get("model"), str) else None
    if name is None and recorded is None:
        raise UserError(f"{path} does not record its network; name it with --model")
    if name is None and names.is_file(recorded):
        fix = f"to run that file, add --model {recorded} (for a teacher, --teacher)"
        raise UserError(f"{path} holds a network of your own, {recorded}; {fix}")
    try:
        name = names.network(name or recorded)
        own = recorded and names.is_file(recorded)  # a file, which may have been moved since
        other = recorded and (Path(recorded).name != Path(name).name if own else names.network(recorded) != name)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if other:
        raise UserError(f"{path} holds a {recorded}, not a {name}")
    metadata = {key: value for key, value in contents.items() if not isinstance(value, dict)}
    metadata |= {key: value.item() for key, value in metadata.items() if isinstance(value, np.generic)}
    if wrong := misfit(metadata, checkpoint.METADATA):
        raise UserError(f"{path} is damaged: {wrong}")
    if image_size and metadata.setdefault("image_size", image_size) != image_size:
        held = metadata["image_size"]
        raise UserError(f"{path} holds a network for images of {held}x{held}, not {image_size}x{image_size}")
    metadata = names.declared_input(name) | metadata
    size = metadata.setdefault("image_size", None)
    network = from_state(name, checkpoint.weights_of(contents, path), path, size or 32, metadata.get("classes"))
    metadata |= {"model": name, "classes": classes_of(network.state_dict(), name, metadata.get("classes"))}
    if len(metadata.get("class_names") or range(metadata["classes"])) != metadata["classes"]:
        raise UserError(f"{path} is damaged: it names {len(metadata['class_names'])} of {metadata['classes']} classes")
    option_a = names.family(name) == "resnet" and name.endswith("a")
    imagenet = names.torchvision_name(name) or option_a or size not in (None, 32)
    metadata.setdefault("mean", list(names.IMAGENET_MEAN if imagenet else names.RELEASED_MEAN))
    metadata.setdefault("std", list(names.IMAGENET_STD if imagenet else names.RELEASED_STD))
    return network, metadata
