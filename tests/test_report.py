"""The report: averages, the fitted temperature, comparisons and their intervals, on made-up members."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from evaluation import metrics, report
from models.ensemble import AVERAGES, average_probs

NAMES = ("a", "b", "c")
MEMBERS = [{"name": name, "checkpoint": f"{name}.pt"} for name in NAMES]
CLASSES = tuple("pqrst")


def make_logits(*, views=1, images=400, seed=0):
    """Members that are right more often than not, (3, views, images, 5), and the labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 5, images)
    logits = rng.normal(0, 1.5, (3, views, images, 5)) + rng.normal(0, 1, (images, 5))
    logits[..., np.arange(images), labels] += 2
    return torch.from_numpy(logits), torch.from_numpy(labels)


@pytest.mark.parametrize("how", AVERAGES)
@pytest.mark.parametrize("views", [1, 2])
def test_members_ensemble_and_the_ensemble_without_each(how, views):
    logits, _ = make_logits(views=views)
    probs = report.average(logits.float(), how, 1.5)
    flat = logits.float().double().reshape(3, views, -1, 5)
    everything = torch.cat(list(flat))
    torch.testing.assert_close(probs.ensemble, average_probs(everything, how, 1.5))
    for member in range(3):
        torch.testing.assert_close(probs.members[member], average_probs(flat[member], how))
        others = torch.cat([flat[other] for other in range(3) if other != member])
        torch.testing.assert_close(probs.without[member], average_probs(others, how, 1.5))
    if how == "softmax":
        untempered = report.average(logits, how).ensemble
        torch.testing.assert_close(untempered, logits.softmax(-1).mean((0, 1)))


def test_a_single_member_has_nothing_to_leave_out():
    logits, labels = make_logits()
    probs = report.average(logits[:1], "softmax")
    torch.testing.assert_close(probs.ensemble, probs.members[0])
    result = report.report(probs, labels, MEMBERS[:1], CLASSES)
    assert (result["leave_one_out"], result["disagreement"]) == ([], [[0.0]])
    assert result["versus_members"][0]["intervals"]["accuracy"] == [0, 0]


@pytest.mark.parametrize("how", AVERAGES)
def test_the_fit_is_the_least_loss_of_a_fine_grid(how):
    logits, labels = make_logits()
    averaged = report.average_logits(logits.flatten(0, 1), how)
    grid = np.exp(np.linspace(-3, 3, 3001))
    best = grid[np.argmin([F.cross_entropy(averaged / value, labels).item() for value in grid])]
    assert report.fit_temperature(logits, labels, how) == pytest.approx(best, rel=2e-3)


def test_the_fit_stays_in_its_range():
    labels = torch.arange(5).repeat(8)
    right = 1000 * F.one_hot(labels, 5).double()[None, None]
    low, high = report.TEMPERATURES
    assert report.fit_temperature(right, labels, "softmax") == pytest.approx(low, rel=1e-6)
    assert report.fit_temperature(-right, labels, "softmax") == pytest.approx(high, rel=1e-6)


def test_report_against_numpy():
    logits, labels = make_logits()
    probs = report.average(logits, "softmax")
    result = report.report(probs, labels, MEMBERS, CLASSES)
    assert [(row["name"], row["checkpoint"]) for row in result["members"]] == [(name, f"{name}.pt") for name in NAMES]
    assert result["temperature"] is None
    everyone = [*zip(result["members"], probs.members, strict=True), (result["ensemble"], probs.ensemble)]
    everyone += zip(result["leave_one_out"], probs.without, strict=True)
    for row, each in everyone:
        each, rows = each.numpy(), np.arange(400)
        assert row["loss"] == pytest.approx(-np.log(each[rows, labels]).mean())
        assert row["accuracy"] == pytest.approx((each.argmax(1) == labels.numpy()).mean())
        assert row["brier"] == pytest.approx(((each - np.eye(5)[labels]) ** 2).sum(1).mean())
        assert row["calibration_error"] == metrics.calibration_error(torch.from_numpy(each), labels)
        for name in metrics.PER_IMAGE:
            low, high = row["intervals"][name]
            assert low < row[name] < high
    for row, member, rest in zip(result["versus_members"], result["members"], result["leave_one_out"], strict=True):
        for name in metrics.PER_IMAGE:
            assert row[name] == pytest.approx(result["ensemble"][name] - member[name])
            assert rest["versus_ensemble"][name] == pytest.approx(rest[name] - result["ensemble"][name])
            assert row["intervals"][name][0] <= row[name] <= row["intervals"][name][1]
    assert [row["without"] for row in result["leave_one_out"]] == list(NAMES)
    assert result["best_member"] == max(result["members"], key=lambda row: row["accuracy"])["name"]
    assert result["confusions"] == sorted(result["confusions"], key=lambda row: -row["images"])
    first = result["confusions"][0]
    true, predicted = CLASSES.index(first["true"]), CLASSES.index(first["predicted"])
    assert first["images"] == ((labels == true) & (probs.ensemble.argmax(1) == predicted)).sum()


def test_the_effect_of_a_temperature():
    logits, labels = make_logits()
    plain = report.report(report.average(logits, "softmax"), labels, MEMBERS, CLASSES)
    result = report.report(report.average(logits, "softmax", 1.5), labels, MEMBERS, CLASSES, fitted_on=50)
    effect = result["temperature"]
    assert (effect["value"], effect["fitted_on"]) == (1.5, 50)
    for name in (*metrics.PER_IMAGE, "calibration_error"):
        assert effect["before"][name] == plain["ensemble"][name]
        assert effect["after"][name] == result["ensemble"][name]
    assert result["members"] == plain["members"]
    for name in metrics.PER_IMAGE:
        assert effect["difference"][name] == pytest.approx(effect["after"][name] - effect["before"][name])
    change = [metrics.per_image(report.average(logits, "softmax", value).ensemble, labels) for value in (1.5, 1.0)]
    means = metrics.bootstrap((change[0] - change[1]).numpy())
    assert effect["difference"]["intervals"]["loss"] == pytest.approx(metrics.interval(means[:, 0]))


def test_mean_and_standard_deviation_of_the_members_of_one_network():
    members = [
        {"name": str(number), "loss": number / 2, "accuracy": number / 10, "brier": 0.1, "calibration_error": 0.2}
        for number in range(5)
    ]
    small, large = {"name": "resnext", "arguments": {"depth": 29}}, {"name": "resnext", "arguments": {"depth": 38}}
    dense = {"name": "densenet", "arguments": {"depth": 121}}
    groups = report.by_network(members, [small, dense, small, large, small])
    assert len(groups) == 1, "one of a kind has no spread"
    assert (groups[0]["network"], groups[0]["members"]) == ("resnext", ["0", "2", "4"])
    assert groups[0]["loss"] == {"mean": 1.0, "std": pytest.approx(np.std([0, 1, 2], ddof=1))}
    assert groups[0]["accuracy"]["std"] == pytest.approx(0.2)
