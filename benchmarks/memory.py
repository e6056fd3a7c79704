"""Measure what keeping freed memory is worth on the CPU (device.keep_freed_memory): training steps with it and without.

The setting cannot be taken back within a process, so each measurement is a process of its own, in turn.
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import device, errors
from common.command_line import Parser

from benchmarks import harness
from models import NETWORKS

BATCH_SIZE = 64


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("--output", default=f"{harness.RESULTS}/memory.json", help="(default: %(default)s)")
    parser.add_argument(
        "--rounds", type=harness.positive, default=3, help="processes of each kind and network (default: 3)"
    )
    parser.add_argument("--steps", type=harness.positive, default=6, help="training steps of a process (default: 6)")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), help="(default: all)")
    parser.add_argument("--measure", nargs=2, metavar=("NETWORK", "KEEP"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(measure(options.measure[0], options.measure[1] == "kept", options.steps))
        return 0

    networks = {}
    print("| network | freed memory given back | kept | ratio |\n|---|--:|--:|--:|")
    for name in options.networks:
        rates = {"given_back": [], "kept": []}
        for _ in range(options.rounds):
            for kind, values in rates.items():
                command = [sys.executable, __file__, "--measure", name, kind, "--steps", str(options.steps)]
                values.append(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        medians = {kind: statistics.median(values) for kind, values in rates.items()}
        networks[name] = {"images_per_second": medians, "ratio": medians["kept"] / medians["given_back"]}
        print(
            f"| {name} | {medians['given_back']:.1f} | {medians['kept']:.1f} | {networks[name]['ratio']:.2f} |",
            flush=True,
        )
    provenance = harness.provenance(torch.device("cpu"))
    harness.write_results(provenance | {"batch_size": BATCH_SIZE, "networks": networks}, options.output)
    return 0


def measure(name: str, keep: bool, steps: int) -> float:
    """Images a second of training on one batch, the median over `steps` after a first."""
    if keep:
        device.keep_freed_memory()
    model = NETWORKS[name](10).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    images = torch.randn(BATCH_SIZE, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (BATCH_SIZE,))
    seconds = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    return BATCH_SIZE / statistics.median(seconds[1:])


if __name__ == "__main__":
    errors.run(main)
