"""Splits: the networks' input, held-out and fewer images, and the order of classes."""

import pytest
import torch
import torchvision
from torchvision.transforms import v2

import data_loader
from takd.config import names
from takd.errors import UserError
from takd.images.split import Transform, class_order, fewer, hold_out

HALVES = (0.5,) * 3, (0.25,) * 3


@pytest.fixture(scope="module")
def train():
    return data_loader.read("digits").train


@pytest.fixture(scope="module")
def noise():
    return torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


# ------------------------------------------------------------------------------------------------- transforms
def test_normalisation_is_torchvisions(noise):
    mean, std = names.RELEASED_MEAN, names.RELEASED_STD
    theirs = torchvision.transforms.Compose(
        [torchvision.transforms.ToTensor(), torchvision.transforms.Normalize(mean, std)]
    )
    expected = torch.stack([theirs(image.permute(1, 2, 0).numpy()) for image in noise])
    transform = Transform(mean, std, 32)
    torch.testing.assert_close(transform(noise).contiguous(), expected, rtol=1e-5, atol=1e-6)
    rounded = transform(noise, torch.bfloat16)
    assert torch.equal(rounded, transform(noise).bfloat16())
    assert rounded.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("size", [48, 64, 20])
def test_images_are_resized_as_torchvision_does(train, size):
    images = train.images[:5]
    steps = [v2.ToDtype(torch.float32), v2.Resize(size, antialias=True), v2.Normalize([0, 0, 0], [255, 255, 255])]
    expected = (v2.Compose(steps)(images) - 0.5) / 0.25
    ours = Transform(*HALVES, size)(images)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(ours.contiguous(), expected, rtol=1e-4, atol=1e-4)


def test_another_size_has_imagenets_normalisation(train):
    resized = data_loader.read("digits", image_size=48).train
    assert resized.images.shape[-1] == 32  # they are resized for the network, batch by batch
    assert resized.transform == (names.IMAGENET_MEAN, names.IMAGENET_STD, 48) and resized.image_size == 48
    spec = names.DATASETS["digits"]
    assert data_loader.read("digits", image_size=32).train.transform == train.transform == (spec.mean, spec.std, 32)


# ---------------------------------------------------------------------------------------- held-out and fewer images
def pixels(split):
    return {image.numpy().tobytes() for image in split.images}


@pytest.mark.parametrize("amount, count", [(0.1, 144), (100, 100), (0.5, 719)])
def test_held_out_images_are_disjoint_and_stratified(train, amount, count):
    rest, validation = hold_out(train, amount)
    assert (len(rest), len(validation)) == (len(train) - count, count)
    assert (rest.name, validation.name) == (f"digits/train-{1438 - count}", f"digits/validation-{count}")
    assert pixels(rest) | pixels(validation) == pixels(train) and not pixels(rest) & pixels(validation)
    share = torch.bincount(validation.labels) / torch.bincount(train.labels)
    assert float(share.max() - share.min()) < 0.02


def test_held_out_and_fewer_images_do_not_depend_on_a_seed(train):
    torch.manual_seed(1)
    first = hold_out(train, 0.2)[1], fewer(train, 100)
    torch.manual_seed(2)
    second = hold_out(train, 0.2)[1], fewer(train, 100)
    assert all(torch.equal(a.images, b.images) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("amount", [0.0001, 1438, 5000])
def test_holding_out_nothing_or_everything_is_refused(train, amount):
    with pytest.raises(UserError, match=rf"--validation-split {amount:g} leaves -?\d+ of 1438 images to train on"):
        hold_out(train, amount)


def test_fewer_images_are_stratified(train):
    few = fewer(train, 100)
    assert (
        len(few) == 100 and set(torch.bincount(few.labels).tolist()) <= {9, 10, 11} and few.name == "digits/train-100"
    )
    assert len(pixels(few)) == 100 and pixels(few) < pixels(train)
    with pytest.raises(UserError, match="--train-images 1439: there are 1438 images to train on"):
        fewer(train, 1439)


# -------------------------------------------------------------------------------------------------- classes
@pytest.mark.parametrize(
    "recorded, order",
    [(["c", "a", "b"], [1, 2, 0]), (["a", "b", "c"], None), (["a", "b", "x"], None), (["a", "b"], None), (None, None)],
)
def test_class_order_is_where_each_class_stands_in_a_file_of_the_same_classes(recorded, order):
    assert class_order(recorded, ("a", "b", "c")) == order


def test_digests_are_of_pixels_and_labels(train):
    swapped = train.subset(torch.tensor([1, 0, *range(2, len(train))]), "swapped")
    assert train.digest == data_loader.read("digits", image_size=48).train.digest != swapped.digest
