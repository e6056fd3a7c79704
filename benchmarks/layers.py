"""Time the distinct layers of each network, forward and backward: convolutions, and norms with the ReLU after them.

A grouped convolution can also be computed as a dense one, with weights of 0 between the groups: it has more operations,
but on some devices a much faster kernel. Both are timed in channels-last and in contiguous order. Depthwise
convolutions are only timed as they are. A norm and its ReLU are two kernels in eager mode, and one if torch.compile
fuses them. The ways take turns; a result is the median of the rounds. The best way has the smallest sum over all layers
of a network, each counted as often as it occurs.
"""

import itertools
import statistics
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import errors
from common.device import autocast, pick_precision, set_up_device

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import harness
from models import NETWORKS
from models.resnext import GroupedConv2d
from training.cuda_graph import WARM_UP_STEPS

LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
CALLS = 10  # per CUDA graph
KINDS = {"convolutions": nn.Conv2d, "norms": nn.BatchNorm2d}

Layer = Callable[[Tensor], Tensor]
Ways = dict[str, tuple[Layer, torch.memory_format]]  # the ways to compute a layer, with the layout of the images


def main() -> int:
    flags = {"networks": list(NETWORKS), "batch_size": 128, "rounds": 5, "device": "auto"}
    options = harness.make_parser(__doc__, "layers.json", **flags).parse_args()
    device = set_up_device(options.device)
    precision = pick_precision("auto", device)
    ways_of = {"convolutions": convolutions, "norms": norms}
    networks: dict[str, dict[str, Any]] = {name: {} for name in options.networks}
    table = {}
    for name, kind in itertools.product(options.networks, KINDS):
        rows = []
        for shape, count in shapes(name, KINDS[kind]).items():
            with device:
                noise = torch.randn(options.batch_size, shape[0], shape[-1], shape[-1], dtype=getattr(torch, precision))
                layers = ways_of[kind](*shape)
            ways = {
                way: timer(layer, noise.to(memory_format=layout, copy=True).requires_grad_(), device, precision)
                for way, (layer, layout) in layers.items()
            }
            spent = harness.in_turn(ways, options.rounds, warm_up=True)
            rows.append({"shape": shape, "count": count} | {way: statistics.median(own) for way, own in spent.items()})
        # A layer without groups is dense, so it counts in both sums.
        sums = {
            way: sum(row["count"] * row.get(way, row.get(way.replace("dense", "grouped"))) for row in rows)
            for way in dict.fromkeys(way for row in rows for way in list(row)[2:])
        }
        networks[name][kind] = {"milliseconds": sums, "rows": rows}
        table[f"{name}, {kind}"] = {f"{way}, ms": f"{spent:.2f}" for way, spent in sums.items()}
    return harness.report(options, device, table, precision=precision, networks=networks)


def shapes(name: str, kind: type[nn.Module]) -> Counter:
    """The layers of one kind in a network on 32×32 images, and how often each occurs.

    Convolutions are (in, out, kernel, stride, groups, size), norms (channels, size).
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


def convolutions(in_channels: int, out_channels: int, kernel: int, stride: int, groups: int, _: int) -> Ways:
    ways: Ways = {}
    for name, layout in LAYOUTS.items():
        plain = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False)
        ways[f"{name} grouped"] = plain.to(memory_format=layout), layout
        if 1 < groups < in_channels:
            dense = GroupedConv2d(in_channels, groups=groups, stride=stride, dense=True)
            ways[f"{name} dense"] = dense.to(memory_format=layout), layout
    return ways


def norms(channels: int, _: int) -> Ways:
    """In DenseNet a ReLU follows each norm, in the other networks two thirds of them."""
    # Plain tensors: for parameters, the kernel would be compiled again for each shape.
    weight, bias = (torch.ones(channels, requires_grad=True) for _ in range(2))
    calls = {"eager": norm_relu, "compiled": compiled_norm_relu}
    return {way: (partial(call, weight=weight, bias=bias), torch.channels_last) for way, call in calls.items()}


def norm_relu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.relu(F.batch_norm(x, None, None, weight, bias, training=True))


compiled_norm_relu = torch.compile(norm_relu, dynamic=True)  # one kernel for all shapes


def timer(layer: Layer, images: Tensor, device: torch.device, precision: str) -> Callable[[], float]:
    """A function that measures milliseconds of forward and backward; on CUDA in a graph, without Python's overhead."""

    def call() -> None:
        with autocast(device, precision):
            output = layer(images)
        images.grad = None
        output.backward(output)

    if device.type != "cuda":
        return lambda: 1000 * harness.seconds_of(call, device)
    graph, side_stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    side_stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side_stream):
        for _ in range(WARM_UP_STEPS):
            call()
    torch.cuda.current_stream().wait_stream(side_stream)
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    return lambda: 1000 * harness.seconds_of(graph.replay, device) / CALLS


if __name__ == "__main__":
    errors.run(main)
