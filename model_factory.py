"""Names -> networks: the plain CNNs and the CIFAR ResNets of the paper, and reading a network out of a file's weights.

    network = create_network("resnet20", classes=100)
    logits = network(images)                                # (B, 3, H, W) -> (B, C)
    stages, pooled, logits = network.forward_features(images)

Parameter counts, state-dict keys and initialisation are those of the released TAKD code, so files go both ways; the
ResNets are also those of RepDistiller, key for key. Legend: B batch, C classes, H W height and width.
"""

import math
from typing import NamedTuple

import torch
from torch import nn

import checkpoint
import names
from kernels import conv_norm
from names import UserError


class Features(NamedTuple):
    """What a distillation method may look at: stage outputs from the stem on, the pooled vector, the logits."""

    stages: tuple  # of (B, channels, h, w)
    pooled: torch.Tensor  # (B, features), what the classifier sees
    logits: torch.Tensor  # (B, C)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; where the shape changes, the shortcut is a 1x1 convolution with batch norm."""

    def __init__(self, in_channels, out_channels, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x):
        shortcut = x if self.downsample is None else conv_norm(*self.downsample, x, relu=False)
        x = conv_norm(self.conv1, self.bn1, x)
        return conv_norm(self.conv2, self.bn2, x, residual=shortcut)


class ResNet(nn.Module):
    """ResNet of depth 6n + 2 for 32x32 images (He et al. 2016, section 4.2), stages of 16, 32 and 64 channels."""

    def __init__(self, depth, classes):
        super().__init__()
        blocks = (depth - 2) // 6
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

    @staticmethod
    def _stage(in_channels, out_channels, blocks, stride):
        first = BasicBlock(in_channels, out_channels, stride)
        return nn.Sequential(first, *(BasicBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)))

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


def create_network(name, classes, image_size=32):
    """A freshly initialised network by name, drawing from torch's global generator. Unknown names are UserErrors."""
    name = names.network(name)
    if names.family(name) == "resnet":
        return ResNet(int(name.removeprefix("resnet")), classes)
    planes = names.PLANES_10 if classes <= 10 else names.PLANES_100
    return PlaneCNN(planes[int(name.removeprefix("plane"))], classes, image_size)


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


# ------------------------------------------------------------------------------------- weights out of files
def network_from_state(name, state_dict, source, image_size=32):
    """The named network holding exactly `state_dict` (wrappers' prefixes removed), its classes read off the classifier.

    Raises a UserError naming `source` where a key is missing, left over or of another shape: loading is always strict.
    """
    state_dict = strip_prefixes(state_dict)
    classes = classes_of(state_dict)
    if classes is None:
        raise UserError(f"{source} holds no classifier weights that {name} has (keys like {_some(state_dict)})")
    network = create_network(name, classes, image_size)
    own = network.state_dict()
    if missing := own.keys() - state_dict.keys():
        raise UserError(f"{source} is not {name}: {len(missing)} of its {len(own)} keys are missing ({_some(missing)})")
    if left_over := state_dict.keys() - own.keys():
        raise UserError(f"{source} is not {name}: {len(left_over)} keys are left over ({_some(left_over)})")
    for key, value in own.items():
        if value.shape != state_dict[key].shape:
            shapes = f"{tuple(state_dict[key].shape)}, {name} has {tuple(value.shape)}"
            raise UserError(f"{source} is not {name}: {key} is {shapes}")
    network.load_state_dict(state_dict, strict=True)
    return network


def strip_prefixes(state_dict):
    """Without the prefixes of DataParallel (`module.`), torch.compile (`_orig_mod.`) and Lightning (`model.`), in any nesting."""
    for prefix in ("module.", "_orig_mod.", "model.") * 3:
        if state_dict and all(key.startswith(prefix) for key in state_dict):
            state_dict = {key.removeprefix(prefix): value for key, value in state_dict.items()}
    return state_dict


def classes_of(state_dict):
    """The number of classes a state dict's classifier has, or None where it has none that we know."""
    linears = [key for key in state_dict if key == "fc.weight" or key.startswith("fc_layers.") and key.endswith("weight")]
    return state_dict[max(linears)].shape[0] if linears else None


def _some(keys):
    keys = sorted(keys)
    return ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")


def load_network(path, name=None):
    """(network, about) from a checkpoint file: ours, the released code's, RepDistiller's or a bare state dict.

    `name` is needed only where the file does not say what it holds. `about` has at least `model`, `classes`, `mean` and `std`;
    files that say nothing of normalisation get the released code's, their convention. Raises UserErrors.
    """
    contents = checkpoint.read(path)
    said = contents.get("model") if isinstance(contents.get("model"), str) else None
    if name is None and said is None:
        raise UserError(f"{path} does not say which network it holds; name it with --model")
    if name is not None and said is not None and names.network(name) != names.network(said):
        raise UserError(f"{path} holds a {said}, not a {names.network(name)}")
    name = names.network(name or said)
    network = network_from_state(name, checkpoint.weights_of(contents, path), path)
    about = {key: value for key, value in contents.items() if not isinstance(value, dict)}
    about |= {"model": name, "classes": classes_of(network.state_dict())}
    about.setdefault("mean", list(names.RELEASED_MEAN))
    about.setdefault("std", list(names.RELEASED_STD))
    return network, about
