#!/usr/bin/env python3
"""Data sets by name -> splits of labelled images, held in memory.

    splits = read("cifar100", "data")                      splits.train, splits.test
    splits = load(config, print)                           for a run: with its validation split, on its device

  python3 data_loader.py --download cifar10 cifar100 --dataset-dir data      in advance, as on a login node

A data set is a row of DATASETS in takd/config/names.py and a branch of `read`; folders of images need neither.
"""

from takd import process

if __name__ == "__main__":
    process.start()

import dataclasses
from pathlib import Path
from typing import NamedTuple

from takd.config import flags, names

if __name__ == "__main__":  # usage errors are reported before torch is imported, which takes seconds
    ARGUMENTS = flags.download_parser(__doc__).parse_args()
    flags.check_packages("data_loader.py", "torch", "torchvision")

import torch

from takd.config.run_config import RunConfig
from takd.errors import UserError
from takd.files import Say
from takd.images import cifar_files, folder
from takd.images.split import Split, Transform, fewer, hold_out


class Splits(NamedTuple):
    """The parts of a data set. Without a validation part the test images select the best epoch, as in the paper."""

    train: Split
    test: Split
    validation: Split | None = None

    @property
    def selection(self) -> str:
        """The part that selects the best epoch."""
        return "validation" if self.validation else "test"


PURPOSES = {"test": "to test", "val": "to validate"}  # by Split.part


def load(config: RunConfig, say: Say) -> Splits:
    """A run's splits, on its device."""
    splits = outline(config, pixels=True, say=say)
    splits = Splits(*(part and part.to(config.device) for part in splits))
    held_out = f", {len(splits.validation)} held out to select the epoch" if splits.validation else ""
    size = splits.train.image_size
    shown = f", {size}x{size}" if size != 32 else ""
    counts = f"{len(splits.train)} images to train, {len(splits.test)} {PURPOSES[splits.test.part]}"
    say(f"data      {config.dataset}: {counts}{held_out}{shown}")
    return splits


def outline(config: RunConfig, pixels: bool = False, say: Say = lambda line: None) -> Splits:
    """A run's splits without their pixels, on the CPU: to check everything else before these are decoded or fetched."""
    place, download = config.dataset_dir or "data", config.download is not False
    splits = read(config.dataset, place, download, say, config.image_size or 0, pixels)
    if config.validation_split:
        if splits.validation:
            fix = "leave out --validation-split"
            raise UserError(f"{config.dataset_dir} has a val folder, which selects the epoch; {fix}")
        train, validation = hold_out(splits.train, config.validation_split)
        splits = splits._replace(train=train, validation=validation)
    if config.train_images:
        splits = splits._replace(train=fewer(splits.train, config.train_images))
    if config.test_images:
        splits = splits._replace(test=fewer(splits.test, config.test_images))
    own = {key: value for key, value in names.declared_input(config.student).items() if key != "image_size"}
    transform = splits.train.transform._replace(**{key: tuple(value) for key, value in own.items()})
    return Splits(*(part and dataclasses.replace(part, transform=transform) for part in splits))


def read(
    name: str,
    dataset_dir: str = "data",
    download: bool = True,
    say: Say = lambda line: None,
    image_size: int = 0,
    pixels: bool = True,
) -> Splits:
    """The splits of a data set, on the CPU; networks get images of `image_size` (0: the data set's usual one).

    Looked for in this order: torchvision's layout in `dataset_dir`, class folders in `dataset_dir/<name>`, and a
    download if `download`. For the data set `folder`, `dataset_dir` itself holds the class folders, and a `val` beside
    `test` becomes the validation part. Missing or damaged files are UserErrors with what to do. Without `pixels` the
    images are 1x1 and grey, and nothing is written.
    """
    name, place, files = names.dataset(name), Path(dataset_dir), {}
    spec = names.DATASETS[name]
    size = image_size or spec.image_size
    if name == "digits":
        arrays, classes = cifar_files.digits()
    elif name == "folder":
        arrays, classes, files = folder.read(name, place, size, say, pixels)
    elif not pixels and ((place / names.CIFAR_FOLDERS[name]).is_dir() or not (place / name).is_dir()):
        arrays, classes = cifar_files.outline(name)
    elif (place / names.CIFAR_FOLDERS[name]).is_dir():
        arrays, classes = cifar_files.read(name, place, say)
    elif (place / name).is_dir():
        arrays, classes, _ = folder.read(name, place / name, spec.image_size, say, pixels)
    else:
        arrays, classes = cifar_files.downloaded(name, place, download, say)
    mean, std = (spec.mean, spec.std) if size == spec.image_size else (names.IMAGENET_MEAN, names.IMAGENET_STD)
    splits = {}
    for part, pair in arrays.items():
        images, labels = map(torch.from_numpy, pair)
        called = "val" if name == "folder" and not (place / part).is_dir() else part
        splits[part] = Split(
            f"{name}/{called}", images, labels, classes, Transform(mean, std, size), files.get(part, ())
        )
    return Splits(**splits)


def random_split(name: str, image_size: int | None = None, count: int | None = None) -> Split:
    """Images of random pixels in a data set's shape, two of each class or `count`, if no real ones are needed."""
    spec = names.DATASETS[name]
    classes = spec.classes or 10
    count = count or 2 * classes
    images = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8)
    transform = Transform(spec.mean, spec.std, image_size or spec.image_size)
    return Split("random", images, torch.arange(count) % classes, tuple(map(str, range(classes))), transform)


def main() -> None:
    """Download what is missing, and print where the data sets are."""
    place = Path(ARGUMENTS.dataset_dir)
    for name in ARGUMENTS.download:
        splits = read(name, ARGUMENTS.dataset_dir, say=print)
        found = next(path for path in (place / names.CIFAR_FOLDERS[name], place / name) if path.is_dir())
        print(f"{name} is in {found}: {len(splits.train)} images to train, {len(splits.test)} to test, checked")


if __name__ == "__main__":
    with flags.errors_in_one_line("data_loader.py"):
        main()
