"""Every metric of predicted probabilities against the same computed in numpy, some against torchmetrics too."""

import math

import numpy as np
import pytest
import torch
from command_line import softmax

from evaluation import metrics
from models.ensemble import average_probs


@pytest.fixture
def logits():
    return np.random.default_rng(0).normal(0, 3, (3, 500, 7))


@pytest.fixture
def labels():
    return np.random.default_rng(1).integers(0, 7, 500)


def test_loss_accuracy_and_brier_score_equal_numpy(logits, labels):
    probs = softmax(logits[0])
    tensor, targets = torch.from_numpy(probs), torch.from_numpy(labels)
    loss, correct = -np.log(probs[np.arange(500), labels]), probs.argmax(1) == labels
    brier = ((probs - np.eye(7)[labels]) ** 2).sum(1)
    np.testing.assert_allclose(metrics.per_image(tensor, targets), np.stack([loss, correct, brier], 1), atol=1e-12)
    assert metrics.accuracy(torch.from_numpy(logits[0]), targets) == correct.mean()
    assert metrics.negative_log_likelihood(tensor, targets) == pytest.approx(loss.mean(), abs=1e-12)


def test_a_probability_of_zero_is_a_large_loss_not_an_infinite_one():
    loss = metrics.negative_log_likelihood(torch.tensor([[1.0, 0.0]]), torch.tensor([1]))
    assert 80 < loss < math.inf


def test_both_averages_equal_numpy(logits):
    tensor, mean = torch.from_numpy(logits), softmax(logits).mean(0)
    np.testing.assert_allclose(average_probs(tensor), mean, atol=1e-12)
    np.testing.assert_allclose(average_probs(tensor, "logits"), softmax(logits.mean(0)), atol=1e-12)
    assert not np.allclose(softmax(logits.mean(0)), mean, atol=1e-2), "the two averages ought to differ"
    with pytest.raises(ValueError, match="'median'"):
        average_probs(tensor, "median")


def test_calibration_equals_a_loop_in_numpy(logits, labels):
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


def test_a_bin_holds_its_upper_edge(monkeypatch):
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
    matrix = metrics.confusion_matrix(probs, labels)
    assert matrix.tolist() == [[1, 2, 0], [0, 1, 1], [3, 0, 1]]
    assert metrics.confusions(matrix, 2) == [(2, 0, 3), (0, 1, 2)]
    assert metrics.confusions(matrix, 10) == [(2, 0, 3), (0, 1, 2), (1, 2, 1)]
    assert metrics.confusions(matrix.diag().diag(), 10) == []


@pytest.mark.parametrize("at_once", [1, 35, 10_000])
def test_bootstrap_equals_a_loop(monkeypatch, at_once):
    values = np.random.default_rng(5).normal(size=(7, 3))
    monkeypatch.setattr(metrics, "RESAMPLED_AT_ONCE", at_once)
    monkeypatch.setattr(metrics, "RESAMPLES", 40)
    rng = np.random.default_rng(0)
    expected = [values[rng.integers(0, 7, 7)].mean(0) for _ in range(40)]
    np.testing.assert_allclose(metrics.bootstrap(values), expected, atol=1e-12)


def test_an_interval_is_as_wide_as_the_normal_distribution_has_it():
    values = np.random.default_rng(5).random((400, 1)) < 0.9
    low, high = metrics.interval(metrics.bootstrap(values)[:, 0])
    share = values.mean()
    assert low < share < high
    assert (high - low) / 2 == pytest.approx(1.96 * math.sqrt(share * (1 - share) / 400), rel=0.05)
