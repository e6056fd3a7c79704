"""Accuracy against cost: of subsets of an ensemble, and of a cascade, which runs the cheapest member first.

Costs are per image: milliseconds, measured while the logits were computed, and multiply-adds, which are counted.
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
TOLERANCE = 0.001  # accuracy that a threshold chosen on validation images may lose
MAX_MEMBERS_FOR_ALL_SUBSETS = 6  # with more members, only the smallest and the largest subsets

Cost = dict[str, Any]  # of a member: name, checkpoint, milliseconds, multiply_adds


def member_costs(contents: members.Contents, milliseconds: Sequence[float], views: int) -> list[Cost]:
    """Name, checkpoint and costs of each member. `milliseconds` are for all `views` (1; 2 with flips) of an image."""
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
    """All subsets of `count` members; if there are many, only those with 1, 2, all but one, and all members."""
    sizes = range(1, count + 1) if count <= MAX_MEMBERS_FOR_ALL_SUBSETS else (1, 2, count - 1, count)
    return itertools.chain.from_iterable(itertools.combinations(range(count), size) for size in sizes)


def subset_rows(
    logits: Tensor, labels: Tensor, costs: Sequence[Cost], average: str, temperature: float
) -> list[dict[str, Any]]:
    """Accuracy, loss and cost of each subset, from logits (M, V, N, C). Single members have no temperature."""
    rows = []
    for subset in subsets(len(costs)):
        views = logits[list(subset)].double().flatten(0, 1)
        probs = average_probs(views, average, temperature if len(subset) > 1 else 1.0)
        seen = {costs[number]["name"]: 1 for number in subset}
        rows.append({"members": list(seen)} | scores_and_cost(probs, labels, costs, seen))
    return rows


def cascade_rows(probs: Tensor, labels: Tensor, costs: Sequence[Cost]) -> list[dict[str, Any]]:
    """Accuracy, loss and cost at each of `THRESHOLDS`, from the members' probabilities (M, N, C).

    The cheapest member runs first. `seen`: the fraction of the images on which each member runs.
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
    """`seen`: the fraction of the images on which each member runs, by name."""
    return {
        "accuracy": metrics.accuracy(probs, labels),
        "loss": metrics.negative_log_likelihood(probs, labels),
        "milliseconds": sum(seen.get(cost["name"], 0) * cost["milliseconds"] for cost in costs),
        "multiply_adds": sum(seen.get(cost["name"], 0) * cost["multiply_adds"] for cost in costs),
    }


def pick_threshold(val_logits: Tensor | None, val_labels: Tensor | None, costs: Sequence[Cost]) -> dict[str, Any]:
    """The lowest threshold at which the cascade is nearly as accurate as the ensemble on the validation images.

    `val_logits` are (M, V, N, C), `val_labels` (N,). Without them, the default: it is never chosen on test images.
    """
    if val_logits is None:
        return {"value": DEFAULT_THRESHOLD, "chosen_by": "constant"}
    probs = torch.stack([average_probs(views) for views in val_logits.double()])
    min_accuracy = metrics.accuracy(probs.mean(0), val_labels) - TOLERANCE
    rows = cascade_rows(probs, val_labels, costs)
    value = next((row["threshold"] for row in rows if row["accuracy"] >= min_accuracy), 1.0)
    return {"value": value, "chosen_by": "validation", "num_images": len(val_labels)}
