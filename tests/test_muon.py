"""Muon's parts. tests/test_loop.py compares whole runs with a plain loop, which uses singular values."""

import pytest
import torch
from torch import nn

from training.muon import Muon, orthogonalize


@pytest.mark.parametrize("shape", [(2, 8, 24), (2, 24, 8), (1, 16, 16)])
def test_singular_values_become_similar_and_singular_vectors_stay(shape):
    u, _, v = torch.linalg.svd(torch.randn(shape, generator=torch.Generator().manual_seed(0)), full_matrices=False)
    values = torch.linspace(0.2, 2, min(shape[1:]))
    found = u.mT @ orthogonalize((u * values) @ v) @ v.mT
    new = found.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(found, torch.diag_embed(new), atol=1e-5, rtol=0)
    assert ((new > 0.68) & (new < 1.21)).all()


def step(kernel, gradient, **settings):
    settings = {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "scale": 0.5} | settings
    optimizer = Muon([kernel], lr=torch.tensor(0.2), **settings)
    kernel.grad = gradient.clone()
    optimizer.step()
    return kernel.detach()


def test_a_step_keeps_the_norm_of_a_kernel_and_changes_it_by_the_learning_rate():
    before = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    after = step(nn.Parameter(before.clone()), 1e-3 * torch.randn_like(before))
    assert after.norm().item() == pytest.approx(before.norm().item())
    # The step is almost orthogonal to the kernel, as almost all directions are in many dimensions.
    assert ((after - before).norm() / before.norm()).item() == pytest.approx(0.1, rel=0.1)


@pytest.mark.parametrize("shape", [(8, 24, 3, 3), (24, 8, 1, 1), (24, 1, 3, 3)])
def test_bfloat16_rounds_the_update_and_not_the_kernel(shape):
    before, gradient = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    exact, rounded = (step(nn.Parameter(before.clone()), gradient, dtype=dtype) for dtype in (None, torch.bfloat16))
    assert 0 < (rounded - exact).norm() < 0.02 * (exact - before).norm()
    assert rounded.norm().item() == pytest.approx(before.norm().item())


def test_the_channels_of_a_depthwise_convolution_do_not_influence_each_other():
    before, gradient = torch.randn(2, 5, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    other_gradient = gradient.clone()
    other_gradient[1:] *= 100
    one, other = (step(nn.Parameter(before.clone()), change) for change in (gradient, other_gradient))
    torch.testing.assert_close(one, other)


def test_a_gradient_or_a_kernel_of_zeros_changes_nothing():
    kernel = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(step(nn.Parameter(kernel.clone()), torch.zeros_like(kernel)), kernel)
    zeros = torch.zeros_like(kernel)
    assert torch.equal(step(nn.Parameter(zeros.clone()), kernel), zeros)


def test_a_frozen_kernel_is_skipped():
    kernel = nn.Parameter(torch.ones(2, 2, 3, 3))
    Muon([kernel], lr=torch.tensor(0.2), momentum=0.9, nesterov=True, weight_decay=0.1, scale=0.5).step()
    assert torch.equal(kernel, torch.ones(2, 2, 3, 3))
