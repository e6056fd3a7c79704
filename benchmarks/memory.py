"""Measure the speed-up from keeping freed memory on the CPU (device.keep_freed_memory), with a plain training loop.

Each measurement runs in its own process. They take turns.
"""

import statistics
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import errors
from common.device import keep_freed_memory

import torch

from benchmarks import harness, plain
from models import NETWORKS

BATCH_SIZE = 64


def main() -> int:
    flags = {"networks": list(NETWORKS), "rounds": 3, "seconds": 8.0}
    options = harness.make_parser(__doc__, "memory.json", **flags).parse_args()
    if options.measure:
        network, kind = options.measure
        if kind == "kept":
            keep_freed_memory()
        print(plain.rate_on_one_batch(network, options.seconds, BATCH_SIZE))
        return 0
    networks, rows = {}, {}
    for network in options.networks:
        ways = {kind: partial(harness.in_subprocess, network, kind) for kind in ("given_back", "kept")}
        rates = harness.in_turn(ways, options.rounds, show=(network + ", {:.1f} images/s").format)
        medians = {kind: statistics.median(values) for kind, values in rates.items()}
        ratio = medians["kept"] / medians["given_back"]
        networks[network] = {"images_per_second": medians, "ratio": ratio}
        rows[network] = {kind: f"{rate:.1f}" for kind, rate in medians.items()} | {"ratio": f"{ratio:.2f}"}
    return harness.report(options, torch.device("cpu"), rows, batch_size=BATCH_SIZE, networks=networks)


if __name__ == "__main__":
    errors.run(main)
