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
