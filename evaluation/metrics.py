"""Metrics of predicted probabilities: loss, accuracy, Brier score, calibration error, and bootstrap intervals.

In float64: a test loss summed over ten thousand images should not depend on the order of the sum.
"""

from collections import Counter

import numpy as np
import torch
from torch import Tensor

PER_IMAGE = ("loss", "accuracy", "brier")  # the columns that `per_image` returns
BINS = 15
RESAMPLES = 10_000
RESAMPLED_AT_ONCE = 2**20  # images drawn per batch: 8 MB of indices, and as much of counts


def negative_log_likelihood(probs: Tensor, labels: Tensor) -> float:
    """Mean −log of the probability that `probs`, (N, C), give to `labels`, int64 (N,)."""
    return per_image(probs, labels)[:, 0].mean().item()


def accuracy(scores: Tensor, labels: Tensor) -> float:
    """Fraction of rows whose highest score, of logits or probabilities (N, C), is that of the label, int64 (N,)."""
    return (scores.argmax(1) == labels).double().mean().item()


def per_image(probs: Tensor, labels: Tensor) -> Tensor:
    """`PER_IMAGE` of each image, float64 (N, 3), from `probs`, (N, C), and `labels`, int64 (N,).

    A probability of zero counts as the smallest float64 above it.
    """
    probs = probs.double()
    chosen = probs.gather(1, labels[:, None])[:, 0]
    loss = -chosen.clamp(min=torch.finfo(torch.float64).tiny).log()
    correct = (probs.argmax(1) == labels).double()
    brier = probs.square().sum(1) - 2 * chosen + 1  # Σ(p − y)², y being 1 for the label and 0 elsewhere
    return torch.stack([loss, correct, brier], 1)


def reliability(probs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Number of images, mean confidence and accuracy in each of `BINS` equally wide confidence bins.

    An image's confidence is the probability of its most probable class. Returns int64, float64 and float64 (BINS,),
    the last two being fractions, and 0 if a bin is empty. (Guo et al. 2017, arXiv:1706.04599, section 2)
    """
    confidence, predicted = probs.double().max(1)
    bin_of = ((confidence * BINS).ceil().long() - 1).clamp(0, BINS - 1)  # a bin holds its upper edge, as in the paper
    counts = torch.bincount(bin_of, minlength=BINS)
    mean_confidence = torch.bincount(bin_of, confidence, BINS) / counts.clamp(min=1)
    accuracies = torch.bincount(bin_of, (predicted == labels).double(), BINS) / counts.clamp(min=1)
    return counts, mean_confidence, accuracies


def calibration_error(probs: Tensor, labels: Tensor) -> float:
    """Expected calibration error, a fraction: mean |accuracy − confidence| over the bins, weighted by count."""
    counts, confidence, accuracies = reliability(probs, labels)
    return ((accuracies - confidence).abs() * counts).sum().item() / len(labels)


def disagreement(probs: Tensor) -> Tensor:
    """Fraction of images that two members classify differently, float64 (M, M), from `probs`, (M, N, C)."""
    predicted = probs.argmax(2)
    return (predicted[:, None] != predicted).double().mean(2)


def confusion_matrix(probs: Tensor, labels: Tensor) -> Tensor:
    """Number of images of each true class (row) by predicted class (column), int64 (C, C)."""
    classes = probs.shape[1]
    return torch.bincount(labels * classes + probs.argmax(1), minlength=classes**2).view(classes, classes)


def confusions(probs: Tensor, labels: Tensor, most: int) -> list[tuple[int, int, int]]:
    """The `most` frequent mistakes: true class, predicted class, number of images, the most frequent first."""
    pairs = zip(labels.tolist(), probs.argmax(1).tolist(), strict=True)
    counts = Counter((true, predicted) for true, predicted in pairs if true != predicted)
    return [(*pair, count) for pair, count in counts.most_common(most)]


def bootstrap(values: np.ndarray) -> np.ndarray:
    """Means of `values`, (N, K), over N rows drawn with replacement: float64 (RESAMPLES, K).

    The K columns share every draw, so the difference of two of them is that of a paired comparison. (Efron 1979)
    """
    rng = np.random.default_rng(0)
    images = len(values)
    means = np.empty((RESAMPLES, values.shape[1]))
    for start in range(0, RESAMPLES, at_once := max(1, RESAMPLED_AT_ONCE // images)):
        drawn = rng.integers(0, images, (min(at_once, RESAMPLES - start), images))
        # How often each row was drawn: one product with `values` then replaces gathering them all.
        counts = np.stack([np.bincount(rows, minlength=images) for rows in drawn]).astype(np.float64)
        means[start : start + len(drawn)] = counts @ values / images
    return means


def intervals(means: np.ndarray) -> dict[str, list[float]]:
    """Both ends of the middle 95 % of resampled means, (RESAMPLES, 3), of each of `PER_IMAGE`."""
    return dict(zip(PER_IMAGE, np.percentile(means, [2.5, 97.5], axis=0).T.tolist(), strict=True))
