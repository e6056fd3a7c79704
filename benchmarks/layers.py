"""Time each network's distinct layers, forward and backward: convolutions, and norms with the ReLU behind them.

A grouped convolution can also be computed as a dense one whose weights between groups are 0: more operations, but on
some devices a far faster kernel. Both are timed in channels-last order and in PyTorch's own, in the precision that
--precision auto takes. A depthwise convolution is timed as it is alone. A norm and its ReLU are two kernels in eager
mode, and one if torch.compile fuses them; both are in channels-last order. The sum over a network's layers, each as
often as it occurs, says which way to take.

    python benchmarks/layers.py --batch-size 512
"""

import argparse
import functools
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import errors
from common.command_line import Parser
from common.device import DEVICES, autocast, pick_precision, set_up_device

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import harness
from models import NETWORKS
from models.resnext import GroupedConv2d
from training.cuda_graph import WARM_UP

LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
KINDS = ("convolutions", "norms")
REPEATS = 10  # in a CUDA graph


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), help="(default: all)")
    parser.add_argument("--layers", nargs="+", choices=KINDS, default=list(KINDS), help="(default: both)")
    parser.add_argument("--batch-size", type=harness.positive, default=128, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=harness.positive, default=5, help="calls that count (default: %(default)s)")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="(default: auto)")
    parser.add_argument("--output", default=f"{harness.RESULTS}/layers.json", help="(default: %(default)s)")
    options = parser.parse_args()
    device = set_up_device(options.device)
    precision = pick_precision("auto", device)
    networks = {}
    for name in options.networks:
        networks[name] = {}
        for kind in options.layers:
            measure = of_convolutions if kind == "convolutions" else of_norms
            networks[name][kind] = measured = measure(name, options, device, precision)
            sums = ", ".join(f"{way} {spent:.2f} ms" for way, spent in measured["milliseconds"].items())
            print(f"{name}, {kind}: {sums}", flush=True)
    about = {"batch_size": options.batch_size, "precision": precision}
    harness.write_results(harness.provenance(device) | about | {"networks": networks}, options.output)
    return 0


def of_convolutions(name: str, options: argparse.Namespace, device: torch.device, precision: str) -> dict[str, Any]:
    rows = []
    for shape, count in shapes(name, nn.Conv2d).items():
        row = {"shape": shape, "count": count}
        for way in ways(shape):
            layer, images = convolution(shape, way, options.batch_size, device)
            row[way] = milliseconds(layer, images, options.rounds, device, precision)
        rows.append(row)
    sums = {
        way: sum(row["count"] * row.get(way, row[f"{way.split()[0]} grouped"]) for row in rows)
        for way in ways((0, 0, 0, 0, 2, 0))
    }
    return {"milliseconds": sums, "rows": rows}


def of_norms(name: str, options: argparse.Namespace, device: torch.device, precision: str) -> dict[str, Any]:
    """As if a ReLU followed each norm, which is so in DenseNet; in the others it is so for two thirds of them."""
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    calls = {"eager": norm_relu, "compiled": torch.compile(norm_relu, dynamic=True)}  # one kernel for all shapes
    rows = []
    for (channels, size), count in shapes(name, nn.BatchNorm2d).items():
        # Not parameters, for whose shapes a kernel would be compiled again.
        weight, bias = (torch.ones(channels, device=device, requires_grad=True) for _ in range(2))
        images = torch.randn(options.batch_size, channels, size, size, device=device, dtype=dtype)
        images = images.to(memory_format=torch.channels_last).requires_grad_()
        row = {"shape": (channels, size), "count": count}
        for way, call in calls.items():
            layer = functools.partial(call, weight=weight, bias=bias)
            row[way] = milliseconds(layer, images, options.rounds, device, precision)
        rows.append(row)
    return {"milliseconds": {way: sum(row["count"] * row[way] for row in rows) for way in calls}, "rows": rows}


def norm_relu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.relu(F.batch_norm(x, None, None, weight, bias, training=True))


def shapes(name: str, kind: type[nn.Module]) -> Counter:
    """A network's layers of one kind on 32×32 images, and how often each occurs.

    Convolutions as in, out, kernel, stride, groups, size; norms as channels, size.
    """
    found: Counter = Counter()

    def note(module: nn.Module, inputs: tuple, _: Any) -> None:
        size = inputs[0].shape[-1]
        if isinstance(module, nn.Conv2d):
            kernel, stride = module.kernel_size[0], module.stride[0]
            found[module.in_channels, module.out_channels, kernel, stride, module.groups, size] += 1
        else:
            found[module.num_features, size] += 1

    with torch.device("meta"):
        model = NETWORKS[name](10)
        for module in model.modules():
            if isinstance(module, kind):
                module.register_forward_hook(note)
        model(torch.empty(2, 3, 32, 32))
    return found


def ways(shape: tuple[int, ...]) -> list[str]:
    channels, groups = shape[0], shape[4]
    kinds = ["grouped", "dense"] if groups > 1 and groups != channels else ["grouped"]
    return [f"{layout} {kind}" for layout in LAYOUTS for kind in kinds]


def convolution(
    shape: tuple[int, ...], way: str, batch_size: int, device: torch.device
) -> tuple[nn.Module, Tensor]:  # and its input
    in_channels, out_channels, kernel, stride, groups, size = shape
    layout, kind = way.split()
    if kind == "dense":
        layer = GroupedConv2d(in_channels, groups=groups, stride=stride, dense=True)
    else:
        layer = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False)
    images = torch.randn(batch_size, in_channels, size, size, device=device)
    images = images.to(memory_format=LAYOUTS[layout]).requires_grad_()
    return layer.to(device, memory_format=LAYOUTS[layout]), images


def milliseconds(
    layer: Callable[[Tensor], Tensor], images: Tensor, rounds: int, device: torch.device, precision: str
) -> float:
    """The median of forward and backward together. On CUDA as one graph, as in training: without Python's time."""

    def call() -> None:
        with autocast(device, precision):
            output = layer(images)
        output.backward(output)

    calls, repeats = (graph_of(call), REPEATS) if device.type == "cuda" else (call, 1)
    spent = []
    for _ in range(rounds + 1):  # the first one does not count
        harness.synchronize(device)
        started = time.perf_counter()
        calls()
        harness.synchronize(device)
        spent.append(1000 * (time.perf_counter() - started) / repeats)
    return statistics.median(spent[1:])


def graph_of(call: Callable[[], None]) -> Callable[[], None]:
    """`REPEATS` calls as one CUDA graph."""
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            call()
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        for _ in range(REPEATS):
            call()
    return graph.replay


if __name__ == "__main__":
    errors.run(main)
