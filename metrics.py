"""Loss and accuracy of predicted probabilities.

In float64: a test loss summed over ten thousand images should not depend on the order of the sum.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def cross_entropy(logits: Tensor, labels: Tensor) -> float:
    """Mean negative log-likelihood of `labels`, int64 (N,), under the softmax of `logits`, (N, C)."""
    return F.cross_entropy(logits.double(), labels).item()


def negative_log_likelihood(probs: Tensor, labels: Tensor) -> float:
    """Mean −log of the probability that `probs`, (N, C), give to `labels`, int64 (N,).

    A probability of nought counts as the smallest float64 above it.
    """
    chosen = probs.double().gather(1, labels[:, None])
    return -chosen.clamp(min=torch.finfo(torch.float64).tiny).log().mean().item()


def accuracy(scores: Tensor, labels: Tensor) -> float:
    """Fraction of rows whose highest score, of logits or probabilities (N, C), is that of the label, int64 (N,)."""
    return (scores.argmax(1) == labels).double().mean().item()
