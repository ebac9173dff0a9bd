"""CIFAR in torchvision's layout: found, downloaded once, verified, or one line with what to do; and the digits."""

import contextlib
import functools
import hashlib
import http.server
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tarfile
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from conftest import ROOT

import data_loader
from takd import files
from takd.config import names
from takd.errors import UserError

FOLDER = "cifar-10-batches-py"


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture
def server(tmp_path):
    """A web server on this machine: the requests it received, and an event that it waits for before it responds."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            assert may_answer.wait(30)
            with contextlib.suppress(BrokenPipeError):  # torchvision's first request looks at the head only
                super().do_GET()

        def log_message(self, *_):
            pass

    requests, may_answer = [], threading.Event()
    may_answer.set()
    handler = functools.partial(Handler, directory=tmp_path / "origin")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield SimpleNamespace(url=f"http://127.0.0.1:{server.server_port}", requests=requests, may_answer=may_answer)
        server.shutdown()


@pytest.fixture
def archive(tmp_path, server, monkeypatch):
    """A small archive in CIFAR-10's layout that torchvision takes for the real one; the constants by which it does."""
    folder = tmp_path / "origin" / FOLDER
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        batch = {"data": random.integers(0, 256, (20, 3072), np.uint8), "labels": list(range(10)) * 2}
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class{i}" for i in range(10)]}))
    packed = tmp_path / "origin/cifar-10-python.tar.gz"
    with tarfile.open(packed, "w:gz") as tar:
        tar.add(folder, folder.name)
    constants = {
        "url": f"{server.url}/{packed.name}",
        "tgz_md5": md5(packed),
        "train_list": [[f"data_batch_{i}", md5(folder / f"data_batch_{i}")] for i in range(1, 6)],
        "test_list": [["test_batch", md5(folder / "test_batch")]],
        "meta": {"filename": "batches.meta", "key": "label_names", "md5": md5(folder / "batches.meta")},
    }
    for key, value in constants.items():
        monkeypatch.setattr(torchvision.datasets.CIFAR10, key, value)
    return constants


def refused(folder, match, download=False):
    with pytest.raises(UserError, match=match) as caught:
        data_loader.read("cifar10", folder, download=download)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------- found and fetched
def test_torchvisions_layout_is_found(archive, tmp_path):
    splits = data_loader.read("cifar10", tmp_path / "origin", download=False)
    train = splits.train
    assert (len(train), len(splits.test), train.classes[3]) == (100, 20, "class3")
    batch = pickle.loads((tmp_path / "origin" / FOLDER / "data_batch_2").read_bytes())
    assert np.array_equal(train.images[20:40].flatten(1).numpy(), batch["data"])
    assert train.labels[20:40].tolist() == batch["labels"]


def test_an_absent_set_is_downloaded_and_found_again(archive, tmp_path):
    said = []
    train = data_loader.read("cifar10", tmp_path / "data", say=said.append).train
    assert len(train) == 100 and "downloading" in said[0]
    (tmp_path / "origin/cifar-10-python.tar.gz").unlink()
    assert torch.equal(data_loader.read("cifar10", tmp_path / "data").train.images, train.images)


def test_a_set_that_is_being_unpacked_is_waited_for(archive, tmp_path):
    """Another process has made the folder and is still filling it."""
    data, said, result = tmp_path / "data", [], []
    shutil.copytree(tmp_path / "origin" / FOLDER, data / FOLDER)
    (data / FOLDER / "test_batch").unlink()
    waiting = threading.Event()

    def say(line):
        said.append(line)
        waiting.set()

    with files.locked(data / ".cifar10.lock", "the download"):
        thread = threading.Thread(target=lambda: result.append(data_loader.read("cifar10", data, say=say)), daemon=True)
        thread.start()
        assert waiting.wait(30)
        shutil.copy(tmp_path / "origin" / FOLDER / "test_batch", data / FOLDER)
    thread.join(30)
    assert "waiting for" in said[0] and len(result[0].test) == 20


# ---------------------------------------------------------------------------------------------------- refused
def test_a_damaged_file_is_refused(archive, tmp_path):
    file = tmp_path / "origin" / FOLDER / "data_batch_3"
    file.write_bytes(file.read_bytes()[:-1])
    refused(tmp_path / "origin", rf"{FOLDER} is incomplete or damaged .* delete it, then fetch .* tar -xzf")


def test_a_damaged_archive_is_refused(archive, tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "tgz_md5", "0" * 32)
    refused(tmp_path / "data", "damaged", download=True)
    assert not (tmp_path / "data" / FOLDER).exists()


@pytest.mark.parametrize("present", [False, True])
def test_offline_is_one_line_with_the_manual_steps(archive, tmp_path, monkeypatch, present):
    """Nothing listens on port 9 of this machine. https, as in the real address: torchvision tries http next."""
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", "https://127.0.0.1:9/cifar-10-python.tar.gz")
    data = tmp_path / "data"
    if present:
        data.mkdir()
    steps = f"; fetch https://.* .md5 {archive['tgz_md5']}. and unpack it: tar -xzf cifar-10-python.tar.gz -C {data}$"
    refused(data, rf"^no cifar10 in {data} and no download \(.+\){steps}", download=True)
    assert data.exists() == present and not (present and any(data.iterdir()))


def test_downloading_can_be_forbidden(archive, server, tmp_path):
    refused(tmp_path / "data", "no cifar10 in .* and downloading is off; fetch http://")
    assert not (tmp_path / "data").exists() and not server.requests


# ------------------------------------------------------------------------------------------------ the command
PATCHED_COMMAND = """
import json, runpy, sys
import torchvision.datasets
for key, value in json.loads(sys.argv[1]).items():
    setattr(torchvision.datasets.CIFAR10, key, value)
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def start_download(archive, tmp_path):
    """start_download() starts `data_loader.py --download cifar10` of the small archive, or with other constants."""

    def start(**constants):
        argv = [ROOT / "data_loader.py", "--download", "cifar10", "--dataset-dir", tmp_path / "data"]
        command = [sys.executable, "-c", PATCHED_COMMAND, json.dumps(archive | constants), *map(str, argv)]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=tmp_path, env=environment, text=True, stdout=pipe, stderr=pipe)

    return start


def test_two_download_commands_at_once_download_once_and_a_third_finds_it(start_download, server, tmp_path):
    server.may_answer.clear()
    pair = [start_download() for _ in range(2)]
    first_words = sorted(process.stdout.readline().split()[0] for process in pair)
    server.may_answer.set()
    ends = [process.communicate(timeout=300) for process in pair]
    assert first_words == ["cifar10", "waiting"], (
        ends
    )  # "cifar10 is not in ...: downloading", "waiting for process ..."
    assert [process.returncode for process in pair] == [0, 0], ends
    line = f"cifar10 is in {tmp_path}/data/{FOLDER}: 100 images to train, 20 to test, checked\n"
    assert all(out.endswith(line) for out, _ in ends) and (tmp_path / "data" / FOLDER).is_dir()
    assert len(server.requests) == 2  # torchvision makes one request for where the file is and one for the file
    assert start_download().communicate(timeout=300) == (line, "")


def test_errors_of_the_download_command_are_one_line(start_download):
    process = start_download(url="https://127.0.0.1:9/cifar-10-python.tar.gz")
    _, err = process.communicate(timeout=300)
    assert process.returncode == 2 and re.fullmatch(r"data_loader\.py: error: no cifar10 in [^\n]* -C [^\n]*\n", err)


@pytest.mark.parametrize(
    "argv, message", [(["--download", "digits"], "choose from"), (["--download"], "at least one"), ([], "--download")]
)
def test_usage_errors_of_the_download_command(argv, message, run_command):
    outcome = run_command("data_loader.py", *argv)
    assert (outcome.status, outcome.out, outcome.err.count("\n")) == (2, "", 1) and message in outcome.err


# ---------------------------------------------------------------------------------------------- real images
def test_digits_agree_with_the_data_sets_row():
    splits, spec = data_loader.read("digits"), names.DATASETS["digits"]
    assert (len(splits.train), len(splits.test)) == (spec.train_images, spec.test_images)
    pixels = splits.train.images.double().div(255)
    assert float(pixels.mean()) == pytest.approx(spec.mean[0], abs=2e-3)
    assert float(pixels.std()) == pytest.approx(spec.std[0], abs=2e-3)
    distinct = {image.numpy().tobytes() for split in (splits.train, splits.test) for image in split.images}
    assert len(distinct) == 1797


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_real_cifar(name, cifar_dir):
    """Complete, with the means and standard deviations per channel that the released code normalises by."""
    splits, spec = data_loader.read(name, cifar_dir, download=False), names.DATASETS[name]
    assert (len(splits.train), len(splits.test)) == (50_000, 10_000)
    assert set(torch.bincount(splits.train.labels).tolist()) == {50_000 // spec.classes}
    mean = splits.train.images.float().div(255).mean((0, 2, 3))
    assert torch.allclose(mean, torch.tensor(spec.mean), atol=0.02)
