"""Time each network's distinct convolutions, forward and backward: grouped ones as they are and as dense ones.

A grouped convolution can also be computed as a dense one whose weights between groups are 0: more operations, but on
some devices a far faster kernel. Both are timed in channels-last order and in PyTorch's own, in the precision that
--precision auto takes, in turn. A depthwise convolution is timed as it is alone. The sum over a network's convolutions,
each as often as it occurs, says which way to take.

    python benchmarks/convolutions.py --batch-size 512
"""

import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import errors
from common.command_line import Parser
from common.device import DEVICES, autocast, pick_precision, set_up_device

import torch
from torch import nn

from benchmarks import harness
from models import NETWORKS
from models.resnext import GroupedConv2d

LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), help="(default: all)")
    parser.add_argument("--batch-size", type=harness.positive, default=128, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=harness.positive, default=5, help="calls that count (default: %(default)s)")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="(default: auto)")
    parser.add_argument("--output", default=f"{harness.RESULTS}/convolutions.json", help="(default: %(default)s)")
    options = parser.parse_args()
    device = set_up_device(options.device)
    precision = pick_precision("auto", device)
    networks = {}
    for name in options.networks:
        rows = [
            {"shape": shape, "count": count}
            | {way: milliseconds(shape, way, options, device, precision) for way in ways(shape)}
            for shape, count in convolutions(name).items()
        ]
        sums = {
            way: sum(row["count"] * row.get(way, row[f"{way.split()[0]} grouped"]) for row in rows)
            for way in ways((0, 0, 0, 0, 2, 0))
        }
        networks[name] = {"milliseconds": sums, "convolutions": rows}
        print(f"{name}: " + ", ".join(f"{way} {spent:.2f} ms" for way, spent in sums.items()), flush=True)
    about = {"batch_size": options.batch_size, "precision": precision}
    harness.write_results(harness.provenance(device) | about | {"networks": networks}, options.output)
    return 0


def convolutions(name: str) -> Counter:
    """A network's convolutions on 32×32 images and how often each occurs: in, out, kernel, stride, groups, size."""
    found: Counter = Counter()

    def note(module: nn.Module, inputs: tuple, _: Any) -> None:
        found[
            module.in_channels, module.out_channels, module.kernel_size[0], module.stride[0], module.groups,
            inputs[0].shape[-1],
        ] += 1  # fmt: skip

    with torch.device("meta"):
        model = NETWORKS[name](10)
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(note)
        model(torch.empty(2, 3, 32, 32))
    return found


def ways(shape: tuple[int, ...]) -> list[str]:
    channels, groups = shape[0], shape[4]
    kinds = ["grouped", "dense"] if groups > 1 and groups != channels else ["grouped"]
    return [f"{layout} {kind}" for layout in LAYOUTS for kind in kinds]


def milliseconds(shape: tuple[int, ...], way: str, options: Any, device: torch.device, precision: str) -> float:
    """The median of forward and backward together, after a call that does not count."""
    in_channels, out_channels, kernel, stride, groups, size = shape
    layout, kind = way.split()
    if kind == "dense":
        convolution = GroupedConv2d(in_channels, groups=groups, stride=stride, dense=True)
    else:
        convolution = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False)
    convolution.to(device, memory_format=LAYOUTS[layout])
    images = torch.randn(options.batch_size, in_channels, size, size, device=device)
    images = images.to(memory_format=LAYOUTS[layout]).requires_grad_()
    spent = []
    for _ in range(options.rounds + 1):
        harness.synchronize(device)
        started = time.perf_counter()
        with autocast(device, precision):
            output = convolution(images)
        output.backward(output)
        harness.synchronize(device)
        spent.append(1000 * (time.perf_counter() - started))
    return statistics.median(spent[1:])


if __name__ == "__main__":
    errors.run(main)
