"""Checkpoint files: read without executing anything, refused in one line where damaged, written atomically."""

import contextlib
import os
import pickle
import re

import numpy as np
import pytest
import torch

import evaluate
import model_factory
from takd.errors import UserError
from takd.run import checkpoint


@pytest.fixture
def contents():
    """A network and a used optimizer, as the released code saves them."""
    torch.manual_seed(1)
    network = model_factory.create("plane2", 10)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    network(torch.rand(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    return {"model_state_dict": network.state_dict(), "optimizer_state_dict": optimizer.state_dict(), "epoch": 41}


def refused(path, match):
    with pytest.raises(UserError, match=match) as caught:
        model_factory.load(path, "plane2")
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


class Trap:
    """Unpickling it creates a folder, as malicious code in a file could."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("writer", ["torch", "legacy torch", "pickle"])
def test_a_file_with_code_is_refused_and_not_run(writer, contents, tmp_path, call):
    folder, path = tmp_path / "ran", tmp_path / "file.pth.tar"
    contents["trap"] = Trap(folder)
    if writer == "pickle":
        path.write_bytes(pickle.dumps(contents))
    else:
        torch.save(contents, path, _use_new_zipfile_serialization=writer == "torch")
    refused(path, "refused: it holds more than tensors")
    outcome = call(evaluate, "--checkpoint", path, "--model", "plane2", "--dataset", "digits", "--cuda", "0")
    assert outcome.status == 2 and outcome.out == ""
    assert re.fullmatch(r"evaluate\.py: error: .*refused.*\n", outcome.err)
    assert not folder.exists()
    pickle.loads(pickle.dumps(contents))  # the trap does work
    assert folder.exists()


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.int32, np.int64])
def test_numpy_scalars_are_read(kind, tmp_path):
    torch.save({"best_acc": kind(74)}, tmp_path / "file")
    assert checkpoint.read(tmp_path / "file") == {"best_acc": 74}


@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_files(zipped, contents, tmp_path):
    """Cut off, or with changed bytes, a file is refused in one line, or still whole where the bytes carry nothing."""
    path = tmp_path / "file.pth.tar"
    torch.save(contents, path, _use_new_zipfile_serialization=zipped)
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
            model_factory.load(path, "plane2")


@pytest.mark.parametrize("place", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_a_flipped_byte(place, contents, tmp_path):
    """Among the weights it changes numbers only, which nothing but a digest finds."""
    path = tmp_path / "file.pth.tar"
    checkpoint.save(contents, path)
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 1
    path.write_bytes(data)
    refused(path, "cannot be read: damaged or cut off")


TENSORS = {
    "repeated numbers": lambda: torch.zeros(1).expand(10**12),
    "no numbers": lambda: torch.empty(10**12, device="meta"),
    "a sparse one": lambda: torch.zeros(4, 4).to_sparse(),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_a_tensor_whose_numbers_are_not_in_the_file(kind, contents, tmp_path):
    """Refused before anything copies it, compares it or computes its digest: it may ask for terabytes."""
    contents["model_state_dict"]["conv_layers.0.bias"] = TENSORS[kind]()
    torch.save(contents, tmp_path / "file.pth.tar")
    refused(tmp_path / "file.pth.tar", "numbers")
    with pytest.raises(UserError, match="numbers"):
        checkpoint.weights_digest(tmp_path / "file.pth.tar")


@pytest.mark.parametrize(
    "key, value",
    [
        ("class_names", 5),
        ("class_names", ["a", "b"]),
        ("mean", [0.5]),
        ("mean", [float("nan")] * 3),
        ("std", [0.2, 0.2, 0]),
        ("std", torch.ones(3)),
        ("image_size", 10**6),
        ("image_size", "32"),
        ("path", "plane2"),
        ("dataset", 3),
        ("test_accuracy_percent", [1]),
        ("epoch", -1),
    ],
)
def test_metadata_of_a_wrong_form(key, value, contents, tmp_path):
    torch.save(contents | {"classes": 10, key: value}, tmp_path / "file.pth.tar")
    refused(tmp_path / "file.pth.tar", "is damaged: (class|mean|std|image|path|data|test|epoch|it names 2 of 10)")


def test_a_users_file_is_run_only_where_it_is_named(contents, tmp_path, call):
    """Whoever sends a checkpoint does not choose the code that reads it."""
    ran, file = tmp_path / "ran", tmp_path / "net.py"
    file.write_text(f"import os\nos.mkdir({str(ran)!r})\nfrom model_factory import PlaneCNN\nclass Net(PlaneCNN):\n"
                    "    def __init__(self, classes): super().__init__('C16 MP C16 MP', classes)\n")  # fmt: skip
    name = f"{file}:Net"
    torch.save(contents | {"model": name, "classes": 10}, tmp_path / "file.pth.tar")
    for other in (None, "plane2"):
        with pytest.raises(UserError, match="net.py:Net"):
            model_factory.load(tmp_path / "file.pth.tar", other)
    outcome = call(evaluate, "--checkpoint", tmp_path / "file.pth.tar", "--dataset", "digits", "--cuda", "0")
    assert outcome.status == 2 and f"add --model {name}" in outcome.err and outcome.err.count("\n") == 1
    assert not ran.exists()
    assert model_factory.load(tmp_path / "file.pth.tar", name)[1]["model"] == name and ran.exists()


@pytest.mark.parametrize(
    "data",
    [b"hello\n", b"\x80\x02}q\x00.", b"PK\x03\x04 not a zip", bytes(range(256)) * 8, b"\x80\x04\x95"],
    ids=range(5),
)
def test_files_of_other_kinds(data, tmp_path):
    (tmp_path / "file").write_bytes(data)
    refused(tmp_path / "file", "cannot be read|refused|holds")


def test_a_folder_and_an_absent_file(tmp_path):
    refused(tmp_path, "is a folder")
    refused(tmp_path / "absent", "does not exist")


def test_saving_is_atomic(tmp_path):
    """A save that fails leaves the old file whole and nothing beside it."""
    checkpoint.save({"epoch": 1}, tmp_path / "file")
    with pytest.raises(Exception, match="pickle"):
        checkpoint.save({"epoch": lambda: None}, tmp_path / "file")
    assert checkpoint.read(tmp_path / "file") == {"epoch": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
