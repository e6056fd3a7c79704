"""Images with their labels, and random subsets of them that are balanced over the classes."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from common.errors import UserError

import numpy as np


@dataclass(frozen=True)
class Split:
    """Images and their labels."""

    images: np.ndarray  # uint8 (N, 3, H, W), C-contiguous
    labels: np.ndarray  # int64 (N,), each an index into the data set's classes

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: np.ndarray | slice) -> "Split":
        return Split(self.images[rows], self.labels[rows])

    def drop(self, rows: np.ndarray) -> "Split":
        return self.take(np.delete(np.arange(len(self)), rows))


@dataclass(frozen=True)
class Dataset:
    """Everything a run needs to know about its images."""

    source: str  # value of --data
    classes: tuple[str, ...]  # names; a label is an index into them
    train: Split
    test: Split
    val: Split | None  # held-out images, if any
    digest: str  # hash of all images (at this image size), labels and class names of the source, before any split
    test_split: float | None = None  # fraction of each class that became the test set; None if the source has one


def digest(classes: Sequence[str], *splits: Split) -> str:
    hasher = hashlib.blake2b(json.dumps(classes).encode(), digest_size=16)
    for split in splits:
        hasher.update(repr(split.images.shape).encode())
        hasher.update(split.images)
        hasher.update(split.labels)
    return hasher.hexdigest()


def hold_out(split: Split, fraction: float, seed: tuple[int, int]) -> tuple[Split, Split]:
    """Hold out a random `fraction` of each class. Returns the rest and the held-out images, at least one per class."""
    rng = np.random.default_rng(seed)
    held_out = []
    for label in np.unique(split.labels):
        rows = rng.permutation(np.flatnonzero(split.labels == label))
        held_out.append(rows[: min(max(1, round(fraction * len(rows))), len(rows) - 1)])
    rows = np.sort(np.concatenate(held_out))
    return split.drop(rows), split.take(rows)


def balanced_rows(
    flag: str, size: int, split: Split, classes: Sequence[str], seed: tuple[int, int], least: int = 1, min_left: int = 0
) -> np.ndarray:
    """Pick `size` rows at random so that any two classes' counts differ by at most one.

    seed: --split-seed and the number of the random choice. least: the smallest `size` allowed. min_left: how many rows
    of each class must not be picked. Returns int64 (size,), ascending. Raises UserError, which names `flag`, if `size`
    is impossible.
    """
    free = np.bincount(split.labels) - min_left
    smallest = int(free.argmin())
    largest = int(free[smallest] * len(classes) + (free > free[smallest]).sum())
    if not least <= size <= largest:
        limit = f"class {classes[smallest]!r} has only {free[smallest]} to give"
        raise UserError(f"{flag} {size}: expected {least} to {largest}. All classes get equal numbers, and {limit}")
    rng = np.random.default_rng(seed)
    per_class, remainder = divmod(size, len(classes))
    counts = np.full(len(classes), per_class)
    counts[rng.permutation(np.flatnonzero(free > per_class))[:remainder]] += 1
    picked = [rng.permutation(np.flatnonzero(split.labels == label))[:count] for label, count in enumerate(counts)]
    return np.sort(np.concatenate(picked))
