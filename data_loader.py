"""Names -> splits -> batches: whole data sets as uint8 tensors on the device, cut into batches by seeded generators.

    train, test = load("cifar100", "data")
    for batch in train_batches(train, 128, "crop-flip", seed=1, epoch=0): ...     # Batch(index, views, images, labels)

Order and views come from two generators seeded by (seed, epoch), so any epoch can be rebuilt alone, from any step on, on any
device. Legend: N images of a split, B of a batch, H W their size.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import os
import socket
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import augmentation
import checkpoint
import kernels
import names
from files import locked, replacing
from names import UserError


@dataclasses.dataclass(frozen=True)
class Split:
    """Labelled images, whole and on one device."""

    name: str  # such as "cifar100/train"
    images: torch.Tensor  # uint8 (N, 3, H, W)
    labels: torch.Tensor  # int64 (N,)
    classes: tuple  # class names, by label
    mean: tuple  # per channel, of pixels in 0..1
    std: tuple

    def __len__(self):
        return len(self.labels)

    def to(self, device):
        return dataclasses.replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def subset(self, index, name):
        return dataclasses.replace(self, name=name, images=self.images[index], labels=self.labels[index])

    def digest(self):
        """Of the pixels and labels: what a table of logits is bound to."""
        return checkpoint.digest(self.images, self.labels)


class Batch(NamedTuple):
    index: torch.Tensor  # int64 (B,), rows of the split
    views: torch.Tensor  # int64 (B,), see augmentation.py
    images: torch.Tensor  # uint8 (B, 3, H, W), the views themselves
    labels: torch.Tensor  # int64 (B,)
    part = None  # a Part in a PartialBatch


class Part(NamedTuple):
    """What one of several processes takes of a step's batch: images start to stop of `images`.

    Parts are contiguous and as equal as they can be. A batch with fewer images than there are processes is whole in each.
    """

    start: int
    stop: int
    images: int  # of the whole step
    share: float  # its loss times this, summed over the processes, is the step's
    weight: float  # its loss times this, averaged over the processes, is the step's

    @property
    def whole(self):
        return self.stop - self.start == self.images


class PartialBatch(Batch):
    """One process's part of a step's batch; its Part is set on it."""


def part_of(images, rank, size):
    """The Part of process `rank` of `size` in a step of `images`."""
    if images < size:
        return Part(0, images, images, 1 / size, 1.0)
    start, stop = images * rank // size, images * (rank + 1) // size
    return Part(start, stop, images, (stop - start) / images, (stop - start) * size / images)


# -------------------------------------------------------------------------------------------------- batches
def generator(seed, epoch, purpose):
    """A CPU generator for one purpose of one epoch. Hashed, so that neighbouring seeds and epochs share nothing."""
    number = hashlib.blake2b(f"{seed} {epoch} {purpose}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(number, "little") >> 1)


def steps_per_epoch(split, batch_size):
    """Batches of an epoch, the last partial one included."""
    return -(-len(split) // batch_size)


class EpochPlan(NamedTuple):
    """Which image under which view comes when in one epoch."""

    order: torch.Tensor  # int64 (N,), rows of the split
    views: torch.Tensor  # int64 (N,)


def epoch_plan(split, augment, seed, epoch):
    """Every image once, in an order and under views drawn on the CPU: the same on every device, from (seed, epoch) alone."""
    order = torch.randperm(len(split), generator=generator(seed, epoch, "order"))
    views = torch.randint(augmentation.VIEWS[augment], (len(split),), generator=generator(seed, epoch, "views"))
    return EpochPlan(order.to(split.images.device), views.to(split.images.device))


def train_batches(split, batch_size, augment, seed, epoch, first_step=0, rank=0, size=1):
    """The batches of one epoch from `first_step` on, the last partial one included; of each, the part of process `rank`."""
    plan = epoch_plan(split, augment, seed, epoch)
    for rows, part in train_parts(len(split), batch_size, first_step, rank, size):
        index, views = plan.order[rows], plan.views[rows]
        batch = (Batch if part is None else PartialBatch)(
            index, views, augmentation.apply(augment, split.images[index], views), split.labels[index]
        )
        if part:
            batch.part = part
        yield batch


def train_parts(images, batch_size, first_step=0, rank=0, size=1):
    """(slice of an epoch's plan, Part) for each step; the whole batch, and no Part, where there is one process."""
    for start in range(first_step * batch_size, images, batch_size):
        stop = min(start + batch_size, images)
        if size == 1:
            yield slice(start, stop), None
        else:
            part = part_of(stop - start, rank, size)
            yield slice(start + part.start, start + part.stop), part


def evaluation_batches(split, batch_size=500):
    """(images, labels) in their order, every image once, the last partial batch included."""
    for start in range(0, len(split), batch_size):
        yield split.images[start : start + batch_size], split.labels[start : start + batch_size]


def normalise(images, mean, std, dtype=torch.float32):
    """uint8 (B, 3, H, W) -> channels last: (pixel / 255 - mean) / std, as torchvision's ToTensor and Normalize, rounded to `dtype`."""
    scale_shift, table = _constants(tuple(mean), tuple(std), dtype, images.device)
    looked_up = kernels.look_up(images, table)
    return _scaled(images, scale_shift, dtype) if looked_up is None else looked_up


def _scaled(images, scale_shift, dtype):
    values = images.to(torch.float32, memory_format=torch.channels_last)
    return values.mul_(scale_shift[0]).add_(scale_shift[1]).to(dtype)


@functools.lru_cache
@torch.inference_mode(False)  # they outlive an evaluation that asks for them first
def _constants(mean, std, dtype, device):
    """Factor and summand per channel, (2, 1, 3, 1, 1), and what each of the 256 values of a pixel becomes, (3, 256): made once."""
    scale = [1 / (255 * deviation) for deviation in std]
    shift = [-average / deviation for average, deviation in zip(mean, std, strict=True)]
    scale_shift = torch.tensor([scale, shift]).reshape(2, 1, 3, 1, 1)
    values = torch.arange(256, dtype=torch.uint8).expand(1, 3, 1, 256)
    return scale_shift.to(device), _scaled(values, scale_shift, dtype).reshape(3, 256).contiguous()


# ------------------------------------------------------------------------------------------------ data sets
def load(name, dataset_dir="data", download=True, say=lambda line: None):
    """(train, test) splits of a data set, on the CPU.

    Looked for in this order: torchvision's layout in `dataset_dir`, class folders in `dataset_dir/<name>`, and the network if
    `download`. `say` receives lines for the user. Whatever is missing or damaged is a UserError that says what to do.
    """
    name = names.dataset(name)
    dataset_dir = Path(dataset_dir)
    if name == "digits":
        arrays, classes = _digits()
    elif (dataset_dir / TORCHVISION_FOLDERS[name]).is_dir():
        _wait_for_unpacking(name, dataset_dir, say)
        arrays, classes = _torchvision(name, dataset_dir, download=False)
    elif (dataset_dir / name).is_dir():
        arrays, classes = _class_folders(name, dataset_dir / name, say)
    else:
        arrays, classes = _downloaded(name, dataset_dir, download, say)
    spec = names.DATASETS[name]
    return tuple(
        Split(f"{name}/{part}", torch.from_numpy(images), torch.from_numpy(labels), classes, spec.mean, spec.std)
        for part, (images, labels) in arrays.items()
    )


def class_order(names_in_file, classes):
    """Where each of a data set's classes stands in a file that names the same ones otherwise ordered; None where nothing is to be done.

    A file that names no classes, or other ones, is matched by position.
    """
    if not names_in_file or list(names_in_file) == list(classes) or sorted(names_in_file) != sorted(classes):
        return None
    return [list(names_in_file).index(name) for name in classes]


def held_out(train, amount):
    """(train, validation): `amount` below 1 is a share, else a number of images, taken evenly from the classes.

    The same images whatever the seed, so that a teacher and its students leave out the same ones.
    """
    count = round(amount * len(train)) if amount < 1 else int(amount)
    if not 0 < count < len(train):
        raise UserError(f"--validation-split {amount:g} leaves {len(train) - count} of {len(train)} images to train on")
    shuffled = torch.randperm(len(train), generator=generator(0, 0, "validation"))
    # Rank of each image within its class, as a share: the smallest shares of every class are held out.
    by_class = shuffled[train.labels[shuffled].argsort(stable=True)]
    sizes = torch.bincount(train.labels, minlength=len(train.classes))
    starts = sizes.cumsum(0) - sizes
    ordered = train.labels[by_class]
    share = (torch.arange(len(train)) - starts[ordered]) / sizes[ordered]
    chosen = by_class[share.argsort(stable=True)]
    prefix = train.name.split("/")[0]
    return (
        train.subset(chosen[count:].sort().values, f"{prefix}/train-{len(train) - count}"),
        train.subset(chosen[:count].sort().values, f"{prefix}/validation-{count}"),
    )


def _digits():
    """scikit-learn's 1,797 handwritten digits, 8x8 enlarged to 32x32x3; every fifth image is a test image."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = (digits.images * (255 / 16)).round().astype(np.uint8)
    images = np.repeat(np.kron(pixels, np.ones((1, 4, 4), np.uint8))[:, None], 3, axis=1)
    labels = digits.target.astype(np.int64)
    test = np.arange(len(labels)) % 5 == 4
    parts = {"train": ~test, "test": test}
    return {part: (images[rows], labels[rows]) for part, rows in parts.items()}, tuple("0123456789")


# ------------------------------------------------------------------------------------ torchvision's layout
TORCHVISION_FOLDERS = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}
DOWNLOAD_TIMEOUT_SECONDS = 20  # of silence: a compute node without a network says so soon instead of hanging


def _torchvision_class(name):
    import torchvision.datasets

    return {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]


def _torchvision(name, dataset_dir, download):
    """Both parts through torchvision, which verifies every file's checksum."""
    dataset_class = _torchvision_class(name)
    arrays = {}
    try:
        for part in ("train", "test"):
            data = dataset_class(dataset_dir, train=part == "train", download=download)
            images = np.ascontiguousarray(data.data.transpose(0, 3, 1, 2))
            arrays[part] = images, np.asarray(data.targets, dtype=np.int64)
    except RuntimeError:
        folder = dataset_dir / TORCHVISION_FOLDERS[name]
        raise UserError(
            f"{folder} is incomplete or damaged (checksums differ); delete it, then {_manual_steps(name, dataset_dir)}"
        ) from None
    return arrays, tuple(data.classes)


def _manual_steps(name, dataset_dir):
    dataset_class = _torchvision_class(name)
    return f"fetch {dataset_class.url} (md5 {dataset_class.tgz_md5}) and unpack it: tar -xzf {dataset_class.filename} -C {dataset_dir}"


def _wait_for_unpacking(name, dataset_dir, say):
    """A folder that another process has just made may not be full yet."""
    lock = dataset_dir / f".{name}.lock"
    if os.access(lock, os.W_OK):
        with locked(lock, f"the download of {name}", wait=True, say=say):
            pass


def _downloaded(name, dataset_dir, download, say):
    """Fetched by one process while others wait for it."""
    if not download:
        raise UserError(f"no {name} in {dataset_dir} and downloading is off; {_manual_steps(name, dataset_dir)}")
    lock, made, before = dataset_dir / f".{name}.lock", not dataset_dir.exists(), socket.getdefaulttimeout()
    try:
        with locked(lock, f"the download of {name}", wait=True, say=say):
            if not (dataset_dir / TORCHVISION_FOLDERS[name]).is_dir():
                say(f"{name} is not in {dataset_dir}: downloading it")
            socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_SECONDS)
            return _torchvision(name, dataset_dir, download=True)
    except OSError as error:
        lock.unlink(missing_ok=True)
        if made:
            with contextlib.suppress(OSError):  # not empty: keep what is there
                dataset_dir.rmdir()
        reason = str(getattr(error, "reason", error))
        raise UserError(f"no {name} in {dataset_dir} and no download ({reason}); {_manual_steps(name, dataset_dir)}") from None
    finally:
        socket.setdefaulttimeout(before)


# ------------------------------------------------------------------------------------------- class folders
CACHE_NAME = "takd-decoded.npz"


def _class_folders(name, folder, say):
    """`<folder>/{train,test}/<class>/<image>`, sorted by name, decoded once and then read from one array file."""
    spec = names.DATASETS[name]
    listings = {part: _listing(folder / part, spec.classes, name) for part in ("train", "test")}
    classes = tuple(listings["train"])
    if classes != tuple(listings["test"]):
        differ = sorted(set(classes) ^ set(listings["test"]))
        raise UserError(f"{folder}: train and test hold different classes ({', '.join(differ[:5])})")
    expected = {"train": spec.train_images, "test": spec.test_images}
    for part, listing in listings.items():
        count = sum(map(len, listing.values()))
        if count != expected[part]:
            say(f"warning: {folder / part} holds {count} images, the original {name} {expected[part]}")
    signature = _signature(listings)
    cache = folder / CACHE_NAME
    arrays = _read_cache(cache, signature)
    if arrays is None:
        say(f"decoding {folder} (once; kept in {cache})")
        arrays = {part: _decode(listing) for part, listing in listings.items()}
        _write_cache(cache, signature, arrays, say)
    return arrays, classes


def _listing(part, expected_classes, name):
    """{class: [(path, size, mtime)]}, classes and images sorted by name."""
    from PIL import Image

    if not part.is_dir():
        raise UserError(f"{part} does not exist; class folders are <dir>/{name}/train/<class>/<image> and .../test/...")
    listing = {}
    endings = Image.registered_extensions()
    for entry in sorted(os.scandir(part), key=lambda entry: entry.name):
        if entry.is_dir() and not entry.name.startswith("."):
            files = [file for file in os.scandir(entry.path) if os.path.splitext(file.name)[1].lower() in endings]
            files.sort(key=lambda file: file.name)
            listing[entry.name] = [(file.path, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    if len(listing) != expected_classes:
        raise UserError(f"{part} holds {len(listing)} class folders, {name} has {expected_classes}")
    if empty := [label for label, files in listing.items() if not files]:
        raise UserError(f"{part} has classes without an image: {', '.join(empty[:5])}")
    return listing


def _signature(listings):
    """Of names, sizes and times of all files: a changed folder is decoded anew."""
    hasher = hashlib.blake2b(digest_size=16)
    for part, listing in listings.items():
        for label, files in listing.items():
            for path, size, modified in files:
                hasher.update(f"{part}/{label}/{os.path.basename(path)} {size} {modified}\n".encode())
    return hasher.hexdigest()


def _decode(listing):
    """uint8 (N, 3, 32, 32) and int64 (N,): in threads, as Pillow decodes outside Python's lock."""
    paths = [path for files in listing.values() for path, _, _ in files]
    labels = np.repeat(np.arange(len(listing)), [len(files) for files in listing.values()]).astype(np.int64)
    images = np.empty((len(paths), 3, 32, 32), np.uint8)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        faults = [fault for fault in pool.map(_decode_one, paths, images, chunksize=256) if fault]
    if faults:
        raise UserError(f"{len(faults)} of {len(paths)} images cannot be used, first {faults[0]}; mend or remove them")
    return images, labels


def _decode_one(path, target):
    """Fill `target` (3, 32, 32) from a file; returns what is wrong with it, if anything is."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            if image.size != (32, 32):
                return f"{path} ({image.width}x{image.height} pixels, expected 32x32)"
            target[:] = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        return f"{path} ({str(error).splitlines()[0][:80]})"
    return None


def _read_cache(cache, signature):
    """The decoded arrays, or None where the file is absent, damaged or of another folder's state."""
    with contextlib.suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        with np.load(cache, allow_pickle=False) as file:
            if str(file["signature"]) == signature:
                return {part: (file[f"{part}_images"], file[f"{part}_labels"]) for part in ("train", "test")}
    return None


def _write_cache(cache, signature, arrays, say):
    named = {f"{part}_{kind}": array for part, pair in arrays.items() for kind, array in zip(("images", "labels"), pair, strict=True)}
    try:
        with replacing(cache) as temporary, open(temporary, "wb") as file:
            np.savez(file, signature=signature, **named)
    except OSError as error:  # a read-only share: the next start decodes again
        say(f"warning: {cache} cannot be written ({error.strerror}): every start will decode the images")
