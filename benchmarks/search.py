"""Search for a recipe with short runs: one script, several sets of flags, several seeds. Held-out images decide.

Every run holds out --val-size training images, on which its last epoch is evaluated. Test results decide nothing and
are not stored. Each run is a process with one thread; one per core runs at a time, which gives the most images per
second on a CPU with few cores. Runs that are already in the output are skipped: the same command continues after a
stop, and more flags or seeds add runs.

    python benchmarks/search.py --script mobilenetv2.py --output benchmarks/results/search/width05.json \
        --run 'batch 128: --batch-size 128' --run 'batch 64: --batch-size 64' -- --width 0.5 --epochs 4
"""

import argparse
import itertools
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import errors
from common.errors import UserError

import torch

from benchmarks import harness
from dataset.image_folder import num_cores
from evaluation.members import SCRIPTS
from training.history import read_csv

FEW = "100"  # test images: every epoch ends with a test, whose result is not used here
KEPT = ("val_accuracy", "val_loss", "train_accuracy", "train_loss")


def main() -> int:
    parser = harness.make_parser(__doc__, "search.json", data="cifar10")
    parser.add_argument("--script", choices=list(SCRIPTS.values()), required=True)
    parser.add_argument("--run", type=named_flags, action="append", required=True, metavar="'LABEL: FLAGS'")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="(default: 0)")
    parser.add_argument("--val-size", type=harness.positive, default=5000, help="(default: %(default)s)")
    parser.add_argument("flags", nargs="*", metavar="-- FLAGS", help="flags of every run")
    options = parser.parse_args()
    output = Path(options.output)
    before = json.loads(output.read_text()) if output.exists() else {"runs": []}
    rows: list[dict[str, Any]] = before["runs"]
    done = {(row["script"], row["flags"], row["seed"]) for row in rows}
    about = harness.provenance(torch.device("cpu")) | {"data": options.data, "val_size": options.val_size}
    for name in ("data", "val_size"):
        if before.get(name, about[name]) != about[name]:
            raise UserError(f"{output} has runs with {name} {before[name]}, not {about[name]}; give another --output")
    commit = about.pop("commit")  # stored per run, because runs can be added later
    runs = [(label, shlex.join([*options.flags, *own])) for label, own in options.run]
    wanted = [
        {"label": label, "script": options.script, "flags": flags, "seed": seed, "commit": commit}
        for seed in options.seeds
        for label, flags in runs
        if (options.script, flags, seed) not in done
    ]
    one_at_a_time = threading.Lock()

    def run(row: dict[str, Any]) -> None:
        row = row | train(options, row["flags"], row["seed"])
        with one_at_a_time:
            rows.append(row)
            harness.write_results(about | {"runs": rows}, output)
        accuracy, loss = 100 * row["val_accuracy"], row["val_loss"]
        print(f"{row['label']}, seed {row['seed']}: {accuracy:.2f} %, loss {loss:.4f}", flush=True)

    with ThreadPoolExecutor(num_cores()) as pool:
        list(pool.map(run, wanted))
    harness.print_table(table(rows))
    return 0


def train(options: argparse.Namespace, flags: str, seed: int) -> dict[str, float]:
    """The results of the last epoch of one run. Raises UserError if the script fails."""
    with tempfile.TemporaryDirectory(prefix="search-") as folder:
        command = [
            sys.executable, str(harness.ROOT / options.script), *shlex.split(flags), "--seed", str(seed),
            "--data", options.data, "--val-size", str(options.val_size), "--test-size", FEW,
            "--name", "run", "--checkpoint-dir", folder, "--plot-dir", folder,
        ]  # fmt: skip
        started, one_thread = time.monotonic(), os.environ | {"OMP_NUM_THREADS": "1"}
        ended = subprocess.run(command, env=one_thread, capture_output=True, text=True, check=False)
        if ended.returncode:
            raise UserError(f"{options.script} {flags} ended with status {ended.returncode}: {ended.stderr[-500:]}")
        last = read_csv(Path(folder) / "run.csv")[-1]
    return {name: last[name] for name in KEPT} | {"seconds": time.monotonic() - started}


def table(rows: list[dict[str, Any]]) -> dict[str, dict[str, str]]:
    """Mean and standard deviation over the seeds, one row per set of flags."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[f"{row['label']} ({row['script']} {row['flags']})"].append(row)
    cells = {label: {"seeds": str(len(group))} for label, group in groups.items()}
    for label, name in itertools.product(groups, KEPT):
        scale, digits = (100, 2) if name.endswith("accuracy") else (1, 3)
        values = [scale * row[name] for row in groups[label]]
        spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        cells[label][name] = f"{statistics.mean(values):.{digits}f}{spread}"
    return cells


def named_flags(text: str) -> tuple[str, list[str]]:
    """argparse type of --run: a label, a colon, and flags."""
    label, colon, flags = text.partition(":")
    if not colon:
        raise argparse.ArgumentTypeError(f"{text!r} has no colon; expected 'label: --flag value'")
    return label.strip(), shlex.split(flags)


if __name__ == "__main__":
    errors.run(main)
