"""Metrics of predicted probabilities: loss, accuracy, Brier score, calibration error, and bootstrap intervals.

They are computed in float64, so that the sum over ten thousand images practically does not depend on the order.
"""

from collections import Counter

import numpy as np
import torch
from torch import Tensor

PER_IMAGE = ("loss", "accuracy", "brier")  # the columns that `per_image` returns
BINS = 15
RESAMPLES = 10_000
RESAMPLED_AT_ONCE = 2**20  # images drawn at once: 8 MB of indices, and 8 MB of counts


def negative_log_likelihood(probs: Tensor, labels: Tensor) -> float:
    """Mean of −log p, where p is the probability of the label; `probs` are (N, C), `labels` int64 (N,)."""
    return per_image(probs, labels)[:, 0].mean().item()


def accuracy(scores: Tensor, labels: Tensor) -> float:
    """Fraction of images whose highest score is that of the label; `scores` (logits or probs) are (N, C)."""
    return (scores.argmax(1) == labels).double().mean().item()


def per_image(probs: Tensor, labels: Tensor) -> Tensor:
    """`PER_IMAGE` of each image, float64 (N, 3), from `probs`, (N, C), and `labels`, int64 (N,).

    For the loss, a probability of zero counts as the smallest positive float64.
    """
    probs = probs.double()
    chosen = probs.gather(1, labels[:, None])[:, 0]
    loss = -chosen.clamp(min=torch.finfo(torch.float64).tiny).log()
    correct = (probs.argmax(1) == labels).double()
    brier = probs.square().sum(1) - 2 * chosen + 1  # Σ(p − y)², y being 1 for the label and 0 elsewhere
    return torch.stack([loss, correct, brier], 1)


def reliability(probs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Number of images, mean confidence and accuracy in each of `BINS` equally wide confidence bins.

    The confidence is the probability of the predicted class. Returns int64, float64 and float64, each (BINS,). The last
    two are fractions, 0 for an empty bin. (Guo et al. 2017, arXiv:1706.04599, section 2)
    """
    confidence, predicted = probs.double().max(1)
    # A bin includes its upper edge, as in the paper.
    bin_of = ((confidence * BINS).ceil().long() - 1).clamp(0, BINS - 1)
    counts = torch.bincount(bin_of, minlength=BINS)
    mean_confidence = torch.bincount(bin_of, confidence, BINS) / counts.clamp(min=1)
    accuracies = torch.bincount(bin_of, (predicted == labels).double(), BINS) / counts.clamp(min=1)
    return counts, mean_confidence, accuracies


def calibration_error(probs: Tensor, labels: Tensor) -> float:
    """Expected calibration error (ECE), a fraction: mean |accuracy − confidence| over the bins, weighted by count."""
    counts, confidence, accuracies = reliability(probs, labels)
    return ((accuracies - confidence).abs() * counts).sum().item() / len(labels)


def disagreement(probs: Tensor) -> Tensor:
    """Fraction of images that each pair of members classifies differently, float64 (M, M); `probs` are (M, N, C)."""
    predicted = probs.argmax(2)
    return (predicted[:, None] != predicted).double().mean(2)


def confusion_matrix(probs: Tensor, labels: Tensor) -> Tensor:
    """Number of images by true class (row) and predicted class (column), int64 (C, C)."""
    classes = probs.shape[1]
    return torch.bincount(labels * classes + probs.argmax(1), minlength=classes**2).view(classes, classes)


def confusions(probs: Tensor, labels: Tensor, limit: int) -> list[tuple[int, int, int]]:
    """The `limit` most frequent mistakes, the most frequent first: true class, predicted class, number of images."""
    pairs = zip(labels.tolist(), probs.argmax(1).tolist(), strict=True)
    counts = Counter((true, predicted) for true, predicted in pairs if true != predicted)
    return [(*pair, count) for pair, count in counts.most_common(limit)]


def bootstrap(values: np.ndarray) -> np.ndarray:
    """Bootstrap (Efron 1979): means of `values`, (N, K), over N rows drawn with replacement, float64 (RESAMPLES, K).

    All K columns use the same rows, so the difference of two columns is a paired comparison.
    """
    rng = np.random.default_rng(0)
    num_images = len(values)
    means = np.empty((RESAMPLES, values.shape[1]))
    for start in range(0, RESAMPLES, at_once := max(1, RESAMPLED_AT_ONCE // num_images)):
        drawn = rng.integers(0, num_images, (min(at_once, RESAMPLES - start), num_images))
        # Counting how often each row was drawn needs only a matrix product, instead of gathering all drawn rows.
        counts = np.stack([np.bincount(rows, minlength=num_images) for rows in drawn]).astype(np.float64)
        means[start : start + len(drawn)] = counts @ values / num_images
    return means


def intervals(means: np.ndarray) -> dict[str, list[float]]:
    """95 % intervals (both ends) of each of `PER_IMAGE`, from resampled means, (RESAMPLES, 3)."""
    return dict(zip(PER_IMAGE, np.percentile(means, [2.5, 97.5], axis=0).T.tolist(), strict=True))
