"""Count what a training step must do at least, for an image of 32×32: operations, bytes, and the floors they set.

Operations: those of convolutions and matrix products, forward and backward.

Bytes: activations in bfloat16, each read or written once by each kernel that has to.

separate    every convolution and every norm is a kernel of its own. Forward, each reads its input and writes its
            output. Backward, a norm reads its output's gradient and its input, and writes the input's gradient; a
            convolution reads its output's gradient twice, for the input's gradient, which it writes, and together with
            its input for the weights'. ReLU, pooling and additions are taken as fused into their neighbours.
fused       the same, but norms are free: computed on the way into or out of the convolutions beside them.

Weights, momentum and the optimiser are left out: at 512 images a step they are below one byte in a hundred.

The floors follow from the two rates given; the defaults are what an H100 of 80 GB reaches in practice: 790 TFLOP/s in
bfloat16 (989 on the data sheet) and 3.0 TB/s (3.35 on the data sheet).
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import errors
from common.command_line import Parser

from benchmarks import harness
from models import NETWORKS

BYTES = 2  # of a number in bfloat16


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("--flops", type=float, default=790e12, help="operations a second (default: %(default)g)")
    parser.add_argument("--bandwidth", type=float, default=3.0e12, help="bytes a second (default: %(default)g)")
    parser.add_argument("--output", default=f"{harness.RESULTS}/roofline.json", help="JSON file (default: %(default)s)")
    options = parser.parse_args()
    for name in ("flops", "bandwidth"):
        if not getattr(options, name) > 0:
            raise errors.UserError(f"--{name} is {getattr(options, name):g}; it must be above 0")

    networks = {name: count(name) for name in NETWORKS}
    print("| an image of 32×32 | GFLOP | MB | MB, norms fused | images/s: operations | bytes | bytes, norms fused |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    for name, counted in networks.items():
        floors = {
            "operations": options.flops / counted["flops"],
            "separate": options.bandwidth / counted["bytes_separate"],
            "fused": options.bandwidth / counted["bytes_fused"],
        }
        counted["images_per_second"] = floors
        print(
            f"| {name} | {counted['flops'] / 1e9:.2f} | {counted['bytes_separate'] / 1e6:.1f} | "
            f"{counted['bytes_fused'] / 1e6:.1f} | {floors['operations']:,.0f} | {floors['separate']:,.0f} | "
            f"{floors['fused']:,.0f} |"
        )
    rates = {"flops_per_second": options.flops, "bytes_per_second": options.bandwidth}
    harness.write_results(harness.provenance(torch.device("cpu")) | rates | {"networks": networks}, options.output)
    return 0


def count(name: str) -> dict[str, Any]:
    """Operations and bytes of a training step for one image."""
    model = NETWORKS[name](10)
    moved = {nn.Conv2d: [0, 0], nn.BatchNorm2d: [0, 0]}  # numbers that go in and come out

    def note(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        moved[type(module)][0] += inputs[0].numel()
        moved[type(module)][1] += output.numel()

    handles = [module.register_forward_hook(note) for module in model.modules() if type(module) in moved]
    model.eval()(torch.zeros(1, 3, 32, 32))
    for handle in handles:
        handle.remove()

    (conv_in, conv_out), (norm_in, norm_out) = moved.values()
    convolutions = BYTES * ((conv_in + conv_out) + (conv_out + conv_in) + (conv_out + conv_in))
    norms = BYTES * ((norm_in + norm_out) + (norm_out + norm_in + norm_in))
    return {
        "flops": harness.flops_per_image(name),
        "bytes_separate": convolutions + norms,
        "bytes_fused": convolutions,
    }


if __name__ == "__main__":
    errors.run(main)
