"""Batches: functions of seed and epoch, each image once, resumed midway, and random augmentation in any process."""

import numpy as np
import pytest
import torch
from PIL import Image

import data_loader
from takd.distill import evaluation
from takd.images import augmentation
from takd.images.batches import batches
from takd.images.split import epoch_plan, step_rows
from takd.run.distributed import part_of


@pytest.fixture(scope="module")
def digits():
    return data_loader.read("digits")


def epoch(split, number=0, batch_size=100, augment="crop-flip", seed=1, first_step=0, workers=0, rank=0, size=1):
    """The batches of an epoch, of one process of several."""
    rows = [part_of(step, rank, size).rows for step in step_rows(len(split), batch_size, first_step)]
    return list(batches(split, augment, epoch_plan(split, augment, seed, number), rows, workers))


def columns(batch):
    return batch.index, batch.views, batch.images, batch.labels


def whole(epoch_batches):
    """(index, views, images, labels) of all batches."""
    return [torch.cat(column) for column in zip(*map(columns, epoch_batches), strict=True)]


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# ------------------------------------------------------------------------------------------------ an epoch
def test_every_image_exactly_once_and_the_last_batch_kept(digits):
    for split in (digits.train, digits.test):
        found = epoch(split)
        assert [len(batch) for batch in found] == [100] * (len(split) // 100) + [len(split) % 100]
        assert len(step_rows(len(split), 100)) == len(found)
        index, views, images, labels = whole(found)
        assert index.sort().values.tolist() == list(range(len(split)))
        assert torch.equal(labels, split.labels[index])
        assert torch.equal(images, augmentation.apply("crop-flip", split.images[index], views))


def test_evaluation_has_every_image_in_order(digits):
    answers = evaluation.predict(torch.nn.Flatten(), digits.test, batch_size=100)
    assert torch.equal(answers, digits.test.transform(digits.test.images).flatten(1))


def test_an_epoch_is_a_function_of_seed_and_number(digits):
    first = whole(epoch(digits.train))
    torch.rand(3)  # the global generator has no part in it
    assert equal(first, whole(epoch(digits.train)))
    for changes in ({"seed": 2}, {"number": 1}, {"seed": 0, "number": 1}):
        index, views, _, _ = whole(epoch(digits.train, **changes))
        assert not torch.equal(index, first[0]) and not torch.equal(views, first[1])


def test_a_resumed_epoch_is_the_rest_of_the_whole_one(digits):
    complete = epoch(digits.train)
    for step in (0, 1, 7, len(complete)):
        rest = epoch(digits.train, first_step=step)
        assert len(rest) == len(complete) - step
        assert all(equal(columns(a), columns(b)) for a, b in zip(rest, complete[step:], strict=True))


def test_order_and_views_are_independent(digits):
    """Changing the augmentation must not change the order, and views must not correlate with rows."""
    index, views, _, _ = whole(epoch(digits.train))
    assert torch.equal(index, whole(epoch(digits.train, augment="none"))[0])
    assert torch.equal(index, whole(epoch(digits.train, batch_size=7))[0])
    assert abs(float(torch.corrcoef(torch.stack([index, views]).double())[0, 1])) < 0.1


def test_views_are_drawn_evenly(digits):
    views = torch.cat([epoch_plan(digits.train, "crop-flip", 1, number).views for number in range(20)])
    counts = torch.bincount(views, minlength=162).double()
    expected = len(views) / 162
    assert len(counts) == 162 and float(((counts - expected) ** 2 / expected).sum()) < 161 + 5 * (2 * 161) ** 0.5


# ------------------------------------------------------------------------------------- random augmentation
@pytest.fixture
def photograph_split(photographs):
    return data_loader.read("folder", photographs, image_size=24).train


@pytest.mark.parametrize("source", ["files", "pixels"])
def test_random_views_are_the_same_from_any_number_of_workers(source, photograph_split, digits):
    split = photograph_split if source == "files" else digits.train.subset(slice(0, 25), "digits/part")
    options = {"augment": "rotate-crop-flip", "batch_size": 10}
    state = torch.get_rng_state()
    here = epoch(split, **options)
    assert torch.equal(torch.get_rng_state(), state)
    assert [len(batch) for batch in here] == [10] * (len(split) // 10) + [len(split) % 10]
    assert {batch.images.shape[1:] for batch in here} == {(3, split.image_size, split.image_size)}
    for changes, expected in (({"workers": 2}, here), ({"first_step": 2}, here[2:])):
        found = epoch(split, **options, **changes)
        assert all(equal(columns(a), columns(b)) for a, b in zip(found, expected, strict=True))
    halves = [epoch(split, **options, rank=rank, size=2) for rank in (0, 1)]
    for batch, *parts in zip(here, *halves, strict=True):
        assert torch.equal(batch.images, torch.cat([part.images for part in parts]))
    assert not torch.equal(here[0].images, epoch(split, 1, **options)[0].images)


def test_random_views_are_of_the_original_files(photograph_split):
    """Not of the small decoded copies: a crop of a large image keeps its detail."""
    batch = epoch(photograph_split, augment="rotate-crop-flip", batch_size=10)[0]
    with Image.open(photograph_split.files[int(batch.index[0])]) as image:
        pixels = torch.from_numpy(np.array(image).transpose(2, 0, 1))
    assert torch.equal(batch.images[0], augmentation.random_view(pixels, int(batch.views[0]), 24))
