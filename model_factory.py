"""Names -> networks: the plain CNNs and the CIFAR ResNets of the paper, torchvision's, a user's own; and reading one out of a file.

    network = create_network("resnet20", classes=100)
    logits = network(images)                                # (B, 3, H, W) -> (B, C)
    stages, pooled, logits = network.forward_features(images)

Parameter counts, state-dict keys and initialisation are those of the released TAKD code, so files go both ways; the
ResNets are also those of RepDistiller, key for key. Torchvision's networks and a user's keep their own keys.
Legend: B batch, C classes, H W height and width.
"""

import inspect
import math
import re
import socket
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from takd.config import names
from takd.config.names import UserError
from takd.cpu.kernels import conv_norm
from takd.run import checkpoint


class Features(NamedTuple):
    """What a distillation method may look at: stage outputs from the stem on, the pooled vector, the logits."""

    stages: tuple  # of (B, channels, h, w)
    pooled: torch.Tensor  # (B, features), what the classifier sees
    logits: torch.Tensor  # (B, C)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; where the shape changes, the shortcut is a 1x1 convolution with batch norm.

    `padded` makes it He et al.'s option A instead: every other pixel, and zeros in the channels that are new, half on either side.
    """

    def __init__(self, in_channels, out_channels, stride, padded):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample = None
        self.new_channels = out_channels - in_channels if padded else 0
        if not padded and (stride != 1 or in_channels != out_channels):
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x):
        shortcut = x if self.downsample is None else conv_norm(*self.downsample, x, relu=False)
        if half := self.new_channels // 2:
            shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, half, half)).contiguous(memory_format=torch.channels_last)
        x = conv_norm(self.conv1, self.bn1, x)
        return conv_norm(self.conv2, self.bn2, x, residual=shortcut)


class ResNet(nn.Module):
    """ResNet of depth 6n + 2 for 32x32 images (He et al. 2016, section 4.2), stages of 16, 32 and 64 channels.

    `padded`: with shortcuts without weights (option A there), else projections (option B), as the released code.
    """

    def __init__(self, depth, classes, padded=False):
        super().__init__()
        blocks = (depth - 2) // 6
        self.padded = padded
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, blocks, stride=1)
        self.layer2 = self._stage(16, 32, blocks, stride=2)
        self.layer3 = self._stage(32, 64, blocks, stride=2)
        self.fc = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # He et al. 2015, fan out
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan_out))

    def _stage(self, in_channels, out_channels, blocks, stride):
        first = BasicBlock(in_channels, out_channels, stride, self.padded)
        return nn.Sequential(first, *(BasicBlock(out_channels, out_channels, 1, self.padded) for _ in range(blocks - 1)))

    def forward_features(self, images):
        stem = conv_norm(self.conv1, self.bn1, images)
        stage1 = self.layer1(stem)
        stage2 = self.layer2(stage1)
        stage3 = self.layer3(stage2)
        pooled = stage3.mean(dim=(2, 3))  # (B, 64)
        return Features((stem, stage1, stage2, stage3), pooled, self.fc(pooled))

    def forward(self, images):
        return self.forward_features(images).logits


class PlaneCNN(nn.Module):
    """A plain CNN from a row of names.PLANES_*: `conv_layers` counts convolution, batch norm, ReLU and pool in turn."""

    def __init__(self, layers, classes, image_size=32):
        super().__init__()
        convolutions, linears = [], []
        channels, size, features = 3, image_size, None
        for layer in layers.split():
            if layer == "MP":
                convolutions.append(nn.MaxPool2d(2, 2))
                size //= 2
            elif layer.startswith("FC"):
                features = features or channels * size * size
                linears += [nn.Linear(features, int(layer[2:])), nn.ReLU(inplace=True)]
                features = int(layer[2:])
            else:
                width = int(layer[1:])
                convolutions += [
                    nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True),
                ]  # fmt: skip
                channels = width
        if size < 1:
            raise UserError(f"{image_size}x{image_size} images are too small for this network's {layers.count('MP')} poolings")
        linears.append(nn.Linear(features or channels * size * size, classes))
        self.conv_layers = nn.Sequential(*convolutions)
        after = [*convolutions[3:], None, None, None]
        self.blocks = [  # where a convolution stands, and whether a pool follows its batch norm and ReLU
            (i, isinstance(after[i], nn.MaxPool2d)) for i, layer in enumerate(convolutions) if isinstance(layer, nn.Conv2d)
        ]
        self.fc_layers = nn.Sequential(*linears)

    def forward_features(self, images):
        x, stages = images, []
        for start, pool in self.blocks:
            x = conv_norm(self.conv_layers[start], self.conv_layers[start + 1], x, pool=pool)
            if pool or start == self.blocks[-1][0]:
                stages.append(x)
        pooled = self.fc_layers[:-1](x.flatten(1))
        return Features(tuple(stages), pooled, self.fc_layers[-1](pooled))

    def forward(self, images):
        return self.forward_features(images).logits


def create_network(name, classes, image_size=32, pretrained=False):
    """A freshly initialised network by name, drawing from torch's global generator. Unknown names are UserErrors.

    `pretrained`: with torchvision's weights, but for the last layer, which is new for these classes.
    """
    name = names.network(name)
    builder = names.torchvision_name(name)
    if pretrained and not builder:
        raise UserError(f"there are no pretrained weights of {name}, only of torchvision's networks (resnet50, torchvision:NAME)")
    if builder:
        return _with_features(_torchvision(builder, classes, image_size, pretrained), name, classes, image_size)
    if ":" in name:
        return _with_features(_users_own(name, classes, image_size), name, classes, image_size)
    if found := re.fullmatch(r"resnet(\d+)(a?)", name):
        return ResNet(int(found[1]), classes, padded=found[2] == "a")
    planes = names.PLANES_10 if classes <= 10 else names.PLANES_100
    return PlaneCNN(names.CNN5 if name == "cnn5" else planes[int(name.removeprefix("plane"))], classes, image_size)


def kaiming_xavier(network):
    """He et al. 2015 (fan out) for convolutions and Glorot and Bengio 2010 (uniform) for linear layers' weights, in place."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)


INITIALISATIONS = {"kaiming-xavier": kaiming_xavier}  # besides the networks' own


def count_parameters(network):
    """Trainable values in a network."""
    return sum(parameter.numel() for parameter in network.parameters())


# ---------------------------------------------------------------------------------- other people's networks
class _Observed:
    """Mixed into the class of a network that only has `forward`: forward_features from what passes through its modules."""

    def forward_features(self, images):
        """Stages are the last square map at each size among what the network is a sequence of; pooled, what the classifier sees."""
        maps, seen = {}, {}

        def note_map(module, _, output):
            square = isinstance(output, torch.Tensor) and output.dim() == 4 and output.shape[2] == output.shape[3]
            if square and not isinstance(module, nn.AdaptiveAvgPool2d):
                maps[output.shape[2]] = output

        def note_input(module, inputs, _):
            seen[isinstance(module, nn.Linear)] = inputs[0]

        handles = [module.register_forward_hook(note_map) for module in _in_sequence(self)]
        handles += [module.register_forward_hook(note_input) for module in self.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
        try:
            logits = self(images)
        finally:
            for handle in handles:
                handle.remove()
        pooled = seen.get(True, seen.get(False, logits))  # SqueezeNet's last layer is a convolution
        return Features(tuple(maps.values()), pooled.mean((2, 3)) if pooled.dim() == 4 else pooled.flatten(1), logits)


def _in_sequence(module):
    """The modules that a network is made of one after the other: a ResNet's blocks, a VGG's layers."""
    for child in module.children():
        single = len(list(module.children())) == 1
        if (single or isinstance(child, nn.Sequential | nn.ModuleList)) and any(True for _ in child.children()):
            yield from _in_sequence(child)
        else:
            yield child


def _with_features(network, name, classes, image_size):
    """The network, given forward_features where it has none. A UserError where it makes no (B, C) logits of such images."""
    if not hasattr(network, "forward_features"):
        network.__class__ = type(type(network).__name__, (_Observed, type(network)), {})
    try:
        with torch.no_grad():
            logits = network.eval().forward_features(torch.zeros(2, 3, image_size, image_size)).logits
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{name} does not work with {image_size}x{image_size} images ({reason}); another --image-size?") from None
    if not isinstance(logits, torch.Tensor) or logits.shape != (2, classes):
        shape = tuple(logits.shape) if isinstance(logits, torch.Tensor) else f"a {type(logits).__name__}"
        raise UserError(f"{name} makes {shape} of 2 images, not logits (2, {classes}): its last layer must have a value a class")
    return network.train()


def _torchvision(name, classes, image_size, pretrained):
    import torchvision.models

    options = {"num_classes": classes}
    if name.startswith("vit_"):
        options["image_size"] = image_size
    elif name.startswith("maxvit"):
        options["input_size"] = (image_size, image_size)
    elif name in ("googlenet", "inception_v3"):  # auxiliary classifiers would be a second loss
        options |= {"aux_logits": False, "init_weights": True, "transform_input": True}
    try:
        network = torchvision.models.get_model(name, weights=None, **options)
    except (AssertionError, ValueError, RuntimeError) as error:
        raise UserError(f"torchvision's {name} takes no {image_size}x{image_size} images ({error}); another --image-size?") from None
    if pretrained:
        *_, head = (key for key, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d))
        state = {key: value for key, value in _pretrained_state(name).items() if key not in (f"{head}.weight", f"{head}.bias")}
        try:
            load_weights(network, state)
        except RuntimeError:  # positions of a transformer
            raise UserError(f"--pretrained: torchvision's weights of {name} are for images of another size than {image_size}") from None
    return network


DOWNLOAD_TIMEOUT_SECONDS = 20  # of silence, as for data sets


def _pretrained_state(name):
    """Torchvision's default weights, from its cache or the network; read as any checkpoint before torchvision may unpickle them."""
    import torchvision.models

    weights = torchvision.models.get_model_weights(name).DEFAULT
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
    if not file.is_file():
        before = socket.getdefaulttimeout()
        socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_SECONDS)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(weights.url, str(file), re.search(r"-([0-9a-f]{8,})\.", file.name)[1], progress=False)
        except (OSError, RuntimeError) as error:  # the latter: another checksum
            reason = getattr(error, "reason", error)
            raise UserError(f"--pretrained: no weights of {name} and no download ({reason}); fetch {weights.url} and put it at {file}") from None
        finally:
            socket.setdefaulttimeout(before)
    checkpoint.weights_of(checkpoint.read(file), file)
    try:
        return torchvision.models.get_model(name, weights=weights).state_dict()  # which knows its older files' spellings
    except RuntimeError as error:
        raise UserError(f"--pretrained: {file} does not hold torchvision's {name} ({str(error).splitlines()[0]}); delete it") from None


def _users_own(name, classes, image_size):
    """`FILE.py:CLASS`, called with the number of classes: as `classes` or `num_classes` where it has such an argument, else first."""
    maker = names.imported(name)
    try:
        known = inspect.signature(maker).parameters
        given = {"classes": classes, "num_classes": classes, "image_size": image_size}
        options = {key: value for key, value in given.items() if key in known}
        network = maker(**options) if options.keys() & {"classes", "num_classes"} else maker(classes, **options)
    except Exception as error:
        raise UserError(f"{name} cannot be made for {classes} classes: {type(error).__name__}: {error}") from None
    if not isinstance(network, nn.Module):
        raise UserError(f"{name} makes a {type(network).__name__}, not a torch.nn.Module")
    return network


# ------------------------------------------------------------------------------------- weights out of files
def network_from_state(name, state_dict, source, image_size=32, classes=None):
    """The named network holding exactly `state_dict` (wrappers' prefixes removed), its classes read off the classifier.

    Raises a UserError naming `source` where a key is missing, left over or of another shape: loading is always strict.
    """
    whole, state_dict = state_dict, strip_prefixes(state_dict)
    if re.fullmatch(r"resnet\d+a", name):  # most option-A files call the classifier so
        state_dict = {re.sub(r"^linear\.", "fc.", key): value for key, value in state_dict.items()}
    classes = classes_of(state_dict, name) or classes
    if classes is None:
        raise UserError(f"{source} holds no classifier weights that {name} has (keys like {_some(state_dict)})")
    network = create_network(name, classes, image_size)
    own = network.state_dict()
    if own.keys() <= whole.keys():  # a part of the network itself is called like a wrapper
        state_dict = whole
    state_dict = {key: value for key, value in own.items() if key.endswith("num_batches_tracked")} | state_dict  # files of old torch
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


def load_weights(network, state_dict):
    """Into a network that has all of its keys; what is not in `state_dict` stays. MNASNet asks for versions that a file lost."""
    own = network.state_dict()
    own.update(state_dict)
    network.load_state_dict(own)


def strip_prefixes(state_dict):
    """Without the prefixes of DataParallel (`module.`), torch.compile (`_orig_mod.`) and Lightning (`model.`), in any nesting."""
    for prefix in ("module.", "_orig_mod.", "model.") * 3:
        if state_dict and all(key.startswith(prefix) for key in state_dict):
            state_dict = {key.removeprefix(prefix): value for key, value in state_dict.items()}
    return state_dict


def classes_of(state_dict, name):
    """The number of classes that the named network's classifier has in a state dict, or None where it holds none.

    Torchvision's networks register the classifier last; of a user's only the checkpoint knows.
    """
    if names.torchvision_name(name):
        classifiers = [key for key, value in state_dict.items() if value.dim() > 1][-1:]
    else:
        linears = [key for key in state_dict if key == "fc.weight" or key.startswith("fc_layers.") and key.endswith("weight")]
        classifiers = [max(linears)] if linears and ":" not in name else []
    return state_dict[classifiers[0]].shape[0] if classifiers else None


def _some(keys):
    keys = sorted(keys)
    return ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")


def load_network(path, name=None, image_size=None):
    """(network, about) from a checkpoint file: ours, the released code's, RepDistiller's or a bare state dict.

    `name` and `image_size` are needed only where the file does not say what it holds. `about` has at least `model`, `classes`,
    `image_size` (None: the data set's usual one), `mean` and `std`. Files that say nothing of normalisation get what such files
    were made with: the released code's, or ImageNet's for torchvision's networks, option A's published files and larger images.
    A network of a user's own file runs that file. Raises UserErrors.
    """
    contents = checkpoint.read(path)
    said = contents.get("model") if isinstance(contents.get("model"), str) else None
    if name is None and said is None:
        raise UserError(f"{path} does not say which network it holds; name it with --model")
    try:
        name = names.network(name or said)
        # A user's own file may have been moved since.
        other = said and Path(said).name != Path(name).name and names.network(said) != name
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if other:
        raise UserError(f"{path} holds a {said}, not a {name}")
    about = {key: value for key, value in contents.items() if not isinstance(value, dict)}
    if image_size and about.setdefault("image_size", image_size) != image_size:
        raise UserError(f"{path} holds a network for images of {about['image_size']}x{about['image_size']}, not {image_size}x{image_size}")
    weights = checkpoint.weights_of(contents, path)
    size = about.setdefault("image_size", None)
    network = network_from_state(name, weights, path, size or 32, about.get("classes"))
    about |= {"model": name, "classes": classes_of(network.state_dict(), name) or about["classes"]}
    option_a = names.family(name) == "resnet" and name.endswith("a")
    imagenet = names.torchvision_name(name) or option_a or size not in (None, 32)
    about.setdefault("mean", list(names.IMAGENET_MEAN if imagenet else names.RELEASED_MEAN))
    about.setdefault("std", list(names.IMAGENET_STD if imagenet else names.RELEASED_STD))
    return network, about
