"""Networks: the released code's sizes, keys and initialisation; torchvision's; the user's; and loading files."""

import copy
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import same_weights
from torch import nn

import evaluate
import model_factory
import train
from takd.config import names
from takd.distill import evaluation
from takd.distill.teacher import freeze
from takd.errors import UserError

# Parameters at 10 and at 100 classes, entries of the state dict: computed from the released code's networks.
SIZES = {
    "plane2": (13_082, 215_172, 16),
    "plane4": (37_338, 475_652, 30),
    "plane6": (82_778, 1_107_204, 44),
    "plane8": (327_962, 1_246_276, 60),
    "plane10": (2_487_850, 2_931_460, 74),
    "resnet8": (78_042, 83_892, 56),
    "resnet14": (175_258, 181_108, 92),
    "resnet20": (272_474, 278_324, 128),
    "resnet26": (369_690, 375_540, 164),
    "resnet32": (466_906, 472_756, 200),
    "resnet44": (661_338, 667_188, 272),
    "resnet56": (855_770, 861_620, 344),
    "resnet110": (1_730_714, 1_736_564, 668),
    "cnn5": (92_686, 93_856, 37),
    "resnet50": (23_528_522, 23_712_932, 320),
}
# Option A: without the two shortcuts' convolutions and batch norms.
for depth in names.RESNET_DEPTHS:
    ten, hundred, entries = SIZES[f"resnet{depth}"]
    SIZES[f"resnet{depth}a"] = ten - 2752, hundred - 2752, entries - 12


def test_every_network_has_a_row():
    assert set(SIZES) == set(names.NETWORKS)


@pytest.mark.parametrize("name", SIZES)
def test_sizes(name):
    ten, hundred, entries = SIZES[name]
    for classes, parameters in ((10, ten), (100, hundred)):
        network = model_factory.create(name, classes)
        assert evaluation.count_parameters(network) == parameters
        assert len(network.state_dict()) == entries


def test_cnn5_at_its_own_size():
    """98,446 parameters at 224x224 with ten classes, 588 x 10 + 10 of these in the last layer."""
    network = model_factory.create("cnn5", 10, image_size=224)
    assert evaluation.count_parameters(network) == 98_446 and network.fc_layers[0].weight.shape == (10, 588)
    assert network.eval()(torch.rand(1, 3, 224, 224)).shape == (1, 10)


@pytest.mark.parametrize("name", ["plane2", "plane8", "resnet8"])
@pytest.mark.parametrize("classes", [1, 2, 11, 200, 1000])
def test_any_number_of_classes(name, classes):
    assert model_factory.create(name, classes)(torch.rand(2, 3, 32, 32)).shape == (2, classes)


BATCH_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def test_resnet_keys():
    expected = {"conv1.weight", "fc.weight", "fc.bias", *(f"bn1.{part}" for part in BATCH_NORM)}
    for layer in (1, 2, 3):
        for block in (f"layer{layer}.0", f"layer{layer}.1"):  # of resnet14
            for half in (1, 2):
                expected |= {f"{block}.conv{half}.weight", *(f"{block}.bn{half}.{part}" for part in BATCH_NORM)}
        if layer > 1:
            downsample = f"layer{layer}.0.downsample"
            expected |= {f"{downsample}.0.weight", *(f"{downsample}.1.{part}" for part in BATCH_NORM)}
    assert set(model_factory.create("resnet14", 10).state_dict()) == expected


def test_plane_keys_count_convolution_norm_relu_and_pool():
    state = model_factory.create("plane8", 100).state_dict()
    convolutions = [int(key.split(".")[1]) for key, value in state.items() if value.dim() == 4]
    # C32 C32 MP C64 C64 MP C128 C128 MP C256 C256 MP, three entries a convolution and one a pool
    assert convolutions == [0, 3, 7, 10, 14, 17, 21, 24]
    assert all(f"conv_layers.{i}.bias" in state and f"conv_layers.{i + 1}.running_mean" in state for i in convolutions)
    linear = {f"fc_layers.{i}.{part}" for i in (0, 2) for part in ("weight", "bias")}
    assert {key for key in state if key.startswith("fc")} == linear
    assert state["fc_layers.0.weight"].shape == (64, 256 * 2 * 2)


def test_resnet_initialisation():
    torch.manual_seed(0)
    for module in model_factory.create("resnet20", 100).modules():
        if isinstance(module, nn.Conv2d):
            expected = math.sqrt(2 / (module.kernel_size[0] ** 2 * module.out_channels))
            spread = 5 / math.sqrt(2 * module.weight.numel())  # five standard errors of a standard deviation
            assert float(module.weight.detach().std()) == pytest.approx(expected, rel=spread)
            assert abs(float(module.weight.detach().mean())) < 5 * expected / math.sqrt(module.weight.numel())
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all()


def test_plane_keeps_pytorchs_initialisation():
    torch.manual_seed(3)
    ours = model_factory.create("plane2", 10).conv_layers[0]
    torch.manual_seed(3)
    assert torch.equal(ours.weight, nn.Conv2d(3, 16, 3, padding=1).weight)


@pytest.mark.parametrize("name", ["plane2", "plane6", "plane10", "resnet8", "resnet20", "resnet8a", "cnn5"])
def test_features_belong_to_the_logits(name):
    torch.manual_seed(0)
    network, images = model_factory.create(name, 10).eval(), torch.rand(4, 3, 32, 32)
    features = network.forward_features(images)
    assert torch.equal(features.logits, network(images))
    classifier = network.fc if names.family(name) == "resnet" else network.fc_layers[-1]
    assert torch.equal(classifier(features.pooled), features.logits)
    assert len(features.stages) >= 2 and all(stage.dim() == 4 for stage in features.stages)
    if names.family(name) == "resnet":
        shapes = [tuple(stage.shape[1:]) for stage in features.stages]
        assert shapes == [(16, 32, 32), (16, 32, 32), (32, 16, 16), (64, 8, 8)]
        assert torch.allclose(features.stages[-1].mean((2, 3)), features.pooled, atol=1e-6)


@pytest.mark.parametrize(
    "spelling, name",
    [
        ("ResNet20", "resnet20"),
        ("ResNet-20A", "resnet20a"),
        ("CNN-5", "cnn5"),
        ("Torchvision:ResNeXt50-32x4d", "torchvision:resnext50_32x4d"),
        ("resnet-110", "resnet110"),
        ("Plain10", "plane10"),
        ("cnn4", "plane4"),
        ("PLANE_2", "plane2"),
    ],
)
def test_spellings(spelling, name):
    assert names.network(spelling) == name


@pytest.mark.parametrize(
    "typo, meant",
    [
        ("resnet21", "resnet20"),
        ("resent8", "resnet8"),
        ("plane3", "plane"),
        ("plne10", "plane10"),
        ("torchvision:resnet51", "resnet50"),
    ],
)
def test_an_unknown_name_gets_the_nearest_and_the_list(typo, meant):
    with pytest.raises(UserError, match=rf"did you mean {meant}") as caught:
        model_factory.create(typo, 10)
    known = names.torchvision_networks() if typo.startswith("torchvision") else names.NETWORKS
    assert all(name in str(caught.value) for name in known)


# ---------------------------------------------------------------------------- torchvision's, and the user's
SHAPES = {  # channels and height of the stages, and the classifier's inputs
    "resnet50": ([(64, 16), (256, 8), (512, 4), (1024, 2), (2048, 1)], 2048),
    "torchvision:resnet18": ([(64, 16), (64, 8), (128, 4), (256, 2), (512, 1)], 512),
    "torchvision:mobilenet_v3_small": ([(16, 16), (16, 8), (24, 4), (48, 2), (576, 1)], 1024),
    "torchvision:shufflenet_v2_x0_5": ([(24, 16), (24, 8), (48, 4), (96, 2), (1024, 1)], 1024),
}


@pytest.mark.parametrize("name", SHAPES)
def test_features_of_torchvisions_networks(name):
    """Keys stay torchvision's; a ResNet's stages are the outputs of its stem and of its four layers."""
    torch.manual_seed(0)
    network = model_factory.create(name, 7).eval()
    plain = torchvision.models.get_model(names.torchvision_name(name), num_classes=7).eval()
    plain.load_state_dict(network.state_dict())
    images, stages, pooled, outputs = torch.rand(2, 3, 32, 32), *SHAPES[name], {}
    features = network.forward_features(images)
    assert torch.equal(features.logits, plain(images)) and torch.equal(network(images), features.logits)
    assert [tuple(stage.shape[1:3]) for stage in features.stages] == stages and features.pooled.shape == (2, pooled)
    assert torch.equal([*network.modules()][-1](features.pooled), features.logits)
    if "resnet" in name:
        for i in (1, 2, 3, 4):
            layer = getattr(plain, f"layer{i}")
            layer.register_forward_hook(lambda _, __, output, i=i: outputs.update({i: output}))
        plain(images)
        assert all(torch.equal(features.stages[i], outputs[i]) for i in (1, 2, 3, 4))
    assert not any(module._forward_hooks for module in network.modules())


# fmt: off
@pytest.mark.slow
@pytest.mark.parametrize("name, size", [
    ("alexnet", 64), ("convnext_tiny", 32), ("densenet121", 32), ("efficientnet_b0", 32), ("googlenet", 32),
    ("inception_v3", 75), ("maxvit_t", 224), ("mnasnet0_5", 32), ("mobilenet_v2", 32), ("regnet_y_400mf", 32),
    ("resnext50_32x4d", 32), ("squeezenet1_1", 32), ("swin_t", 32), ("vit_b_32", 64),
])
# fmt: on
def test_a_torchvision_network_of_every_architecture(name, size, saved):
    """Created, trained a step, saved, read and frozen, with the same logits."""
    torch.manual_seed(0)
    network = model_factory.create(f"torchvision:{name}", 5, size)
    images = torch.rand(2, 3, size, size)
    features = network.train().forward_features(images)
    features.logits.sum().backward()
    path = saved({"model_state_dict": network.state_dict(), "model": f"torchvision:{name}", "image_size": size})
    loaded, metadata = model_factory.load(path)
    assert (metadata["classes"], metadata["image_size"]) == (5, size)
    expected = network.eval()(images)
    assert torch.equal(loaded.eval()(images), expected)
    frozen = freeze(loaded, torch.device("cpu"), torch.float32, size)
    torch.testing.assert_close(frozen.forward_features(images).logits, expected, rtol=1e-2, atol=1e-3)


OWN = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        first, second = nn.Conv2d(3, 8, 3, stride=2), nn.Conv2d(8, 16, 3, stride=2)
        self.body = nn.Sequential(first, nn.BatchNorm2d(8), nn.ReLU(), second, nn.ReLU())
        self.linear = nn.Linear(16, classes)

    def forward(self, images):
        return self.linear(self.body(images).mean((2, 3)))

class Keyword(Net):
    def __init__(self, width=1, num_classes=10):
        super().__init__(num_classes)

class Timm(Net):
    mean, std, image_size = (0.5, 0.5, 0.5), [0.25, 0.25, 0.25], 48

    def __init__(self, classes, pretrained=False):
        super().__init__(classes)
        self.pretrained = pretrained

    def forward_features(self, images):
        return self.body(images)

    def forward(self, images):
        return self.linear(self.forward_features(images).mean((2, 3)))

class Tokens(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.patches = nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.Flatten(2))
        self.head = nn.Linear(8, classes)

    def forward(self, images):
        return self.head(self.patches(images).mean(2))

def short(classes):
    return Net(classes - 1)

def nothing(classes):
    return classes

class Broken(nn.Module):
    def __init__(self, classes):
        raise KeyError("depth")
"""


@pytest.fixture
def own(tmp_path):
    (tmp_path / "my_nets.py").write_text(OWN)
    return str(tmp_path / "my_nets.py")


@pytest.mark.parametrize("name", ["Net", "Keyword"])
def test_the_users_network(own, name):
    network = model_factory.create(f"{own}:{name}", 7).eval()
    features = network.forward_features(torch.rand(2, 3, 32, 32))
    assert [tuple(stage.shape[1:]) for stage in features.stages] == [(8, 15, 15), (16, 7, 7)]
    assert torch.equal(features.stages[-1].mean((2, 3)), features.pooled)
    assert torch.equal(network.linear(features.pooled), features.logits) and features.logits.shape == (2, 7)
    assert set(network.state_dict()) >= {"body.0.weight", "linear.bias"}


def test_a_forward_features_of_another_meaning(own):
    """As in timm's networks: it returns a tensor, and forward calls it. The keys of the state dict stay."""
    network = model_factory.create(f"{own}:Timm", 7).eval()
    images = torch.rand(2, 3, 32, 32)
    features = copy.deepcopy(network).forward_features(images)
    assert torch.equal(features.logits, network(images))
    assert torch.equal(features.pooled, network.body(images).mean((2, 3)))
    assert [tuple(stage.shape[1:]) for stage in features.stages] == [(8, 15, 15), (16, 7, 7)]
    assert set(network.state_dict()) == set(model_factory.create(f"{own}:Net", 7).state_dict())


def test_tokens_are_no_stages(own):
    """A transformer's: neither they nor the maps that they were cut from."""
    for name in (f"{own}:Tokens", "torchvision:vit_b_32"):
        assert model_factory.create(name, 7).eval().forward_features(torch.rand(2, 3, 32, 32)).stages == ()


def test_weights_without_a_record_of_the_users_network(own, tmp_path):
    """Such as timm's own training saves: classes from the last layer, the input as the class declares it."""
    network = model_factory.create(f"{own}:Timm", 7)
    torch.save({"state_dict": network.state_dict()}, tmp_path / "file")
    loaded, metadata = model_factory.load(tmp_path / "file", f"{own}:Timm")
    assert same_weights(loaded.state_dict(), network.state_dict())
    declared = {"mean": (0.5, 0.5, 0.5), "std": [0.25, 0.25, 0.25], "image_size": 48}
    assert metadata == {"model": f"{own}:Timm", "classes": 7} | declared


@pytest.mark.parametrize(
    "name, message",
    [
        ("Absent", "defines no 'Absent'; it defines: Net Keyword Timm Tokens short nothing Broken"),
        ("Broken", r"cannot be made for 7 classes: KeyError: 'depth'"),
        ("short", r"returns \(2, 6\) for 2 images, not logits \(2, 7\)"),
        ("nothing", "returns a int, not a torch.nn.Module"),
    ],
)
def test_a_mistake_in_the_users_network(own, name, message):
    with pytest.raises(UserError, match=message) as caught:
        model_factory.create(f"{own}:{name}", 7)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_imported(tmp_path):
    (tmp_path / "nets.py").write_text("import nothing_of_this_name\nclass Net: pass\n")
    message = "cannot be imported: ModuleNotFoundError: No module named 'nothing_of_this_name'"
    with pytest.raises(UserError, match=message):
        model_factory.create(f"{tmp_path}/nets.py:Net", 7)


def test_the_users_network_is_trained_scored_and_used_as_a_teacher(own, tmp_path, call, tiny, monkeypatch):
    monkeypatch.chdir(tmp_path)
    net = f"{own}:Net"
    command = (*tiny, "--student", net, "--epochs", "2", "--learning-rate", "0.1", "--batch-size", "16")
    outcome = call(train, *command, "--run-dir", tmp_path / "own")
    assert outcome.status == 0, outcome.err
    (best,) = (tmp_path / "own").glob("*_best.pth.tar")
    assert best.name.endswith("my_nets.py-Net_seed1_best.pth.tar")
    result = json.loads(call(evaluate, "--checkpoint", best, "--model", net, "--cuda", "0", "--json").out)
    assert result["model"] == net
    assert result["test_accuracy_percent"] == pytest.approx(result["recorded_test_accuracy_percent"])
    (tmp_path / "moved").mkdir()
    moved = f"{shutil.move(own, tmp_path / 'moved/my_nets.py')}:Net"
    lost = call(evaluate, "--checkpoint", best, "--model", net, "--cuda", "0")
    assert (lost.status, lost.err.count("\n")) == (2, 1) and "cannot be read" in lost.err
    assert call(evaluate, "--checkpoint", best, "--model", moved, "--cuda", "0").status == 0
    teacher = ("--teacher", moved, "--teacher-checkpoint", best)
    distilled = call(train, *tiny, *teacher, "--run-dir", tmp_path / "distilled")
    assert distilled.status == 0, distilled.err
    assert call(train, *tiny, "--student", moved, *teacher).status == 0
    assert all("/" not in run.name and ":" not in run.name for run in Path("runs").iterdir())


# ------------------------------------------------------------------------------------- pretrained weights
@pytest.fixture
def published(tmp_path, monkeypatch):
    """Where torchvision keeps the weights of its smallest network."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    weights = torchvision.models.get_model_weights("shufflenet_v2_x0_5").DEFAULT
    return tmp_path / "home/hub/checkpoints" / Path(weights.url).name, weights


def refuses_pretrained(match):
    with pytest.raises(UserError, match=match) as caught:
        model_factory.create("torchvision:shufflenet_v2_x0_5", 10, pretrained=True)
    assert "\n" not in str(caught.value)


def test_pretrained_weights_without_a_network_connection(published, monkeypatch):
    file, weights = published
    url = f"https://127.0.0.1:9/{file.name}"  # where nothing listens
    monkeypatch.setattr(weights.value, "url", url)
    refuses_pretrained(rf"no weights of shufflenet_v2_x0_5 and no download \(.*\); fetch {url} and put it at {file}")


@pytest.mark.parametrize(
    "contents, message", [(b"half a file", "cannot be read"), ({"fc.weight": torch.zeros(2, 2)}, "does not hold")]
)
def test_a_damaged_file_of_pretrained_weights(contents, message, published):
    file = published[0]
    file.parent.mkdir(parents=True)
    file.write_bytes(contents) if isinstance(contents, bytes) else torch.save(contents, file)
    refuses_pretrained(message)


def test_a_users_class_loads_its_pretrained_weights_where_it_is_asked_to(own):
    for given in (True, False):
        assert model_factory.create(f"{own}:Timm", 7, pretrained=given).pretrained is given
    with pytest.raises(UserError, match="and classes of your own that take `pretrained`"):
        model_factory.create(f"{own}:Net", 7, pretrained=True)


def test_pretrained_weights_are_torchvisions_only():
    with pytest.raises(UserError, match="no pretrained weights of plane2"):
        model_factory.create("plane2", 10, pretrained=True)


# -------------------------------------------------------------------------------------------- files
@pytest.fixture
def network():
    torch.manual_seed(1)
    return model_factory.create("plane2", 10)


@pytest.fixture
def state(network):
    return network.state_dict()


@pytest.fixture
def saved(tmp_path):
    """saved(contents) -> the path of a file with these contents."""

    def save(contents):
        torch.save(contents, tmp_path / "file.pth.tar")
        return tmp_path / "file.pth.tar"

    return save


def refused(path, match, name="plane2"):
    with pytest.raises(UserError, match=match) as caught:
        model_factory.load(path, name)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def released_format(network):
    """As the released code's torch.save call writes it, a used optimizer included."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    network(torch.rand(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    return {"model_state_dict": network.state_dict(), "optimizer_state_dict": optimizer.state_dict(), "epoch": 41}


def prefixed(prefix, network):
    return {f"{prefix}{key}": value for key, value in network.state_dict().items()}


FORMATS = {
    "released code": released_format,
    "RepDistiller": lambda network: {"epoch": 240, "model": network.state_dict(), "best_acc": 74.3},
    "state_dict": lambda network: {"state_dict": network.state_dict()},
    "bare": lambda network: network.state_dict(),
    "DataParallel": lambda network: {"state_dict": nn.DataParallel(network).state_dict()},
    "compiled": lambda network: {"model_state_dict": prefixed("_orig_mod.", network)},
    "both": lambda network: prefixed("module._orig_mod.", network),
    "both, swapped": lambda network: prefixed("_orig_mod.module.", network),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_formats(kind, network, saved):
    contents = FORMATS[kind](network)
    loaded, metadata = model_factory.load(saved(contents), "plane2")
    assert same_weights(loaded.state_dict(), network.state_dict())
    assert (metadata["model"], metadata["classes"]) == ("plane2", 10)
    assert (tuple(metadata["mean"]), tuple(metadata["std"])) == ((0.507, 0.487, 0.441), (0.267, 0.256, 0.276))


def test_repdistillers_accuracy_as_a_numpy_number(state, saved):
    """Some of its published files hold best_acc as such a number, which runs no code."""
    _, metadata = model_factory.load(saved({"model": state, "best_acc": np.float64(74.3)}), "plane2")
    assert metadata["best_acc"] == pytest.approx(74.3)


class Published(nn.Module):
    """A ResNet with option A's shortcuts as in its published files, written independently: `linear`, no downsample."""

    class Block(nn.Module):
        def __init__(self, before, after, stride):
            super().__init__()
            self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(after)
            self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(after)
            self.grows = after != before

        def forward(self, x):
            y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
            if self.grows:
                zeros = torch.zeros_like(x[:, : x.shape[1] // 2, ::2, ::2])
                x = torch.cat([zeros, x[:, :, ::2, ::2], zeros], dim=1)
            return torch.relu(y + x)

    def __init__(self, blocks):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        for i, (before, after) in enumerate(((16, 16), (16, 32), (32, 64)), 1):
            first = self.Block(before, after, 1 if i == 1 else 2)
            rest = (self.Block(after, after, 1) for _ in range(blocks - 1))
            setattr(self, f"layer{i}", nn.Sequential(first, *rest))
        self.linear = nn.Linear(64, 10)

    def forward(self, x):
        x = self.layer3(self.layer2(self.layer1(torch.relu(self.bn1(self.conv1(x))))))
        return self.linear(x.mean((2, 3)))


def test_a_published_file_with_option_a(saved):
    torch.manual_seed(0)
    theirs, images = Published(3), torch.rand(8, 3, 32, 32)
    theirs(images * 3)  # running statistics other than 0 and 1
    # As before torch 0.4.1, without num_batches_tracked:
    state = {key: value for key, value in prefixed("module.", theirs).items() if "tracked" not in key}
    network, metadata = model_factory.load(saved({"state_dict": state, "best_prec1": 91.7}), "resnet20a")
    torch.testing.assert_close(network.eval()(images), theirs.eval()(images), rtol=1e-4, atol=1e-5)
    assert (tuple(metadata["mean"]), tuple(metadata["std"])) == (names.IMAGENET_MEAN, names.IMAGENET_STD)
    frozen = freeze(network, torch.device("cpu"), torch.float32)
    torch.testing.assert_close(frozen(images), theirs(images), rtol=1e-3, atol=1e-4)
    ours = model_factory.create("resnet20a", 10)
    assert {key.replace("fc.", "linear.") for key in ours.state_dict()} == theirs.state_dict().keys()


def test_a_bare_file_of_torchvisions(saved):
    name = "torchvision:shufflenet_v2_x0_5"
    path = saved(model_factory.create(name, 6).state_dict())
    _, metadata = model_factory.load(path, name, image_size=64)
    assert (metadata["classes"], metadata["image_size"]) == (6, 64)
    assert tuple(metadata["mean"]) == names.IMAGENET_MEAN
    refused(path, "keys are missing", "torchvision:resnet18")


def test_another_image_size_than_the_files(saved):
    state = model_factory.create("cnn5", 10, 64).state_dict()
    path = saved({"model_state_dict": state, "model": "cnn5", "image_size": 64})
    assert model_factory.load(path)[1]["image_size"] == 64
    with pytest.raises(UserError, match="for images of 64x64, not 32x32"):
        model_factory.load(path, image_size=32)


def test_a_missing_key(state, saved):
    del state["conv_layers.0.bias"]
    refused(saved(state), r"1 of its 16 keys are missing \(conv_layers\.0\.bias\)")


def test_a_key_left_over(state, saved):
    refused(saved(state | {"aux.weight": torch.zeros(1)}), r"1 keys are left over \(aux\.weight\)")


def test_a_wrong_shape(state, saved):
    state["conv_layers.0.weight"] = torch.zeros(16, 1, 3, 3)
    refused(saved(state), r"conv_layers\.0\.weight is \(16, 1, 3, 3\)")


def test_another_network(saved):
    refused(saved(model_factory.create("resnet8", 10).state_dict()), "is not plane2")


def test_a_file_of_option_a_is_not_loaded_as_option_b(saved):
    """Its classifier is `linear.*` and there are no downsample weights. Nothing is guessed."""
    state = model_factory.create("resnet8", 10).state_dict()
    state = {key.replace("fc.", "linear."): value for key, value in state.items() if "downsample" not in key}
    refused(saved({"state_dict": state}), "holds no classifier weights that resnet8 has", "resnet8")


def test_a_file_without_weights(saved):
    refused(saved({"epoch": 3}), "holds no weights")
    refused(saved([1, 2]), "holds a list")


def test_the_name_is_needed_only_where_the_file_has_none(state, saved):
    path = saved({"model_state_dict": state})
    with pytest.raises(UserError, match="name it with --model"):
        model_factory.load(path)
    path = saved({"model_state_dict": state, "model": "plane2"})
    assert model_factory.load(path)[1]["model"] == "plane2"
    refused(path, "holds a plane2, not a plane4", "plane4")


def test_the_released_code_can_read_our_files(teacher_file):
    """`model.load_state_dict(torch.load(file)['model_state_dict'])` and its optimizer, with nothing left over."""
    contents = torch.load(teacher_file, weights_only=True)
    network = model_factory.create("plane2", 10)
    network.load_state_dict(contents["model_state_dict"], strict=True)
    torch.optim.SGD(network.parameters(), lr=0.01).load_state_dict(contents["optimizer_state_dict"])
    assert isinstance(contents["epoch"], int)
