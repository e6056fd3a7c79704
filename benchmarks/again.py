"""Time main_ens.py with its members' logits at hand: what a second look at the same ensemble takes, imports aside.

    python benchmarks/again.py checkpoints/densenet.pt checkpoints/mobilenetv2.pt checkpoints/resnext.pt

The checkpoints and flags are main_ens.py's. It runs once, which asks the networks where nothing is kept yet, and then
again and again, all in one process; pictures and figures go to a folder that is removed.
"""

import argparse
import contextlib
import io
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import errors
from common.device import DEVICES, set_up_device

import main_ens
from benchmarks import harness


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoints", nargs="*", help="(default: those of main_ens.py)")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="(default: auto)")
    parser.add_argument("--rounds", type=harness.positive, default=5, help="second looks (default: %(default)s)")
    parser.add_argument("--output", default=f"{harness.RESULTS}/again.json", help="JSON file (default: %(default)s)")
    options = parser.parse_args()
    results = harness.provenance(set_up_device(options.device))
    with tempfile.TemporaryDirectory() as folder:
        flags = [*options.checkpoints, "--device", options.device, "--plot-dir", folder]
        first, *others = [seconds(flags) for _ in range(1 + options.rounds)]
    again = statistics.median(others)
    results |= {"rounds": options.rounds, "seconds": {"first": first, "again": again, "all": others}}
    harness.write_results(results, options.output)
    print(f"the first time {first:.1f} s, again {again:.2f} s. Results: {options.output}")
    return 0


def seconds(flags: list[str]) -> float:
    """Of main_ens.py with these flags, without what it prints."""
    argv, sys.argv = sys.argv, ["main_ens.py", *flags]
    started = time.perf_counter()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            main_ens.main()
    finally:
        sys.argv = argv
    return time.perf_counter() - started


if __name__ == "__main__":
    errors.run(main)
