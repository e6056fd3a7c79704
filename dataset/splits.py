"""Images with their labels, and random parts of them in which every class has its share."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from common.errors import UserError

import numpy as np


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

    def drop(self, rows: np.ndarray) -> "Split":
        return self.take(np.delete(np.arange(len(self)), rows))


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
    """held-out images, None where there are none"""
    digest: str
    """hex digest of all images, labels and class names of the source at this image size, before any of them were held
    out or left out: a checkpoint stores it to know its data again"""
    test_split: float | None = None
    """part of each class that was split off for the test, None where the source has test images"""


def digest(classes: Sequence[str], *splits: Split) -> str:
    hasher = hashlib.blake2b(json.dumps(classes).encode(), digest_size=16)
    for split in splits:
        hasher.update(repr(split.images.shape).encode())
        hasher.update(split.images)
        hasher.update(split.labels)
    return hasher.hexdigest()


def hold_out(split: Split, share: float, stream: tuple[int, int]) -> tuple[Split, Split]:
    """The rest, and the held-out `share` of each class, rounded; of 2 or more images each gets at least 1."""
    rng = np.random.default_rng(stream)
    held_out = []
    for label in np.unique(split.labels):
        rows = rng.permutation(np.flatnonzero(split.labels == label))
        held_out.append(rows[: min(max(1, round(share * len(rows))), len(rows) - 1)])
    rows = np.sort(np.concatenate(held_out))
    return split.drop(rows), split.take(rows)


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
    how many rows of each class must be left. Returns int64 (size,), ascending. Raises UserError, in the name of
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
