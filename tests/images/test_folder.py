"""Folders of images: layouts, every kind of file that people have, and the cache of decoded images."""

import os
import pathlib
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as F

import data_loader
from takd.config import names
from takd.errors import UserError
from takd.images import folder as folders

CLASSES = ("blue", "green", "red")


@pytest.fixture
def folder(photographs, tmp_path):
    """A copy of the photographs, to be changed."""
    return shutil.copytree(photographs, tmp_path / "three", ignore=shutil.ignore_patterns("takd-decoded*"))


@pytest.fixture
def cifar(tmp_path, class_folders):
    """The folder of a tiny cifar10 as class folders."""
    return class_folders(tmp_path) / "cifar10"


def read(place, size=32):
    """(splits, lines printed) of photographs, or of the cifar10 in a folder of that name."""
    said, place = [], Path(place)
    name, place, size = ("cifar10", place.parent, None) if place.name == "cifar10" else ("folder", place, size)
    return data_loader.read(name, place, download=False, say=said.append, image_size=size), said


def refused(place, match):
    with pytest.raises(UserError, match=match) as caught:
        read(place)
    assert "\n" not in str(caught.value)
    assert not list(Path(place).glob("takd-decoded*")) and not list(Path(place).glob(".*"))


def free_memory(monkeypatch, bytes_free):
    """The memory that the system reports as available."""
    read_text = pathlib.Path.read_text

    def reported(path, *options, **more):
        meminfo = f"MemAvailable:  {bytes_free // 1024} kB\n"
        return meminfo if str(path) == "/proc/meminfo" else read_text(path, *options, **more)

    monkeypatch.setattr(pathlib.Path, "read_text", reported)


def hide_contents(place):
    """Zeros in place of every image, of the same size and time: only the cache still has the pixels."""
    for file in [*place.rglob("*.jpg"), *place.rglob("*.png")]:
        status = file.stat()
        file.write_bytes(b"\0" * status.st_size)
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


# ------------------------------------------------------------------------------------------------- layouts
def test_a_folder_of_images(folder):
    splits, said = read(folder, 24)
    train = splits.train
    assert (train.classes, train.name, splits.validation) == (CLASSES, "folder/train", None)
    assert (train.images.shape, train.images.dtype, len(splits.test)) == ((36, 3, 24, 24), torch.uint8, 18)
    assert train.labels.tolist() == [label for label in range(3) for _ in range(12)]
    assert train.transform == (names.IMAGENET_MEAN, names.IMAGENET_STD, 24)
    assert all(f"/{CLASSES[label]}/" in file for file, label in zip(train.files, train.labels, strict=True))
    for i in (0, 35):  # the middle square, as torchvision cuts and shrinks it
        image = Image.open(train.files[i])
        expected = F.pil_to_tensor(F.resize(F.center_crop(image, [min(image.size)] * 2), [24, 24]))
        assert (train.images[i].float() - expected.float()).abs().mean() < 0.5
    assert any("decoding 54 images" in line for line in said)
    assert data_loader.read("folder", folder).train.image_size == 224


def test_class_folders_of_cifar_are_read_in_order_of_names(cifar):
    (train, test, _), said = read(cifar)
    assert train.classes == tuple(f"class{label:03}" for label in range(10))
    assert train.labels.tolist() == [label for label in range(10) for _ in range(3)]
    assert (train.images.shape, train.images.dtype, len(test)) == ((30, 3, 32, 32), torch.uint8, 10)
    with Image.open(cifar / "train/class004/1.png") as image:
        assert np.array_equal(train.images[13].permute(1, 2, 0).numpy(), np.asarray(image))
    assert train.transform == (names.RELEASED_MEAN, names.RELEASED_STD, 32)
    warnings = [line for line in said if line.startswith("warning:")]
    assert len(warnings) == 2 and "holds 30 images, the original cifar10 50000" in warnings[0]


def test_val_beside_test_selects_the_epoch(folder):
    shutil.copytree(folder / "val", folder / "test")
    (folder / "test/red/00.jpg").unlink()
    splits, _ = read(folder)
    assert (len(splits.train), len(splits.test), len(splits.validation)) == (36, 17, 18)
    assert splits.selection == "validation"
    shutil.rmtree(folder / "val")
    assert read(folder)[0].selection == "test"


def test_nested_folders_and_files_that_are_not_images(folder):
    (folder / "train/red/deep/er").mkdir(parents=True)
    shutil.move(folder / "train/red/00.jpg", folder / "train/red/deep/er/00.jpg")
    (folder / "train/red/notes.txt").write_text("no image")
    (folder / "train/red/._01.jpg").write_bytes(b"what macOS leaves")
    assert len(read(folder)[0].train) == 36


def test_links_are_followed_once_and_never_back(folder, tmp_path):
    expected = read(folder)[0].train.images.clone()
    red = folder / "train/red"
    for name, target in {".": ".", "up": "..", "all": "../..", "root": "/", "loop": "loop", "other": "../blue"}.items():
        (red / f"link {name}").symlink_to(target)
    assert torch.equal(read(folder)[0].train.images, expected)
    (tmp_path / "elsewhere").mkdir()
    shutil.move(red / "05.jpg", tmp_path / "elsewhere")
    for name in ("once", "twice"):
        (red / name).symlink_to(tmp_path / "elsewhere")
    assert len(read(folder)[0].train) == len(expected)


def test_names_that_are_not_utf8(folder):
    """Of images and classes; the latter have escapes, so that every report and every locale can show them."""
    for part in ("train", "val"):
        os.rename(folder / part / "red", os.fsencode(folder / part) + b"/r\xe9d\n")
        os.rename(folder / part / "blue/00.jpg", os.fsencode(folder / part) + b"/blue/\xff.jpg")
    splits, _ = read(folder)
    assert splits.train.classes == ("blue", "green", r"r\udce9d\n") and len(splits.train) == 36
    assert len(folders.folder_digest(folder)) == 32


def test_nothing_is_decoded_for_an_outline(folder):
    splits = data_loader.read("folder", folder, image_size=24, pixels=False)
    assert (splits.train.classes, len(splits.train), len(splits.test)) == (CLASSES, 36, 18)
    assert splits.train.transform(splits.train.images).shape == (36, 3, 24, 24)
    assert not list(folder.glob("takd-decoded*"))


def test_layouts_that_are_refused(folder, tmp_path):
    refused(tmp_path / "absent", "absent/train does not exist; class folders are")
    (folder / "val").rename(folder / "valid")
    refused(folder, "three/test does not exist")
    (folder / "valid").rename(folder / "val")
    (folder / "val/red").rename(folder / "val/purple")
    refused(folder, r"train and val hold different classes \(purple, red\)")
    for label in ("green", "blue"):
        shutil.rmtree(folder / "train" / label)
    refused(folder, "train holds 1 class folders; classification needs two or more")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda cifar: shutil.rmtree(cifar / "train/class002"), "train holds 9 class folders, cifar10 has 10"),
        (
            lambda cifar: (cifar / "test/class003").rename(cifar / "test/other"),
            r"different classes \(class003, other\)",
        ),
        (lambda cifar: [file.unlink() for file in cifar.glob("train/class002/*")], "without an image: class002"),
        (lambda cifar: shutil.rmtree(cifar / "test"), "cifar10/test does not exist"),
    ],
)
def test_layouts_of_cifar_that_are_refused(change, message, cifar):
    change(cifar)
    refused(cifar, message)


# ----------------------------------------------------------------------------------------------- the cache
@pytest.mark.parametrize("place", ["folder", "cifar"])
def test_images_are_decoded_once_per_size(place, request):
    place = request.getfixturevalue(place)
    first, said = read(place)
    assert any("decoding" in line for line in said)
    hide_contents(place)
    second, said = read(place)
    assert not any("decoding" in line for line in said)
    assert all(torch.equal(getattr(first, part).images, getattr(second, part).images) for part in ("train", "test"))
    assert torch.equal(first.test.labels, second.test.labels)
    if place.name == "three":
        with pytest.raises(UserError, match="54 of 54 images cannot be used"):
            read(place, 24)


def test_a_changed_folder_is_decoded_again(cifar):
    before = read(cifar)[0].train
    image = cifar / "train/class000/0.png"
    Image.new("RGB", (32, 32), (1, 2, 3)).save(image)
    changed = read(cifar)[0].train
    assert changed.images[0, :, 5, 5].tolist() == [1, 2, 3] and not torch.equal(before.images, changed.images)
    shutil.copy(image, image.with_name("9.png"))
    assert len(read(cifar)[0].train) == 31
    image.unlink()
    assert len(read(cifar)[0].train) == 30
    assert len(list(cifar.glob("takd-decoded-*"))) == 1


def claiming(shape):
    """The file with another shape in its header."""
    return lambda data: data.replace(b"(40, 3, 32, 32), }" + b" " * 20, f"{shape}, }}".ljust(38).encode())


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[: len(data) // 2],
        lambda data: data + b"x",
        lambda data: b"x" * 500,
        lambda data: data[:9000] + bytes([data[9000] ^ 1]) + data[9001:],
        claiming((10**8, 3, 32, 32)),
        claiming((40, 3, 64, 16)),
    ],
)
def test_a_damaged_cache_is_rebuilt(cifar, damage):
    first = read(cifar)[0].train.images.clone()  # not the mapped file itself, which is about to shrink
    (cache,) = cifar.glob("takd-decoded-32-*.npy")
    data = cache.read_bytes()
    cache.write_bytes(damage(data))
    assert cache.read_bytes() != data
    cache.with_name(f".{cache.name}.4711.tmp").write_text("left by a killed process")
    assert torch.equal(read(cifar)[0].train.images, first) and not list(cifar.glob(".*"))
    assert not any("decoding" in line for line in read(cifar)[1])


def test_images_that_do_not_fit_into_memory_are_mapped(folder, monkeypatch):
    in_memory = read(folder)[0].train
    free_memory(monkeypatch, 0)
    arrays = folders.read("folder", folder, 32, print).arrays
    assert all(isinstance(images, np.memmap) for images, _ in arrays.values())
    mapped = read(folder)[0].train
    index = torch.tensor([30, 2])
    assert torch.equal(in_memory.images, mapped.images) and torch.equal(mapped.take(index), in_memory.images[index])


@pytest.mark.parametrize("full", [True, False])
def test_where_decoded_images_cannot_be_kept(folder, monkeypatch, full):
    """A read-only share: they stay in memory if they fit."""
    expected = read(folder)[0].train.images.clone()
    for cache in folder.glob("takd-decoded*"):
        cache.unlink()

    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", no_space)
    if full:
        free_memory(monkeypatch, 1024)
        return refused(folder, r"cannot be written \(No space left on device\), and the images need 0\.0 GB of memory")
    splits, said = read(folder)
    assert torch.equal(splits.train.images, expected) and any("every start will decode" in line for line in said)
    assert not list(folder.glob("*takd-decoded*"))


# ------------------------------------------------------------------------------------------ kinds of files
def square(*colour, mode="RGB"):
    return Image.new(mode, (40, 40), colour if len(colour) > 1 else colour[0])


def sixteen_bits():
    return Image.fromarray(np.full((40, 40), 40000, np.uint16))


def transparent():
    image = square(255, 0, 0, 0, mode="RGBA")
    image.paste((0, 0, 255, 255), (0, 0, 20, 40))  # the left half
    return image


def palette():
    image = square(1, mode="P")
    image.putpalette([0, 0, 0, 10, 200, 30])
    return image


# The file's ending, image and options; what its left and right half must become; what is reported.
KINDS = {
    "grey": ("png", square(77, mode="L"), {}, (77,) * 3, (77,) * 3, "mode L"),
    "bits": ("png", square(1, mode="1"), {}, (255,) * 3, (255,) * 3, "mode 1"),
    "grey of 16 bits": ("png", sixteen_bits(), {}, (156,) * 3, (156,) * 3, "of 16 bits"),
    "TIFF of 16 bits": ("tif", sixteen_bits(), {}, (156,) * 3, (156,) * 3, "of 16 bits"),
    "CMYK": ("tif", square(0, 255, 255, 0, mode="CMYK"), {}, (255, 0, 0), (255, 0, 0), "mode CMYK"),
    "CMYK JPEG": ("jpg", square(0, 255, 255, 0, mode="CMYK"), {"quality": 100}, (254, 0, 0), (254, 0, 0), "mode CMYK"),
    "palette": ("png", palette(), {}, (10, 200, 30), (10, 200, 30), "mode P"),
    "palette with a transparent colour": (
        "png",
        palette(),
        {"transparency": 1},
        (255,) * 3,
        (255,) * 3,
        "transparency",
    ),
    "transparent": ("png", transparent(), {}, (0, 0, 255), (255,) * 3, "transparency"),
    "GIF": ("gif", palette(), {}, (10, 200, 30), (10, 200, 30), "mode P"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_every_kind_become_rgb(folder, kind):
    ending, image, options, left, right, report = KINDS[kind]
    file = folder / f"train/blue/00.{ending}"
    (folder / "train/blue/00.jpg").unlink()
    image.save(file, **options)
    splits, said = read(folder)
    pixels = splits.train.images[0].int()
    for colour, column in ((left, 4), (right, 28)):
        assert (pixels[:, 16, column] - torch.tensor(colour)).abs().max() <= 3, pixels[:, 16, column]
    assert any(re.match(rf"images    1 .*{report}.* \(first {file}\)", line) for line in said), said


def test_images_of_other_modes_in_cifar_become_rgb(cifar):
    """Exactly as Pillow converts them: no resizing is in between."""
    expected = {}
    for i, mode in enumerate(("L", "P", "RGBA", "1", "CMYK")):
        file = cifar / "train" / f"class00{i}" / "0.png"
        with Image.open(file) as image:
            image = image.convert(mode)
        file.unlink()
        image.save(file.with_suffix(".tif" if mode == "CMYK" else ".png"))
        expected[i] = np.asarray(image.convert("RGB"))
    train = read(cifar)[0].train
    for i, pixels in expected.items():
        assert np.array_equal(train.images[3 * i].permute(1, 2, 0).numpy(), pixels)


@pytest.mark.parametrize("orientation, corner", [(1, (0, 0)), (3, (1, 1)), (6, (0, 1)), (8, (1, 0)), (2, (0, 1))])
def test_images_are_rotated_by_their_exif(folder, orientation, corner):
    """A white corner, stored at the top left, is where an image viewer shows it."""
    image = square(0, 0, 0)
    image.paste((255, 255, 255), (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(folder / "train/blue/00.jpg", exif=exif, quality=95)
    splits, said = read(folder)
    pixels = splits.train.images[0].float().mean(0)
    places = [(row, column) for row in (0, 1) for column in (0, 1)]
    quarters = {(row, column): pixels[16 * row :, 16 * column :][4:12, 4:12].mean() for row, column in places}
    assert max(quarters, key=quarters.get) == corner and min(quarters.values()) < 10
    assert any("EXIF" in line for line in said) == (orientation != 1)


def test_files_that_cannot_be_used_are_counted_and_named(folder):
    whole = (folder / "train/red/05.jpg").read_bytes()
    for i, contents in enumerate((b"", b"no image at all", whole[: len(whole) // 2], whole[:20])):
        (folder / f"val/green/{i:02}.jpg").write_bytes(contents)
    (folder / "train/red/link.jpg").symlink_to("nowhere")
    os.mkfifo(folder / "train/red/pipe.jpg")
    Image.fromarray(np.full((40, 40), 0.5, np.float32)).save(folder / "train/red/99.tif")
    three = r".*red/99\.tif \(floating-point pixels\); .*red/link\.jpg \(not a file.*\); .*pipe\.jpg \(not a file.*\); "
    three += r"\.\.\.; fix"
    refused(folder, f"7 of 57 images cannot be used, first {three}")


@pytest.mark.parametrize("contents", [b"", b"not an image", None])
def test_a_damaged_image_of_cifar_is_named(cifar, contents):
    file = cifar / "test/class007/0.png"
    file.write_bytes(contents if contents is not None else file.read_bytes()[:100])
    refused(cifar, r"1 of 40 images cannot be used, first .*class007/0\.png \(")


def test_an_image_of_cifar_of_another_size_is_named(cifar):
    Image.new("RGB", (33, 32)).save(cifar / "train/class001/0.png")
    refused(cifar, r"1 of 40 images .*class001/0\.png \(33x32 pixels, expected 32x32\)")


# -------------------------------------------------------------------------------------------------- digest
def test_a_folders_digest_is_of_names_and_sizes_wherever_it_is(folder, photographs):
    before = folders.folder_digest(folder)
    assert before == folders.folder_digest(photographs)
    os.utime(folder / "train/red/00.jpg", ns=(0, 0))
    assert folders.folder_digest(folder) == before
    (folder / "train/red/00.jpg").rename(folder / "train/red/100.jpg")
    assert folders.folder_digest(folder) != before
