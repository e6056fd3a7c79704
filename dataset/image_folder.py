"""Image files in class folders, decoded once and then cached as one uint8 array. The layouts are:

    photos/train/<class>/…  photos/test/<class>/…      or val/, valid/ instead of test/, in upper or lower case
    photos/train/…  photos/val/…  photos/test/…        the best epoch on the validation images is kept
    photos/<class>/…                                   a fraction of each class becomes the test set

As in torchvision's ImageFolder, image files are recognized by their extension, subfolders of a class folder belong to
the class, and all other files are ignored; so are names that begin with a dot.
"""

import hashlib
import json
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

from common import files
from common.errors import UserError, first_line

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from .splits import Split

SPLIT_OF = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
    "test": "test", "tests": "test", "testing": "test",
}  # fmt: skip
HEIC = (".heic", ".heif")
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif", *HEIC)
CACHE_VERSION = 2  # increase it when the same source would give other arrays than before
MAX_CACHED_COPIES = 2  # per source
MAX_LISTED = 10  # unreadable images named in the error
CHUNK = 8  # images per task of a thread; with one per task, small images take longer

# Pillow warns above 90 million pixels, which is normal for a large photo, and raises an error above twice that.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


def load_image_folder(
    folder: Path, image_size: int, cache_dir: Path
) -> tuple[tuple[str, ...], Split, Split | None, Split | None]:
    """Class names, train, validation and test images of a folder; the last two are None if missing.

    The images are sorted by class, then by path. The decoded images are cached in `cache_dir`.

    Raises UserError for a folder that contains the cache, for a folder without class folders, for a class without
    images, if train, validation and test have different classes, and for unreadable images.
    """
    if cache_dir.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{folder} contains {cache_dir.parent}/, the folder of decoded images; run from another folder")
    parts = find_parts(folder)
    listing = {name: list_classes(part) for name, part in parts.items()}
    classes = tuple(listing["train"])
    if not classes:
        raise UserError(f"{parts['train']}: has no folders; expected train/<class>/…, or a folder for each class")
    for name, found in listing.items():
        if different := sorted(found.keys() ^ set(classes)):
            has, lacks = ("train", name) if different[0] in classes else (name, "train")
            where = f"is in {parts[has].name}/ but not in {parts[lacks].name}/"
            raise UserError(f"{folder}: class {different[0]!r} {where}; add it or remove it")
        if empty := [label for label in classes if not found[label]]:
            raise UserError(f"{parts[name] / empty[0]}: has no images ({', '.join(EXTENSIONS)}); add some or remove it")
    paths = [path for found in listing.values() for label in classes for path in found[label]]
    images = load_cached(folder, paths, image_size, cache_dir)
    splits = {}
    for name, found in listing.items():
        labels = np.repeat(np.arange(len(classes), dtype=np.int64), [len(found[label]) for label in classes])
        splits[name], images = Split(images[: len(labels)], labels), images[len(labels) :]
    return classes, splits["train"], splits.get("val"), splits.get("test")


def find_parts(folder: Path) -> dict[str, Path]:
    """The folders named train, val and test; if there are none, the folder itself as "train"."""
    inside = visible_folders(folder)
    while len(inside) == 1 and inside[0].name.lower() not in SPLIT_OF and (deeper := visible_folders(inside[0])):
        folder, inside = inside[0], deeper  # an archive often unpacks to a single outer folder
    parts: dict[str, Path] = {}
    for path in inside:
        if (name := SPLIT_OF.get(path.name.lower())) in parts:
            raise UserError(f"{folder}: has both {parts[name].name}/ and {path.name}/; remove one")
        if name:
            parts[name] = path
    if "train" not in parts:
        return {"train": folder}
    for path in inside:
        if path not in parts.values():
            print(f"note: {path} is ignored; beside train/, only val/ and test/ are used", file=sys.stderr)
    if "test" not in parts and "val" in parts:  # a single folder of held-out images is for testing
        parts["test"] = parts.pop("val")
    return parts


def visible_folders(folder: Path) -> list[Path]:
    _, names, _ = next(os.walk(folder, onerror=raise_unreadable))
    return [folder / name for name in sorted(names) if name[0] != "."]


def list_classes(folder: Path) -> dict[str, list[Path]]:
    """The image files of each class folder, sorted."""
    found = {}
    for path in visible_folders(folder):
        try:
            path.name.encode()
        except UnicodeEncodeError:
            raise UserError(f"{folder}: class {path.name!a} is not valid UTF-8; rename the folder") from None
        found[path.name] = list(image_files_in(path))
    return found


def image_files_in(folder: Path) -> Iterator[Path]:
    """All image files in a folder and its subfolders, sorted. Links are followed; no folder is visited twice."""
    visited = set()
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=raise_unreadable):
        real = os.path.realpath(parent)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if name[0] != ".")
        for name in sorted(names):
            if name[0] != "." and name.lower().endswith(EXTENSIONS):
                yield Path(parent, name)


def raise_unreadable(error: OSError) -> NoReturn:
    raise UserError(f"{error.filename}: cannot read this folder ({error.strerror}); change its permissions, or move it")


def load_cached(folder: Path, paths: Sequence[Path], image_size: int, cache_dir: Path) -> np.ndarray:
    """The decoded images, uint8 (N, 3, S, S), from the cache if they are there; otherwise they are added to it."""
    source = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16]
    stats = [os.stat(path) if path.exists() else os.lstat(path) for path in paths]  # `decode` reports a broken link
    # A changed file whose mtime was reset still has a new ctime.
    fingerprints = [(stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for stat in stats]
    listing = [(os.path.relpath(path, folder), *found) for path, found in zip(paths, fingerprints, strict=True)]
    content = hashlib.sha256(json.dumps([listing, image_size, CACHE_VERSION]).encode()).hexdigest()[:16]
    cached = cache_dir / f"{source}-{content}.npz"
    if cached.is_file():
        try:
            with np.load(cached, allow_pickle=False) as stored:
                images = stored["images"]
            if images.dtype != np.uint8 or images.shape != (len(paths), 3, image_size, image_size):
                raise ValueError(f"holds {images.dtype} {images.shape}")
            os.utime(cached)
            return images
        except Exception as error:  # numpy and zipfile raise many exception types for a damaged file
            print(f"warning: {cached} is damaged ({first_line(error)}); it is rebuilt", file=sys.stderr)
    images = decode_or_raise(folder, paths, image_size)
    try:
        with files.atomic_write(cached, "the cache of decoded images", shared=True) as file:
            np.savez(file, images=images)
        for old in sorted(cache_dir.glob(f"{source}-*.npz"), key=os.path.getmtime)[:-MAX_CACHED_COPIES]:
            old.unlink(missing_ok=True)
    except (UserError, OSError) as error:
        print(f"warning: {error}. Until then every start decodes all images again", file=sys.stderr)
    return images


def decode_or_raise(folder: Path, paths: Sequence[Path], image_size: int) -> np.ndarray:
    """Decode all images. Raises one UserError for all unreadable images; it names the first ten."""
    images, broken = empty_images(len(paths), image_size), []
    decoded = tqdm(decode_all(paths, image_size), f"decode {folder.name}", len(paths), unit="image", disable=None)
    for row, result in enumerate(decoded):
        if isinstance(result, UserError):
            broken.append(result)
        else:
            images[row] = result[0]
    if broken:
        listed = "".join(f"\n  {error}" for error in broken[:MAX_LISTED])
        more = f"\n  and {len(broken) - MAX_LISTED:,} more" if len(broken) > MAX_LISTED else ""
        raise UserError(f"{folder}: {len(broken):,} of {len(paths):,} images cannot be read:{listed}{more}")
    return images


def resize_all(pixels: np.ndarray, image_size: int) -> np.ndarray:
    """uint8 gray (N, H, W) or RGB (N, H, W, 3) to uint8 (N, 3, S, S). Raises UserError if they do not fit in memory."""
    if pixels.shape[1:] == (image_size, image_size, 3):
        return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
    images = empty_images(len(pixels), image_size)
    for row, image in enumerate(tqdm(pixels, unit="image", desc="resize", delay=1, disable=None)):
        images[row] = to_array(Image.fromarray(image), image_size)
    return images


def empty_images(count: int, image_size: int) -> np.ndarray:
    """uint8 (count, 3, S, S), uninitialized. Raises UserError if they do not fit in memory."""
    try:
        return np.empty((count, 3, image_size, image_size), np.uint8)
    except (MemoryError, ValueError):  # ValueError: more than any machine can address
        raise UserError(f"--image-size {image_size}: {count:,} images do not fit in memory; make it smaller") from None


Decoded = tuple[np.ndarray, tuple[int, int]]  # uint8 (3, S, S), and the original width and height


def decode_all(paths: Sequence[str | Path], image_size: int) -> Iterator[Decoded | UserError]:
    """Decode image files in parallel; yields, in order, each image or the error of an unreadable one."""

    def decode_chunk(start: int) -> list[Decoded | UserError]:
        return [decode(path, image_size) for path in paths[start : start + CHUNK]]

    with ThreadPoolExecutor(num_cores(), "decode") as pool:  # threads suffice: Pillow releases the GIL
        for decoded in pool.map(decode_chunk, range(0, len(paths), CHUNK)):
            yield from decoded


def num_cores() -> int:
    """The number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def decode(path: str | Path, image_size: int) -> Decoded | UserError:
    """Decode one image file. If it is unreadable, the error is returned, not raised."""
    if not os.path.isfile(path):  # e.g. a named pipe, which would block
        return UserError(f"{path}: not a file, or a broken link; remove it")
    try:
        with Image.open(path) as image:
            if image.format == "EPS":
                raise ValueError("PostScript is a program, and files must not run programs")
            ImageOps.exif_transpose(image, in_place=True)
            return to_array(image, image_size), image.size
    except Image.DecompressionBombError as error:
        return UserError(f"{path}: too large ({error}); make it smaller, or remove it")
    except UnidentifiedImageError:
        heic = " (HEIC: pip install pillow-heif)" if Path(path).suffix.lower() in HEIC else ""
        return UserError(f"{path}: not an image that Pillow can read; remove it, or convert it to PNG{heic}")
    except Exception as error:  # Pillow raises many exception types for broken files
        return UserError(f"{path}: cannot be read ({first_line(error)}); replace or remove it")


def to_array(image: Image.Image, image_size: int) -> np.ndarray:
    """Convert to RGB, uint8 (3, S, S): the largest centered square of the image, resized if it has another size."""
    if image.mode.startswith("I"):  # 16 bits per pixel, which Pillow would clip to 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 256).astype(np.uint8))
    if image.mode == "P":  # converting straight to RGB warns about transparent palettes
        image = image.convert("RGBA")
    image = ImageOps.fit(image.convert("RGB"), (image_size, image_size), Image.Resampling.BILINEAR)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))
