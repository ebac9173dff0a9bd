"""CIFAR in torchvision's layout, downloaded if absent, with checksums; and scikit-learn's digits, without files."""

import contextlib
import os
from pathlib import Path

import numpy as np

from takd.config.names import CIFAR_FOLDERS, DATASETS
from takd.errors import UserError
from takd.files import Say, locked
from takd.process import downloading

Arrays = tuple[dict[str, tuple[np.ndarray, np.ndarray]], tuple[str, ...]]  # {part: (images, labels)}, class names


def digits() -> Arrays:
    """1,797 handwritten digits, 8x8 enlarged to 32x32x3; every fifth image is a test image."""
    from sklearn.datasets import load_digits

    data = load_digits()
    pixels = (data.images * (255 / 16)).round().astype(np.uint8)
    images = np.repeat(np.kron(pixels, np.ones((1, 4, 4), np.uint8))[:, None], 3, axis=1)
    labels = data.target.astype(np.int64)
    test = np.arange(len(labels)) % 5 == 4
    parts = {"train": ~test, "test": test}
    return {part: (images[rows], labels[rows]) for part, rows in parts.items()}, tuple("0123456789")


def outline(name: str) -> Arrays:
    """The shape of a data set that need not be there: images of one grey pixel, classes in turn."""
    spec = DATASETS[name]
    assert spec.classes and spec.train_images and spec.test_images
    counts = {"train": spec.train_images, "test": spec.test_images}
    arrays = {part: (np.full((n, 3, 1, 1), 128, np.uint8), np.arange(n) % spec.classes) for part, n in counts.items()}
    return arrays, tuple(map(str, range(spec.classes)))


def read(name: str, dataset_dir: Path, say: Say) -> Arrays:
    """A data set that is present, once no other process is unpacking it any more."""
    lock = dataset_dir / f".{name}.lock"
    if os.access(lock, os.W_OK):
        with locked(lock, f"the download of {name}", wait=True, say=say):
            pass
    return _torchvision(name, dataset_dir, download=False)


def downloaded(name: str, dataset_dir: Path, allowed: bool, say: Say) -> Arrays:
    """A data set that is absent, downloaded by one process while others wait for it."""
    if not allowed:
        raise UserError(f"no {name} in {dataset_dir} and downloading is off; {_manual_steps(name, dataset_dir)}")
    lock, made = dataset_dir / f".{name}.lock", not dataset_dir.exists()
    try:
        with locked(lock, f"the download of {name}", wait=True, say=say):
            if not (dataset_dir / CIFAR_FOLDERS[name]).is_dir():
                say(f"{name} is not in {dataset_dir}: downloading it")
            with downloading():
                return _torchvision(name, dataset_dir, download=True)
    except OSError as error:
        lock.unlink(missing_ok=True)
        if made:
            with contextlib.suppress(OSError):  # not empty: keep what is there
                dataset_dir.rmdir()
        reason, steps = str(getattr(error, "reason", error)), _manual_steps(name, dataset_dir)
        raise UserError(f"no {name} in {dataset_dir} and no download ({reason}); {steps}") from None


def _torchvision(name, dataset_dir, download):
    """Both parts through torchvision, which verifies every file's checksum."""
    arrays = {}
    try:
        for part in ("train", "test"):
            data = _dataset_class(name)(dataset_dir, train=part == "train", download=download)
            images = np.ascontiguousarray(data.data.transpose(0, 3, 1, 2))
            arrays[part] = images, np.asarray(data.targets, dtype=np.int64)
    except RuntimeError:
        folder, steps = dataset_dir / CIFAR_FOLDERS[name], _manual_steps(name, dataset_dir)
        raise UserError(f"{folder} is incomplete or damaged (checksums differ); delete it, then {steps}") from None
    return arrays, tuple(data.classes)


def _dataset_class(name):
    import torchvision.datasets

    return {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]


def _manual_steps(name, dataset_dir):
    data = _dataset_class(name)
    return f"fetch {data.url} (md5 {data.tgz_md5}) and unpack it: tar -xzf {data.filename} -C {dataset_dir}"
