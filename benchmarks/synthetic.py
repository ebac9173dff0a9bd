#!/usr/bin/env python3
"""Learnable images of CIFAR-100's shape, as class folders, for a machine without the data set.

python3 benchmarks/synthetic.py data          writes data/cifar100/{train,test}/, 60,000 images, in about a minute
"""

import argparse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image


def write(folder: Path, per_class: dict[str, int], classes: int = 100) -> None:
    """Class folders in `folder`: each class a smooth pattern, each image that of its class, shifted, under noise."""
    random = np.random.default_rng(0)
    coarse = random.integers(0, 256, (classes, 4, 4, 3), dtype=np.uint8)
    patterns = np.stack(
        [np.asarray(Image.fromarray(each).resize((32, 32), Image.Resampling.BICUBIC)) for each in coarse]
    )

    def fill(place: Path, pattern: np.ndarray, shifts: np.ndarray, noise: np.random.Generator) -> None:
        place.mkdir(parents=True)
        for i, shift in enumerate(shifts):
            image = np.roll(pattern, tuple(shift), axis=(0, 1)) + noise.normal(0, 60, pattern.shape)
            Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(place / f"{i:05}.png", compress_level=1)

    with ThreadPoolExecutor() as pool:
        jobs = []
        for part, count in per_class.items():
            for label, pattern in enumerate(patterns):
                shifts, noise = random.integers(-4, 5, (count, 2)), np.random.default_rng((label, count))
                jobs.append(pool.submit(fill, folder / part / f"class{label:03}", pattern, shifts, noise))
        for job in jobs:
            job.result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the --dataset-dir to make")
    parser.add_argument("--per-class", type=int, default=500, help="training images of a class (test: a fifth)")
    args = parser.parse_args()
    write(args.folder / "cifar100", {"train": args.per_class, "test": args.per_class // 5})


if __name__ == "__main__":
    main()
