"""Images, views and batches: against torchvision, and every way a data folder can be wrong."""

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
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torchvision.transforms import functional as F

import data_loader
from takd import files
from takd.config import names
from takd.config.names import UserError
from takd.images import augmentation

ROOT = Path(data_loader.__file__).resolve().parent


@pytest.fixture(scope="module")
def images():
    return torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def digits():
    return data_loader.load("digits")


# -------------------------------------------------------------------------------------------- views
@pytest.mark.parametrize("augment, padding", [("crop-flip", "constant"), ("crop-flip-reflect", "reflect")])
def test_all_views_are_torchvisions_pad_crop_and_hflip(augment, padding, images):
    for view in range(162):
        row, column, mirrored = view // 18, view // 2 % 9, view % 2
        ours = augmentation.apply(augment, images, torch.full((len(images),), view))
        for image, mine in zip(images, ours, strict=True):
            theirs = F.crop(F.pad(image.float(), [4], padding_mode=padding).byte(), row, column, 32, 32)
            assert torch.equal(mine, F.hflip(theirs) if mirrored else theirs), view


def test_every_image_gets_its_own_view(images):
    views = torch.tensor([0, 161, 80, 7, 33])
    together = augmentation.apply("crop-flip", images, views)
    for i, view in enumerate(views):
        assert torch.equal(together[i], augmentation.apply("crop-flip", images[i : i + 1], view[None])[0])


def test_one_view_is_the_image_itself(images):
    for augment, view in augmentation.UNCHANGED.items():
        assert torch.equal(augmentation.apply(augment, images, torch.full((len(images),), view)), images)


def test_normalise_is_torchvisions(images):
    mean, std = names.RELEASED_MEAN, names.RELEASED_STD
    transform = torchvision.transforms.Compose([torchvision.transforms.ToTensor(), torchvision.transforms.Normalize(mean, std)])
    theirs = torch.stack([transform(image.permute(1, 2, 0).numpy()) for image in images])
    torch.testing.assert_close(data_loader.normalise(images, mean, std).contiguous(), theirs, rtol=1e-5, atol=1e-6)
    rounded = data_loader.normalise(images, mean, std, dtype=torch.bfloat16)
    assert torch.equal(rounded, data_loader.normalise(images, mean, std).bfloat16())
    assert rounded.is_contiguous(memory_format=torch.channels_last)


# ------------------------------------------------------------------------------------------ batches
def epoch(split, **changes):
    options = {"batch_size": 100, "augment": "crop-flip", "seed": 1, "epoch": 0} | changes
    return list(data_loader.train_batches(split, **options))


def columns(batches):
    index, views, images, labels = (torch.cat(column) for column in zip(*batches, strict=True))
    return index, views, images, labels


def test_every_image_exactly_once_and_the_last_batch_kept(digits):
    for split in digits:
        batches = epoch(split)
        assert [len(batch.labels) for batch in batches] == [100] * (len(split) // 100) + [len(split) % 100]
        assert data_loader.steps_per_epoch(split, 100) == len(batches)
        index, views, images, labels = columns(batches)
        assert index.sort().values.tolist() == list(range(len(split)))
        assert torch.equal(labels, split.labels[index])
        assert torch.equal(images, augmentation.apply("crop-flip", split.images[index], views))
        assert sum(len(labels) for _, labels in data_loader.evaluation_batches(split, 100)) == len(split)


def test_an_epoch_is_a_function_of_seed_and_number(digits):
    first = columns(epoch(digits[0]))
    torch.rand(3)  # the global generator has no part in it
    assert all(torch.equal(a, b) for a, b in zip(first, columns(epoch(digits[0])), strict=True))
    for changes in ({"seed": 2}, {"epoch": 1}, {"seed": 0, "epoch": 1}):
        index, views, _, _ = columns(epoch(digits[0], **changes))
        assert not torch.equal(index, first[0]) and not torch.equal(views, first[1])


def test_a_resumed_epoch_is_the_rest_of_the_whole_one(digits):
    whole = epoch(digits[0])
    for step in (0, 1, 7, len(whole)):
        rest = epoch(digits[0], first_step=step)
        assert len(rest) == len(whole) - step
        for ours, theirs in zip(rest, whole[step:], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_order_and_views_are_independent(digits):
    """Changing the augmentation must not change the order, and a view must say nothing of the place."""
    index, views, _, _ = columns(epoch(digits[0]))
    assert torch.equal(index, columns(epoch(digits[0], augment="none"))[0])
    assert torch.equal(index, columns(epoch(digits[0], batch_size=7))[0])
    assert abs(float(torch.corrcoef(torch.stack([index, views]).double())[0, 1])) < 0.1


def test_views_are_drawn_evenly(digits):
    views = torch.cat([columns(epoch(digits[0], epoch=number))[1] for number in range(20)])
    counts = torch.bincount(views, minlength=162).double()
    expected = len(views) / 162
    assert len(counts) == 162 and float(((counts - expected) ** 2 / expected).sum()) < 161 + 5 * (2 * 161) ** 0.5


# ----------------------------------------------------------------------------------------- held out
@pytest.mark.parametrize("amount, count", [(0.1, 144), (100, 100), (0.5, 719)])
def test_held_out_is_disjoint_and_stratified(digits, amount, count):
    train = digits[0]
    rest, validation = data_loader.held_out(train, amount)
    assert (len(rest), len(validation)) == (len(train) - count, count)
    pixels = [{image.numpy().tobytes() for image in split.images} for split in (rest, validation, train)]
    assert pixels[0] | pixels[1] == pixels[2] and not pixels[0] & pixels[1]
    share = torch.bincount(validation.labels) / torch.bincount(train.labels)
    assert float(share.max() - share.min()) < 0.02


def test_held_out_does_not_depend_on_a_seed(digits):
    torch.manual_seed(1)
    first = data_loader.held_out(digits[0], 0.2)[1]
    torch.manual_seed(2)
    assert torch.equal(first.images, data_loader.held_out(digits[0], 0.2)[1].images)


@pytest.mark.parametrize("amount", [0.0001, 1438, 5000])
def test_holding_out_nothing_or_everything_is_refused(digits, amount):
    with pytest.raises(UserError, match="leaves"):
        data_loader.held_out(digits[0], amount)


def test_digits_are_what_the_tables_say(digits):
    spec = names.DATASETS["digits"]
    assert (len(digits[0]), len(digits[1])) == (spec.train_images, spec.test_images)
    pixels = digits[0].images.double().div(255)
    assert float(pixels.mean()) == pytest.approx(spec.mean[0], abs=2e-3)
    assert float(pixels.std()) == pytest.approx(spec.std[0], abs=2e-3)
    assert len({image.numpy().tobytes() for split in digits for image in split.images}) == 1797


# ------------------------------------------------------------------------------------- class folders
def loaded(root, name="cifar10"):
    """(train, test, lines said)."""
    said = []
    return *data_loader.load(name, root, download=False, say=said.append), said


def refused(root, match, name="cifar10"):
    with pytest.raises(UserError, match=match) as caught:
        data_loader.load(name, root, download=False)
    assert "\n" not in str(caught.value)


@pytest.fixture
def folders(tmp_path, class_folders):
    return class_folders(tmp_path)


def test_class_folders_are_read_in_order_of_names(folders):
    train, test, _ = loaded(folders)
    assert train.classes == tuple(f"class{label:03}" for label in range(10))
    assert train.labels.tolist() == [label for label in range(10) for _ in range(3)]
    assert (train.images.shape, train.images.dtype, len(test)) == ((30, 3, 32, 32), torch.uint8, 10)
    with Image.open(folders / "cifar10/train/class004/1.png") as image:
        assert np.array_equal(train.images[13].permute(1, 2, 0).numpy(), np.asarray(image))


def test_grey_palette_and_transparent_images_become_rgb(folders):
    expected = {}
    for i, mode in enumerate(("L", "P", "RGBA", "1", "CMYK")):
        file = folders / "cifar10/train" / f"class00{i}" / f"0.{'tif' if mode == 'CMYK' else 'png'}"
        with Image.open(file.with_suffix(".png")) as image:
            image = image.convert(mode)
        file.with_suffix(".png").unlink()
        image.save(file)
        expected[i] = np.asarray(image.convert("RGB"))
    train = loaded(folders)[0]
    for i, pixels in expected.items():
        assert np.array_equal(train.images[3 * i].permute(1, 2, 0).numpy(), pixels)


def test_fewer_images_than_the_original_are_a_warning(folders):
    said = loaded(folders)[2]
    assert any(line.startswith("warning:") and "holds 30 images, the original cifar10 50000" in line for line in said)


def test_wrong_number_of_classes(tmp_path, class_folders):
    refused(class_folders(tmp_path, classes=9), "holds 9 class folders, cifar10 has 10")


def test_train_and_test_of_different_classes(folders):
    (folders / "cifar10/test/class003").rename(folders / "cifar10/test/other")
    refused(folders, r"different classes \(class003, other\)")


def test_a_class_without_images(folders):
    shutil.rmtree(folders / "cifar10/train/class002")
    (folders / "cifar10/train/class002").mkdir()
    refused(folders, "without an image: class002")


def test_no_test_folder(folders):
    shutil.rmtree(folders / "cifar10/test")
    refused(folders, "test does not exist")


def test_wrong_size_is_named(folders):
    Image.new("RGB", (33, 32)).save(folders / "cifar10/train/class001/0.png")
    refused(folders, r"1 of 40 images .*class001/0\.png \(33x32 pixels, expected 32x32\)")


@pytest.mark.parametrize("contents", [b"", b"not an image", None])
def test_a_corrupt_image_is_named(folders, contents):
    file = folders / "cifar10/test/class007/0.png"
    file.write_bytes(contents if contents is not None else file.read_bytes()[:100])
    refused(folders, r"1 of 40 images cannot be used, first .*class007/0\.png \(")
    assert not list((folders / "cifar10").glob("*.npy"))


def test_the_second_start_reads_the_cache(folders):
    first = loaded(folders)
    assert any("decoding" in line for line in first[2])
    images = sorted((folders / "cifar10").rglob("*.png"))
    for image in images:  # same size and time, other contents: only a reader of the cache does not notice
        status = image.stat()
        image.write_bytes(b"\0" * status.st_size)
        os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns))
    second = loaded(folders)
    assert not any("decoding" in line for line in second[2])
    assert torch.equal(first[0].images, second[0].images) and torch.equal(first[1].labels, second[1].labels)


def test_a_changed_folder_is_decoded_anew(folders):
    before = loaded(folders)[0]
    image = folders / "cifar10/train/class000/0.png"
    Image.new("RGB", (32, 32), (1, 2, 3)).save(image)
    changed = loaded(folders)[0]
    assert changed.images[0, :, 5, 5].tolist() == [1, 2, 3] and not torch.equal(before.images, changed.images)
    shutil.copy(image, image.with_name("9.png"))
    assert len(loaded(folders)[0]) == 31
    image.unlink()
    assert len(loaded(folders)[0]) == 30
    assert len(list((folders / "cifar10").glob("takd-decoded-*"))) == 1


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[: len(data) // 2], lambda data: b"x" * 500])
def test_a_damaged_cache_is_made_anew(folders, damage):
    first = loaded(folders)[0].images.clone()  # not the mapped file itself, which is about to shrink
    (cache,) = (folders / "cifar10").glob("takd-decoded-32-*.npy")
    whole = cache.read_bytes()
    cache.write_bytes(damage(whole))
    assert torch.equal(loaded(folders)[0].images, first)
    assert not any("decoding" in line for line in loaded(folders)[2])


# ------------------------------------------------------------------------------ torchvision's layout
def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture
def server(tmp_path):
    """A web server on this machine: what it was asked for, and an event without which it does not answer."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            assert may_answer.wait(30)
            with contextlib.suppress(BrokenPipeError):  # torchvision's first request looks at the head alone
                super().do_GET()

        def log_message(self, *_):
            pass

    asked, may_answer = [], threading.Event()
    may_answer.set()
    handler = functools.partial(Handler, directory=tmp_path / "origin")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield SimpleNamespace(url=f"http://127.0.0.1:{server.server_port}", asked=asked, may_answer=may_answer)
        server.shutdown()


@pytest.fixture
def archive(tmp_path, server, monkeypatch):
    """A small archive in CIFAR-10's layout that torchvision takes for the real one; the constants that say so."""
    folder = tmp_path / "origin/cifar-10-batches-py"
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


def test_torchvisions_layout_is_found(archive, tmp_path):
    train, test, _ = loaded(tmp_path / "origin")
    assert (len(train), len(test), train.classes[3]) == (100, 20, "class3")
    batch = pickle.loads((tmp_path / "origin/cifar-10-batches-py/data_batch_2").read_bytes())
    assert np.array_equal(train.images[20:40].flatten(1).numpy(), batch["data"])
    assert train.labels[20:40].tolist() == batch["labels"]


def test_an_absent_set_is_downloaded_and_found_again(archive, tmp_path):
    said = []
    train, _ = data_loader.load("cifar10", tmp_path / "data", say=said.append)
    assert len(train) == 100 and "downloading" in said[0]
    (tmp_path / "origin/cifar-10-python.tar.gz").unlink()
    assert torch.equal(data_loader.load("cifar10", tmp_path / "data")[0].images, train.images)


def test_a_damaged_file_is_refused(archive, tmp_path):
    file = tmp_path / "origin/cifar-10-batches-py/data_batch_3"
    file.write_bytes(file.read_bytes()[:-1])
    refused(tmp_path / "origin", r"cifar-10-batches-py is incomplete or damaged .* delete it, then fetch .* tar -xzf")


def test_a_damaged_archive_is_refused(archive, tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "tgz_md5", "0" * 32)
    with pytest.raises(UserError, match="damaged"):
        data_loader.load("cifar10", tmp_path / "data")
    assert not (tmp_path / "data/cifar-10-batches-py").exists()


@pytest.mark.parametrize("present", [False, True])
def test_offline_is_one_line_with_the_manual_steps(archive, tmp_path, monkeypatch, present):
    """Nothing listens on port 9 of this machine. https, as the real address: torchvision tries http next and says so."""
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", "https://127.0.0.1:9/cifar-10-python.tar.gz")
    data = tmp_path / "data"
    if present:
        data.mkdir()
    with pytest.raises(UserError) as caught:
        data_loader.load("cifar10", data)
    message = str(caught.value)
    assert re.match(rf"no cifar10 in {data} and no download \(.+\); fetch https://", message) and "\n" not in message
    assert archive["tgz_md5"] in message and f"tar -xzf cifar-10-python.tar.gz -C {data}" in message
    assert data.exists() == present and not (present and any(data.iterdir()))


def test_downloading_can_be_forbidden(archive, server, tmp_path):
    refused(tmp_path / "data", "no cifar10 in .* and downloading is off; fetch http://")
    assert not (tmp_path / "data").exists() and not server.asked


PATCHED_LOAD = """
import json, sys
from pathlib import Path
import torchvision.datasets
import data_loader
for key, value in json.loads(sys.argv[1]).items():
    setattr(torchvision.datasets.CIFAR10, key, value)
print(len(data_loader.load("cifar10", Path(sys.argv[2]), say=lambda line: print(line, flush=True))[0]))
"""


def test_the_download_command(archive, tmp_path, capsys):
    for _ in range(2):  # the second time it is there
        data_loader.main(SimpleNamespace(download=["cifar10"], dataset_dir=tmp_path / "data"))
        said = capsys.readouterr().out.splitlines()
        assert said[-1] == f"cifar10 is in {tmp_path}/data/cifar-10-batches-py: 100 images to train, 20 to test, checked"
    assert len(said) == 1 and (tmp_path / "data/cifar-10-batches-py").is_dir()


@pytest.mark.parametrize(
    "argv, message", [(["--download", "digits"], "choose from"), (["--download"], "at least one"), ([], "--download")]
)
def test_usage_errors_of_the_download_command(argv, message, tmp_path, run_command):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    outcome = run_command("data_loader.py", *argv, PYTHONPATH=str(tmp_path))
    assert (outcome.status, outcome.out, outcome.err.count("\n")) == (2, "", 1) and message in outcome.err


def test_two_processes_at_once_download_once(archive, server, tmp_path):
    server.may_answer.clear()
    command = [sys.executable, "-c", PATCHED_LOAD, json.dumps(archive), str(tmp_path / "data")]
    pair = [subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
    first_words = sorted(process.stdout.readline().split()[0] for process in pair)
    server.may_answer.set()
    ends = [process.communicate(timeout=300) for process in pair]
    assert first_words == ["cifar10", "waiting"], ends  # "cifar10 is not in ...: downloading it", "waiting for process ..."
    assert [process.returncode for process in pair] == [0, 0], ends
    assert all(out.endswith("100\n") for out, _ in ends)
    assert len(server.asked) == 2  # torchvision asks once where the file is and once for the file


def test_a_set_being_unpacked_is_waited_for(archive, tmp_path):
    """Another process has made the folder and is still filling it."""
    data, said, result = tmp_path / "data", [], []
    shutil.copytree(tmp_path / "origin/cifar-10-batches-py", data / "cifar-10-batches-py")
    (data / "cifar-10-batches-py/test_batch").unlink()
    waiting = threading.Event()

    def say(line):
        said.append(line)
        waiting.set()

    with files.locked(data / ".cifar10.lock", "the download"):
        thread = threading.Thread(target=lambda: result.append(data_loader.load("cifar10", data, say=say)), daemon=True)
        thread.start()
        assert waiting.wait(30)
        shutil.copy(tmp_path / "origin/cifar-10-batches-py/test_batch", data / "cifar-10-batches-py")
    thread.join(30)
    assert "waiting for" in said[0] and len(result[0][1]) == 20


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_the_real_images(name, cifar_dir):
    """Whole, and with the channels' means and deviations that the released code's normalisation says."""
    train, test = data_loader.load(name, cifar_dir, download=False)
    spec = names.DATASETS[name]
    assert (len(train), len(test)) == (50_000, 10_000)
    assert set(torch.bincount(train.labels).tolist()) == {50_000 // spec.classes}
    mean = train.images.float().div(255).mean((0, 2, 3))
    assert torch.allclose(mean, torch.tensor(spec.mean), atol=0.02)
