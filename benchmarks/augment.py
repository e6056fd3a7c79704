"""Measure how fast augmented batches come: this project's loader and the usual one.

ours         utils.TrainLoader: all images of a chunk at once, on the device, in this process
torchvision  the way it is usually written: transforms on one PIL image at a time, in a DataLoader with two processes

Both take images of one set through RandomCrop, ColorJitter, RandomHorizontalFlip, RandAugment and normalisation with
the recipes' settings, and end in float32 batches of 64. They take turns, round by round; the first round warms up and
is not counted. A round of ours is a whole epoch of its images, the draws of the epoch included. The DataLoader's
processes start in the warm-up and stay: what they cost to start is not counted.
"""

import itertools
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before this folder, which has an augment.py as well

from common import errors
from common.device import set_up_device

import numpy as np
import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.plain import torchvision_loader
from dataset.transforms import Augmentation
from utils import TrainLoader

BATCH_SIZE = 64
WORKERS = 2
TORCHVISION_PART = 0.4  # of the images, for torchvision's rounds to take about as long


def main() -> int:
    flags = {"data": "cifar10", "images": 10_000, "image_size": 32, "rounds": 9, "device": "auto"}
    options = harness.make_parser(__doc__, "augment.json", **flags).parse_args()
    device = set_up_device(options.device)
    split = harness.load_images(options, at_least=BATCH_SIZE).train
    few = split.take(np.arange(max(BATCH_SIZE, round(TORCHVISION_PART * len(split)))))
    ours = TrainLoader(split, BATCH_SIZE, Augmentation(), device=device)
    theirs = torchvision_loader(few, Augmentation(), batch_size=BATCH_SIZE, workers=WORKERS)
    epochs = itertools.count()
    ways = {
        "ours": lambda: images_per_second(ours.epoch(next(epochs)), ours.num_images, device),
        "torchvision": lambda: images_per_second(theirs, len(few), device),
    }
    rates = harness.in_turn(ways, options.rounds, warm_up=True, show="{:,.0f} images/s".format)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    ratios = [one / other for one, other in zip(rates["ours"], rates["torchvision"], strict=True)]
    ratio = statistics.median(ratios)
    rows = {name: {"images/s": f"{rate:,.0f}"} for name, rate in medians.items()}
    return harness.report(
        options, device, rows | {"ratio": {"images/s": f"{ratio:.1f}"}},
        batch_size=BATCH_SIZE, torchvision_processes=WORKERS, num_images={"ours": len(split), "torchvision": len(few)},
        images_per_second=medians, ratio=ratio, ratios=ratios,
    )  # fmt: skip


def images_per_second(batches: Iterable[tuple[Tensor, Tensor]], count: int, device: torch.device) -> float:
    """How fast `count` images come in batches, when each is on the device and nothing else is done with it."""

    def fetch() -> None:
        for images, _ in batches:
            images.to(device)

    return count / harness.seconds_of(fetch, device)


if __name__ == "__main__":
    errors.run(main)
