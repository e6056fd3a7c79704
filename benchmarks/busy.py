"""Measure what training loses where another program keeps a core busy, by how long OpenMP threads spin.

A MobileNetV2 trains in a process of its own, on quiet cores and beside another that trains on one core, at the lowest
priority: started from the same session, where the priority counts, and from another, as from another terminal, where
Linux (sched_autogroup) gives each session its share whatever the priority. All settings take turns, round by round; a
figure is the median of the rounds.

    python benchmarks/busy.py --spins default 0 1000 4000 16000
"""

import argparse
import itertools
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import errors
from common.command_line import Parser
from common.device import set_up_device
from common.errors import UserError

import torch
from torch.nn import functional as F

from benchmarks import harness
from benchmarks.harness import positive
from models import NETWORKS

BESIDE = ("nothing", "same session", "another session")


def main() -> int:
    options = parse_flags()
    if options.train is not None:
        print(train(options.train, options.batch_size))
        return 0
    if not shutil.which("taskset"):
        raise UserError("this benchmark ties a process to a core with taskset, of util-linux, which is not there")
    figures: dict[tuple[str, str], list[float]] = {}
    for number, beside in itertools.product(range(options.rounds), BESIDE):
        other = start_other(beside, options)
        try:
            for spins in options.spins:
                rate = float(subprocess.run(command(options), env=environment(spins), **CAPTURED).stdout.split()[-1])
                figures.setdefault((spins, beside), []).append(rate)
                print(f"round {number + 1}, {spins} spins, beside {beside}: {rate:.1f} images/s", flush=True)
        finally:
            if other:
                other.kill()
                other.wait()
    rows = [
        {"spins": spins, "beside": beside, "images_per_second": statistics.median(rates), "rounds": rates}
        for (spins, beside), rates in figures.items()
    ]
    results = harness.provenance(torch.device("cpu")) | {"batch_size": options.batch_size, "figures": rows}
    harness.write_results(results, options.output)
    print(f"\n| spins | {' | '.join(f'beside {beside}' for beside in BESIDE)} |\n|---|{'--:|' * len(BESIDE)}")
    for spins in options.spins:
        print(f"| {spins} | {' | '.join(f'{statistics.median(figures[spins, beside]):.1f}' for beside in BESIDE)} |")
    return 0


CAPTURED = {"check": True, "stdout": subprocess.PIPE, "text": True}


def command(options: argparse.Namespace, seconds: float | None = None) -> list[str]:
    train_for = str(options.seconds if seconds is None else seconds)
    return [sys.executable, __file__, "--train", train_for, "--batch-size", str(options.batch_size)]


def environment(spins: str) -> dict[str, str]:
    """Without a setting of the caller's own; "default" is libgomp's."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("GOMP_", "OMP_"))}
    return own if spins == "default" else own | {"GOMP_SPINCOUNT": spins}


def start_other(beside: str, options: argparse.Namespace) -> subprocess.Popen | None:
    """Something else that trains, tied to the last core, at the lowest priority."""
    if beside == "nothing":
        return None
    core = str(max(os.sched_getaffinity(0)))
    process = subprocess.Popen(
        ["taskset", "-c", core, "nice", "-n", "19", *command(options, seconds=1e6)],
        env=environment("default") | {"OMP_NUM_THREADS": "1"},
        start_new_session=beside == "another session",
        stdout=subprocess.PIPE,
    )
    process.stdout.readline()  # it trains
    return process


def train(seconds: float, batch_size: int) -> float:
    """Train for so long after two steps; returns images a second."""
    set_up_device("cpu")
    torch.manual_seed(0)
    model = NETWORKS["mobilenetv2"](10, width=0.5).train().to(memory_format=torch.channels_last)
    images = torch.randn(batch_size, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (batch_size,))
    for count in itertools.count():
        if count == 2:
            print("training", flush=True)
            started = time.perf_counter()
        if count > 2 and (taken := time.perf_counter() - started) >= seconds:
            return (count - 2) * batch_size / taken
        F.cross_entropy(model(images), labels).backward()
        model.zero_grad(set_to_none=True)
    raise AssertionError


def parse_flags() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--spins", nargs="+", default=["default", "0", "1000", "4000", "16000"], help="GOMP_SPINCOUNT")
    parser.add_argument("--rounds", type=positive, default=3, help="(default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=8, help="of each measurement (default: %(default)g)")
    parser.add_argument("--batch-size", type=positive, default=64, help="(default: %(default)s)")
    parser.add_argument("--output", default=f"{harness.RESULTS}/busy.json", help="(default: %(default)s)")
    parser.add_argument("--train", type=float, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    errors.run(main)
