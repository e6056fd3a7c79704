"""What the benchmarks share: flags, turns, timing, subprocesses, tables, and the provenance of the results."""

import argparse
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import files
from common.command_line import Parser
from common.device import DEVICES, cpu_has_bfloat16
from common.errors import UserError
from common.text import pluralize

import numpy as np
import PIL
import torch
import torchvision

import dataset
from dataset import Dataset
from models import NETWORKS

ROOT = Path(__file__).resolve().parents[1]
RESULTS = "benchmarks/results"


def make_parser(description: str | None, output: str, **defaults: Any) -> Parser:
    """The parser of a script that writes `output`; it has those flags of `FLAGS` whose defaults are given here."""
    parser = Parser(description)
    parser.add_argument("--output", default=f"{RESULTS}/{output}", help="(default: %(default)s)")
    for name, default in defaults.items():
        parser.add_argument("--" + name.replace("_", "-"), default=default, **FLAGS[name])
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)  # used by in_subprocess
    return parser


def positive(text: str) -> int:
    """argparse type: an integer of 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def above_zero(text: str) -> float:
    """argparse type: a finite number above 0."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number above 0")
    return value


FLAGS: dict[str, dict[str, Any]] = {
    "data": {"help": "cifar10, digits, or a folder of images (default: %(default)s)"},
    "images": {"type": positive, "help": "use at most this many training images"},
    "image_size": {"type": positive, "help": "side of the images (default: %(default)s)"},
    "networks": {"nargs": "+", "choices": list(NETWORKS), "help": "(default: all)"},
    "batch_size": {"type": positive, "help": "images per step (default: %(default)s)"},
    "rounds": {"type": positive, "help": "number of rounds; all alternatives run in each (default: %(default)s)"},
    "seconds": {"type": above_zero, "help": "approximate duration of a measurement (default: %(default)g)"},
    "device": {"choices": DEVICES, "help": "auto: CUDA, else MPS, else the CPU"},
}


def load_images(options: argparse.Namespace) -> Dataset:
    """Load --data with at most --images random training images."""
    data = dataset.load(options.data, image_size=options.image_size)
    rows = np.random.default_rng(0).permutation(len(data.train))[: options.images]
    return replace(data, train=data.train.take(rows))


def in_turn(
    ways: dict[str, Callable[[], Any]], rounds: int, *, warm_up: bool = False, show: Callable[[Any], str] | None = None
) -> dict[str, list[Any]]:
    """The results of each of `ways` in each round. They take turns, so that other load on the machine affects all.

    With `warm_up`, a round 0 comes first, which does not count. `show` formats a result, which is printed at once.
    """
    values: dict[str, list[Any]] = {name: [] for name in ways}
    for number in range(0 if warm_up else 1, rounds + 1):
        for name, measure in ways.items():
            value = measure()
            if show:
                print(f"round {number}, {name}: {show(value)}", flush=True)
            if number:
                values[name].append(value)
    return values


def in_subprocess(*measured: object, environment: dict[str, str] | None = None) -> Any:
    """Run this script again, with its own flags and --measure `measured`; return the JSON in its last line of output.

    For settings that a process cannot undo: of the memory allocator, of OpenMP and of TF32. Raises UserError if the
    process fails, without a message if it has printed one.
    """
    what, environment = [str(value) for value in measured], os.environ | (environment or {})
    command = [sys.executable, *sys.argv, "--measure", *what]
    ended = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if ended.returncode < 0:
        raise UserError(
            f"{' '.join(what)}: the process was killed by signal {-ended.returncode}; if memory ran out, use smaller "
            "batches, or leave it out"
        )
    if ended.returncode:
        raise UserError("", silent=True)
    return json.loads(ended.stdout.splitlines()[-1])


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """The seconds that `work` takes, until the device has finished."""
    wait = (lambda: None) if device.type == "cpu" else torch.accelerator.synchronize
    wait()
    started = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - started


def report(
    options: argparse.Namespace, device: torch.device, rows: dict[str, dict[str, str]], **results: object
) -> int:
    """Write `provenance`, the flags and `results` to --output, and print a table of `rows`. Returns exit status 0."""
    flags = {name: value for name, value in vars(options).items() if name not in ("output", "measure")}
    write_results(flags | provenance(device) | results, options.output)
    print_table(rows)
    print(f"\nResults: {options.output}")
    return 0


def write_results(results: dict[str, Any], path: str | Path) -> None:
    """Write JSON. Raises UserError if the file cannot be written."""
    with files.atomic_write(path, "the results") as file:
        file.write((json.dumps(results, indent=2, ensure_ascii=False) + "\n").encode())


def print_table(rows: dict[str, dict[str, str]]) -> None:
    """Print a Markdown table from `rows`: label → column → cell. Missing cells are empty."""
    columns = list(dict.fromkeys(column for cells in rows.values() for column in cells))
    print(f"\n| | {' | '.join(columns)} |\n|---|{'--:|' * len(columns)}")
    for label, cells in rows.items():
        print(f"| {' | '.join([label, *(cells.get(column, '') for column in columns)])} |")


def provenance(device: torch.device) -> dict[str, Any]:
    """Where and how the results were measured: the device, the versions, the commit and the command."""
    versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
    versions |= {"torchvision": str(torchvision.__version__), "numpy": np.__version__, "pillow": PIL.__version__}
    how = {"commit": commit(), "command": shlex.join(["python", *sys.argv])}
    return {"device": device_name(device), "versions": versions} | how


def device_name(device: torch.device) -> str:
    """The name of the GPU, or of the processor, its instructions that matter, and the number of PyTorch's threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    instructions = torch.backends.cpu.get_cpu_capability() + (" with bfloat16" if cpu_has_bfloat16() else "")
    name = f"{processor()} ({instructions}), {pluralize(torch.get_num_threads(), 'thread')}"
    return f"MPS, {name}" if device.type == "mps" else name


def processor() -> str:
    info = Path("/proc/cpuinfo")  # only Linux has it
    model = re.search(r"^model name\s*: (.*)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return model[1] if model else platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit of this code, with "-dirty" if a file differs from it; None outside a git repository.

    `benchmarks/results` is ignored: the results of one benchmark do not make the next one "-dirty".
    """

    def git(*arguments: str) -> str:
        command = ["git", "--git-dir=.git", *arguments]  # not the repository of a folder above
        return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, encoding="utf-8").stdout.strip()

    try:
        changes = git("status", "--porcelain", "--", ".", f":(exclude){RESULTS}")
        return git("rev-parse", "HEAD") + ("-dirty" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return None
