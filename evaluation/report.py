"""The results of members and ensemble on a test set: from the members' logits to the numbers in ensemble.json.

Every interval is the middle 95 % of a bootstrap over the test images. It says how much a number would vary with other
test images, not with another training seed. The calibration error has no interval: it is a sum of absolute values,
which resampling increases, so that its interval would lie above it.
"""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from evaluation import metrics
from evaluation.members import TEMPERATURES
from evaluation.metrics import PER_IMAGE
from models.ensemble import average_logits, average_probs

MAX_CONFUSIONS, MAX_DOUBTFUL_LABELS = 10, 50


@dataclass(frozen=True)
class Probs:
    """Probabilities of the same N images, float64."""

    members: Tensor  # (M, N, C)
    ensemble: Tensor  # (N, C)
    without: list[Tensor]  # (N, C) each: the ensemble without one of the members; empty if there is only one member
    unscaled: Tensor  # (N, C): the ensemble with temperature 1
    temperature: float


def ensemble_probs(logits: Tensor, average: str, temperature: float = 1.0) -> Probs:
    """Probabilities of members and ensemble, from logits (M, V, N, C) of M members for V views of N images.

    A member is averaged over its views, the ensemble over all views of all members. `average` is one of `AVERAGES`. The
    temperature applies to the ensemble, also without one of its members, but not to single members.
    """
    logits = logits.double()
    others = [torch.cat([logits[:number], logits[number + 1 :]]) for number in range(len(logits)) if len(logits) > 1]
    return Probs(
        members=torch.stack([average_probs(views, average) for views in logits]),
        ensemble=average_probs(logits.flatten(0, 1), average, temperature),
        without=[average_probs(rest.flatten(0, 1), average, temperature) for rest in others],
        unscaled=average_probs(logits.flatten(0, 1), average),
        temperature=temperature,
    )


def fit_temperature(logits: Tensor, labels: Tensor, average: str) -> float:
    """The temperature, within `TEMPERATURES`, that gives the ensemble the lowest loss on validation images.

    `logits` are (M, V, N, C), `labels` int64 (N,). It is fitted after averaging, because the average of members that
    are calibrated one by one is underconfident (Rahaman and Thiery 2021, arXiv:2007.08792).
    """
    averaged = average_logits(logits.double().flatten(0, 1), average)

    def loss(log_temperature: float) -> float:
        return F.cross_entropy(averaged / math.exp(log_temperature), labels).item()

    # The loss is convex in 1 / temperature, so it has a single minimum, which a ternary search finds.
    low, high = (math.log(limit) for limit in TEMPERATURES)
    while high - low > 1e-7:
        left, right = (2 * low + high) / 3, (low + 2 * high) / 3
        low, high = (low, right) if loss(left) <= loss(right) else (left, high)
    return math.exp((low + high) / 2)


def report(
    probs: Probs, labels: Tensor, members: Sequence[dict], classes: Sequence[str], fitted_on: int | None = None
) -> dict[str, Any]:
    """Scores of members and ensemble, and their differences, as in ensemble.json. `labels` are int64 (N,).

    `members` are dicts with a "name" and anything else to store; `fitted_on` is the number of images on which the
    temperature was fitted. Losses are in nats; accuracies, calibration errors and disagreements are fractions.
    Differences are the ensemble minus a member, or the ensemble without a member minus the whole ensemble.
    """
    all_probs = [*probs.members, probs.ensemble, *probs.without, probs.unscaled]
    per_image = [metrics.per_image(each, labels) for each in all_probs]
    resampled = metrics.bootstrap(torch.cat(per_image, 1).numpy()).reshape(-1, len(all_probs), len(PER_IMAGE))
    scores = [
        dict(zip(PER_IMAGE, values.mean(0).tolist(), strict=True))
        | {"calibration_error": metrics.calibration_error(each, labels)}
        for each, values in zip(all_probs, per_image, strict=True)
    ]
    rows = [row | {"intervals": metrics.intervals(resampled[:, number])} for number, row in enumerate(scores)]
    whole, unscaled = len(members), len(rows) - 1

    def difference(one: int, other: int) -> dict[str, Any]:
        change = {name: scores[one][name] - scores[other][name] for name in PER_IMAGE}
        return change | {"intervals": metrics.intervals(resampled[:, one] - resampled[:, other])}

    # The best member is selected on the test set, so the comparison is biased against the ensemble.
    best = max(range(whole), key=lambda number: (scores[number]["accuracy"], -scores[number]["loss"]))
    names = [member["name"] for member in members]
    temperature = None
    if probs.temperature != 1.0:
        before, after = scores[unscaled], scores[whole]
        temperature = {"value": probs.temperature, "fitted_on": fitted_on, "before": before, "after": after}
        temperature["difference"] = difference(whole, unscaled)
    return {
        "members": [member | row for member, row in zip(members, rows[:whole], strict=True)],
        "ensemble": rows[whole],
        "best_member": names[best],
        "versus_members": [{"name": name} | difference(whole, number) for number, name in enumerate(names)],
        "leave_one_out": [
            {"without": name} | rows[number] | {"versus_ensemble": difference(number, whole)}
            for number, name in zip(range(whole + 1, unscaled), names, strict=False)
        ],
        "disagreement": metrics.disagreement(probs.members).tolist(),
        "confusions": [
            {"true": classes[true], "predicted": classes[predicted], "images": images}
            for true, predicted, images in metrics.confusions(probs.ensemble, labels, MAX_CONFUSIONS)
        ],
        "temperature": temperature,
    }


def doubtful_labels(probs: Tensor, labels: Tensor, classes: Sequence[str]) -> list[dict[str, Any]]:
    """The images whose label has the lowest probability in the ensemble, (N, C); the lowest first.

    About 0.5 % of CIFAR-10's test labels are wrong (Northcutt et al. 2021, arXiv:2103.14749), and such images tend to
    be at the top of this list. All scores include them.
    """
    given = probs[torch.arange(len(labels)), labels]
    predicted_probs, predicted = probs.max(1)
    return [
        {
            "index": row,
            "label": classes[labels[row]],
            "label_prob": given[row].item(),
            "prediction": classes[predicted[row]],
            "prediction_prob": predicted_probs[row].item(),
        }
        for row in given.argsort(stable=True)[:MAX_DOUBTFUL_LABELS].tolist()
    ]


def by_network(members: Sequence[dict[str, Any]], networks: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and sample standard deviation (n − 1) over the members of each network that has two or more members.

    `members` are the members in `report`, `networks` the "network" of their checkpoints: a name and arguments.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for member, network in zip(members, networks, strict=True):
        groups.setdefault(json.dumps(network, sort_keys=True), []).append(member)
    return [
        {"network": json.loads(network)["name"], "members": [member["name"] for member in same]}
        | {name: mean_and_std([member[name] for member in same]) for name in (*PER_IMAGE, "calibration_error")}
        for network, same in groups.items()
        if len(same) > 1
    ]


def mean_and_std(values: Sequence[float]) -> dict[str, float]:
    return {"mean": statistics.mean(values), "std": statistics.stdev(values)}
