"""Networks: sizes, keys and initialisation of the released code's, and files of several origins in and out of them."""

import contextlib
import math
import os
import pickle
import re

import numpy as np
import pytest
import torch

import checkpoint
import evaluate
import model_factory
import names
from names import UserError

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
}


def test_every_network_has_a_row():
    assert set(SIZES) == set(names.NETWORKS)


@pytest.mark.parametrize("name", SIZES)
def test_sizes(name):
    ten, hundred, entries = SIZES[name]
    for classes, parameters in ((10, ten), (100, hundred)):
        network = model_factory.create_network(name, classes)
        assert model_factory.count_parameters(network) == parameters
        assert len(network.state_dict()) == entries


@pytest.mark.parametrize("name", ["plane2", "plane8", "resnet8"])
@pytest.mark.parametrize("classes", [1, 2, 11, 200, 1000])
def test_any_number_of_classes(name, classes):
    assert model_factory.create_network(name, classes)(torch.rand(2, 3, 32, 32)).shape == (2, classes)


def test_resnet_keys():
    batch_norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    expected = {"conv1.weight", "fc.weight", "fc.bias", *(f"bn1.{part}" for part in batch_norm)}
    for layer in (1, 2, 3):
        for i in range(2):  # resnet14
            for half in (1, 2):
                expected |= {f"layer{layer}.{i}.conv{half}.weight", *(f"layer{layer}.{i}.bn{half}.{part}" for part in batch_norm)}
        if layer > 1:
            expected |= {f"layer{layer}.0.downsample.0.weight", *(f"layer{layer}.0.downsample.1.{part}" for part in batch_norm)}
    assert set(model_factory.create_network("resnet14", 10).state_dict()) == expected


def test_plane_keys_count_convolution_norm_relu_and_pool():
    state = model_factory.create_network("plane8", 100).state_dict()
    convolutions = [int(key.split(".")[1]) for key, value in state.items() if key.endswith("weight") and value.dim() == 4]
    # C32 C32 MP C64 C64 MP C128 C128 MP C256 C256 MP, three entries a convolution and one a pool
    assert convolutions == [0, 3, 7, 10, 14, 17, 21, 24]
    assert all(f"conv_layers.{i}.bias" in state and f"conv_layers.{i + 1}.running_mean" in state for i in convolutions)
    assert {key for key in state if key.startswith("fc")} == {
        f"fc_layers.{i}.{part}" for i in (0, 2) for part in ("weight", "bias")
    }
    assert state["fc_layers.0.weight"].shape == (64, 256 * 2 * 2)


def test_resnet_initialisation():
    torch.manual_seed(0)
    for module in model_factory.create_network("resnet20", 100).modules():
        if isinstance(module, torch.nn.Conv2d):
            expected = math.sqrt(2 / (module.kernel_size[0] ** 2 * module.out_channels))
            spread = 5 / math.sqrt(2 * module.weight.numel())  # five standard errors of a standard deviation
            assert float(module.weight.detach().std()) == pytest.approx(expected, rel=spread)
            assert abs(float(module.weight.detach().mean())) < 5 * expected / math.sqrt(module.weight.numel())
        elif isinstance(module, torch.nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all()


def test_plane_keeps_pytorchs_initialisation():
    torch.manual_seed(3)
    ours = model_factory.create_network("plane2", 10).conv_layers[0]
    torch.manual_seed(3)
    assert torch.equal(ours.weight, torch.nn.Conv2d(3, 16, 3, padding=1).weight)


@pytest.mark.parametrize("name", ["plane2", "plane6", "plane10", "resnet8", "resnet20"])
def test_features_belong_to_the_logits(name):
    torch.manual_seed(0)
    network, images = model_factory.create_network(name, 10).eval(), torch.rand(4, 3, 32, 32)
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
    [("ResNet20", "resnet20"), ("resnet-110", "resnet110"), ("Plain10", "plane10"), ("cnn4", "plane4"), ("PLANE_2", "plane2")],
)
def test_spellings(spelling, name):
    assert names.network(spelling) == name


@pytest.mark.parametrize(
    "typo, meant", [("resnet21", "resnet20"), ("resent8", "resnet8"), ("plane3", "plane"), ("plne10", "plane10")]
)
def test_an_unknown_name_gets_the_nearest_and_the_list(typo, meant):
    with pytest.raises(UserError, match=rf"did you mean {meant}") as caught:
        model_factory.create_network(typo, 10)
    assert all(name in str(caught.value) for name in names.NETWORKS)


# -------------------------------------------------------------------------------------------- files
@pytest.fixture
def network():
    torch.manual_seed(1)
    return model_factory.create_network("plane2", 10)


@pytest.fixture
def state(network):
    return network.state_dict()


@pytest.fixture
def saved(tmp_path):
    """saved(contents) -> the path of a file that holds them."""

    def save(contents):
        torch.save(contents, tmp_path / "file.pth.tar")
        return tmp_path / "file.pth.tar"

    return save


def released_format(network):
    """As the released code's torch.save call writes it, a used optimizer included."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    network(torch.rand(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    return {"model_state_dict": network.state_dict(), "optimizer_state_dict": optimizer.state_dict(), "epoch": 41}


FORMATS = {
    "released code": released_format,
    "RepDistiller": lambda network: {"epoch": 240, "model": network.state_dict(), "best_acc": 74.3},
    "state_dict": lambda network: {"state_dict": network.state_dict()},
    "bare": lambda network: network.state_dict(),
    "DataParallel": lambda network: {"state_dict": torch.nn.DataParallel(network).state_dict()},
    "compiled": lambda network: {"model_state_dict": {f"_orig_mod.{key}": value for key, value in network.state_dict().items()}},
    "both": lambda network: {f"module._orig_mod.{key}": value for key, value in network.state_dict().items()},
    "both, swapped": lambda network: {f"_orig_mod.module.{key}": value for key, value in network.state_dict().items()},
}


@pytest.mark.parametrize("kind", FORMATS)
def test_formats(kind, network, saved):
    contents = FORMATS[kind](network)
    loaded, about = model_factory.load_network(saved(contents), "plane2")
    for key, value in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)
    assert (about["model"], about["classes"]) == ("plane2", 10)
    assert (tuple(about["mean"]), tuple(about["std"])) == ((0.507, 0.487, 0.441), (0.267, 0.256, 0.276))


def test_repdistillers_numpy_accuracy_is_no_code(state, saved):
    """Some of its published files hold best_acc as a numpy number."""
    loaded, about = model_factory.load_network(saved({"model": state, "best_acc": np.float64(74.3)}), "plane2")
    assert about["best_acc"] == pytest.approx(74.3)


def refused(path, match, name="plane2"):
    with pytest.raises(UserError, match=match) as caught:
        model_factory.load_network(path, name)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_missing_key(state, saved):
    del state["conv_layers.0.bias"]
    refused(saved(state), r"1 of its 16 keys are missing \(conv_layers\.0\.bias\)")


def test_key_left_over(state, saved):
    refused(saved(state | {"aux.weight": torch.zeros(1)}), r"1 keys are left over \(aux\.weight\)")


def test_wrong_shape(state, saved):
    state["conv_layers.0.weight"] = torch.zeros(16, 1, 3, 3)
    refused(saved(state), r"conv_layers\.0\.weight is \(16, 1, 3, 3\)")


def test_another_network(saved):
    refused(saved(model_factory.create_network("resnet8", 10).state_dict()), "is not plane2")


def test_linear_instead_of_fc(saved):
    """The option-A files in the wild: the classifier is `linear.*` and there are no downsample weights. Nothing is guessed."""
    state = model_factory.create_network("resnet8", 10).state_dict()
    state = {key.replace("fc.", "linear."): value for key, value in state.items() if "downsample" not in key}
    refused(saved({"state_dict": state}), "holds no classifier weights that resnet8 has", "resnet8")


def test_a_file_without_weights(saved):
    refused(saved({"epoch": 3}), "holds no weights")
    refused(saved([1, 2]), "holds a list")


class Trap:
    """Unpickling it leaves a mark on the disk: what code in a file could do."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("writer", ["torch", "legacy torch", "pickle"])
def test_a_file_with_code_is_refused_and_not_run(writer, state, tmp_path, call):
    mark, path = tmp_path / "ran", tmp_path / "file.pth.tar"
    contents = {"model_state_dict": state, "trap": Trap(mark)}
    if writer == "pickle":
        path.write_bytes(pickle.dumps(contents))
    else:
        torch.save(contents, path, _use_new_zipfile_serialization=writer == "torch")
    refused(path, "refused: it holds more than tensors")
    outcome = call(evaluate, "--checkpoint", path, "--model", "plane2", "--dataset", "digits", "--cuda", "0")
    assert outcome.status == 2 and outcome.out == "" and re.fullmatch(r"evaluate\.py: error: .*refused.*\n", outcome.err)
    assert not mark.exists()
    pickle.loads(pickle.dumps(contents))  # the trap does work
    assert mark.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_files(zipped, network, tmp_path):
    """Cut off anywhere, or with changed bytes, a file is refused in one line, or still whole where the bytes carry nothing."""
    path = tmp_path / "file.pth.tar"
    torch.save(released_format(network), path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    for length in (0, 1, 4, 64, 1000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        refused(path, "cannot be read|refused")
    random = np.random.default_rng(0)
    for _ in range(60):
        damaged = np.frombuffer(whole, np.uint8).copy()
        damaged[random.integers(0, 3000, 5)] = random.integers(0, 256, 5)
        path.write_bytes(damaged.tobytes())
        with contextlib.suppress(UserError):
            model_factory.load_network(path, "plane2")


def test_files_that_are_something_else(tmp_path):
    path = tmp_path / "file"
    for contents in (b"hello\n", b"\x80\x02}q\x00.", b"PK\x03\x04 not a zip", bytes(range(256)) * 8, b"\x80\x04\x95"):
        path.write_bytes(contents)
        refused(path, "cannot be read|refused|holds")


def test_a_folder_and_nothing(tmp_path):
    refused(tmp_path, "is a folder")
    refused(tmp_path / "absent", "does not exist")


def test_the_name_is_needed_only_where_the_file_does_not_say(state, saved):
    path = saved({"model_state_dict": state})
    with pytest.raises(UserError, match="name it with --model"):
        model_factory.load_network(path)
    path = saved({"model_state_dict": state, "model": "plane2"})
    assert model_factory.load_network(path)[1]["model"] == "plane2"
    refused(path, "holds a plane2, not a plane4", "plane4")


def test_ours_load_as_the_released_code_reads(teacher_file):
    """`model.load_state_dict(torch.load(file)['model_state_dict'])` and its optimizer, with nothing left over."""
    contents = torch.load(teacher_file, weights_only=True)
    network = model_factory.create_network("plane2", 10)
    network.load_state_dict(contents["model_state_dict"], strict=True)
    torch.optim.SGD(network.parameters(), lr=0.01).load_state_dict(contents["optimizer_state_dict"])
    assert isinstance(contents["epoch"], int)


def test_saving_is_atomic(tmp_path):
    """A save that fails leaves the old file whole and nothing beside it."""
    checkpoint.save({"epoch": 1}, tmp_path / "file")
    with pytest.raises(Exception, match="pickle"):
        checkpoint.save({"epoch": lambda: None}, tmp_path / "file")
    assert checkpoint.read(tmp_path / "file") == {"epoch": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
