"""The report and its metrics, on random members, compared with NumPy and torchmetrics."""

import math

import numpy as np
import pytest
import torch
from command_line import softmax
from torch.nn import functional as F

from evaluation import metrics, report
from models.ensemble import AVERAGES, average_probs

NAMES = ("a", "b", "c")
MEMBERS = [{"name": name, "checkpoint": f"{name}.pt"} for name in NAMES]
CLASSES = tuple("pqrst")


def make_logits(*, views=1, images=400, seed=0):
    """Logits of members that are usually right, (3, views, images, 5), and the labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 5, images)
    logits = rng.normal(0, 1.5, (3, views, images, 5)) + rng.normal(0, 1, (images, 5))
    logits[..., np.arange(images), labels] += 2
    return torch.from_numpy(logits), torch.from_numpy(labels)


@pytest.mark.parametrize("how", AVERAGES)
@pytest.mark.parametrize("views", [1, 2])
def test_probabilities_of_members_ensemble_and_leave_one_out(how, views):
    logits, _ = make_logits(views=views)
    probs = report.ensemble_probs(logits.float(), how, 1.5)
    flat = logits.float().double().reshape(3, views, -1, 5)
    everything = torch.cat(list(flat))
    torch.testing.assert_close(probs.ensemble, average_probs(everything, how, 1.5))
    for member in range(3):
        torch.testing.assert_close(probs.members[member], average_probs(flat[member], how))
        others = torch.cat([flat[other] for other in range(3) if other != member])
        torch.testing.assert_close(probs.without[member], average_probs(others, how, 1.5))
    if how == "softmax":
        untempered = report.ensemble_probs(logits, how).ensemble
        torch.testing.assert_close(untempered, logits.softmax(-1).mean((0, 1)))


def test_a_single_member_has_no_leave_one_out():
    logits, labels = make_logits()
    probs = report.ensemble_probs(logits[:1], "softmax")
    torch.testing.assert_close(probs.ensemble, probs.members[0])
    result = report.report(probs, labels, MEMBERS[:1], CLASSES)
    assert (result["leave_one_out"], result["disagreement"]) == ([], [[0.0]])
    assert result["versus_members"][0]["intervals"]["accuracy"] == [0, 0]


@pytest.mark.parametrize("how", AVERAGES)
def test_the_fitted_temperature_is_the_best_of_a_fine_grid(how):
    logits, labels = make_logits()
    averaged = report.average_logits(logits.flatten(0, 1), how)
    grid = np.exp(np.linspace(-3, 3, 3001))
    best = grid[np.argmin([F.cross_entropy(averaged / value, labels).item() for value in grid])]
    assert report.fit_temperature(logits, labels, how) == pytest.approx(best, rel=2e-3)


def test_the_fitted_temperature_stays_in_its_range():
    labels = torch.arange(5).repeat(8)
    right = 1000 * F.one_hot(labels, 5).double()[None, None]
    low, high = report.TEMPERATURES
    assert report.fit_temperature(right, labels, "softmax") == pytest.approx(low, rel=1e-6)
    assert report.fit_temperature(-right, labels, "softmax") == pytest.approx(high, rel=1e-6)


def test_the_report_equals_numpy():
    logits, labels = make_logits()
    probs = report.ensemble_probs(logits, "softmax")
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
        assert metrics.accuracy(torch.from_numpy(each), labels) == pytest.approx(row["accuracy"])
        assert metrics.negative_log_likelihood(torch.from_numpy(each), labels) == pytest.approx(row["loss"])
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


def test_the_difference_that_a_temperature_makes():
    logits, labels = make_logits()
    probs = report.ensemble_probs(logits, "softmax", 1.5)
    difference = report.report(probs, labels, MEMBERS, CLASSES)["temperature"]["difference"]
    change = (metrics.per_image(probs.ensemble, labels) - metrics.per_image(probs.unscaled, labels)).numpy()
    assert [difference[name] for name in metrics.PER_IMAGE] == pytest.approx(change.mean(0).tolist())
    assert difference["intervals"]["loss"] == pytest.approx(metrics.intervals(metrics.bootstrap(change))["loss"])


def test_mean_and_standard_deviation_by_network():
    members = [
        {"name": str(number), "loss": number / 2, "accuracy": number / 10, "brier": 0.1, "calibration_error": 0.2}
        for number in range(5)
    ]
    small, large = {"name": "resnext", "arguments": {"depth": 29}}, {"name": "resnext", "arguments": {"depth": 38}}
    dense = {"name": "densenet", "arguments": {"depth": 121}}
    groups = report.by_network(members, [small, dense, small, large, small])
    assert len(groups) == 1, "a single member has no standard deviation"
    assert (groups[0]["network"], groups[0]["members"]) == ("resnext", ["0", "2", "4"])
    assert groups[0]["loss"] == {"mean": 1.0, "std": pytest.approx(np.std([0, 1, 2], ddof=1))}
    assert groups[0]["accuracy"]["std"] == pytest.approx(0.2)


@pytest.fixture
def logits():
    return np.random.default_rng(0).normal(0, 3, (3, 500, 7))


@pytest.fixture
def labels():
    return np.random.default_rng(1).integers(0, 7, 500)


def test_a_probability_of_zero_gives_a_large_finite_loss():
    loss = metrics.negative_log_likelihood(torch.tensor([[1.0, 0.0]]), torch.tensor([1]))
    assert 80 < loss < math.inf


def test_reliability_and_calibration_error_equal_a_loop_in_numpy(logits, labels):
    probs = softmax(logits[0])
    confidence, hits = probs.max(1), probs.argmax(1) == labels
    tensor, targets = torch.from_numpy(probs), torch.from_numpy(labels)
    counts, mean_confidence, accuracies = metrics.reliability(tensor, targets)
    error = 0
    for number in range(15):
        inside = (confidence > number / 15) & (confidence <= (number + 1) / 15)
        assert counts[number] == inside.sum()
        if inside.any():
            assert mean_confidence[number] == pytest.approx(confidence[inside].mean())
            assert accuracies[number] == pytest.approx(hits[inside].mean())
            error += inside.sum() / 500 * abs(hits[inside].mean() - confidence[inside].mean())
        else:
            assert mean_confidence[number] == accuracies[number] == 0
    assert metrics.calibration_error(tensor, targets) == pytest.approx(error, abs=1e-12)


def test_calibration_error_equals_torchmetrics(logits, labels):
    torchmetrics = pytest.importorskip("torchmetrics")
    reference = torchmetrics.classification.MulticlassCalibrationError(num_classes=7, n_bins=15, norm="l1")
    for each in logits:
        probs, targets = torch.from_numpy(softmax(each)), torch.from_numpy(labels)
        edges = np.arange(16)[:, None] / 15
        assert np.abs(probs.max(1).values.numpy() - edges).min() > 1e-6, "on an edge, rounding decides the bin"
        assert metrics.calibration_error(probs, targets) == pytest.approx(reference(probs, targets).item(), abs=1e-6)


def test_a_bin_includes_its_upper_edge(monkeypatch):
    monkeypatch.setattr(metrics, "BINS", 4)
    probs = torch.tensor([[0.5, 0.5], [0.75, 0.25], [1.0, 0.0]])
    counts, _, _ = metrics.reliability(probs, torch.zeros(3, dtype=torch.long))
    assert counts.tolist() == [0, 1, 1, 1]


def test_disagreement_equals_numpy(logits):
    predicted = logits.argmax(2)
    ours = metrics.disagreement(torch.from_numpy(softmax(logits)))
    for one in range(3):
        for other in range(3):
            assert ours[one, other] == (predicted[one] != predicted[other]).mean()


def test_confusions_are_the_most_frequent_mistakes_in_order():
    labels = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])
    probs = torch.eye(3)[[1, 1, 0, 2, 1, 0, 0, 0, 2]]
    assert metrics.confusion_matrix(probs, labels).tolist() == [[1, 2, 0], [0, 1, 1], [3, 0, 1]]
    assert metrics.confusions(probs, labels, 2) == [(2, 0, 3), (0, 1, 2)]
    assert metrics.confusions(probs, labels, 10) == [(2, 0, 3), (0, 1, 2), (1, 2, 1)]
    assert metrics.confusions(torch.eye(3)[labels], labels, 10) == []


@pytest.mark.parametrize("at_once", [1, 35, 10_000])
def test_bootstrap_equals_a_loop(monkeypatch, at_once):
    values = np.random.default_rng(5).normal(size=(7, 3))
    monkeypatch.setattr(metrics, "RESAMPLED_AT_ONCE", at_once)
    monkeypatch.setattr(metrics, "RESAMPLES", 40)
    rng = np.random.default_rng(0)
    expected = [values[rng.integers(0, 7, 7)].mean(0) for _ in range(40)]
    np.testing.assert_allclose(metrics.bootstrap(values), expected, atol=1e-12)


def test_an_interval_has_the_width_of_the_normal_approximation():
    values = np.random.default_rng(5).random((400, 1)) < 0.9
    low, high = metrics.intervals(metrics.bootstrap(values.repeat(3, axis=1)))["accuracy"]
    share = values.mean()
    assert low < share < high
    assert (high - low) / 2 == pytest.approx(1.96 * math.sqrt(share * (1 - share) / 400), rel=0.05)
