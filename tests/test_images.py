"""Folders of images, image sizes and endless views: against torchvision, and every kind of file that people have."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms import functional as F

import data_loader
import evaluate
import train
from takd.config import names
from takd.config.names import UserError
from takd.distill import teacher as teachers
from takd.images import augmentation
from takd.run import checkpoint

ROOT = Path(data_loader.__file__).resolve().parent
COLOURS = {"blue": (40, 60, 220), "green": (40, 200, 60), "red": (220, 50, 40)}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Photographs of three colours, of several sizes, 12 to train and 6 to validate of each."""
    folder = tmp_path_factory.mktemp("photographs") / "three"
    random = np.random.default_rng(0)
    for part, count in (("train", 12), ("val", 6)):
        for name, colour in COLOURS.items():
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(-40, 40, (40 + i, 64 - i, 3)) + np.array(colour)
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / part / name / f"{i:02}.jpg", quality=95)
    return folder


@pytest.fixture
def folder(drawn, tmp_path):
    """A copy to be changed."""
    return shutil.copytree(drawn, tmp_path / "three", ignore=shutil.ignore_patterns("takd-decoded*"))


def loaded(folder, size=32):
    """(the splits by their parts, lines said)."""
    said = []
    return data_loader.load_parts("folder", folder, say=said.append, image_size=size), said


def refused(folder, match):
    with pytest.raises(UserError, match=match) as caught:
        loaded(folder)
    assert "\n" not in str(caught.value)
    assert not list(Path(folder).glob("takd-decoded*")) and not list(Path(folder).glob(".*"))


# ------------------------------------------------------------------------------------------- folders
def test_a_folder_of_images(drawn):
    parts, said = loaded(drawn, 24)
    train_, test = parts["train"], parts["test"]
    assert parts.keys() == {"train", "test"} and train_.classes == tuple(COLOURS)
    assert (train_.images.shape, train_.images.dtype, len(test)) == ((36, 3, 24, 24), torch.uint8, 18)
    assert train_.labels.tolist() == [label for label in range(3) for _ in range(12)]
    assert (train_.mean, train_.std, train_.image_size) == (names.IMAGENET_MEAN, names.IMAGENET_STD, 24)
    assert all(f"/{train_.classes[label]}/" in file for file, label in zip(train_.files, train_.labels, strict=True))
    for i in (0, 35):  # the middle square, as torchvision cuts and shrinks it
        image = Image.open(train_.files[i])
        expected = F.pil_to_tensor(F.resize(F.center_crop(image, [min(image.size)] * 2), [24, 24]))
        assert (train_.images[i].float() - expected.float()).abs().mean() < 0.5
    assert any("decoding 54 images" in line for line in said)
    assert data_loader.load("folder", drawn)[0].image_size == 224


def test_images_are_decoded_once_a_size(folder, monkeypatch):
    first = loaded(folder)[0]
    monkeypatch.setattr(data_loader, "_decode_one", None)
    second, said = loaded(folder)
    assert not said and all(torch.equal(first[part].images, second[part].images) for part in first)
    with pytest.raises(TypeError):
        loaded(folder, 24)


def test_images_that_do_not_fit_are_mapped(folder, monkeypatch):
    inside = loaded(folder)[0]["train"]
    monkeypatch.setattr(data_loader, "_free_memory", lambda: 0)
    monkeypatch.setattr(data_loader.np, "load", lambda *options, load=np.load: mapped.append(load(*options)) or mapped[-1])
    mapped = []
    outside = loaded(folder)[0]["train"]
    assert isinstance(mapped[0], np.memmap) and torch.equal(inside.images, outside.images)
    index = torch.tensor([30, 2])
    assert torch.equal(outside.take(index), inside.images[index])


def test_val_beside_test_selects_the_epoch(folder):
    shutil.copytree(folder / "val", folder / "test")
    (folder / "test/red/00.jpg").unlink()
    parts, _ = loaded(folder)
    assert {part: len(split) for part, split in parts.items()} == {"train": 36, "test": 17, "validation": 18}


def test_folders_in_folders_and_files_that_are_no_images(folder):
    (folder / "train/red/deep/er").mkdir(parents=True)
    shutil.move(folder / "train/red/00.jpg", folder / "train/red/deep/er/00.jpg")
    (folder / "train/red/notes.txt").write_text("no image")
    (folder / "train/red/._01.jpg").write_bytes(b"what macOS leaves")
    assert len(loaded(folder)[0]["train"]) == 36


def test_layouts_that_are_none(folder, tmp_path):
    refused(tmp_path / "absent", "absent/train does not exist; class folders are")
    (folder / "val").rename(folder / "valid")
    refused(folder, "three/test does not exist")
    (folder / "valid").rename(folder / "val")
    (folder / "val/red").rename(folder / "val/purple")
    refused(folder, r"train and val hold different classes \(purple, red\)|train and test hold")
    for label in ("green", "blue"):
        shutil.rmtree(folder / "train" / label)
    refused(folder, "train holds 1 class folders")


@pytest.mark.parametrize("full", [True, False])
def test_where_decoded_images_cannot_be_kept(folder, monkeypatch, full):
    """A read-only share: they stay in memory, where it has room."""
    expected = loaded(folder)[0]["train"].images.clone()
    for cache in folder.glob("takd-decoded*"):
        cache.unlink()

    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(data_loader.os, "posix_fallocate", no_space)
    if full:
        monkeypatch.setattr(data_loader, "_free_memory", lambda: 1000)
        return refused(folder, r"cannot be written \(No space left on device\), and the images need 0\.0 GB of memory")
    parts, said = loaded(folder)
    assert torch.equal(parts["train"].images, expected) and any("every start will decode" in line for line in said)
    assert not list(folder.glob("*takd-decoded*"))


# ---------------------------------------------------------------------------------- all kinds of files
def square(*colour, mode="RGB"):
    return Image.new(mode, (40, 40), colour if len(colour) > 1 else colour[0])


def sixteen():
    return Image.fromarray(np.full((40, 40), 40000, np.uint16))


def transparent():
    image = square(255, 0, 0, 0, mode="RGBA")
    image.paste((0, 0, 255, 255), (0, 0, 20, 40))  # the left half
    return image


def palette():
    image = square(1, mode="P")
    image.putpalette([0, 0, 0, 10, 200, 30])
    return image


# What is saved under which name and how, what its left and its right half must become, and what is said.
KINDS = {
    "grey": ("png", square(77, mode="L"), {}, (77,) * 3, (77,) * 3, "mode L"),
    "bits": ("png", square(1, mode="1"), {}, (255,) * 3, (255,) * 3, "mode 1"),
    "grey of 16 bits": ("png", sixteen(), {}, (156,) * 3, (156,) * 3, "of 16 bits"),
    "TIFF of 16 bits": ("tif", sixteen(), {}, (156,) * 3, (156,) * 3, "of 16 bits"),
    "CMYK": ("tif", square(0, 255, 255, 0, mode="CMYK"), {}, (255, 0, 0), (255, 0, 0), "mode CMYK"),
    "JPEG in CMYK": ("jpg", square(0, 255, 255, 0, mode="CMYK"), {"quality": 100}, (254, 0, 0), (254, 0, 0), "mode CMYK"),
    "palette": ("png", palette(), {}, (10, 200, 30), (10, 200, 30), "mode P"),
    "palette with a transparent colour": ("png", palette(), {"transparency": 1}, (255,) * 3, (255,) * 3, "transparency"),
    "transparent": ("png", transparent(), {}, (0, 0, 255), (255,) * 3, "transparency"),
    "GIF": ("gif", palette(), {}, (10, 200, 30), (10, 200, 30), "mode P"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_every_kind(folder, kind):
    ending, image, options, left, right, told = KINDS[kind]
    file = folder / f"train/blue/00.{ending}"
    (folder / "train/blue/00.jpg").unlink()
    image.save(file, **options)
    parts, said = loaded(folder)
    pixels = parts["train"].images[0].int()
    for colour, column in ((left, 4), (right, 28)):
        assert (pixels[:, 16, column] - torch.tensor(colour)).abs().max() <= 3, pixels[:, 16, column]
    assert any(re.match(rf"images    1 .*{told}.* \(first {file}\)", line) for line in said), said


@pytest.mark.parametrize("orientation, corner", [(1, (0, 0)), (3, (1, 1)), (6, (0, 1)), (8, (1, 0)), (2, (0, 1))])
def test_images_are_turned_as_their_exif_says(folder, orientation, corner):
    """A white corner, top left as stored, is where a viewer shows it."""
    image = square(0, 0, 0)
    image.paste((255, 255, 255), (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(folder / "train/blue/00.jpg", exif=exif, quality=95)
    parts, said = loaded(folder)
    pixels = parts["train"].images[0].float().mean(0)
    quarters = {(row, column): pixels[16 * row :, 16 * column :][4:12, 4:12].mean() for row in (0, 1) for column in (0, 1)}
    assert max(quarters, key=quarters.get) == corner and min(quarters.values()) < 10
    assert any("EXIF" in line for line in said) == (orientation != 1)


def test_files_that_cannot_be_used_are_counted_and_named(folder):
    whole = (folder / "train/red/05.jpg").read_bytes()
    for i, contents in enumerate((b"", b"no image at all", whole[: len(whole) // 2], whole[:20])):
        (folder / f"val/green/{i:02}.jpg").write_bytes(contents)
    (folder / "train/red/link.jpg").symlink_to("nowhere")
    Image.fromarray(np.full((40, 40), 0.5, np.float32)).save(folder / "train/red/99.tif")
    refused(
        folder,
        r"6 of 56 images cannot be used, first .*red/99\.tif \(floating-point pixels\); .*red/link\.jpg \(.*\); .*; \.\.\.; mend",
    )


def test_a_run_does_not_begin_with_a_broken_image(folder, call, tmp_path):
    (folder / "train/red/05.jpg").write_bytes(b"")
    argv = ("--dataset", "folder", "--dataset-dir", folder, "--image-size", "32", "--student", "plane2", "--cuda", "0")
    outcome = call(train, *argv, "--run-dir", tmp_path / "run")
    assert outcome.status == 2 and outcome.err.count("\n") == 1 and "1 of 54 images cannot be used, first" in outcome.err
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------ sizes and views
@pytest.fixture(scope="module")
def digits():
    return data_loader.load("digits", image_size=48)


@pytest.mark.parametrize("size", [48, 64, 20])
def test_images_are_resized_as_torchvision_does(digits, size):
    images = digits[0].images[:5]
    transform = v2.Compose([v2.ToDtype(torch.float32), v2.Resize(size, antialias=True), v2.Normalize([0, 0, 0], [255, 255, 255])])
    expected = (transform(images) - 0.5) / 0.25
    ours = data_loader.normalise(images, (0.5,) * 3, (0.25,) * 3, size)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(ours.contiguous(), expected, rtol=1e-4, atol=1e-4)


def test_another_size_has_imagenets_normalisation(digits):
    assert (digits[0].image_size, digits[0].images.shape[-1], digits[0].mean) == (48, 32, names.IMAGENET_MEAN)
    assert data_loader.load("digits", image_size=32)[0].mean == names.DATASETS["digits"].mean


def test_flip_is_the_image_and_its_mirror(digits):
    images = digits[0].images[:4]
    for view, expected in ((0, images), (1, F.hflip(images))):
        assert torch.equal(augmentation.apply("flip", images, torch.full((4,), view)), expected)


def test_an_endless_view_is_torchvisions(drawn):
    image = F.pil_to_tensor(Image.open(drawn / "train/red/03.jpg"))
    state = torch.get_rng_state()
    views = [augmentation.endless(image, view, 24) for view in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert views[0].shape == (3, 24, 24) and torch.equal(views[0], views[1]) and not torch.equal(views[0], views[2])
    torch.manual_seed(2)
    theirs = v2.Compose([v2.RandomRotation(30, InterpolationMode.BILINEAR), v2.RandomResizedCrop(24), v2.RandomHorizontalFlip()])
    assert torch.equal(theirs(image), views[2])
    torch.set_rng_state(state)


def endless(split, **changes):
    options = {"batch_size": 10, "augment": "rotate-crop-flip", "seed": 1, "epoch": 0, "workers": 0} | changes
    return list(data_loader.train_batches(split, **options))


def test_endless_views_are_the_same_by_any_number_of_workers(drawn, digits):
    for split in (loaded(drawn, 24)[0]["train"], digits[0].subset(slice(0, 25), "digits/part")):
        state = torch.get_rng_state()
        here = endless(split)
        assert torch.equal(torch.get_rng_state(), state)
        assert [len(batch.labels) for batch in here] == [10] * (len(split) // 10) + [len(split) % 10]
        assert {batch.images.shape[1:] for batch in here} == {(3, split.image_size, split.image_size)}
        for ours, theirs in zip(here, endless(split, workers=2), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        for ours, theirs in zip(endless(split, first_step=2), here[2:], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        halves = [endless(split, rank=rank, size=2) for rank in (0, 1)]
        for whole, *parts in zip(here, *halves, strict=True):
            assert torch.equal(whole.images, torch.cat([part.images for part in parts]))
        assert not torch.equal(here[0].images, endless(split, epoch=1)[0].images)


def test_endless_views_are_of_the_original_pixels(drawn):
    """Not of the small copies that are kept: a crop of a large image keeps its detail."""
    split = loaded(drawn, 24)[0]["train"]
    batch = endless(split)[0]
    row, view = int(batch.index[0]), int(batch.views[0])
    with Image.open(split.files[row]) as image:
        assert torch.equal(batch.images[0], augmentation.endless(F.pil_to_tensor(image), view, 24))


def test_fewer_images(digits):
    few = data_loader.fewer(digits[0], 100)
    assert len(few) == 100 and set(torch.bincount(few.labels).tolist()) <= {9, 10, 11} and few.name == "digits/train-100"
    assert torch.equal(few.images, data_loader.fewer(digits[0], 100).images)


# ------------------------------------------------------------------------------------------------ trainings
FOLDER = (
    "--dataset",
    "folder",
    "--image-size",
    "40",
    "--student",
    "plane2",
    "--cuda",
    "0",
    "--precision",
    "fp32",
    "--batch-size",
    "6",
)


def read(file):
    return json.loads(Path(file).read_text())


def state(run):
    return checkpoint.read(run / "last.pth.tar")["model_state_dict"]


@pytest.fixture(scope="module")
def colours(drawn, tmp_path_factory, call):
    """A finished run on the photographs: it learns them."""
    run = tmp_path_factory.mktemp("colours") / "run"
    outcome = call(train, *FOLDER, "--dataset-dir", drawn, "--epochs", "2", "--run-dir", run)
    assert outcome.status == 0, outcome.err
    assert "data      folder: 36 images to train, 18 to test, 40x40" in outcome.out
    assert read(run / "summary.json")["best"]["accuracy_percent"] > 80
    return run


def test_a_folders_run_is_scored_and_teaches(colours, drawn, call, tmp_path):
    best = colours / "plane2_seed1_best.pth.tar"
    contents = checkpoint.read(best)
    assert (contents["image_size"], contents["class_names"], contents["mean"]) == (40, list(COLOURS), list(names.IMAGENET_MEAN))
    scored = json.loads(call(evaluate, "--checkpoint", best, "--dataset-dir", drawn, "--cuda", "0", "--json").out)
    assert scored["test_accuracy_percent"] == pytest.approx(scored["recorded_test_accuracy_percent"])
    for more in (
        (),
        ("--image-size", "32"),
        ("--augment", "rotate-crop-flip", "--workers", "0"),
    ):  # its pixels, others, endless ones
        taught = (*FOLDER, "--dataset-dir", drawn, "--epochs", "1", "--teacher", "plane2", "--teacher-checkpoint", best, *more)
        outcome = call(train, *taught, "--run-dir", tmp_path / f"run{len(more)}")
        assert outcome.status == 0, outcome.err
        assert ("no end of views" in outcome.out) == ("--augment" in more)
        assert abs(float(re.search(r"teacher   ([\d.]+) %", outcome.out)[1]) - scored["test_accuracy_percent"]) < 12


def test_another_folders_run_is_another_run(colours, folder, call, drawn):
    command = (*FOLDER, "--epochs", "2", "--run-dir", colours)
    moved = call(train, *command, "--dataset-dir", folder)  # the same images elsewhere
    assert moved.status == 0 and moved.out.startswith("finished")
    (folder / "train/red/00.jpg").unlink()
    other = call(train, *command, "--dataset-dir", folder)
    assert other.status == 2 and "holds another run (images" in other.err


def test_a_teacher_of_other_classes_is_refused(colours, folder, call, tmp_path):
    for part in ("train", "val"):
        (folder / part / "red").rename(folder / part / "azure")
    command = (
        *FOLDER,
        "--teacher",
        "plane2",
        "--teacher-checkpoint",
        colours / "plane2_seed1_best.pth.tar",
        "--dataset-dir",
        folder,
    )
    outcome = call(train, *command, "--run-dir", tmp_path / "run")
    assert outcome.status == 2 and "knows other classes than" in outcome.err and not (tmp_path / "run").exists()


def test_a_val_folder_takes_no_validation_split(folder, call, tmp_path):
    shutil.copytree(folder / "val", folder / "test")
    command = (*FOLDER, "--dataset-dir", folder, "--epochs", "1", "--run-dir", tmp_path / "run")
    assert "leave --validation-split away" in call(train, *command, "--validation-split", "0.1").err
    assert call(train, *command).status == 0
    assert read(tmp_path / "run/summary.json")["selection_split"] == "validation"


def test_an_interrupted_run_with_workers_continues_bit_for_bit(drawn, tmp_path, call, start_command):
    """SIGTERM to the whole group, as a cluster sends it: workers too."""
    import os
    import signal
    import time

    command = (
        *FOLDER,
        "--dataset-dir",
        drawn,
        "--epochs",
        "3",
        "--batch-size",
        "1",
        "--augment",
        "rotate-crop-flip",
        "--workers",
        "2",
    )
    assert call(train, *command, "--run-dir", tmp_path / "whole").status == 0
    process = start_command("train.py", *command, "--run-dir", tmp_path / "stopped", "--save-minutes", "0.0001")
    last = tmp_path / "stopped/last.pth.tar"
    while not (last.exists() and checkpoint.read(last)["step"] > 0):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for child in map(int, children):
        os.kill(child, signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM and err == "", (out, err)
    assert not (tmp_path / "stopped/summary.json").exists()
    assert call(train, *command, "--run-dir", tmp_path / "stopped").status == 0
    ours, theirs = state(tmp_path / "stopped"), state(tmp_path / "whole")
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_teacher_at_another_size(tmp_path, call, teacher_file, tiny):
    """A teacher of 32x32 for a student at 48x48 and the other way round: each sees its own size, and its table is its own."""
    assert call(train, *tiny, "--image-size", "48", "--run-dir", tmp_path / "large").status == 0
    large = tmp_path / "large/plane2_seed1_best.pth.tar"
    for file, sizes in ((teacher_file, ("48",)), (large, ("48", "32"))):
        recorded = checkpoint.read(file)["test_accuracy_percent"]
        for size in sizes:
            argv = (*tiny, "--teacher", "plane2", "--teacher-checkpoint", file, "--image-size", size)
            outcome = call(train, *argv, "--run-dir", tmp_path / f"{file.stem}-{size}")
            assert outcome.status == 0, outcome.err
            assert float(re.search(r"teacher   ([\d.]+) %", outcome.out)[1]) == pytest.approx(recorded, abs=0.3)
    assert len(list(Path(f"{large}.logits").glob("*.float32"))) == 1  # both students', as the teacher's pixels are the same


def test_a_table_belongs_to_a_size(teacher_file, digits):
    import model_factory

    network = model_factory.create_network("plane2", 10, 48)
    bindings = {
        teachers.Teacher(network, (0.5,) * 3, (0.5,) * 3, split, "cpu", "fp32", image_size=48).binding(split)
        for split in (digits[1], dataclasses.replace(digits[1], size=32))
    }
    other = model_factory.create_network("resnet8", 10)
    sizes = {
        teachers.Teacher(other, (0.5,) * 3, (0.5,) * 3, digits[1], "cpu", "fp32", image_size=n).binding(digits[1]) for n in (32, 48)
    }
    assert (len(bindings), len(sizes)) == (1, 2)


# --------------------------------------------------------------------------------------------- the container
def test_the_dockerfile_is_the_steps_that_the_tests_have_taken():
    """No engine builds it here: the files that it copies exist, and it installs what `make` installs."""
    steps = [
        line.split(None, 1) for line in (ROOT / "Dockerfile").read_text().replace("\\\n", " ").splitlines() if line[:1].isalpha()
    ]
    copied = [word for step, rest in steps if step == "COPY" for word in rest.split()[:-1]]
    assert all((ROOT / word).exists() for word in copied) and "." in copied
    installs = [rest for step, rest in steps if step == "RUN" and "pip install" in rest]
    assert len(installs) == 1 and installs[0].endswith("-r requirements.txt") and "requirements.txt" in copied
    order = [step for step, _ in steps]
    assert order[0] == "FROM" and json.loads(dict(steps)["ENTRYPOINT"]) == ["python3"]
    assert (ROOT / json.loads(dict(steps)["CMD"])[0]).is_file()
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".git", ".venv", "runs"} <= set(ignored) and not {"kernels.c", "*.py"} & set(ignored)
