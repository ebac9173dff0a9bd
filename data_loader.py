#!/usr/bin/env python3
"""Names -> splits -> batches: whole data sets as uint8 tensors, on the device where they fit, cut into batches by seeded generators.

    train, test = load("cifar100", "data")
    for batch in train_batches(train, 128, "crop-flip", seed=1, epoch=0): ...     # Batch(index, views, images, labels)

  python3 data_loader.py --download cifar10 cifar100 --dataset-dir data      fetch them now, as on a cluster's login node

Order and views come from two generators seeded by (seed, epoch), so any epoch can be rebuilt alone, from any step on, on any
device. Folders of images are decoded once, at the size that networks get, into one file, which is read into memory, or mapped where
it takes more than half of what is free; views without end are made of the original files, by worker processes.
Legend: N images of a split, B of a batch, H W their size.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import importlib
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import NamedTuple

from takd.config import names

if __name__ == "__main__":  # before torch is imported: a mistake in the arguments is answered at once
    from takd.config import flags as arguments

    ARGUMENTS = arguments.download(__doc__)
    with arguments.requirements("data_loader.py"):
        importlib.import_module("torchvision.datasets")

import numpy as np
import torch
from torch.nn import functional as F

from takd.config.names import UserError
from takd.files import locked, replacing
from takd.images import augmentation
from takd.run import checkpoint


@dataclasses.dataclass(frozen=True)
class Split:
    """Labelled images, whole and on one device; on the host where a GPU has no room for them."""

    name: str  # such as "cifar100/train"
    images: torch.Tensor  # uint8 (N, 3, H, W)
    labels: torch.Tensor  # int64 (N,)
    classes: tuple  # class names, by label
    mean: tuple  # per channel, of pixels in 0..1
    std: tuple
    size: int | None = None  # height and width that networks get, where not H and W
    files: tuple = ()  # the original images, where they came from files

    def __len__(self):
        return len(self.labels)

    @property
    def device(self):
        """Where batches are."""
        return self.labels.device

    @property
    def image_size(self):
        return self.size or self.images.shape[-1]

    def to(self, device):
        device = torch.device(device)
        fits = device.type != "cuda" or self.images.nbytes < 0.6 * torch.cuda.mem_get_info(device)[0]
        images = self.images.to(device) if fits else self.images
        return dataclasses.replace(self, images=images, labels=self.labels.to(device))

    def take(self, index):
        """uint8 (B, 3, H, W): the images of these rows, on the device."""
        return self.images[index.to(self.images.device)].to(self.device)

    def subset(self, index, name):
        files = tuple(self.files[row] for row in torch.arange(len(self))[index].tolist()) if self.files else ()
        return dataclasses.replace(self, name=name, images=self.images[index], labels=self.labels[index], files=files)

    def digest(self):
        """Of the pixels and labels: what a table of logits is bound to."""
        return checkpoint.digest(self.images, self.labels)


class Batch(NamedTuple):
    index: torch.Tensor  # int64 (B,), rows of the split
    views: torch.Tensor  # int64 (B,), see augmentation.py
    images: torch.Tensor  # uint8 (B, 3, H, W), the views themselves
    labels: torch.Tensor  # int64 (B,)
    part = None  # a Part in a PartialBatch


class Draw(NamedTuple):
    """A batch not gathered yet: where a step is recorded for a GPU, gathering and augmenting are part of it."""

    index: torch.Tensor  # int64 (B,)
    views: torch.Tensor  # int64 (B,)
    split: Split
    augment: str
    part = None

    def made(self, index, views):
        """The Batch of these rows and views, on the split's device."""
        return Batch(index, views, augmentation.apply(self.augment, self.split.take(index), views), self.split.labels[index])


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
    views = torch.randint(augmentation.VIEWS[augment] or 2**62, (len(split),), generator=generator(seed, epoch, "views"))
    return EpochPlan(order.to(split.device), views.to(split.device))


def train_batches(split, batch_size, augment, seed, epoch, first_step=0, rank=0, size=1, workers=0):
    """The batches of one epoch from `first_step` on, the last partial one included; of each, the part of process `rank`.

    Endless views are made by `workers` processes, the same pixels by any number of them; 0 makes them here.
    """
    plan = epoch_plan(split, augment, seed, epoch)
    parts = list(train_parts(len(split), batch_size, first_step, rank, size))
    made = _made_elsewhere(split, plan, [rows for rows, _ in parts], workers) if augmentation.VIEWS[augment] is None else None
    for rows, part in parts:
        draw = Draw(plan.order[rows], plan.views[rows], split, augment)
        if made:
            batch = Batch(draw.index, draw.views, next(made).to(split.device), split.labels[draw.index])
        else:
            batch = draw.made(draw.index, draw.views)
        if part:
            batch = PartialBatch(*batch)
            batch.part = part
        yield batch


def train_draws(split, batch_size, augment, seed, epoch, first_step=0):
    """The Draws of train_batches' batches, of one process and without endless views."""
    plan = epoch_plan(split, augment, seed, epoch)
    for rows, _ in train_parts(len(split), batch_size, first_step):
        yield Draw(plan.order[rows], plan.views[rows], split, augment)


def train_parts(images, batch_size, first_step=0, rank=0, size=1):
    """(slice of an epoch's plan, Part) for each step; the whole batch, and no Part, where there is one process."""
    for start in range(first_step * batch_size, images, batch_size):
        stop = min(start + batch_size, images)
        if size == 1:
            yield slice(start, stop), None
        else:
            part = part_of(stop - start, rank, size)
            yield slice(start + part.start, start + part.stop), part


class _Endless(torch.utils.data.Dataset):
    """The pixels of (row, view) where views have no end: of the original file, or of the split's own image."""

    def __init__(self, split):
        self.files, self.images, self.size = split.files, None if split.files else split.images.cpu(), split.image_size
        augmentation.transforms(self.size)  # imported once, not by every worker of every epoch

    def __getitem__(self, place):
        row, view = place
        image = np.array(_upright_rgb(self.files[row])[0]).transpose(2, 0, 1) if self.files else self.images[row]
        return augmentation.endless(torch.as_tensor(image), view, self.size)


def _made_elsewhere(split, plan, steps, workers):
    """Iterator of uint8 (B, 3, H, W) for each step (a slice of the plan), from torch's DataLoader."""
    places = list(zip(plan.order.tolist(), plan.views.tolist(), strict=True))
    return iter(torch.utils.data.DataLoader(
        _Endless(split), batch_sampler=[places[rows] for rows in steps], num_workers=workers, worker_init_fn=_deaf,
        multiprocessing_context="fork" if workers else None,
        generator=torch.Generator(),  # its own: PyTorch's global one goes on as if there were no loader
    ))  # fmt: skip


def _deaf(_worker):
    """What asks the run to stop is for its own process alone, which then ends its workers."""
    for number in checkpoint.StopSignals.SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def usual_workers():
    """Processes that make endless views where the user names no number."""
    return min(8, len(os.sched_getaffinity(0)))


def evaluation_batches(split, batch_size=500):
    """(images, labels) in their order, every image once, the last partial batch included."""
    for start in range(0, len(split), batch_size):
        yield split.images[start : start + batch_size].to(split.device), split.labels[start : start + batch_size]


def normalise(images, mean, std, size=None, dtype=torch.float32):
    """uint8 (B, 3, H, W) -> channels last: (pixel / 255 - mean) / std, as torchvision's ToTensor and Normalize, rounded to `dtype`.

    Images of another height and width than `size` are resized before, bilinearly and without aliasing.
    """
    scale, shift = _constants(tuple(mean), tuple(std), images.device)
    if size not in (None, images.shape[-1]):
        images = F.interpolate(images.float(), (size, size), mode="bilinear", antialias=True)
    return images.to(torch.float32, memory_format=torch.channels_last).mul_(scale).add_(shift).to(dtype)


@functools.lru_cache
@torch.inference_mode(False)  # they outlive an evaluation that asks for them first
def _constants(mean, std, device):
    """Factor and summand per channel, (2, 1, 3, 1, 1): made once, as copying them would make each step wait for a GPU."""
    scale = [1 / (255 * deviation) for deviation in std]
    shift = [-average / deviation for average, deviation in zip(mean, std, strict=True)]
    return torch.tensor([scale, shift]).reshape(2, 1, 3, 1, 1).to(device)


# ------------------------------------------------------------------------------------------------ data sets
def load(name, dataset_dir="data", download=True, say=lambda line: None, image_size=None):
    """(train, test) splits of a data set, on the CPU; networks get images of `image_size` (None: the data set's usual one).

    Looked for in this order: torchvision's layout in `dataset_dir`, class folders in `dataset_dir/<name>`, and the network if
    `download`; of the data set `folder`, `dataset_dir` itself holds the class folders. `say` receives lines for the user. Whatever
    is missing or damaged is a UserError that says what to do.
    """
    splits = load_parts(name, dataset_dir, download, say, image_size)
    return splits["train"], splits["test"]


def load_parts(name, dataset_dir, download=True, say=lambda line: None, image_size=None):
    """As `load`, {"train": split, "test": split}, and "validation" of a folder that has `val` and `test`."""
    name, dataset_dir = names.dataset(name), Path(dataset_dir)
    spec, files = names.DATASETS[name], {}
    size = image_size or spec.image_size
    if name == "digits":
        arrays, classes = _digits()
    elif name == "folder":
        arrays, classes, files = _class_folders(name, dataset_dir, size, say)
    elif (dataset_dir / TORCHVISION_FOLDERS[name]).is_dir():
        _wait_for_unpacking(name, dataset_dir, say)
        arrays, classes = _torchvision(name, dataset_dir, download=False)
    elif (dataset_dir / name).is_dir():
        arrays, classes, _ = _class_folders(name, dataset_dir / name, spec.image_size, say)
    else:
        arrays, classes = _downloaded(name, dataset_dir, download, say)
    mean, std = (spec.mean, spec.std) if size == spec.image_size else (names.IMAGENET_MEAN, names.IMAGENET_STD)
    return {
        part: Split(f"{name}/{part}", torch.from_numpy(images), torch.from_numpy(labels), classes, mean, std, size, files.get(part, ()))
        for part, (images, labels) in arrays.items()
    }


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
    chosen = _evenly(train)
    prefix = train.name.split("/")[0]
    return (
        train.subset(chosen[count:].sort().values, f"{prefix}/train-{len(train) - count}"),
        train.subset(chosen[:count].sort().values, f"{prefix}/validation-{count}"),
    )


def fewer(train, count):
    """`count` of the training images, taken evenly from the classes, the same ones whatever the seed."""
    if count > len(train):
        raise UserError(f"--train-images {count}: there are {len(train)} images to train on")
    return train.subset(_evenly(train)[:count].sort().values, f"{train.name.split('/')[0]}/train-{count}")


def _evenly(train):
    """All rows in an order whose every beginning has the classes in their proportions."""
    shuffled = torch.randperm(len(train), generator=generator(0, 0, "validation"))
    # Rank of each image within its class, as a share: the smallest shares of every class come first.
    by_class = shuffled[train.labels[shuffled].argsort(stable=True)]
    sizes = torch.bincount(train.labels, minlength=len(train.classes))
    starts = sizes.cumsum(0) - sizes
    ordered = train.labels[by_class]
    share = (torch.arange(len(train)) - starts[ordered]) / sizes[ordered]
    return by_class[share.argsort(stable=True)]


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
CACHE_NAME = "takd-decoded"


def folder_digest(folder):
    """Of the names and sizes of a folder's images: what a run on them is bound to, wherever the folder lies."""
    return _signature(folder, _listings("folder", Path(folder)), times=False)


def _class_folders(name, folder, size, say):
    """`<folder>/{train,test}/<class>/<image>`, sorted by name, decoded once and then read from one array file.

    Returns ({part: (images, labels)}, classes, {part: files}). Images of `folder` are brought to size x size, of the others they
    must have it.
    """
    spec, listings = names.DATASETS[name], _listings(name, folder)
    expected = {"train": spec.train_images, "test": spec.test_images}
    for part, listing in listings.items():
        count = sum(map(len, listing.values()))
        if spec.classes and count != expected[part]:
            say(f"warning: {folder / part} holds {count} images, the original {name} {expected[part]}")
    paths = {part: tuple(path for files in listing.values() for path, _, _ in files) for part, listing in listings.items()}
    cache = folder / f"{CACHE_NAME}-{size}-{_signature(folder, listings)}.npy"
    images = _decoded([path for part in paths.values() for path in part], cache, size, name == "folder", say)
    arrays, start = {}, 0
    for part, listing in listings.items():
        labels = np.repeat(np.arange(len(listing)), [len(files) for files in listing.values()]).astype(np.int64)
        arrays[part] = images[start : start + len(labels)], labels
        start += len(labels)
    return arrays, tuple(listings["train"]), paths


def _listings(name, folder):
    """{part: {class: [(path, size, mtime)]}}; of `folder`, val stands in for an absent test, and selects the epoch beside one."""
    places = {"train": folder / "train", "test": folder / "test"}
    if name == "folder" and (folder / "val").is_dir():
        places["validation" if places["test"].is_dir() else "test"] = folder / "val"
    listings = {part: _listing(place, names.DATASETS[name].classes, name) for part, place in places.items()}
    for part, listing in listings.items():
        if differ := sorted(set(listings["train"]) ^ set(listing)):
            raise UserError(f"{folder}: train and {places[part].name} hold different classes ({', '.join(differ[:5])})")
    return listings


def _listing(part, expected_classes, name):
    """{class: [(path, size, mtime)]}, classes and images sorted by name, in folders of any depth as torchvision's ImageFolder."""
    from PIL import Image

    if not part.is_dir():
        layout = "<dir>/{train,test} with --dataset-dir <dir> (test or val)" if name == "folder" else f"<dir>/{name}/{{train,test}}"
        raise UserError(f"{part} does not exist; class folders are {layout}, and in each <class>/<image>")
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    listing = {}
    for entry in sorted(os.scandir(part), key=lambda entry: entry.name):
        if entry.is_dir() and not entry.name.startswith("."):
            inside = [os.path.join(base, file) for base, _, files in os.walk(entry.path, followlinks=True) for file in files]
            images = [path for path in inside if os.path.splitext(path)[1].lower() in endings]
            listing[entry.name] = [_stamped(path) for path in sorted(images) if not os.path.basename(path).startswith(".")]
    if expected_classes and len(listing) != expected_classes:
        raise UserError(f"{part} holds {len(listing)} class folders, {name} has {expected_classes}")
    if len(listing) < 2:
        raise UserError(f"{part} holds {len(listing)} class folders; two classes or more can be told apart")
    if empty := [label for label, files in listing.items() if not files]:
        raise UserError(f"{part} has classes without an image: {', '.join(empty[:5])}")
    return listing


def _stamped(path):
    with contextlib.suppress(OSError):  # a link to nowhere: the decoder will name it
        status = os.stat(path)
        return path, status.st_size, status.st_mtime_ns
    return path, 0, 0


def _signature(folder, listings, times=True):
    """Of names, sizes and times of all files: a changed folder is decoded anew."""
    hasher = hashlib.blake2b(digest_size=16)
    for part, listing in listings.items():
        for label, files in listing.items():
            for path, size, modified in files:
                hasher.update(f"{part}/{label}/{os.path.relpath(path, folder)} {size} {modified if times else ''}\n".encode())
    return hasher.hexdigest()


def _decoded(paths, cache, size, resize, say):
    """uint8 (N, 3, size, size), in memory or mapped from the file `cache`, which is made first where it is absent or damaged."""
    shape = (len(paths), 3, size, size)
    mapped = "c" if int(np.prod(shape)) > 0.5 * _free_memory() else None
    with contextlib.suppress(OSError, ValueError, EOFError):
        images = np.load(cache, mapped)
        if (images.shape, images.dtype) == (shape, np.uint8):
            return images
    say(f"decoding {len(paths)} images of {cache.parent} (once; kept in {cache})")
    try:
        with replacing(cache) as temporary:
            images = np.lib.format.open_memmap(temporary, "w+", np.uint8, shape)
            with open(temporary, "r+b") as file:  # all of its place now: a mapped file on a full disk would end the process
                os.posix_fallocate(file.fileno(), 0, os.path.getsize(temporary))
            _decode(paths, images, resize, say)
            images.flush()
        for old in cache.parent.glob(f"{CACHE_NAME}-{size}-*.npy"):
            if old != cache:
                old.unlink(missing_ok=True)
        return np.load(cache, mapped)
    except OSError as error:  # a read-only share, a full disk: the next start decodes again
        needed, free = int(np.prod(shape)), _free_memory()
        if needed > 0.9 * free:
            raise UserError(
                f"{cache} cannot be written ({error.strerror}), and the images need {needed / 1e9:.1f} GB of memory, of which "
                f"{free / 1e9:.1f} GB are free; make room there, or give a smaller --image-size"
            ) from None
        say(f"warning: {cache} cannot be written ({error.strerror}): every start will decode the images")
    images = np.empty(shape, np.uint8)
    _decode(paths, images, resize, say)
    return images


def _free_memory():
    """Bytes that processes may still take."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def _decode(paths, target, resize, say):
    """Fill `target` (N, 3, H, W) from files, in threads, as Pillow decodes outside Python's lock.

    Says what had to be converted. Raises a UserError that counts and names the files that cannot be used.
    """
    faults, converted, told = [], collections.defaultdict(list), time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for done, (fault, kinds) in enumerate(pool.map(_decode_one, paths, target, [resize] * len(paths))):
            faults += [fault] if fault else []
            for kind in kinds:
                converted[kind].append(paths[done])
            if time.monotonic() - told > 60:
                told = time.monotonic()
                say(f"decoded {done + 1} of {len(paths)} images")
    if faults:
        shown = "; ".join(faults[:3]) + ("; ..." if len(faults) > 3 else "")
        raise UserError(f"{len(faults)} of {len(paths)} images cannot be used, first {shown}; mend or remove them")
    for kind, files in converted.items():
        say(f"images    {len(files)} {kind} (first {files[0]})")


def _decode_one(path, target, resize):
    """Fill `target` (3, H, W) from a file. Returns (what is wrong with it, or None; what had to be converted, a list)."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    size = target.shape[:0:-1]
    try:
        image, kinds = _upright_rgb(path)
        if resize:  # the middle square: the whole of the shorter side
            image = ImageOps.fit(image, size, Image.Resampling.BILINEAR)
        elif image.size != size:
            return f"{path} ({image.width}x{image.height} pixels, expected {size[0]}x{size[1]})", ()
        target[:] = np.asarray(image).transpose(2, 0, 1)
    except UnidentifiedImageError:
        return f"{path} (not an image)", ()
    except Exception as error:  # a damaged file makes Pillow raise nearly anything
        return f"{path} ({(str(error).splitlines() or [type(error).__name__])[0][:80]})", ()
    return None, kinds


def _upright_rgb(path):
    """(an image file's first picture, RGB and turned as its EXIF says; what had to be converted, a list).

    Transparency is put on white. 16-bit grey is scaled to 8 bits, which Pillow's own conversion would clip.
    """
    from PIL import Image, ImageOps

    kinds = []
    with Image.open(path) as image:
        image.load()
        if image.getexif().get(0x0112, 1) != 1:  # Orientation
            image = ImageOps.exif_transpose(image)
            kinds.append("turned as their EXIF says")
        if image.mode.startswith("I"):
            pixels = np.asarray(image)
            if pixels.min() < 0 or pixels.max() > 65535:
                raise ValueError("32-bit pixels")
            image = Image.fromarray((pixels / 257).round().astype(np.uint8))
            kinds.append("of 16 bits, scaled to 8")
        elif image.mode == "F":
            raise ValueError("floating-point pixels")
        elif image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            kinds.append("with transparency, put on white")
        elif image.mode != "RGB":
            kinds.append(f"of mode {image.mode}, converted to RGB")
        return image.convert("RGB"), kinds


def main(args):
    """Download what is not there, and say where it is."""
    for name in args.download:
        train, test = load(name, args.dataset_dir, say=print)
        folder = Path(args.dataset_dir)
        place = next(path for path in (folder / TORCHVISION_FOLDERS[name], folder / name) if path.is_dir())
        print(f"{name} is in {place}: {len(train)} images to train, {len(test)} to test, checked")


if __name__ == "__main__":
    try:
        main(ARGUMENTS)
    except UserError as error:
        sys.exit(arguments.fail("data_loader.py", error, 2))
    except OSError as error:
        sys.exit(arguments.fail("data_loader.py", error, 1))
