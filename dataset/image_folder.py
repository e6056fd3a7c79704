"""Pictures in class folders, in the layouts that people have, decoded once and then kept as one uint8 array.

    photos/train/<class>/…  photos/test/<class>/…      or val/, valid/ instead of test/, upper or lower case
    photos/train/…  photos/val/…  photos/test/…        the validation images choose the checkpoint
    photos/<class>/…                                   a part of each class is for the test

As in torchvision's ImageFolder, pictures count by their ending, folders within a class belong to it, and anything else
is ignored.
"""

import hashlib
import itertools
import json
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common import files
from common.errors import UserError, first_line

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from .splits import Split

SPLIT_NAMES = {"train": "train", "training": "train", "test": "test", "val": "val", "valid": "val", "validation": "val"}
HEIC = (".heic", ".heif")
ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif", *HEIC)
CACHE_VERSION = 2  # goes up when the same source would give other arrays than before
KEPT_COPIES = 2  # of a source, in the cache
SHOWN = 10  # of the pictures that cannot be read
CHUNK = 8  # pictures that a thread decodes in one go; handing small ones over singly costs more than it gains
CHUNKS_AHEAD = 512  # what threads may decode before it is used, so that it is not all in memory twice
SMALL_FILE = 16_384  # bytes: a photo of some 200×200 pixels, as JPEG

# Pillow warns above 90 million pixels, which a large photo can have, and refuses an image above twice that.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


def load_image_folder(
    folder: Path, image_size: int, cache_dir: Path
) -> tuple[tuple[str, ...], Split, Split | None, Split | None]:
    """Class names, train, validation and test images of a folder; the last two are None where it has none of them.

    Rows are sorted by class, then by path. What was decoded is kept in `cache_dir` for the next time.

    Raises UserError for a folder without class folders, for classes without pictures or not the same in all parts, and
    for pictures that cannot be read.
    """
    parts = find_parts(folder)
    listing = {name: list_classes(part) for name, part in parts.items()}
    classes = tuple(sorted(listing["train"]))
    if not classes:
        raise UserError(f"{parts['train']}: has no folders; expected a folder for each class, with its pictures")
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
    paths = {name: [path for label in classes for path in found[label]] for name, found in listing.items()}
    labels = {
        name: np.repeat(np.arange(len(classes)), [len(found[label]) for label in classes])
        for name, found in listing.items()
    }
    images = through_cache(folder, [path for part in paths.values() for path in part], image_size, cache_dir)
    starts = np.cumsum([len(part) for part in paths.values()])[:-1]
    splits = {
        name: Split(own, labels[name].astype(np.int64))
        for name, own in zip(paths, np.split(images, starts), strict=True)
    }
    test, val = splits.get("test"), splits.get("val")
    return classes, splits["train"], *((None, val) if test is None else (val, test))


def find_parts(folder: Path) -> dict[str, Path]:
    """The folders of "train", "val" and "test" images; "train" alone where the classes lie side by side."""
    inside = visible_folders(folder)
    while len(inside) == 1 and split_name(inside[0]) is None:  # where unpacking an archive has put it all
        deeper = visible_folders(inside[0])
        if not deeper:
            break
        inside = deeper
    if not inside:
        raise UserError(f"--data {folder}: has no folders; expected train/<class>/…, or a folder for each class")
    parts: dict[str, Path] = {}
    for path in inside:
        if (name := split_name(path)) in parts:
            raise UserError(f"{folder}: both {parts[name].name}/ and {path.name}/ are there; remove one")
        if name:
            parts[name] = path
    return parts if "train" in parts else {"train": inside[0].parent}


def split_name(path: Path) -> str | None:
    return SPLIT_NAMES.get(path.name.lower())


def visible_folders(folder: Path) -> list[Path]:
    try:
        return sorted(Path(entry.path) for entry in os.scandir(folder) if entry.is_dir() and not is_hidden(entry.name))
    except OSError as error:
        raise unreadable(error) from None


def is_hidden(name: str) -> bool:
    return name.startswith(".")


def list_classes(folder: Path) -> dict[str, list[Path]]:
    """The pictures of each class folder, sorted."""
    found = {}
    for path in visible_folders(folder):
        try:
            path.name.encode()
        except UnicodeEncodeError:
            raise UserError(f"{folder}: class {path.name!a} is no UTF-8; give it another name") from None
        found[path.name] = list(pictures_in(path))
    return found


def pictures_in(folder: Path) -> Iterator[Path]:
    """All pictures in and below a folder, sorted. Links are followed, but into no folder twice."""
    walked = set()
    for place, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        real = os.path.realpath(place)
        if real in walked:
            folders.clear()
            continue
        walked.add(real)
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        for name in sorted(names):
            if not is_hidden(name) and name.lower().endswith(ENDINGS):
                yield Path(place, name)


def unreadable(error: OSError) -> UserError:
    return UserError(f"{error.filename}: this folder cannot be read ({error.strerror}); make it readable, or move it")


def refuse(error: OSError) -> None:
    raise unreadable(error)


# --------------------------------------------------------------------------------------------------------------- cache


def through_cache(folder: Path, paths: Sequence[Path], image_size: int, cache_dir: Path) -> np.ndarray:
    """uint8 (N, 3, S, S): the decoded pictures, from the cache where it has them."""
    source = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16]
    # The ctime shows a change whose mtime was set back.
    stats = [(os.path.relpath(path, folder), stat_of(path)) for path in paths]
    listing = [(name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for name, stat in stats]
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
        except Exception as error:  # a damaged zip file fails in more ways than numpy and zipfile list
            print(f"warning: {cached} is damaged ({first_line(error)}) and is rebuilt", file=sys.stderr)
    images = decode_or_refuse(folder, paths, image_size)
    try:
        with files.replacing(cached, "the cache of decoded images", shared=True) as file:
            np.savez(file, images=images)
        by_age = sorted(cache_dir.glob(f"{source}-*.npz"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
        for old in by_age[KEPT_COPIES:]:
            old.unlink(missing_ok=True)
    except (UserError, OSError) as error:
        print(f"warning: {error}. Until then every start decodes again", file=sys.stderr)
    return images


def stat_of(path: Path) -> os.stat_result:
    """The file's stat; for a broken link the link's own, so that decoding reports it."""
    return os.stat(path) if path.exists() else os.lstat(path)


# ------------------------------------------------------------------------------------------------------------ decoding


def decode_or_refuse(folder: Path, paths: Sequence[Path], image_size: int) -> np.ndarray:
    """Decode all pictures. Raises UserError that names those that cannot be read, ten of them and how many more."""
    images, broken = room_for(len(paths), image_size), []
    decoded = decode_all(paths, image_size)
    bar = tqdm(decoded, total=len(paths), unit="image", desc=f"decode {folder.name}", disable=None)
    for row, result in enumerate(bar):
        if isinstance(result, UserError):
            broken.append(str(result))
        else:
            images[row] = result[0]
    if broken:
        more = f"\n  and {len(broken) - SHOWN:,} more" if len(broken) > SHOWN else ""
        heic = any(path.suffix.lower() in HEIC for path in paths)
        hint = "\nFor HEIC: pip install pillow-heif and convert them, for instance to PNG" if heic else ""
        raise UserError(
            f"{folder}: {len(broken):,} of {len(paths):,} pictures cannot be read:\n  "
            + "\n  ".join(broken[:SHOWN]) + more + hint
        )  # fmt: skip
    return images


def room_for(count: int, image_size: int) -> np.ndarray:
    """uint8 (count, 3, image_size, image_size), not filled in. Raises UserError where there is not so much memory."""
    try:
        return np.empty((count, 3, image_size, image_size), np.uint8)
    except (MemoryError, ValueError):  # ValueError: more than any machine can address
        raise UserError(
            f"--image-size {image_size}: {count:,} images of that size take {3 * count * image_size**2:,} bytes, more "
            "than there is memory; give a smaller one"
        ) from None


Decoded = tuple[np.ndarray, tuple[int, int]]  # uint8 (3, S, S), and the width and height in the file


def decode_all(paths: Sequence[str | Path], image_size: int) -> Iterator[Decoded | UserError]:
    """Decode picture files, in their order; of one that cannot be read, what is wrong with it.

    Large files are decoded by threads, since Pillow decodes and resizes without the interpreter's lock; on small ones
    threads would wait for one another most of the time.
    """

    def chunk(start: int) -> list[Decoded | UserError]:
        return [decode(path, image_size) for path in paths[start : start + CHUNK]]

    starts = range(0, len(paths), CHUNK)
    sample = paths[:: max(1, len(paths) // 100)]
    if sum(size_of(path) for path in sample) < len(sample) * SMALL_FILE:
        yield from itertools.chain.from_iterable(map(chunk, starts))
        return
    with ThreadPoolExecutor(num_cores(), "decode") as pool:
        for at in range(0, len(starts), CHUNKS_AHEAD):
            yield from itertools.chain.from_iterable(pool.map(chunk, starts[at : at + CHUNKS_AHEAD]))


def size_of(path: str | Path) -> int:
    return os.path.getsize(path) if os.path.isfile(path) else 0


def num_cores() -> int:
    """How many processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def decode(path: str | Path, image_size: int) -> Decoded | UserError:
    """Decode one picture file; what is wrong with it is returned, not raised."""
    if not os.path.isfile(path):  # a pipe would keep its reader waiting
        return UserError(f"{path}: there is no file, or a link to none; remove it")
    try:
        with Image.open(path) as image:
            if image.format == "EPS":
                raise ValueError("PostScript is a program, and is not run")
            ImageOps.exif_transpose(image, in_place=True)
            return to_array(image, image_size), image.size
    except Image.DecompressionBombError as error:
        return UserError(f"{path}: too large ({error}); make it smaller, or remove it")
    except UnidentifiedImageError:
        return UserError(f"{path}: no image that Pillow can read; remove it, or convert it to PNG")
    except PermissionError as error:
        return UserError(f"{path}: not readable ({error.strerror}); change its permissions, or remove it")
    except Exception as error:  # Pillow's readers raise whatever a broken file makes them stumble over
        return UserError(f"{path}: a broken image ({first_line(error)}); replace or remove it")


def to_array(image: Image.Image, image_size: int) -> np.ndarray:
    """RGB, aspect kept, centre cut out: uint8 (3, image_size, image_size). An image of that size stays as it is."""
    if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would cut off at 255 and show as white
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 256).astype(np.uint8))
    if image.mode == "P":  # straight to RGB, Pillow warns about palettes with transparency
        image = image.convert("RGBA")
    image = image.convert("RGB")
    if image.size != (image_size, image_size):
        image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BILINEAR)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))
