"""Measure how much training slows down when another program keeps a core busy, for several spin counts of OpenMP.

A MobileNetV2 of half the width trains in its own process, alone or next to another process that trains on one core with
the lowest priority. That one runs in the same session, where the priority counts, or in another session (like another
terminal), where Linux gives each session its share whatever the priority (sched_autogroup). All settings take turns,
round by round; a result is the median of the rounds.

    python benchmarks/busy.py --spins default 0 1000 4000 16000
"""

import os
import statistics
import subprocess
import sys
from collections import defaultdict
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import errors
from common.device import set_up_device
from common.errors import UserError

import torch

from benchmarks import harness, plain

BESIDE = ("nothing", "same session", "another session")


def main() -> int:
    parser = harness.make_parser(__doc__, "busy.json", rounds=3, seconds=8.0, batch_size=64)
    parser.add_argument("--spins", nargs="+", default=["default", "0", "1000", "4000", "16000"], help="GOMP_SPINCOUNT")
    options = parser.parse_args()
    if options.measure:
        set_up_device("cpu")
        for seconds in options.measure:
            print(plain.rate_on_one_batch("mobilenetv2", float(seconds), options.batch_size, width=0.5), flush=True)
        return 0
    settings = {f"{spins} spins, beside {beside}": (spins, beside) for beside in BESIDE for spins in options.spins}
    ways = {name: partial(measure, *setting, options.seconds) for name, setting in settings.items()}
    figures, table = [], defaultdict(dict)
    for name, rates in harness.in_turn(ways, options.rounds, show="{:.1f} images/s".format).items():
        spins, beside = settings[name]
        median = statistics.median(rates)
        figures.append({"spins": spins, "beside": beside, "images_per_second": median, "rounds": rates})
        table[spins][f"beside {beside}"] = f"{median:.1f}"
    return harness.report(options, torch.device("cpu"), table, figures=figures)


def measure(spins: str, beside: str, seconds: float) -> float:
    """Images per second of one setting."""
    environment = {"GOMP_SPINCOUNT": plain.LIBGOMP_SPINS if spins == "default" else spins}
    if beside == "nothing":
        return harness.in_subprocess(seconds, environment=environment)
    # The other process trains forever, pinned to the last core. It prints a first rate when it has started to train.
    core = str(max(os.sched_getaffinity(0)))
    with subprocess.Popen(
        ["taskset", "-c", core, "nice", "-n", "19", sys.executable, *sys.argv, "--measure", "0.1", "1e6"],
        env=os.environ | {"GOMP_SPINCOUNT": plain.LIBGOMP_SPINS, "OMP_NUM_THREADS": "1"},
        start_new_session=beside == "another session",
        stdout=subprocess.PIPE,
    ) as other:
        try:
            if not other.stdout.readline():
                raise UserError("", silent=True)  # it has printed its error
            return harness.in_subprocess(seconds, environment=environment)
        finally:
            other.kill()


if __name__ == "__main__":
    errors.run(main)
