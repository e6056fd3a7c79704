"""Muon: SGD with momentum, but the update of each convolution is made orthogonal (Jordan et al. 2024).

The singular values of a momentum matrix differ by orders of magnitude: SGD moves a kernel in few directions. Muon gives
all of them about the same length, so that short runs learn much more (benchmarks/README.md). Sources: "Muon: An
optimizer for hidden layers in neural networks", kellerjordan.github.io/posts/muon; for convolutions and norms that are
kept, airbench94_muon.py in github.com/KellerJordan/cifar10-airbench.

Not torch.optim.Muon, which accepts only matrices and always computes in bfloat16, which is slow on many CPUs.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

# Each iteration maps a singular value s to a·s + b·s³ + c·s⁵. With Jordan's coefficients, three iterations bring all
# values above 0.02 (of a matrix with norm 1) to between 0.68 and 1.21.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 3


class Muon(torch.optim.SGD):
    """SGD for all parameters except kernels, (out, in, H, W). A kernel is one matrix with a row per output channel.

    A step changes a kernel by `scale` × learning rate × its norm, then restores the norm. A norm layer follows, so that
    another norm would only change the effective learning rate (see models/__init__.py). Kernels need no weight decay.
    Updates are made orthogonal in `dtype` (bfloat16 for speed; None: the kernel's).
    """

    def __init__(self, params: Iterable, *, scale: float, dtype: torch.dtype | None = None, **settings: Any):
        super().__init__(params, **settings)
        self.scale, self.dtype = scale, dtype

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for kernel in group["params"]:
                if kernel.ndim == 4 and kernel.grad is not None:  # None: its layer is frozen
                    self.step_kernel(kernel, group["lr"], group["momentum"], group["nesterov"])
                    kernel.grad = None  # SGD skips parameters without a gradient
        super().step()

    def step_kernel(self, kernel: Tensor, lr: Tensor, momentum: float, nesterov: bool) -> None:
        state = self.state[kernel]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(kernel)
        buffer = state["momentum_buffer"].mul_(momentum).add_(kernel.grad)
        update = kernel.grad.add_(buffer, alpha=momentum) if nesterov else buffer
        rows = update.permute(0, 2, 3, 1).to(self.dtype or kernel.dtype)  # in memory order, if channels-last
        # A depthwise convolution has no matrix to share between its channels: each is a matrix of one row.
        matrices = rows.reshape(len(kernel), 1, -1) if kernel.shape[1] == 1 else rows.reshape(1, len(kernel), -1)
        update = orthogonalize(matrices).to(kernel.dtype).view(rows.shape).permute(0, 3, 1, 2)
        norm = kernel.norm()
        kernel.sub_(update * (self.scale * lr * norm / update.norm().clamp(min=1e-12)))
        kernel.mul_(norm / kernel.norm().clamp(min=1e-12))


def orthogonalize(matrices: Tensor) -> Tensor:
    """Replace the singular values of each matrix, (B, M, N), by values near 1: a Newton-Schulz iteration."""
    a, b, c = COEFFICIENTS
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-12)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # b·gram + c·gram @ gram
        x = torch.baddbmm(x, polynomial, x, beta=a)  # a·x + polynomial @ x
    return x.mT if is_tall else x
