"""Measure the speed of training (augmentation, step, optimizer): of this project's loop and of plain loops.

ours      the recipe, network and batch size of each script, with loop.Trainer as in loop.fit; ours_sgd is the same with
          SGD, ours_float32 in float32; ours_none, ours_graph, ours_inductor and ours_both have that --compile
baseline  a plain loop like the original project's: batches of 64 in float32 (with TF32 on CUDA), torchvision's
          transforms in a DataLoader with two workers, .item() of loss and correct predictions after every step
tuned     the plain loop, optimized: one worker per core, larger batches, channels-last; on CUDA also bfloat16 (AMP) and
          pinned memory; tuned_bfloat16 has bfloat16 also on the CPU

All train the same network on the same images with the same augmentation. Each measurement runs in its own process. They
take turns, round by round. After a warm-up, a process measures windows of several steps; each ends when the device has
finished. A result is the median of the windows of all rounds. A ratio is that of the medians of ours and the other.

start-up     seconds from the start of the process to the end of its first step: imports, images, preparation
peak memory  on CUDA: of PyTorch; on a Linux CPU: of the process, without the DataLoader's workers
"""

import argparse
import itertools
import json
import math
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common
from common import errors, files
from common.device import cpu_has_bfloat16, peak_memory, set_up_device
from common.errors import UserError

import torch
from torch import Tensor, nn

import dense
import mobilenetv2
import resnext
from benchmarks import harness, plain
from benchmarks.harness import positive
from dataset import Split
from models import NETWORKS
from training.loop import Run, Trainer, make_ema, make_optimizer
from training.recipe import COMPILE, Recipe

RECIPES = {module.RECIPE.network: module.RECIPE for module in (dense, mobilenetv2, resnext)}
# Each variant of ours, and the fields of the recipe that it replaces.
COMPILED = {f"ours_{choice}": {"compile": choice} for choice in COMPILE if choice != "auto"}
OURS: dict[str, dict[str, str]] = {
    "ours": {}, "ours_sgd": {"optimizer": "sgd"}, "ours_float32": {"precision": "float32"}, **COMPILED,
}  # fmt: skip
KINDS = (*OURS, *plain.WORKERS)

# A step, an endless iterator of batches, and information for the results.
Loop = tuple[plain.Step, Iterator[tuple[Tensor, Tensor]], dict[str, Any]]


def main() -> int:
    options = parse_flags()
    if options.measure:
        print(json.dumps(measure(options, *options.measure)))
        return 0
    device = set_up_device(options.device)
    files.check_writable(Path(options.output).parent, "the results")  # better now than after all measurements
    kinds = options.kinds or kinds_for(device)
    ways = {f"{name}, {kind}": partial(try_out, name, kind, device) for name in options.networks for kind in kinds}
    networks: dict[str, dict[str, Any]] = defaultdict(dict)

    def rate(result: dict[str, Any] | None) -> str:
        return f"{statistics.median(result['windows']):,.1f} images/s" if result else "failed"

    for label, found in harness.in_turn(ways, options.rounds, show=rate).items():
        if results := [result for result in found if result]:
            name, kind = label.split(", ")
            networks[name][kind] = pooled(results)
    if not networks:
        raise UserError("nothing could be measured; see the errors above")
    ratios: dict[str, list[float]] = defaultdict(list)
    rows: dict[str, dict[str, str]] = defaultdict(dict)
    for name, measured in networks.items():
        for kind, figures in measured.items():
            rows[f"{kind}, images/s"][name] = f"{figures['images_per_second']:,.1f}"
            if "ours" in measured and kind != "ours":
                figures["ratio"] = measured["ours"]["images_per_second"] / figures["images_per_second"]
                ratios[kind].append(figures["ratio"])
                rows[f"ours / {kind}"][name] = f"{figures['ratio']:.2f}"
            if peak := figures["peak_memory_bytes"]:
                rows[f"{kind}, peak memory"][name] = f"{peak / 2**30:.2f} GiB"
            rows[f"{kind}, start-up"][name] = f"{figures['start_up_seconds']:.1f} s"
    means = {kind: statistics.geometric_mean(own) for kind, own in ratios.items()}
    for kind, mean in means.items():
        rows[f"ours / {kind}"]["geometric mean"] = f"{mean:.2f}"
    return harness.report(options, device, rows, networks=networks, geometric_mean_ratios=means)


def kinds_for(device: torch.device) -> list[str]:
    """The kinds to compare on this device: on a CPU with bfloat16 instructions, both precisions."""
    if device.type == "cpu" and cpu_has_bfloat16():
        return ["ours", "ours_float32", *plain.WORKERS]
    return ["ours", "baseline", "tuned"]


def try_out(name: str, kind: str, device: torch.device) -> dict[str, Any] | None:
    """Call `measure` in a subprocess. Returns None if one of the --compile modes fails."""
    spins = os.environ.get("GOMP_SPINCOUNT")
    if kind not in OURS and spins == common.SPIN_COUNT:  # the shorter spinning is a part of ours
        spins = plain.LIBGOMP_SPINS
    environment = {"GOMP_SPINCOUNT": spins} if spins else {}
    try:
        return harness.in_subprocess(name, kind, device.type, time.time(), environment=environment)
    except UserError as error:
        if kind not in COMPILED:
            raise
        print(f"{name}, {kind} is left out. {error}", file=sys.stderr)
        return None


def measure(options: argparse.Namespace, name: str, kind: str, device_type: str, started: str) -> dict[str, Any]:
    """Train one network with one kind of loop. Raises UserError if device memory runs out."""
    # On the CPU, set_up_device keeps freed memory, which is a part of ours.
    keeps = kind in OURS or device_type != "cpu"
    device = set_up_device(device_type) if keeps else torch.device("cpu")
    data = harness.load_images(options)
    recipe = replace(RECIPES[name], image_size=options.image_size, small_until=0.0, **OURS.get(kind, {}))
    batch_sizes = {"baseline": plain.BASELINE_BATCH_SIZE} | dict.fromkeys(OURS, options.batch_size or recipe.batch_size)
    batch_size = min(batch_sizes.get(kind, options.tuned_batch_size), len(data.train))
    split = data.train.take(slice(len(data.train) // batch_size * batch_size))  # only whole batches
    torch.manual_seed(recipe.seed)
    model = NETWORKS[name](len(data.classes), **recipe.network_arguments())
    try:
        loop = our_loop if kind in OURS else plain_loop
        step, batches, about = loop(kind, model, split, replace(recipe, batch_size=batch_size), device)

        def seconds(count: int) -> float:
            return harness.seconds_of(lambda: [step(*next(batches)) for _ in range(count)], device)

        seconds(1)
        start_up = time.time() - float(started)
        seconds(options.warm_up or (10 if device.type == "cuda" else 1))
        count = 1
        while (taken := seconds(count)) < options.seconds / 8:
            count *= 2
        count = math.ceil(count * options.seconds / taken)
        windows = [count * batch_size / seconds(count) for _ in range(options.windows)]
    except torch.OutOfMemoryError:
        where = f"{name}, {kind}, with batches of {batch_size}"
        raise UserError(f"{where}: out of device memory; use smaller batches, or leave it out") from None
    about |= {"num_images": len(split), "batch_size": batch_size, "windows": windows}
    return about | {"start_up_seconds": start_up, "peak_memory_bytes": peak_memory(device)}


def our_loop(kind: str, model: nn.Module, split: Split, recipe: Recipe, device: torch.device) -> Loop:
    """As in loop.fit and loop.train_epoch, but without the progress bar, which synchronizes once a second."""
    model.to(device, memory_format=torch.channels_last).train()
    run = Run(model, make_optimizer(model, recipe, device), make_ema(model, recipe, split))
    trainer = Trainer(run, split, recipe, device)
    done = itertools.count()

    def step(images: Tensor, labels: Tensor) -> None:
        trainer.train_step(*divmod(next(done), len(trainer.loader)), images, labels)

    batches = itertools.chain.from_iterable(trainer.loader.epoch(epoch) for epoch in itertools.count())
    return step, batches, {"precision": trainer.precision, "compile": trainer.fast_step.choice}


def plain_loop(kind: str, model: nn.Module, split: Split, recipe: Recipe, device: torch.device) -> Loop:
    tuned, on_cuda, workers = kind != "baseline", device.type == "cuda", plain.WORKERS[kind]
    loader = plain.torchvision_loader(
        split, recipe.augmentation(), batch_size=recipe.batch_size, workers=workers, pin_memory=tuned and on_cuda
    )
    precision = "bfloat16" if kind == "tuned_bfloat16" or (tuned and on_cuda) else "float32"
    step = plain.plain_step(model, device, precision=precision, tuned=tuned)
    return step, itertools.chain.from_iterable(itertools.repeat(loader)), {"precision": precision, "workers": workers}


def pooled(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Combine repeated measurements."""
    windows = list(itertools.chain.from_iterable(result["windows"] for result in results))
    return results[0] | {
        "images_per_second": statistics.median(windows),
        "windows": windows,
        "start_up_seconds": statistics.median(result["start_up_seconds"] for result in results),
        "peak_memory_bytes": max(result["peak_memory_bytes"] or 0 for result in results) or None,
    }


def parse_flags() -> argparse.Namespace:
    flags = {"data": "cifar10", "networks": list(NETWORKS), "images": None, "image_size": 32, "rounds": 2}
    parser = harness.make_parser(__doc__, "train.json", **flags, seconds=3.0, device="auto")
    add = parser.add_argument
    add("--kinds", nargs="+", choices=KINDS, help="(default: ours and the plain loops, in bfloat16 if it is fast)")
    add("--batch-size", type=positive, help="images per step of ours (default: the recipe's)")
    add("--tuned-batch-size", type=positive, default=512, help="images per step of tuned (default: %(default)s)")
    add("--windows", type=positive, default=5, help="windows per process (default: %(default)s)")
    add("--warm-up", type=positive, help="steps before the first window (default: 10 on CUDA, 1 elsewhere)")
    return parser.parse_args()


if __name__ == "__main__":
    errors.run(main)
