"""What every benchmark writes beside its figures: the machine, the versions, the commit and the command."""

import json
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
import torchvision

import files

ROOT = Path(__file__).resolve().parents[1]
RESULTS = "benchmarks/results"


def provenance(device: torch.device) -> dict[str, Any]:
    """What a reader needs to judge a figure, or to measure it again."""
    return {"device": device_name(device), "versions": versions(), "commit": commit(), "command": command()}


def device_name(device: torch.device) -> str:
    """The GPU's model, or the processor's and how many threads PyTorch takes there."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    name = f"{processor()}, {threads} thread{'s' if threads != 1 else ''}"
    return f"MPS, {name}" if device.type == "mps" else name


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # only Linux has it
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": str(torchvision.__version__),
        "numpy": np.__version__,
        "pillow": PIL.__version__,
    }


def commit() -> str | None:
    """The commit of the code that runs, with "-dirty" where a file differs from it; None outside a git repository.

    `benchmarks/results` is left out of the comparison: what one benchmark writes does not make the next one dirty.
    """
    try:
        top, head = git("rev-parse", "--show-toplevel", "HEAD").split("\n")
        if Path(top).resolve() != ROOT:
            return None  # unpacked somewhere inside another project's repository
        changes = git("status", "--porcelain", "--", ".", f":(exclude){RESULTS}")
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("-dirty" if changes else "")


def git(*arguments: str) -> str:
    result = subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, encoding="utf-8")
    return result.stdout.strip()


def command() -> str:
    return shlex.join(["python", *sys.argv])


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was given, so that a clock read now tells the truth."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def write_results(results: dict[str, Any], path: str | Path) -> None:
    """Raises UserError where the file cannot be written."""
    with files.replacing(path, "the results") as file:
        file.write((json.dumps(results, indent=2, ensure_ascii=False) + "\n").encode())
