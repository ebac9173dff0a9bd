"""Class folders, `<folder>/{train,test}/<class>/<image>` as for torchvision's ImageFolder, decoded once into a file."""

import collections
import concurrent.futures
import contextlib
import hashlib
import io
import os
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from takd.config.names import DATASETS
from takd.errors import UserError, first_line
from takd.files import Say, alone_in, printable, remove_leftovers, replacing
from takd.process import cores, safe_point

CACHE_NAME = "takd-decoded"
DIGEST_BYTES = 4


class ClassFolders(NamedTuple):
    """{part: (uint8 (N, 3, H, W), int64 (N,))}, class names in order, {part: the images' paths}."""

    arrays: dict[str, tuple[np.ndarray, np.ndarray]]
    classes: tuple[str, ...]
    files: dict[str, tuple[str, ...]]


def read(name: str, folder: Path, size: int, say: Say, pixels: bool = True) -> ClassFolders:
    """A data set's images. Those of `--dataset folder` are resized to size x size; others must have that size. Without
    `pixels` they are 1x1 and grey, and no file is read or written."""
    spec, listings = DATASETS[name], _listings(name, folder)
    for part, expected in {"train": spec.train_images, "test": spec.test_images}.items():
        count = sum(map(len, listings[part].values()))
        if expected and count != expected:
            say(f"warning: {folder / part} holds {count} images, the original {name} {expected}")
    paths = {part: tuple(file for files in listing.values() for file in files) for part, listing in listings.items()}
    if pixels:
        cache = folder / f"{CACHE_NAME}-{size}-{_signature(folder, listings)}.npy"
        images = _decoded([path for part in paths.values() for path in part], cache, size, name == "folder", say)
    else:
        images = np.full((sum(map(len, paths.values())), 3, 1, 1), 128, np.uint8)
    arrays, start = {}, 0
    for part, listing in listings.items():
        labels = np.repeat(np.arange(len(listing)), [len(files) for files in listing.values()]).astype(np.int64)
        arrays[part] = images[start : start + len(labels)], labels
        start += len(labels)
    return ClassFolders(arrays, tuple(listings["train"]), paths)


def folder_digest(folder: str | Path) -> str:
    """Digest of the names and sizes of a folder's images, which identifies them wherever the folder is."""
    return _signature(Path(folder), _listings("folder", Path(folder)), times=False)


# ---------------------------------------------------------------------------------------------- what is there
def _listings(name, folder):
    """{part: {class: paths}}; for `--dataset folder`, val replaces an absent test, or selects the epoch."""
    places = {"train": folder / "train", "test": folder / "test"}
    if name == "folder" and (folder / "val").is_dir():
        places["validation" if places["test"].is_dir() else "test"] = folder / "val"
    there = [place for place in places.values() if place.is_dir()]
    listings = {part: _listing(place, name, DATASETS[name].classes, there) for part, place in places.items()}
    for part, listing in listings.items():
        if differ := sorted(set(listings["train"]) ^ set(listing)):
            raise UserError(f"{folder}: train and {places[part].name} hold different classes ({', '.join(differ[:5])})")
    return listings


def _listing(part, name, classes, places):
    """Classes and images sorted by name, images in folders of any depth."""
    from PIL import Image

    if not part.is_dir():
        layout = f"<dir>/{name}/{{train,test}}"
        if name == "folder":
            layout = "<dir>/{train,test} with --dataset-dir <dir> (test or val)"
        raise UserError(f"{part} does not exist; class folders are {layout}, and in each <class>/<image>")
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    labels = [entry for entry in sorted(part.iterdir()) if entry.is_dir()]
    outside = {_identity(folder) for folder in (*labels, *places, *Path(os.path.realpath(part)).parents)}
    listing = {}
    for entry in labels:
        if not entry.name.startswith("."):
            inside = [path for path in _files(str(entry), outside) if os.path.splitext(path)[1].lower() in endings]
            label = os.fsencode(entry.name).decode(errors="surrogateescape")  # the same in every locale
            listing[printable(label)] = sorted(inside)
    if classes and len(listing) != classes:
        raise UserError(f"{part} holds {len(listing)} class folders, {name} has {classes}")
    if len(listing) < 2:
        raise UserError(f"{part} holds {len(listing)} class folders; classification needs two or more")
    if empty := [label for label, files in listing.items() if not files]:
        raise UserError(f"{part} has classes without an image: {', '.join(empty[:5])}")
    return listing


def _files(folder, outside):
    """The paths of the files at any depth, those of each folder once: links may lead back, or to what is `outside`."""
    seen = set(outside)
    for base, inside, files in os.walk(folder, followlinks=True):
        found = {_identity(os.path.join(base, name)): name for name in sorted(inside, reverse=True)}
        inside[:] = [name for identity, name in found.items() if identity not in seen]
        seen |= found.keys()
        yield from (os.path.join(base, name) for name in files if not name.startswith("."))


def _identity(folder):
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _signature(folder, listings, times=True):
    """Digest of names, sizes and times of all files: a changed folder is decoded again."""
    hasher = hashlib.blake2b(digest_size=16)
    for part, listing in listings.items():
        for label, files in listing.items():
            for path in files:
                size, modified = 0, 0
                with contextlib.suppress(OSError):  # a broken link: the decoder will name it
                    status = os.stat(path)
                    size, modified = status.st_size, status.st_mtime_ns
                hasher.update(f"{part}/{label}/".encode() + os.fsencode(os.path.relpath(path, folder)))
                hasher.update(f" {size} {modified if times else ''}\n".encode())
    return hasher.hexdigest()


# -------------------------------------------------------------------------------------------------- decoding
def _decoded(paths, cache, size, resize, say):
    """uint8 (N, 3, size, size), in memory or mapped from the file `cache`, made first if it is absent or damaged."""
    shape = (len(paths), 3, size, size)
    needed = int(np.prod(shape))
    mapped = needed > 0.5 * _free_memory()
    if (images := _cached(cache, shape, mapped)) is not None:
        return images
    say(f"decoding {len(paths)} images of {cache.parent} (once; kept in {cache})")
    try:
        with alone_in(cache.parent) as alone, replacing(cache) as temporary:
            if alone:
                remove_leftovers(cache.parent, f"{CACHE_NAME}-*")
            images = np.lib.format.open_memmap(temporary, "w+", np.uint8, shape)
            with open(temporary, "r+b") as file:  # allocated now: a mapped file on a full disk kills the process
                os.posix_fallocate(file.fileno(), 0, os.path.getsize(temporary) + DIGEST_BYTES)
            _decode(paths, images, resize, say)
            images.flush()
            with open(temporary, "r+b") as file:
                file.seek(-DIGEST_BYTES, os.SEEK_END)
                file.write(_digest(images))
        for old in cache.parent.glob(f"{CACHE_NAME}-{size}-*.npy"):
            if old != cache:
                old.unlink(missing_ok=True)
        return _cached(cache, shape, mapped)
    except OSError as error:  # a read-only share, a full disk: the next start decodes again
        why, free = f"{cache} cannot be written ({error.strerror})", _free_memory()
        if needed > 0.9 * free:
            fix = "free space there, or give a smaller --image-size"
            memory = f"{needed / 1e9:.1f} GB of memory ({free / 1e9:.1f} GB are free)"
            raise UserError(f"{why}, and the images need {memory}; {fix}") from None
        say(f"warning: {why}: every start will decode the images")
    images = np.empty(shape, np.uint8)
    _decode(paths, images, resize, say)
    return images


def _cached(cache, shape, mapped):
    """uint8 images of this shape from a file; None where it is absent, or its header, size or checksum is wrong."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    start, count = header.getvalue(), int(np.prod(shape))
    if not os.path.isfile(cache) or os.path.getsize(cache) != len(start) + count + DIGEST_BYTES:
        return None
    with open(cache, "rb") as file:
        if file.read(len(start)) != start:
            return None
        images = np.memmap(cache, np.uint8, "c", len(start), count) if mapped else np.fromfile(file, np.uint8, count)
        file.seek(-DIGEST_BYTES, os.SEEK_END)
        return images.reshape(shape) if file.read() == _digest(images) else None


def _digest(images):
    """CRC-32 of the pixels, at the end of their file: 0.1 s for the 60,000 images of CIFAR."""
    return zlib.crc32(images).to_bytes(DIGEST_BYTES, "little")


def _free_memory():
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def _decode(paths, target, resize, say):
    """Fill `target` (N, 3, H, W) from files, in threads: Pillow releases Python's lock.

    Conversions are counted and reported. Files that cannot be used are one UserError, which names them.
    """
    faults, converted, reported = [], collections.defaultdict(list), time.monotonic()
    pool = concurrent.futures.ThreadPoolExecutor(cores())
    try:
        for done, (fault, conversions) in enumerate(pool.map(_decode_one, paths, target, [resize] * len(paths))):
            safe_point()
            faults += [fault] if fault else []
            for conversion in conversions:
                converted[conversion].append(paths[done])
            if time.monotonic() - reported > 60:
                reported = time.monotonic()
                say(f"decoded {done + 1} of {len(paths)} images")
    finally:
        pool.shutdown(cancel_futures=True)
    if faults:
        shown = "; ".join(faults[:3]) + ("; ..." if len(faults) > 3 else "")
        raise UserError(f"{len(faults)} of {len(paths)} images cannot be used, first {shown}; fix or remove them")
    for conversion, files in converted.items():
        say(f"images    {len(files)} {conversion} (first {files[0]})")


def _decode_one(path, target, resize):
    """Fill `target` (3, H, W) from a file. Returns (what is wrong with it, or None; the conversions that it needed)."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    size = target.shape[2], target.shape[1]
    if not os.path.isfile(path):  # a named pipe would be waited for
        return f"{path} (not a file, or a broken link)", ()
    try:
        image, conversions = upright_rgb(path)
        if resize:  # the middle square: the whole of the shorter side
            image = ImageOps.fit(image, size, Image.Resampling.BILINEAR)
        elif image.size != size:
            return f"{path} ({image.width}x{image.height} pixels, expected {size[0]}x{size[1]})", ()
        target[:] = np.asarray(image).transpose(2, 0, 1)
    except UnidentifiedImageError:
        return f"{path} (not an image)", ()
    except Exception as error:  # a damaged file makes Pillow raise nearly anything
        return f"{path} ({first_line(error)[:80]})", ()
    return None, conversions


def upright_rgb(path: str) -> tuple[Any, Sequence[str]]:
    """(a file's first image as a PIL image, RGB and rotated by its EXIF orientation; the conversions that it needed).

    Transparency is composited on white. 16-bit grey is scaled to 8 bits, which Pillow's own conversion would clip.
    """
    from PIL import Image, ImageOps

    conversions = []
    with Image.open(path) as file:
        file.load()
        image: Any = file
        if image.getexif().get(0x0112, 1) != 1:  # Orientation
            image = ImageOps.exif_transpose(image)
            conversions.append("rotated by their EXIF orientation")
        if image.mode.startswith("I"):
            pixels = np.asarray(image)
            if pixels.min() < 0 or pixels.max() > 65535:
                raise ValueError("32-bit pixels")
            image = Image.fromarray((pixels / 257).round().astype(np.uint8))
            conversions.append("of 16 bits, scaled to 8")
        elif image.mode == "F":
            raise ValueError("floating-point pixels")
        elif image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            conversions.append("with transparency, composited on white")
        elif image.mode != "RGB":
            conversions.append(f"of mode {image.mode}, converted to RGB")
        return image.convert("RGB"), conversions
