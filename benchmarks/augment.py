"""Measure how fast augmented batches are made: by this project's loader and by the usual one.

ours         utils.TrainLoader: all images of a chunk at once, on the device, in this process
torchvision  the usual code: transforms on one PIL image at a time, in a DataLoader with two worker processes

Both apply RandomCrop, ColorJitter, RandomHorizontalFlip, RandAugment and normalization with the strengths of --recipe
baseline, and return float32 batches of 64. They take turns, round by round; the first round is a warm-up and does not
count, nor does the start of the DataLoader's workers in it. A round of ours is a whole epoch, with the sampling of its
random parameters.
"""

import itertools
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import errors
from common.device import set_up_device

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.plain import WORKERS, torchvision_loader
from dataset.transforms import Augmentation
from utils import TrainLoader

BATCH_SIZE = 64
TORCHVISION_PART = 0.4  # of the images, so that its rounds take about as long as ours


def main() -> int:
    flags = {"data": "cifar10", "images": 10_000, "image_size": 32, "rounds": 9, "device": "auto"}
    options = harness.make_parser(__doc__, "augment.json", **flags).parse_args()
    device = set_up_device(options.device)
    split = harness.load_images(options).train
    few = split.take(slice(round(TORCHVISION_PART * len(split))))
    ours = TrainLoader(split, BATCH_SIZE, Augmentation(), device=device)
    theirs = torchvision_loader(few, Augmentation(), batch_size=BATCH_SIZE, workers=WORKERS["baseline"])
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
        batch_size=BATCH_SIZE, torchvision_processes=WORKERS["baseline"],
        num_images={"ours": len(split), "torchvision": len(few)},
        images_per_second=medians, ratio=ratio, ratios=ratios,
    )  # fmt: skip


def images_per_second(batches: Iterable[tuple[Tensor, Tensor]], count: int, device: torch.device) -> float:
    """Speed of `batches` with `count` images, when each batch is moved to the device and not used."""

    def fetch() -> None:
        for images, _ in batches:
            images.to(device)

    return count / harness.seconds_of(fetch, device)


if __name__ == "__main__":
    errors.run(main)
