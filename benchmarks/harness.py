"""What the benchmarks share: some of a data set's images, and what every one writes with its numbers.

That is the machine, the versions, the commit and the command.
"""

import argparse
import json
import math
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import files
from common.errors import UserError

import numpy as np
import PIL
import torch
import torchvision
from torch.utils.flop_counter import FlopCounterMode

from dataset import Split
from models import NETWORKS

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


def some_of(train: Split, count: int, *, at_least: int, source: str) -> Split:
    """`count` of the training images of --data `source`, of all classes.

    Raises UserError if there are not so many, or `count` is below `at_least`.
    """
    if len(train) < at_least:
        raise UserError(f"--data {source} has {len(train)} training images; expected {at_least} or more")
    if not at_least <= count <= len(train):
        raise UserError(f"--images {count}: expected {at_least} to {len(train)}, as many as --data {source} has")
    return train.take(np.random.default_rng(0).permutation(len(train))[:count])


def positive(text: str) -> int:
    """The type of a flag that counts something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was given, so that a clock read now tells the truth."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def write_results(results: dict[str, Any], path: str | Path) -> None:
    """Raises UserError if the file cannot be written."""
    with files.replacing(path, "the results") as file:
        file.write((json.dumps(results, indent=2, ensure_ascii=False) + "\n").encode())


def flops_per_image(network: str, num_classes: int = 10, image_size: int = 32, **arguments: Any) -> int:
    """Floating-point operations of a forward and a backward pass, in convolutions and matrix products."""
    with torch.device("meta"):  # shapes suffice to count
        model = NETWORKS[network](num_classes, **arguments)
        images = torch.empty(2, 3, image_size, image_size)
    formulas = {torch.ops.aten.convolution_backward: convolution_backward_flops}
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        model(images).sum().backward()
    return counter.get_total_flops() // len(images)


def convolution_backward_flops(
    grad_shape: list[int], _: list[int], weight_shape: list[int], *others: Any, **__: Any
) -> int:
    """As many as forward for the gradient of the input and as many again for that of the weights, where it is asked.

    PyTorch's own formula takes the latter for that of a convolution without groups: in a depthwise one, it counts the
    operations once for each channel.
    """
    output_mask = others[-1]
    forward = 2 * grad_shape[0] * math.prod(grad_shape[2:]) * math.prod(weight_shape)
    return forward * sum(output_mask[:2])
