"""Data sets: CIFAR-10 or CIFAR-100, a folder of images, or scikit-learn's handwritten digits.

`load` returns each of them as uint8 images, labels and class names. Importing this package does not import torch.
"""

import os
from pathlib import Path

from common.errors import UserError

import numpy as np

from . import cifar10, digits, image_folder
from .splits import Dataset, Split, balanced_rows, digest, hold_out

__all__ = ["Dataset", "Split", "load"]

NAMES = ("cifar10", "cifar100", "digits")
# Each random choice has its own random stream, so that e.g. --val-size does not change which test images are picked.
TEST_SPLIT_STREAM, VAL_STREAM, TRAIN_SUBSET_STREAM, TEST_SUBSET_STREAM = range(4)


def load(
    source: str = "cifar10",
    *,
    image_size: int = 32,
    train_size: int | None = None,
    test_size: int | None = None,
    val_size: int = 0,
    test_split: float = 0.2,
    split_seed: int = 0,
    data_dir: str | Path = "data",
    data_url: str | None = None,
    download: bool = True,
) -> Dataset:
    """Load a data set.

    `source` is one of
      - "cifar10" or "cifar100", read from `data_dir`; if missing there and `download` is True, it is downloaded
      - "digits": scikit-learn's 8×8 digits, which need no download
      - the path of a folder: CIFAR-10's official files, or image files in class folders (see image_folder.py)

    All images become `image_size` × `image_size`: the largest centered square, resized. If a source has no test images
    (digits, class folders without a test folder), the fraction `test_split` of each class becomes the test set. Then
    `val_size` training images are held out, and `train_size` and `test_size` select subsets of the remaining training
    images and of the test images, balanced over the classes. Every choice is random, seeded with `split_seed`.

    Raises UserError for an invalid source or size.
    """
    data_dir = Path(data_dir)
    name = str(source).lower()
    val = test = None
    if name in cifar10.HOSTS:
        folder = cifar10.find(name, data_dir, data_url, download=download)
        classes, train, test = cifar10.read_folder(folder, image_size, name)
    elif data_url is not None:
        raise UserError(f"--data-url is for CIFAR, not for --data {str(source)!r}; remove one of them")
    elif name == "digits":
        classes, train = digits.load_digits(image_size)
    else:
        folder = existing_folder(source)
        if (folder / "data_batch_1").is_file():  # CIFAR-10's official files
            classes, train, test = cifar10.read_folder(folder, image_size)
        else:
            classes, train, val, test = image_folder.load_image_folder(folder, image_size, data_dir / "cache")
    source_digest = digest(classes, *(split for split in (train, val, test) if split is not None))

    if test is None:
        counts = np.bincount(train.labels)
        if counts.min() < 2:
            label = classes[counts.argmin()]
            raise UserError(f"--data {source}: class {label!r} has one image; add some, or a test folder")
        train, test = hold_out(train, test_split, (split_seed, TEST_SPLIT_STREAM))
    else:
        test_split = None
    if val_size:
        if val is not None:
            raise UserError(f"--val-size {val_size}: {source} already has validation images; remove the flag")
        rows = balanced_rows("--val-size", val_size, train, classes, (split_seed, VAL_STREAM), min_left=1)
        val, train = train.take(rows), train.drop(rows)
    if train_size is not None:
        seed = (split_seed, TRAIN_SUBSET_STREAM)
        train = train.take(balanced_rows("--train-size", train_size, train, classes, seed, least=len(classes)))
    if test_size is not None:
        test = test.take(balanced_rows("--test-size", test_size, test, classes, (split_seed, TEST_SUBSET_STREAM)))
    return Dataset(str(source), classes, train, test, val, source_digest, test_split)


def existing_folder(source: str) -> Path:
    """The path of the folder that --data names. Raises UserError if it does not exist."""
    path = os.path.expanduser(source)
    if os.path.isdir(path):
        return Path(path)
    expected = f"expected {', '.join(NAMES)}, or a folder of images"
    if os.path.exists(path):
        raise UserError(f"--data {source} is a file; {expected}. If it is an archive, unpack it and give the folder")
    parent = "" if os.path.isabs(path) else f" in {Path.cwd()}"
    raise UserError(f"--data {source or repr(source)}: there is no such folder{parent}; {expected}")
