"""Measure how fast augmented batches come: this project's loader and the usual one.

ours         utils.TrainLoader: all images of a chunk at once, on the device, in this process
torchvision  the way it is usually written: transforms on one PIL image at a time, in a DataLoader with two processes

Both take images of one set through RandomCrop, ColorJitter, RandomHorizontalFlip, RandAugment and normalisation with
the recipes' settings, and end in float32 batches of 64. They take turns, round by round, so that whatever else the
machine does meets both; the first round warms up and is not counted. A round of ours is a whole epoch of its images,
the draws of the epoch included. The DataLoader's processes start in the warm-up and stay: what they cost to start is
not counted.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before this folder, which has an augment.py as well

from common import errors
from common.command_line import Parser
from common.device import DEVICES, set_up_device

import dataset
from benchmarks import harness
from benchmarks.plain import torchvision_loader
from dataset import Split
from dataset.transforms import Augmentation
from utils import TrainLoader

BATCH_SIZE = 64
WORKERS = 2
IMAGES = 10_000
TORCHVISION_PART = 0.4  # of the images, for torchvision's rounds to take about as long


def main() -> int:
    options = parse_flags()
    device = set_up_device(options.device)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    split = pick_images(options)
    few = split.take(np.arange(max(BATCH_SIZE, round(TORCHVISION_PART * len(split)))))

    ours = TrainLoader(split, BATCH_SIZE, Augmentation(), device=device)
    torchvisions = torchvision_loader(few, Augmentation(), batch_size=BATCH_SIZE, workers=WORKERS)
    rates = {"ours": [], "torchvision": []}
    for round_number in range(options.rounds + 1):
        measured = {
            "ours": images_per_second(ours.epoch(round_number), device),
            "torchvision": images_per_second(iter(torchvisions), device),
        }
        print(f"{f'round {round_number}' if round_number else 'warm-up'}: " + line(measured), flush=True)
        if round_number:
            for name, rate in measured.items():
                rates[name].append(rate)

    medians = {name: statistics.median(values) for name, values in rates.items()}
    ratios = [ours / theirs for ours, theirs in zip(rates["ours"], rates["torchvision"], strict=True)]
    results = harness.provenance(device) | {
        "data": options.data,
        "image_size": options.image_size,
        "batch_size": BATCH_SIZE,
        "torchvision_processes": WORKERS,
        "num_images": {"ours": len(split), "torchvision": len(few)},
        "rounds": options.rounds,
        "images_per_second": medians,
        "ratio": statistics.median(ratios),
        "ratios": ratios,
    }
    harness.write_results(results, options.output)
    report(results, options.output)
    return 0


def pick_images(options: argparse.Namespace) -> Split:
    """As many training images as --images says. Raises UserError if there are not so many."""
    train = dataset.load(options.data, image_size=options.image_size).train
    count = min(IMAGES, len(train)) if options.images is None else options.images
    return harness.some_of(train, count, at_least=BATCH_SIZE, source=options.data)


def images_per_second(batches: Iterator[tuple[Tensor, Tensor]], device: torch.device) -> float:
    """How fast batches come, when each is on the device and nothing else is done with it."""
    harness.synchronize(device)
    started, count = time.perf_counter(), 0
    for images, _ in batches:
        count += len(images.to(device))
    harness.synchronize(device)
    return count / (time.perf_counter() - started)


def line(measured: dict[str, float]) -> str:
    return ", ".join(f"{name} {rate:,.0f}" for name, rate in measured.items()) + " images/s"


def report(results: dict, path: str) -> None:
    rates = results["images_per_second"]
    print(f"\n{results['device']}, {results['data']}, median of {results['rounds']}\n")
    print("| loader | images/s |\n|---|--:|")
    print(f"| ours | {rates['ours']:,.0f} |\n| torchvision, {WORKERS} processes | {rates['torchvision']:,.0f} |")
    print(f"| ratio | {results['ratio']:.1f} |\n\nResults: {path}")


def parse_flags() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--data", default="cifar10", help="cifar10, digits, or a folder of images")
    parser.add_argument("--output", default=f"{harness.RESULTS}/augment.json", help="JSON file (default: %(default)s)")
    parser.add_argument(
        "--images", type=harness.positive, help=f"images in a round of ours (default: {IMAGES:,}, or all)"
    )
    parser.add_argument(
        "--image-size", type=harness.positive, default=32, help="side of the images (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=harness.positive, default=9, help="rounds that count (default: %(default)s)")
    parser.add_argument(
        "--threads", type=harness.positive, help="threads of PyTorch on the CPU (default: its own choice)"
    )
    parser.add_argument("--device", choices=DEVICES, default="auto", help="auto: CUDA, else MPS, else the CPU")
    return parser.parse_args()


if __name__ == "__main__":
    errors.run(main)
