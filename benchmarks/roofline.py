"""Count operations, bytes and kernels of a training step for one 32×32 image, and compute the speed limits.

Operations: of convolutions and matrix products, forward and backward. Bytes: of activations in bfloat16, traced through
PyTorch's operators. Weights and the optimizer do not count: with 512 images, less than 1 % with SGD, more with Muon.

eager       every operator reads its inputs and writes its outputs, also ReLU, addition and concatenation. A norm reads
            its input twice (for statistics and values); its backward pass reads input and gradient twice. The backward
            pass of a convolution reads the gradient twice (for the gradients of input and weights).
fused       only the convolutions read and write; everything else is fused into them.

The defaults of --flops and --bandwidth are what an H100 with 80 GB reaches in practice: 790 TFLOP/s in bfloat16 (989 on
the data sheet) and 3.0 TB/s (3.35 on the data sheet).
"""

import sys
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import errors

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import harness
from models import NETWORKS

BYTES = 2  # per number in bfloat16


def main() -> int:
    parser, number = harness.make_parser(__doc__, "roofline.json"), harness.above_zero
    parser.add_argument("--flops", type=number, default=790e12, help="operations per second (default: %(default)g)")
    parser.add_argument("--bandwidth", type=number, default=3.0e12, help="bytes per second (default: %(default)g)")
    options = parser.parse_args()
    networks, rows = {name: count(name) for name in NETWORKS}, {}
    for name, counted in networks.items():
        limits = {"operations": options.flops / counted["flops"]}
        limits |= {kind: options.bandwidth / counted[f"bytes_{kind}"] for kind in ("eager", "fused")}
        counted["images_per_second"] = limits
        rows[name] = {"GFLOP": f"{counted['flops'] / 1e9:.2f}"}
        rows[name] |= {f"MB, {kind}": f"{counted[f'bytes_{kind}'] / 1e6:.1f}" for kind in ("eager", "fused")}
        rows[name] |= {f"images/s by {kind}": f"{limit:,.0f}" for kind, limit in limits.items()}
    return harness.report(options, torch.device("cpu"), rows, networks=networks)


def count(name: str) -> dict[str, Any]:
    """Operations and bytes of a training step for one image."""
    # The difference between 4 and 2 images: the weights, which are read once per batch, cancel out.
    more, fewer = trace(name, 4), trace(name, 2)
    numbers = more.numbers - fewer.numbers
    by_operator = {operator: BYTES * number // 2 for operator, number in numbers.most_common() if number}
    return {
        "flops": (more.flops - fewer.flops) // 2,
        "bytes_eager": sum(by_operator.values()),
        "bytes_fused": by_operator["convolution"] + by_operator["convolution_backward"],
        "bytes_by_operator": by_operator,
        "kernels": more.kernels,
    }


def trace(name: str, batch_size: int) -> "Traffic":
    with torch.device("meta"), Traffic() as traffic:  # counting needs only shapes
        logits = NETWORKS[name](10)(torch.empty(batch_size, 3, 32, 32))
        F.cross_entropy(logits, torch.empty(batch_size, dtype=torch.long)).backward()
    return traffic


class Traffic(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self.numbers: Counter = Counter()  # numbers read and written, by operator
        self.kernels = 0  # operators that are not views; each is at least one kernel

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if not function.is_view:
            read, written = ([value.numel() for value in tree_leaves(part) if isinstance(value, Tensor)]
                             for part in ((args, kwargs), result))  # fmt: skip
            name = function._schema.name.split("::")[1]
            if name == "convolution":  # each output is a sum over the weights of its channel
                self.flops += 2 * written[0] * args[1][0].numel()
            elif name == "convolution_backward":  # the same for the gradients of input and weights, if required
                self.flops += 2 * read[0] * args[2][0].numel() * sum(args[-1][:2])
                read = [2 * read[0], read[1]]
            elif name in ("mm", "addmm"):
                self.flops += 2 * written[0] * args[-2].shape[1]
            elif "batch_norm" in name:
                passes_over = read[:2] if "backward" in name else read[:1]
                read, written = [2 * number for number in passes_over], written[:1]
            self.numbers[name] += sum(read) + sum(written)
            self.kernels += 1
        return result


if __name__ == "__main__":
    errors.run(main)
