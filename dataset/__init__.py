"""Where images come from: CIFAR-10 or CIFAR-100, a folder of one's own, or the digits that scikit-learn carries.

`load` turns any of them into uint8 arrays, labels and class names. Importing this package does not import torch.
"""

from pathlib import Path

from common.errors import UserError

import numpy as np

from . import cifar10, digits, image_folder
from .splits import Dataset, Split, balanced_rows, digest, hold_out

__all__ = ["Dataset", "Split", "load"]

NAMES = ("cifar10", "cifar100", "digits")
# Each random choice has a stream of its own, so that one size does not change what another picks.
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
      - "cifar10" or "cifar100", as it lies in `data_dir`, downloaded where it does not and `download` lets it
        (`data_url` is asked first);
      - "digits": scikit-learn's 8×8 digits, which need no download;
      - the path of a folder: CIFAR-10's official files, or pictures in class folders (image_folder.py says how).

    Images come out as `image_size` × `image_size`: resized with their aspect kept, then cut to the centre. Of digits,
    and of class folders without a test folder, `test_split` of each class becomes the test images. `val_size` training
    images are held out first; `train_size` picks from the rest, `test_size` from the test images, each with as equal a
    share for every class as the size allows. All of it follows from `split_seed` alone.

    Raises UserError for a source or size that does not work out.
    """
    data_dir = Path(data_dir)
    name = str(source).lower()
    val = test = None
    if name == "digits":
        classes, train = digits.load_digits(image_size)
    elif name in cifar10.ARCHIVES:
        classes, train, test = cifar10.read_folder(
            cifar10.find(name, data_dir, data_url, download=download), image_size, name
        )
    else:
        folder = existing_folder(source)
        if cifar10.is_official(folder):
            classes, train, test = cifar10.read_folder(folder, image_size)
        else:
            classes, train, val, test = image_folder.load_image_folder(folder, image_size, data_dir / "cache")
    own_digest = digest(classes, *(split for split in (train, val, test) if split is not None))

    if test is None:
        counts = np.bincount(train.labels)
        if counts.min() < 2:
            raise UserError(
                f"--data {source}: class {classes[counts.argmin()]!r} has one image, and a class needs one to train on "
                "and one for the test; add more, or a test folder"
            )
        train, test = hold_out(train, test_split, (split_seed, TEST_SPLIT_STREAM))
    else:
        test_split = None
    if val_size:
        if val is not None:
            raise UserError(f"--val-size {val_size}: {source} has validation images of its own; leave the flag out")
        # One image of each class stays behind for training.
        rows = balanced_rows("--val-size", val_size, train.labels, classes, (split_seed, VAL_STREAM), spare=1)
        val, train = train.take(rows), train.drop(rows)
    if train_size is not None:
        stream = (split_seed, TRAIN_SUBSET_STREAM)
        train = train.take(balanced_rows("--train-size", train_size, train.labels, classes, stream, least=len(classes)))
    if test_size is not None:
        stream = (split_seed, TEST_SUBSET_STREAM)
        test = test.take(balanced_rows("--test-size", test_size, test.labels, classes, stream))
    return Dataset(str(source), classes, train, test, val, own_digest, test_split)


def existing_folder(source: str) -> Path:
    """The folder that --data names. Raises UserError where there is none."""
    expected = f"expected {', '.join(NAMES)}, or a folder of images"
    try:
        path = Path(source).expanduser()
        if source and path.is_dir():
            return path
        is_there = path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"--data {source}: {error}; {expected}") from None
    if not source or not is_there:
        place = "" if Path(source).is_absolute() else f" in {Path.cwd()}"
        raise UserError(f"--data {source or repr(source)}: there is no such folder{place}; {expected}")
    raise UserError(f"--data {source}: this is a file; {expected}. Unpack an archive and give the folder")
