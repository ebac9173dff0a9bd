"""Augmentation: every numbered view, and random ones, are torchvision's."""

import pytest
import torch
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms import functional as F

from takd.images import augmentation


@pytest.fixture(scope="module")
def images():
    return torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def all_in(view, images):
    return torch.full((len(images),), view)


@pytest.mark.parametrize("augment, padding", [("crop-flip", "constant"), ("crop-flip-reflect", "reflect")])
def test_all_views_are_torchvisions_pad_crop_and_hflip(augment, padding, images):
    for view in range(162):
        row, column, mirrored = view // 18, view // 2 % 9, view % 2
        ours = augmentation.apply(augment, images, all_in(view, images))
        for image, mine in zip(images, ours, strict=True):
            theirs = F.crop(F.pad(image.float(), [4], padding_mode=padding).byte(), row, column, 32, 32)
            assert torch.equal(mine, F.hflip(theirs) if mirrored else theirs), view


def test_flip_is_the_image_and_its_mirror(images):
    for view, expected in ((0, images), (1, F.hflip(images))):
        assert torch.equal(augmentation.apply("flip", images, all_in(view, images)), expected)


def test_every_image_gets_its_own_view(images):
    views = torch.tensor([0, 161, 80, 7, 33])
    together = augmentation.apply("crop-flip", images, views)
    for i, view in enumerate(views):
        assert torch.equal(together[i], augmentation.apply("crop-flip", images[i : i + 1], view[None])[0])


def test_one_view_is_the_image_itself(images):
    unchanged = {"none": 0, "flip": 0, "crop-flip": (4 * 9 + 4) * 2, "crop-flip-reflect": (4 * 9 + 4) * 2}
    assert unchanged.keys() == {name for name, views in augmentation.VIEWS.items() if views}
    for augment, view in unchanged.items():
        assert torch.equal(augmentation.apply(augment, images, all_in(view, images)), images)


def test_a_random_view_is_torchvisions_and_leaves_the_global_generator_alone():
    image = torch.randint(0, 256, (3, 43, 61), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    state = torch.get_rng_state()
    views = [augmentation.random_view(image, seed, 24) for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert views[0].shape == (3, 24, 24) and torch.equal(views[0], views[1]) and not torch.equal(views[0], views[2])
    rotated = v2.RandomRotation(30, InterpolationMode.BILINEAR)
    theirs = v2.Compose([rotated, v2.RandomResizedCrop(24), v2.RandomHorizontalFlip()])
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(2)
        assert torch.equal(theirs(image), views[2])
