"""The results of members and ensemble on a test set: from the members' logits to the numbers of ensemble.json.

Every interval is the middle 95 % of a bootstrap over the test images. It says how far a figure would move with other
images of the same kind, not with another seed of the training. The calibration error has none: made of absolute values,
it only grows when images are resampled, and its interval would lie above it.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from evaluation import metrics
from evaluation.members import TEMPERATURES
from evaluation.metrics import PER_IMAGE
from models.ensemble import average_logits, average_probs

CONFUSIONS = 10


@dataclass(frozen=True)
class Probs:
    """Probabilities of the same N images, float64."""

    members: Tensor
    """(M, N, C)"""
    ensemble: Tensor
    """(N, C)"""
    without: Tensor
    """(M, N, C): the ensemble without each of its members; (0, N, C) where there is only one"""


def average(logits: Tensor, how: str, temperature: float = 1.0) -> Probs:
    """Average the members' logits, (M, V, N, C): of M members, each of V views of N images.

    A member is averaged over its own views, the ensemble over all views of all members. `how` is one of `AVERAGES`; the
    temperature is the ensemble's, with all members and without one, and leaves the members as they are.
    """
    logits = logits.double()
    members = range(len(logits))
    without = [
        average_probs(logits[[other for other in members if other != member]].flatten(0, 1), how, temperature)
        for member in (members if len(members) > 1 else ())
    ]
    return Probs(
        members=torch.stack([average_probs(own, how) for own in logits]),
        ensemble=average_probs(logits.flatten(0, 1), how, temperature),
        without=torch.stack(without) if without else torch.empty(0, *logits.shape[2:], dtype=torch.float64),
    )


def fit_temperature(logits: Tensor, labels: Tensor, how: str) -> float:
    """The temperature, within `TEMPERATURES`, whose ensemble has the least loss on images that it was not trained on.

    `logits` are (M, V, N, C), `labels` int64 (N,). It is fitted after averaging: members that are calibrated one by one
    make an average that is too unsure (Rahaman and Thiery 2021, arXiv:2007.08792).
    """
    averaged = average_logits(logits.double().flatten(0, 1), how)

    def loss(log_temperature: float) -> float:
        return F.cross_entropy(averaged / math.exp(log_temperature), labels).item()

    # The loss is convex in 1 / temperature, so it has one valley, and a ternary search cannot miss it.
    low, high = (math.log(limit) for limit in TEMPERATURES)
    while high - low > 1e-7:
        left, right = (2 * low + high) / 3, (low + 2 * high) / 3
        low, high = (low, right) if loss(left) <= loss(right) else (left, high)
    return math.exp((low + high) / 2)


def report(probs: Probs, labels: Tensor, names: Sequence[str], classes: Sequence[str]) -> dict[str, Any]:
    """Figures of members and ensemble, and how they compare. `labels` are int64 (N,).

    Losses are in nats; accuracies, calibration errors and disagreements are fractions; a difference is the ensemble
    minus the member, or the ensemble without one minus the whole.
    """
    all_probs = [*probs.members, probs.ensemble, *probs.without]
    per_image = torch.stack([metrics.per_image(own, labels) for own in all_probs], 1)  # (N, all_probs, PER_IMAGE)
    resampled = metrics.bootstrap(per_image.flatten(1).numpy()).reshape(-1, *per_image.shape[1:])
    rows = [
        figures(own, labels) | {"intervals": intervals(resampled[:, number])} for number, own in enumerate(all_probs)
    ]
    at = len(names)  # the ensemble's place
    members, ensemble, without = rows[:at], rows[at], rows[at + 1 :]

    def difference(one: int, other: int) -> dict[str, Any]:
        change = {name: rows[one][name] - rows[other][name] for name in PER_IMAGE}
        return change | {"intervals": intervals(resampled[:, one] - resampled[:, other])}

    # Chosen on the very images it is compared on, the best member looks better than it is: by comparing with it, the
    # ensemble's lead comes out too small rather than too large.
    best = max(range(at), key=lambda number: (members[number]["accuracy"], -members[number]["loss"]))
    return {
        "members": [{"name": name} | row for name, row in zip(names, members, strict=True)],
        "ensemble": ensemble,
        "best_member": names[best],
        "versus_members": [{"name": name} | difference(at, number) for number, name in enumerate(names)],
        "leave_one_out": [
            {"without": names[number]} | row | {"versus_ensemble": difference(at + 1 + number, at)}
            for number, row in enumerate(without)
        ],
        "disagreement": metrics.disagreement(probs.members).tolist(),
        "confusions": [
            {"true": classes[true], "predicted": classes[predicted], "images": images}
            for true, predicted, images in metrics.confusions(probs.ensemble, labels, CONFUSIONS)
        ],
    }


def paired(one: Tensor, other: Tensor, labels: Tensor) -> dict[str, Any]:
    """Means of `PER_IMAGE` of probabilities (N, C) minus those of others for the same images, and their intervals."""
    change = metrics.per_image(one, labels) - metrics.per_image(other, labels)
    means = dict(zip(PER_IMAGE, change.mean(0).tolist(), strict=True))
    return means | {"intervals": intervals(metrics.bootstrap(change.numpy()))}


def figures(probs: Tensor, labels: Tensor) -> dict[str, float]:
    """Loss, accuracy, Brier score and calibration error of probabilities (N, C)."""
    means = metrics.per_image(probs, labels).mean(0).tolist()
    return dict(zip(PER_IMAGE, means, strict=True)) | {"calibration_error": metrics.calibration_error(probs, labels)}


def intervals(resampled: np.ndarray) -> dict[str, list[float]]:
    """The interval of each of `PER_IMAGE` from its resampled means, (resamples, 3)."""
    return {name: metrics.interval(means) for name, means in zip(PER_IMAGE, resampled.T, strict=True)}


def by_network(members: Sequence[dict[str, Any]], networks: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation (of a sample: n − 1) over the members of each network that has two or more.

    `members` are those of `report`, `networks` what their checkpoints say of them: a name and arguments.
    """

    def network(pair: tuple) -> str:
        return repr((pair[1]["name"], sorted(pair[1]["arguments"].items())))

    groups = []
    for _, pairs in groupby(sorted(zip(members, networks, strict=True), key=network), key=network):
        same, (first, *_) = zip(*pairs, strict=True)
        if len(same) > 1:
            spread = {}
            for name in (*PER_IMAGE, "calibration_error"):
                values = [member[name] for member in same]
                spread[name] = {"mean": statistics.mean(values), "std": statistics.stdev(values)}
            groups.append({"network": first["name"], "members": [member["name"] for member in same]} | spread)
    return groups
