"""Measure how fast an ensemble runs: the files that export.py writes, and the PyTorch module.

torch   models.ensemble.Ensemble, as members.load returns it
onnx    the ONNX file in onnxruntime, with as many threads as PyTorch
pt2     the file of torch.export, loaded and run by PyTorch

All take uint8 images and return probabilities, for each network alone and for the ensemble of the three. The networks
have full size and random weights, which do not change the speed. Latency is the time for one image, throughput the
speed with a batch of 64. The three runners take turns; the first call of each turn does not count.

With --cascade, it measures accuracy and time of trained networks on test images: the whole ensemble and the cascade.

    python benchmarks/deploy.py --cascade checkpoints/*.pt --output benchmarks/results/cascade.json
"""

import argparse
import importlib.metadata
import itertools
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import errors
from common.device import autocast, pick_precision, set_up_device

import numpy as np
import torch
from torch import Tensor

import export
import main_ens
from benchmarks import harness
from evaluation import members, metrics
from evaluation.cost import DEFAULT_THRESHOLD
from models import NETWORKS
from models.ensemble import Ensemble, Member
from utils import MEAN, STD

ENSEMBLE = "ensemble"
IMAGE_SIZE = 32
BATCH_SIZE = 64
CALLS = {1: 20, BATCH_SIZE: 1}  # calls per turn that count, by batch size


def main() -> int:
    parser = harness.make_parser(__doc__, "deploy.json", rounds=5)
    known = [ENSEMBLE, *NETWORKS]
    parser.add_argument("--networks", nargs="+", choices=known, default=known, help="(default: all)")
    parser.add_argument("--cascade", nargs="+", default=[], metavar="CHECKPOINT", help="measure the cascade")
    of_cascade = {"help": "for --cascade (default: %(default)s)"}
    parser.add_argument("--threshold", type=float, default=DEFAULT_THRESHOLD, **of_cascade)
    parser.add_argument("--images", type=harness.positive, default=2000, **of_cascade)
    parser.add_argument("--batch-size", type=harness.positive, default=512, **of_cascade)
    options = parser.parse_args()
    device = set_up_device("cpu")
    if options.cascade:
        return measure_cascade(options, device)
    for name in export.FORMATS:
        export.require(name)
    networks = {name: measure(untrained(name), options.rounds, device) for name in options.networks}
    rows = {
        f"{name}, {runner}": {
            "MB": f"{row['bytes'] / 1e6:.1f}" if row["bytes"] else "",
            "latency, ms": f"{row['latency_ms']:.2f}",
            "95 % within, ms": f"{row['latency_ms_95']:.2f}",
            "ratio of latency": f"{row['latency_ratio']:.2f}",
            "images/s": f"{row['images_per_second']:,.1f}",
            "ratio of images/s": f"{row['throughput_ratio']:.2f}",
        }
        for name, runners in networks.items()
        for runner, row in runners.items()
    }
    packages = {name: importlib.metadata.version(name) for name in export.FORMATS["onnx"].packages}
    return harness.report(
        options, device, rows, packages=packages, image_size=IMAGE_SIZE, batch_size=BATCH_SIZE, networks=networks
    )


def untrained(name: str) -> Ensemble:
    """An ensemble of one network, or of all three, with random weights."""
    parts = [Member(NETWORKS[part](10), MEAN, STD) for part in (NETWORKS if name == ENSEMBLE else [name])]
    ensemble = Ensemble(parts, [str(number) for number in range(10)], IMAGE_SIZE)
    return ensemble.to(memory_format=torch.channels_last).eval().requires_grad_(False)


@torch.inference_mode()
def measure(ensemble: Ensemble, rounds: int, device: torch.device) -> dict[str, dict[str, Any]]:
    """Size, latency and throughput of each runner, with ratios to PyTorch; a ratio above 1 means faster."""
    files = {name: file_format.write(ensemble, {}) for name, file_format in export.FORMATS.items()}
    runners = {"torch": ensemble} | {name: export.FORMATS[name].read(content) for name, content in files.items()}
    shape = (BATCH_SIZE, 3, IMAGE_SIZE, IMAGE_SIZE)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    def seconds_of_calls(run: Callable[[Tensor], Tensor], batch: int) -> list[float]:
        return [harness.seconds_of(partial(run, images[:batch]), device) for _ in range(1 + CALLS[batch])][1:]

    spent = {}
    for batch in CALLS:
        turns = harness.in_turn({name: partial(seconds_of_calls, run, batch) for name, run in runners.items()}, rounds)
        spent[batch] = {name: list(itertools.chain.from_iterable(calls)) for name, calls in turns.items()}
    medians = {batch: {name: statistics.median(own) for name, own in spent[batch].items()} for batch in CALLS}
    return {
        name: {
            "bytes": len(files[name]) if name in files else None,
            "latency_ms": 1000 * medians[1][name],
            "latency_ms_95": 1000 * float(np.percentile(spent[1][name], 95)),
            "latency_ratio": medians[1]["torch"] / medians[1][name],
            "images_per_second": BATCH_SIZE / medians[BATCH_SIZE][name],
            "throughput_ratio": medians[BATCH_SIZE]["torch"] / medians[BATCH_SIZE][name],
        }
        for name in runners
    }


def measure_cascade(options: argparse.Namespace, device: torch.device) -> int:
    contents, precision = members.read_all(options.cascade), pick_precision("auto", device)
    data = main_ens.load_data_of(contents[0])
    test = data.test.take(np.random.default_rng(0).permutation(len(data.test))[: options.images])
    images, labels = torch.from_numpy(test.images), torch.from_numpy(test.labels)
    thresholds = {"whole": None, "cascade": options.threshold}
    ensembles = {name: members.load(options.cascade, cascade=threshold) for name, threshold in thresholds.items()}

    @torch.inference_mode()
    def probs(ensemble: Ensemble) -> Tensor:
        with autocast(device, precision):
            return torch.cat([ensemble(batch) for batch in images.split(options.batch_size)])

    ways = {name: partial(harness.seconds_of, partial(probs, ensemble), device) for name, ensemble in ensembles.items()}
    figures, rows = {}, {}
    for name, seconds in harness.in_turn(ways, options.rounds, warm_up=True).items():
        accuracy = metrics.accuracy(probs(ensembles[name]), labels)
        milliseconds = [1000 * turn / len(images) for turn in seconds]
        figures[name] = {"accuracy": accuracy, "milliseconds": statistics.median(milliseconds), "turns": milliseconds}
        rows[name] = {"test accuracy": f"{accuracy:.2%}", "ms per image": f"{figures[name]['milliseconds']:.2f}"}
    ratio = figures["cascade"]["milliseconds"] / figures["whole"]["milliseconds"]
    rows["cascade / whole"] = {"ms per image": f"{ratio:.2f}"}
    names = members.names([path for path, _ in contents])
    about = {"data": data.source, "num_images": len(images), "precision": precision, "members": names}
    return harness.report(options, device, rows, **about, figures=figures, ratio=ratio)


if __name__ == "__main__":
    errors.run(main)
