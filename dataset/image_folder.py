"""Pictures in class folders, in common layouts, decoded once and then cached as one uint8 array.

    photos/train/<class>/…  photos/test/<class>/…      or val/, valid/ instead of test/, upper or lower case
    photos/train/…  photos/val/…  photos/test/…        the validation images select the checkpoint
    photos/<class>/…                                   a fraction of each class is for testing

As in torchvision's ImageFolder, a picture is known by its file name extension, folders within a class belong to it,
and anything else is ignored.
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

SPLIT_NAMES = {
    "train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "tests", "testing"),
}  # fmt: skip
HEIC = (".heic", ".heif")
ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif", *HEIC)
CACHE_VERSION = 2  # to be raised if the same source gives other arrays than before
KEPT_COPIES = 2  # of a source, in the cache
MAX_LISTED = 10  # pictures that cannot be read
CHUNK = 8  # pictures per task of a thread; small ones, one per task, take longer

# Pillow warns above 90 million pixels, which a large photo can have, and rejects an image above twice that.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


def load_image_folder(
    folder: Path, image_size: int, cache_dir: Path
) -> tuple[tuple[str, ...], Split, Split | None, Split | None]:
    """Class names, train, validation and test images of a folder; the last two are None if it has none of them.

    Rows are sorted by class, then by path. The decoded pictures are cached in `cache_dir`.

    Raises UserError for a folder without class folders, for a class without pictures, if train, validation and test
    have different classes, and for pictures that cannot be read.
    """
    parts = find_parts(folder)
    listing = {name: list_classes(part) for name, part in parts.items()}
    classes = tuple(sorted(listing["train"]))
    if not classes:
        raise UserError(f"{parts['train']}: has no folders; expected train/<class>/…, or a folder for each class")
    for name, found in listing.items():
        if different := sorted(found.keys() ^ set(classes)):
            has, lacks = ("train", name) if different[0] in classes else (name, "train")
            raise UserError(
                f"{folder}: class {different[0]!r} is in {parts[has].name}/ but not in {parts[lacks].name}/; expected "
                "the same classes in both: add it there, or remove it here"
            )
        if empty := [label for label in classes if not found[label]]:
            raise UserError(
                f"{parts[name] / empty[0]}: has no pictures ({', '.join(ENDINGS)}); put some there or remove the folder"
            )
    paths = [path for found in listing.values() for label in classes for path in found[label]]
    images = load_cached(folder, paths, image_size, cache_dir)
    splits = {}
    for name, found in listing.items():
        labels = np.repeat(np.arange(len(classes), dtype=np.int64), [len(found[label]) for label in classes])
        splits[name], images = Split(images[: len(labels)], labels), images[len(labels) :]
    test, val = splits.get("test"), splits.get("val")
    return classes, splits["train"], *((None, val) if test is None else (val, test))


def find_parts(folder: Path) -> dict[str, Path]:
    """The folders of "train", "val" and "test" images; only "train" if the folder holds the classes themselves."""
    inside = visible_folders(folder)
    while len(inside) == 1 and split_name(inside[0]) is None and (deeper := visible_folders(inside[0])):
        folder, inside = inside[0], deeper  # skip a single wrapper folder
    parts: dict[str, Path] = {}
    for path in inside:
        if (name := split_name(path)) in parts:
            raise UserError(f"{folder}: has both {parts[name].name}/ and {path.name}/; remove one")
        if name:
            parts[name] = path
    if "train" not in parts:
        return {"train": folder}
    for path in inside:
        if path not in parts.values():
            print(f"note: {path} is ignored; next to a train folder only val and test are used", file=sys.stderr)
    return parts


def split_name(path: Path) -> str | None:
    return next((split for split, names in SPLIT_NAMES.items() if path.name.lower() in names), None)


def visible_folders(folder: Path) -> list[Path]:
    try:
        return sorted(Path(entry.path) for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != ".")
    except OSError as error:
        refuse(error)


def list_classes(folder: Path) -> dict[str, list[Path]]:
    """The pictures of each class folder, sorted."""
    found = {}
    for path in visible_folders(folder):
        try:
            path.name.encode()
        except UnicodeEncodeError:
            raise UserError(f"{folder}: class {path.name!a} is not valid UTF-8; rename the folder") from None
        found[path.name] = list(pictures_in(path))
    return found


def pictures_in(folder: Path) -> Iterator[Path]:
    """All pictures in and below a folder, sorted. Links are followed, each folder once."""
    visited = set()
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        real = os.path.realpath(parent)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if name[0] != ".")
        for name in sorted(names):
            if name[0] != "." and name.lower().endswith(ENDINGS):
                yield Path(parent, name)


def refuse(error: OSError) -> NoReturn:
    raise UserError(f"{error.filename}: this folder cannot be read ({error.strerror}); make it readable, or move it")


def load_cached(folder: Path, paths: Sequence[Path], image_size: int, cache_dir: Path) -> np.ndarray:
    """The pictures as uint8 (N, 3, S, S), from the cache if it has them; otherwise decoded, and written there."""
    source = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16]
    stats = [os.stat(path) if path.exists() else os.lstat(path) for path in paths]  # `decode` reports a broken link
    # The ctime shows a change whose mtime was set back.
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
            print(f"warning: {cached} is damaged ({first_line(error)}) and is rebuilt", file=sys.stderr)
    images = decode_or_refuse(folder, paths, image_size)
    try:
        with files.replacing(cached, "the cache of decoded images", shared=True) as file:
            np.savez(file, images=images)
        for old in sorted(cache_dir.glob(f"{source}-*.npz"), key=os.path.getmtime)[:-KEPT_COPIES]:
            old.unlink(missing_ok=True)
    except (UserError, OSError) as error:
        print(f"warning: {error}. Until then every start decodes again", file=sys.stderr)
    return images


def decode_or_refuse(folder: Path, paths: Sequence[Path], image_size: int) -> np.ndarray:
    """Decode all pictures. Raises UserError that names ten of those that cannot be read, and the number of the rest."""
    images, broken = empty_images(len(paths), image_size), []
    decoded = decode_all(paths, image_size)
    bar = tqdm(decoded, total=len(paths), unit="image", desc=f"decode {folder.name}", disable=None)
    for row, result in enumerate(bar):
        if isinstance(result, UserError):
            broken.append(str(result))
        else:
            images[row] = result[0]
    if broken:
        more = f"\n  and {len(broken) - MAX_LISTED:,} more" if len(broken) > MAX_LISTED else ""
        raise UserError(
            f"{folder}: {len(broken):,} of {len(paths):,} pictures cannot be read:\n  "
            + "\n  ".join(broken[:MAX_LISTED]) + more
        )  # fmt: skip
    return images


def resize_all(pixels: np.ndarray, image_size: int) -> np.ndarray:
    """uint8 grey (N, H, W) or RGB (N, H, W, 3) to uint8 (N, 3, S, S). Raises UserError for more than fits in memory."""
    if pixels.shape[1:] == (image_size, image_size, 3):
        return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
    images = empty_images(len(pixels), image_size)
    for row, image in enumerate(tqdm(pixels, unit="image", desc="resize", delay=1, disable=None)):
        images[row] = to_array(Image.fromarray(image), image_size)
    return images


def empty_images(count: int, image_size: int) -> np.ndarray:
    """uint8 (count, 3, S, S), uninitialized. Raises UserError for more than fits in memory."""
    try:
        return np.empty((count, 3, image_size, image_size), np.uint8)
    except (MemoryError, ValueError):  # ValueError: more than any machine can address
        raise UserError(
            f"--image-size {image_size}: {count:,} images of that size take {3 * count * image_size**2:,} bytes, more "
            "than fits in memory; give a smaller one"
        ) from None


Decoded = tuple[np.ndarray, tuple[int, int]]  # uint8 (3, S, S), and the width and height in the file


def decode_all(paths: Sequence[str | Path], image_size: int) -> Iterator[Decoded | UserError]:
    """Decode picture files, in their order, or the error of an unreadable one."""

    def decode_chunk(start: int) -> list[Decoded | UserError]:
        return [decode(path, image_size) for path in paths[start : start + CHUNK]]

    with ThreadPoolExecutor(num_cores(), "decode") as pool:  # Pillow works without the interpreter's lock
        for decoded in pool.map(decode_chunk, range(0, len(paths), CHUNK)):
            yield from decoded


def num_cores() -> int:
    """The number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def decode(path: str | Path, image_size: int) -> Decoded | UserError:
    """Decode one picture file. The error of an unreadable one is returned, not raised."""
    if not os.path.isfile(path):  # opening a pipe would block
        return UserError(f"{path}: not a file, or a broken link; remove it")
    try:
        with Image.open(path) as image:
            if image.format == "EPS":
                raise ValueError("PostScript is a program, which is not run")
            ImageOps.exif_transpose(image, in_place=True)
            return to_array(image, image_size), image.size
    except Image.DecompressionBombError as error:
        return UserError(f"{path}: too large ({error}); make it smaller, or remove it")
    except UnidentifiedImageError:
        heic = " (HEIC: pip install pillow-heif)" if Path(path).suffix.lower() in HEIC else ""
        return UserError(f"{path}: not an image that Pillow can read; remove it, or convert it to PNG{heic}")
    except PermissionError as error:
        return UserError(f"{path}: not readable ({error.strerror}); change its permissions, or remove it")
    except Exception as error:  # Pillow raises many exception types for broken files
        return UserError(f"{path}: a broken image ({first_line(error)}); replace or remove it")


def to_array(image: Image.Image, image_size: int) -> np.ndarray:
    """RGB, resized if it has another size, with aspect ratio kept and centre-cropped: uint8 (3, S, S)."""
    if image.mode.startswith("I"):  # 16 bits per pixel, which Pillow would clip at 255 and show as white
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 256).astype(np.uint8))
    if image.mode == "P":  # converting straight to RGB warns about transparent palettes
        image = image.convert("RGBA")
    image = image.convert("RGB")
    if image.size != (image_size, image_size):
        image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BILINEAR)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))
