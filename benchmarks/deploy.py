"""Measure how fast an ensemble runs: the files that export.py writes and the PyTorch module, or the cascade.

torch   models.ensemble.Ensemble, as members.load gives it
onnx    the ONNX file in onnxruntime, with as many threads as PyTorch takes
pt2     the file of torch.export, loaded and run by PyTorch

All take uint8 images and give probabilities, for each network alone and for the ensemble of the three. The networks are
of full size and untrained: the weights change nothing about the speed. Latency is the time for one image; throughput is
that of a batch of 64. The three take turns, round by round, so that whatever else the machine does meets all; the first
call of a turn is not counted.

With --cascade, trained checkpoints are asked for the test images of their data instead, as predict.py does: the whole
ensemble and the cascade of the same members, in turn, in batches, in the precision that --precision auto takes.

    python benchmarks/deploy.py --cascade checkpoints/*.pt --output benchmarks/results/cascade.json
"""

import argparse
import importlib.metadata
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import errors
from common.command_line import Parser
from common.device import autocast, pick_precision, set_up_device

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
CALLS = {1: 20, BATCH_SIZE: 1}  # counted in a turn, by batch


def main() -> int:
    options = parse_flags()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = set_up_device("cpu")
    if options.cascade:
        results = harness.provenance(device) | measure_cascade(options, device)
        harness.write_results(results, options.output)
        return 0
    for name in export.FORMATS:
        export.require(name)

    networks = {}
    print("| network | run by | MB | latency, ms | 95 % within, ms | ratio | images/s | ratio |")
    print("|---|---|--:|--:|--:|--:|--:|--:|")
    for name in options.networks:
        networks[name] = measure(untrained(name), options.rounds)
        for runner, row in networks[name].items():
            size = f"{row['bytes'] / 1e6:.1f}" if row["bytes"] else ""
            print(
                f"| {name} | {runner} | {size} | {row['latency_ms']:.2f} | {row['latency_ms_95']:.2f} | "
                f"{row['latency_ratio']:.2f} | {row['images_per_second']:,.1f} | {row['throughput_ratio']:.2f} |",
                flush=True,
            )
    results = harness.provenance(device)
    for name in export.FORMATS["onnx"].packages:
        results["versions"][name] = importlib.metadata.version(name)
    results |= {"image_size": IMAGE_SIZE, "batch_size": BATCH_SIZE, "rounds": options.rounds, "networks": networks}
    harness.write_results(results, options.output)
    print(f"\n{results['device']}; ratios to torch, above 1 is faster. Results: {options.output}")
    return 0


def untrained(name: str) -> Ensemble:
    """The ensemble of one network, or of all."""
    members = [Member(NETWORKS[part](10), MEAN, STD) for part in (NETWORKS if name == ENSEMBLE else [name])]
    ensemble = Ensemble(members, [str(number) for number in range(10)], IMAGE_SIZE)
    return ensemble.to(memory_format=torch.channels_last).eval()


@torch.inference_mode()
def measure(ensemble: Ensemble, rounds: int) -> dict[str, dict[str, Any]]:
    """Size, latency and throughput by runner, with their ratios to PyTorch's."""
    files = {name: file_format.write(ensemble, {}) for name, file_format in export.FORMATS.items()}
    runners = {"torch": ensemble} | {name: export.FORMATS[name].read(content) for name, content in files.items()}
    generator = torch.Generator().manual_seed(0)
    shape = (BATCH_SIZE, 3, IMAGE_SIZE, IMAGE_SIZE)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)

    seconds = {name: {batch: [] for batch in CALLS} for name in runners}
    for _ in range(rounds):
        for batch, calls in CALLS.items():
            for name, run in runners.items():
                seconds[name][batch] += time_calls(run, images[:batch], calls)

    medians = {name: {batch: statistics.median(spent[batch]) for batch in CALLS} for name, spent in seconds.items()}
    return {
        name: {
            "bytes": len(files[name]) if name in files else None,
            "latency_ms": 1000 * medians[name][1],
            "latency_ms_95": 1000 * float(np.percentile(spent[1], 95)),
            "latency_ratio": medians["torch"][1] / medians[name][1],
            "images_per_second": BATCH_SIZE / medians[name][BATCH_SIZE],
            "throughput_ratio": medians["torch"][BATCH_SIZE] / medians[name][BATCH_SIZE],
        }
        for name, spent in seconds.items()
    }


def measure_cascade(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Accuracy and milliseconds an image of the whole ensemble and of the cascade, and the ratio of the medians."""
    contents = members.read_all(options.cascade)
    data = main_ens.load_first(contents[0], argparse.Namespace(data=None, data_url=None, test_size=None))
    rows = np.random.default_rng(0).permutation(len(data.test))[: options.images]
    images, labels = torch.from_numpy(data.test.images[rows]), torch.from_numpy(data.test.labels[rows])
    precision = pick_precision("auto", device)
    ensembles = {
        "whole": members.load(options.cascade),
        "cascade": members.load(options.cascade, cascade=options.threshold),
    }
    milliseconds, figures = {name: [] for name in ensembles}, {}
    for number in range(options.rounds + 1):  # the first one warms up
        for name, ensemble in ensembles.items():
            started = time.perf_counter()
            with torch.inference_mode(), autocast(device, precision):
                probs = torch.cat([ensemble(batch) for batch in images.split(options.batch_size)])
            if number:
                milliseconds[name].append(1000 * (time.perf_counter() - started) / len(images))
            figures[name] = {"accuracy": metrics.accuracy(probs, labels)}
    for name, spent in milliseconds.items():
        figures[name] |= {"milliseconds": statistics.median(spent), "rounds": spent}
        print(f"{name}: {100 * figures[name]['accuracy']:.2f} %, {figures[name]['milliseconds']:.2f} ms an image")
    ratio = figures["cascade"]["milliseconds"] / figures["whole"]["milliseconds"]
    print(f"the cascade at {options.threshold:g} takes {ratio:.2f} of the time")
    return {
        "data": data.source,
        "num_images": len(images),
        "batch_size": options.batch_size,
        "precision": precision,
        "members": members.names(options.cascade),
        "threshold": options.threshold,
        **figures,
        "ratio": ratio,
    }


def time_calls(run: Callable[[Tensor], Tensor], images: Tensor, calls: int) -> list[float]:
    """Seconds of each call, after one that is not counted."""
    run(images)
    seconds = []
    for _ in range(calls):
        started = time.perf_counter()
        run(images)
        seconds.append(time.perf_counter() - started)
    return seconds


def parse_flags() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--output", default=f"{harness.RESULTS}/deploy.json", help="JSON file (default: %(default)s)")
    known = [ENSEMBLE, *NETWORKS]
    parser.add_argument("--networks", nargs="+", choices=known, default=known, help="(default: all)")
    parser.add_argument("--rounds", type=harness.positive, default=5, help="turns of each (default: %(default)s)")
    parser.add_argument("--cascade", nargs="+", type=Path, default=[], metavar="CHECKPOINT", help="measure the cascade")
    parser.add_argument(
        "--threshold", type=float, default=DEFAULT_THRESHOLD, help="its threshold (default: %(default)s)"
    )
    parser.add_argument("--images", type=harness.positive, default=2000, help="of --cascade (default: %(default)s)")
    parser.add_argument("--batch-size", type=harness.positive, default=512, help="of --cascade (default: %(default)s)")
    parser.add_argument("--threads", type=harness.positive, help="threads on the CPU (default: PyTorch's own choice)")
    return parser.parse_args()


if __name__ == "__main__":
    errors.run(main)
