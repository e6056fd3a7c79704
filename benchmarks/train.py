"""Measure training end to end (augmentation, step, optimizer): this project's loop and plain ones, on one device.

ours      the script's own recipe, network and batch size, through loop.Trainer, as loop.fit does it; ours_float32
          is the same with --precision float32, for where the recipe's own comes to bfloat16
baseline  a plain loop as that of the project that this one began from: batches of 64 in float32 (with TF32 on CUDA),
          torchvision's transforms in a DataLoader with two processes, .item() of loss and hits at every step
tuned     the plain loop at its best: the same transforms and processes as many as there are cores, larger batches,
          channels-last; on CUDA also bfloat16 (AMP) and pinned memory; tuned_bfloat16 has bfloat16 on the CPU as well

All train the same network on the same images with the same settings of the augmentation. Each measurement is a
process of its own, since the memory allocator's settings and TF32 cannot be taken back; they take turns, round by
round, so that whatever else the machine does meets all of them. After a warm-up a process measures windows of whole
steps, each ended by waiting for the device. A figure is the median of all rounds' windows; a ratio is one of medians.

start-up     seconds from the start of the process to the end of its first step: imports, images, preparation
peak memory  on CUDA what PyTorch held at most, on a Linux CPU the process's peak size, without the DataLoader's own
data's share of ours: 1 − images/s / images/s on one chunk augmented beforehand, by the same trainer, in alternation
"""

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before this folder, which has an augment.py as well

import common
from common import errors, files
from common.command_line import Parser
from common.device import DEVICES, cpu_has_bfloat16, set_up_device
from common.errors import UserError

import dataset
import dense
import mobilenetv2
import resnext
from benchmarks import harness
from benchmarks.harness import positive
from benchmarks.plain import BASELINE_BATCH_SIZE, WORKERS, Step, baseline_step, torchvision_loader, tuned_step
from dataset import Split
from models import NETWORKS
from training.cuda_graph import pick_compile
from training.loop import Run, Trainer, make_ema, make_optimizer, precision_of
from training.recipe import COMPILE, Recipe
from utils import TrainLoader, normalize

RECIPES = {module.RECIPE.network: module.RECIPE for module in (dense, mobilenetv2, resnext)}
OURS = ("ours", "ours_float32")
RIVALS = ("ours_float32", *WORKERS)
KINDS = ("ours", *RIVALS)
SMALLER = "if memory ran out, give smaller batches, or leave it out by --kinds or --networks"
# Of ours, for each way to run a step, and again for the network as a whole.
FIGURES = ("images_per_second", "precision", "batch_size", "start_up_seconds", "peak_memory_bytes", "data_share")

Batches = Iterator[tuple[Tensor, Tensor]]  # of them, without end


def main() -> int:
    options = parse_flags()
    if options.measure:
        print(json.dumps(measure(options)))
        return 0
    device = set_up_device(options.device)
    options.kinds = options.kinds or kinds_for(device)
    recipes = {name: replace(RECIPES[name], compile=pick_compile(RECIPES[name].compile, device)) for name in RECIPES}
    files.check_writable(Path(options.output).parent, "the results")  # better now than after all measurements
    measured: dict[str, list[dict[str, Any]]] = {name: [] for name in options.networks}
    for round_number in range(1, options.rounds + 1):
        for name in options.networks:
            for kind, choice in jobs(options, recipes[name]):
                if result := in_a_process(name, kind, choice, device, one_of_several=bool(options.compile)):
                    measured[name].append(result)
                    print(f"round {round_number}, {name}, {line(result)}", flush=True)
    if failed := [name for name, results in measured.items() if not results]:
        raise UserError(f"{', '.join(failed)}: no way of running a step works; what they said stands above")
    networks = {name: summary(recipes[name], results) for name, results in measured.items()}
    results = harness.provenance(device) | {
        "data": options.data,
        "image_size": options.image_size,
        "num_images": measured[options.networks[0]][0]["num_images"],
        "rounds": options.rounds,
        "windows": options.windows,
        "seconds": options.seconds,
        "networks": networks,
        "geometric_mean_ratios": geometric_means(networks),
    }
    harness.write_results(results, options.output)
    report(results, options.output)
    return 0


def kinds_for(device: torch.device) -> list[str]:
    """Those that differ on this device: in bfloat16 as well only where a CPU is fast in it."""
    if device.type == "cpu" and cpu_has_bfloat16():
        return list(KINDS)
    return [kind for kind in KINDS if kind not in ("ours_float32", "tuned_bfloat16")]


def jobs(options: argparse.Namespace, recipe: Recipe) -> Iterator[tuple[str, str | None]]:
    """What to measure of a network in each round: kinds and, for ours, choices of --compile."""
    for kind in options.kinds:
        if kind == "ours":
            yield from ((kind, choice) for choice in options.compile or [recipe.compile])
        else:
            yield kind, None


def in_a_process(
    name: str, kind: str, choice: str | None, device: torch.device, *, one_of_several: bool
) -> dict[str, Any] | None:
    """What `measure` returns in a new process, with this one's flags.

    Where that fails, it ends this one with the other's exit status; None for one of several ways to run a step.
    """
    command = [sys.executable, __file__, *sys.argv[1:], "--measure", name, kind, "--device", device.type]
    if choice:
        command += ["--compile", choice]
    command += ["--started", str(time.time())]
    environment = dict(os.environ)
    if kind not in OURS and environment.get("GOMP_SPINCOUNT") == common.SPIN_COUNT:
        del environment["GOMP_SPINCOUNT"]  # it is a part of ours
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    lines = done.stdout.splitlines()
    result = lines.pop() if done.returncode == 0 else ""
    for text in lines:
        print(text, flush=True)
    if done.returncode < 0:
        raise UserError(f"{name}, {kind}: the process was killed by signal {-done.returncode}; {SMALLER}")
    if done.returncode and choice and one_of_several:
        return None  # it has said why
    if done.returncode:
        sys.exit(done.returncode)
    return json.loads(result)


# -------------------------------------------------------------------------------------- one measurement, in its process


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Train one network in one way. Raises UserError for images or memory that do not suffice."""
    name, kind = options.measure
    # To keep freed memory, as set_up_device does on the CPU, is a part of ours.
    device = torch.device("cpu") if kind not in OURS and options.device == "cpu" else set_up_device(options.device)
    data = dataset.load(options.data, image_size=options.image_size)
    recipe = replace(RECIPES[name], image_size=options.image_size)
    if kind in OURS:
        batch_size = recipe.batch_size if options.batch_size is None else options.batch_size
        compile_choice = options.compile[0] if options.compile else recipe.compile
        precision = "float32" if kind == "ours_float32" else precision_of(recipe, None, device)
        recipe = replace(recipe, batch_size=batch_size, compile=compile_choice, precision=precision)
    else:
        batch_size = BASELINE_BATCH_SIZE if kind == "baseline" else options.tuned_batch_size
    count = len(data.train) if options.images is None else options.images
    split = harness.some_of(data.train, count, at_least=2, source=options.data)
    if len(split) > batch_size:
        split = split.take(slice(len(split) // batch_size * batch_size))  # a smaller last batch belongs in no window
    torch.manual_seed(recipe.seed)
    model = NETWORKS[name](len(data.classes), **recipe.network_arguments())
    try:
        if kind in OURS:
            trainer, step, batches = ours(model, split, recipe, device)
        else:
            step, batches = plain(kind, model, split, recipe, batch_size, device)
        result = {"kind": kind, "num_images": len(split), "num_classes": len(data.classes), "batch_size": batch_size}

        training = steps(step, batches)
        next(training)
        harness.synchronize(device)
        result["start_up_seconds"] = time.time() - options.started
        warm_up = (10 if device.type == "cuda" else 1) if options.warm_up is None else options.warm_up
        rate(training, warm_up, device)
        in_window = steps_in(options.seconds, training, device)

        result["windows"] = [rate(training, in_window, device)]
        result["peak_memory_bytes"] = peak_memory(device)  # before the chunk, which belongs to no training
        if kind in OURS:
            on_chunk = steps(step, itertools.cycle(chunk(trainer.loader)))
            result["windows_on_chunk"] = [rate(on_chunk, in_window, device)]
        for _ in range(options.windows - 1):
            result["windows"].append(rate(training, in_window, device))
            if kind in OURS:
                result["windows_on_chunk"].append(rate(on_chunk, in_window, device))
    except torch.OutOfMemoryError:
        raise UserError(f"{name}, {kind}: no device memory for batches of {batch_size}; {SMALLER}") from None
    if kind in OURS:
        result |= {"choice": trainer.fast_step.choice, "precision": recipe.precision}
    return result


def ours(model: nn.Module, split: Split, recipe: Recipe, device: torch.device) -> tuple[Trainer, Step, Batches]:
    """As loop.fit and loop.train_and_evaluate, but for the progress bar, which waits for the device once a second."""
    model.to(device, memory_format=torch.channels_last).train()
    run = Run(model, make_optimizer(model, recipe, device), make_ema(model, recipe, split))
    trainer = Trainer(run, split, recipe, device)
    done = itertools.count()

    def step(images: Tensor, labels: Tensor) -> None:
        trainer.train_step(*divmod(next(done), len(trainer.loader)), images, labels)

    epochs = (trainer.loader.epoch(epoch) for epoch in itertools.count())
    return trainer, step, itertools.chain.from_iterable(epochs)


def chunk(loader: TrainLoader) -> list[tuple[Tensor, Tensor]]:
    """The batches of the first epoch's first chunk, augmented and normalised."""
    images, labels = loader.chunk(loader.plan(0).to(loader.device), 0, loader.augmenter(0))
    pairs = zip(images.split(loader.batch_size), labels.split(loader.batch_size), strict=True)
    return [(normalize(batch), targets) for batch, targets in pairs]


def plain(
    kind: str, model: nn.Module, split: Split, recipe: Recipe, batch_size: int, device: torch.device
) -> tuple[Step, Batches]:
    loader = torchvision_loader(
        split,
        recipe.augmentation(),
        batch_size=batch_size,
        workers=WORKERS[kind],
        pin_memory=kind != "baseline" and device.type == "cuda",
    )
    model.train()
    if kind == "baseline":
        step = baseline_step(model, device)
    else:
        bfloat16 = kind == "tuned_bfloat16" or device.type == "cuda"
        step = tuned_step(model, device, "bfloat16" if bfloat16 else "float32")
    return step, itertools.chain.from_iterable(itertools.repeat(loader))


# ------------------------------------------------------------------------------------------------ clocks and counters


def steps(step: Step, batches: Batches) -> Iterator[int]:
    """Trains when asked for the next number, which is that of the step's images."""
    for images, labels in batches:
        step(images, labels)
        yield len(labels)


def timed(work: Iterator[int], count: int, device: torch.device) -> tuple[int, float]:
    """How much `count` steps of `work` come to, and the seconds until the device has done them."""
    harness.synchronize(device)
    started = time.perf_counter()
    done = sum(itertools.islice(work, count))
    harness.synchronize(device)
    return done, time.perf_counter() - started


def rate(work: Iterator[int], count: int, device: torch.device) -> float:
    done, seconds = timed(work, count, device)
    return done / seconds


def steps_in(seconds: float, work: Iterator[int], device: torch.device) -> int:
    """How many steps last for about `seconds`, found on ever more of them up to an eighth of that."""
    count = 1
    while (taken := timed(work, count, device)[1]) < seconds / 8:
        count *= 2
    return math.ceil(count * seconds / taken)


def peak_memory(device: torch.device) -> int | None:
    """In bytes, since the process started; None where nothing counts it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "cpu" and sys.platform == "linux":
        # Not resource.getrusage, to which a process started from another counts the other's peak too.
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    return None


# ------------------------------------------------------------------------------------------------------- the results


def summary(recipe: Recipe, results: list[dict[str, Any]]) -> dict[str, Any]:
    """A network's part of the JSON, out of what its processes measured.

    Of ours, `compile` has the figures of every way of running a step that was taken, and the network itself those of
    the recipe's own or, where that was not measured, of the fastest.
    """
    network: dict[str, Any] = {}
    by_kind = {kind: [result for result in results if result["kind"] == kind] for kind in KINDS}
    if ours := by_kind["ours"]:
        ways = {
            way: pooled([result for result in ours if result["choice"] == way])
            for way in dict.fromkeys(result["choice"] for result in ours)
        }
        choice = max(ways, key=lambda name: (name == recipe.compile, ways[name]["images_per_second"]))
        network |= {"compile_choice": choice, **{name: ways[choice][name] for name in FIGURES}, "compile": ways}
    for kind in RIVALS:
        if by_kind[kind]:
            workers = {"workers": WORKERS[kind]} if kind in WORKERS else {}
            network[kind] = pooled(by_kind[kind]) | workers
    if ours:
        rate = network["images_per_second"]
        network["ratios"] = {kind: rate / network[kind]["images_per_second"] for kind in RIVALS if kind in network}
    return network


def pooled(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of several measurements of the same."""
    windows = list(itertools.chain.from_iterable(result["windows"] for result in results))
    peaks = [result["peak_memory_bytes"] for result in results]
    figures = {
        "images_per_second": statistics.median(windows),
        "windows": windows,
        "batch_size": results[0]["batch_size"],
        "start_up_seconds": statistics.median(result["start_up_seconds"] for result in results),
        "peak_memory_bytes": None if None in peaks else max(peaks),
    }
    if results[0]["kind"] in OURS:
        figures["precision"] = results[0]["precision"]
        on_chunk = list(itertools.chain.from_iterable(result["windows_on_chunk"] for result in results))
        figures |= {
            "data_share": 1 - figures["images_per_second"] / statistics.median(on_chunk),
            "windows_on_chunk": on_chunk,
        }
    return figures


def geometric_means(networks: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Of the networks' ratios, for each plain loop that was measured."""
    ratios = [network.get("ratios", {}) for network in networks.values()]
    return {kind: statistics.geometric_mean(ratio[kind] for ratio in ratios) for kind in ratios[0]}


def line(result: dict[str, Any]) -> str:
    way = result["kind"]
    if way in OURS:
        way += f" ({result['precision']}, --compile {result['choice']})"
    return (
        f"{way}: {spelled(statistics.median(result['windows']))} images/s, "
        f"first step after {result['start_up_seconds']:.1f} s"
    )


def spelled(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}"


def report(results: dict[str, Any], path: str) -> None:
    networks, means = results["networks"], results["geometric_mean_ratios"]
    columns = [cells(network) for network in networks.values()]
    columns.append({f"ours / {kind}": f"{mean:.2f}" for kind, mean in means.items()})
    print(f"\n{results['device']}, {results['data']}, median of {results['rounds']} × {results['windows']} windows\n")
    print(f"| | {' | '.join(networks)} | geometric mean |\n|---|{'--:|' * len(columns)}")
    for label in dict.fromkeys(itertools.chain(*columns)):
        print(f"| {' | '.join([label, *(column.get(label, '') for column in columns)])} |")
    print(f"\nResults: {path}")


def cells(network: dict[str, Any]) -> dict[str, str]:
    """A network's column of the table: what was measured of it, by the row's label."""
    kinds = {kind: network[kind] for kind in RIVALS if kind in network}
    if "compile" in network:
        kinds = {"ours": network} | kinds
    column = {f"{kind}, images/s": spelled(figures["images_per_second"]) for kind, figures in kinds.items()}
    column |= {f"ours / {kind}": f"{ratio:.2f}" for kind, ratio in network.get("ratios", {}).items()}
    for kind, figures in kinds.items():
        peak = figures["peak_memory_bytes"]
        column[f"{kind}, peak memory"] = "–" if peak is None else f"{peak / 2**30:.2f} GiB"
    column |= {f"{kind}, start-up": f"{figures['start_up_seconds']:.1f} s" for kind, figures in kinds.items()}
    if "compile" in network:
        column["ours, data's share"] = f"{network['data_share']:.1%}"
        column["ours, --compile"] = network["compile_choice"]
        for choice, way in network["compile"].items():
            if choice != network["compile_choice"]:
                column[f"ours, --compile {choice}, images/s"] = spelled(way["images_per_second"])
    return column


def seconds(text: str) -> float:
    """The type of a flag that says how long."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number above 0")
    return value


def parse_flags() -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--data", default="cifar10", help="cifar10, digits, or a folder of images")
    add("--output", default=f"{harness.RESULTS}/train.json", help="JSON file (default: %(default)s)")
    add("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), help="(default: all)")
    add("--kinds", nargs="+", choices=KINDS, help="(default: all, those of bfloat16 on a CPU only where it is fast)")
    add("--compile", nargs="+", choices=COMPILE, help="ways for ours to run a step (default: the recipe's own)")
    add("--batch-size", type=positive, help="images in a step of ours (default: the recipe's own)")
    add("--tuned-batch-size", type=positive, default=512, help="images in a step of tuned (default: %(default)s)")
    add("--images", type=positive, help="training images (default: all)")
    add("--image-size", type=positive, default=32, help="side of the images (default: %(default)s)")
    add("--rounds", type=positive, default=2, help="processes of each kind and network (default: %(default)s)")
    add("--windows", type=positive, default=5, help="measurements in a process (default: %(default)s)")
    add("--seconds", type=seconds, default=3.0, help="about how long a window lasts (default: %(default)g)")
    add("--warm-up", type=positive, help="steps before the first window (default: 10 on CUDA, 1 elsewhere)")
    add("--device", choices=DEVICES, default="auto", help="auto: CUDA, else MPS, else the CPU")
    add("--measure", nargs=2, metavar=("NETWORK", "KIND"), help=argparse.SUPPRESS)
    add("--started", type=float, help=argparse.SUPPRESS)  # when --measure's process was, in seconds of the epoch
    return parser.parse_args()


if __name__ == "__main__":
    errors.run(main)
