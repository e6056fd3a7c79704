"""What accuracy costs: every subset of an ensemble, and a cascade of its members from the cheapest on.

Costs are of one image: milliseconds, measured when the logits were computed, and multiply-adds, which are counted.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from evaluation import metrics
from models.ensemble import average_probs, cascade_probs

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99, 0.995, 0.999, 1.0)
DEFAULT_THRESHOLD = 0.9
TOLERANCE = 0.001  # of accuracy, for the threshold that validation images choose
ALL_SUBSETS_OF = 6  # members; of more, only the smallest and the largest subsets

Cost = dict[str, Any]  # of a member: name, milliseconds, multiply_adds
COSTS = ("milliseconds", "multiply_adds")


def subsets(count: int) -> Iterator[tuple[int, ...]]:
    """Of `count` members: all, or of many the single ones, the pairs, the leave-one-outs and the whole."""
    sizes = range(1, count + 1) if count <= ALL_SUBSETS_OF else (1, 2, count - 1, count)
    return itertools.chain.from_iterable(itertools.combinations(range(count), size) for size in sizes)


def subset_rows(
    logits: Tensor, labels: Tensor, costs: Sequence[Cost], how: str, temperature: float
) -> list[dict[str, Any]]:
    """Accuracy, loss and cost of each subset, from logits (M, V, N, C); a single member keeps its own confidence."""
    rows = []
    for subset in subsets(len(costs)):
        own = logits[list(subset)].double().flatten(0, 1)
        probs = average_probs(own, how, temperature if len(subset) > 1 else 1.0)
        spent = {name: sum(costs[number][name] for number in subset) for name in COSTS}
        rows.append({"members": [costs[number]["name"] for number in subset]} | scores(probs, labels) | spent)
    return rows


def cascade_rows(
    probs: Tensor, labels: Tensor, costs: Sequence[Cost], thresholds: Sequence[float] = THRESHOLDS
) -> list[dict[str, Any]]:
    """Accuracy, loss and cost at each threshold, from the members' probabilities (M, N, C).

    The members come from the cheapest on; `seen` is the share of the images that each one saw.
    """
    order = sorted(range(len(costs)), key=lambda number: costs[number]["multiply_adds"])
    rows = []
    for threshold in thresholds:
        averaged, seen = cascade_probs(probs[order], threshold)
        shares = {number: (seen > place).double().mean().item() for place, number in enumerate(order)}
        spent = {name: sum(costs[number][name] * share for number, share in shares.items()) for name in COSTS}
        by_name = {costs[number]["name"]: share for number, share in shares.items()}
        rows.append({"threshold": threshold, "seen": by_name} | scores(averaged, labels) | spent)
    return rows


def choose_threshold(probs: Tensor, labels: Tensor, costs: Sequence[Cost], ensemble: Tensor) -> float:
    """The lowest threshold whose accuracy is within `TOLERANCE` of the ensemble's, on validation images.

    `probs` are the members' (M, N, C), `ensemble` the ensemble's (N, C).
    """
    enough = metrics.accuracy(ensemble, labels) - TOLERANCE
    rows = cascade_rows(probs, labels, costs)
    return next((row["threshold"] for row in rows if row["accuracy"] >= enough), 1.0)


def scores(probs: Tensor, labels: Tensor) -> dict[str, float]:
    return {"accuracy": metrics.accuracy(probs, labels), "loss": metrics.negative_log_likelihood(probs, labels)}


def doubtful_labels(probs: Tensor, labels: Tensor, classes: Sequence[str], most: int = 50) -> list[dict[str, Any]]:
    """The images whose given label the ensemble, probabilities (N, C), finds least probable; the least first.

    Some 0.5 % of CIFAR-10's test labels are wrong (Northcutt et al. 2021, arXiv:2103.14749), and most of these are
    among the first. Nothing is left out of any score.
    """
    given = probs[np.arange(len(labels)), labels]
    rows = given.argsort(stable=True)[:most].tolist()
    predicted, predicted_probs = probs.argmax(1), probs.amax(1)
    return [
        {
            "index": row,
            "label": classes[labels[row]],
            "label_prob": given[row].item(),
            "prediction": classes[predicted[row]],
            "prediction_prob": predicted_probs[row].item(),
        }
        for row in rows
    ]
