"""What accuracy costs: every subset of an ensemble, and a cascade of its members, the cheapest first.

Costs are of one image: milliseconds, measured when the logits were computed, and multiply-adds, which are counted.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from evaluation import members, metrics
from models.ensemble import average_probs, cascade_probs

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99, 0.995, 0.999, 1.0)
DEFAULT_THRESHOLD = 0.9
TOLERANCE = 0.001  # of accuracy, for the threshold that is chosen on validation images
ALL_SUBSETS_OF = 6  # members; of more, only the smallest and the largest subsets

Cost = dict[str, Any]  # of a member: name, milliseconds, multiply_adds


def member_costs(contents: members.Contents, milliseconds: Sequence[float], views: int) -> list[Cost]:
    """Costs of the members, with their checkpoints. An image has `views` views, and `milliseconds` are of all views."""
    names = members.names([path for path, _ in contents])
    return [
        {
            "name": name,
            "checkpoint": str(path),
            "milliseconds": spent,
            "multiply_adds": views * members.count_multiply_adds(path, content),
        }
        for name, (path, content), spent in zip(names, contents, milliseconds, strict=True)
    ]


def subsets(count: int) -> Iterator[tuple[int, ...]]:
    """All subsets of `count` members; if there are many, only those of 1, 2, all but one, and all members."""
    sizes = range(1, count + 1) if count <= ALL_SUBSETS_OF else (1, 2, count - 1, count)
    return itertools.chain.from_iterable(itertools.combinations(range(count), size) for size in sizes)


def subset_rows(
    logits: Tensor, labels: Tensor, costs: Sequence[Cost], average: str, temperature: float
) -> list[dict[str, Any]]:
    """Accuracy, loss and cost of each subset, from logits (M, V, N, C); temperature applies to averages only."""
    rows = []
    for subset in subsets(len(costs)):
        probs = average_probs(
            logits[list(subset)].double().flatten(0, 1), average, temperature if len(subset) > 1 else 1.0
        )
        seen = {costs[number]["name"]: 1 for number in subset}
        rows.append({"members": list(seen)} | scores_and_cost(probs, labels, costs, seen))
    return rows


def cascade_rows(probs: Tensor, labels: Tensor, costs: Sequence[Cost]) -> list[dict[str, Any]]:
    """Accuracy, loss and cost at each of `THRESHOLDS`, from the members' probabilities (M, N, C).

    The cheapest member comes first; `seen` is the share of the images that each one saw.
    """
    order = sorted(range(len(costs)), key=lambda number: costs[number]["multiply_adds"])
    rows = []
    for threshold in THRESHOLDS:
        averaged, counts = cascade_probs(probs[order], threshold)
        seen = {costs[number]["name"]: (counts > place).double().mean().item() for place, number in enumerate(order)}
        rows.append({"threshold": threshold, "seen": seen} | scores_and_cost(averaged, labels, costs, seen))
    return rows


def scores_and_cost(
    probs: Tensor, labels: Tensor, costs: Sequence[Cost], seen: Mapping[str, float]
) -> dict[str, float]:
    """`seen` is the share of the images that each member sees, by its name."""
    return {
        "accuracy": metrics.accuracy(probs, labels),
        "loss": metrics.negative_log_likelihood(probs, labels),
        "milliseconds": sum(seen.get(cost["name"], 0) * cost["milliseconds"] for cost in costs),
        "multiply_adds": sum(seen.get(cost["name"], 0) * cost["multiply_adds"] for cost in costs),
    }


def pick_threshold(val_logits: Tensor | None, val_labels: Tensor | None, costs: Sequence[Cost]) -> dict[str, Any]:
    """The threshold of the cascade: the lowest at which it is nearly as accurate on validation images as the ensemble.

    `val_logits` are (M, V, N, C), `val_labels` (N,). If they are None, it is the default: the test images never choose.
    """
    if val_logits is None:
        return {"value": DEFAULT_THRESHOLD, "chosen_by": "constant"}
    probs = torch.stack([average_probs(views) for views in val_logits.double()])
    enough = metrics.accuracy(probs.mean(0), val_labels) - TOLERANCE
    rows = cascade_rows(probs, val_labels, costs)
    value = next((row["threshold"] for row in rows if row["accuracy"] >= enough), 1.0)
    return {"value": value, "chosen_by": "validation", "num_images": len(val_labels)}
