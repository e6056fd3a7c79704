"""Loss and accuracy against the same worked out in numpy."""

import math

import numpy as np
import pytest
import torch

import metrics
from models.ensemble import average_probs


def softmax(logits):
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


@pytest.fixture
def logits():
    return np.random.default_rng(0).normal(0, 3, (3, 500, 7))


@pytest.fixture
def labels():
    return np.random.default_rng(1).integers(0, 7, 500)


def test_loss_and_accuracy_of_logits(logits, labels):
    probs = softmax(logits[0])
    own, targets = torch.from_numpy(logits[0]), torch.from_numpy(labels)
    assert metrics.cross_entropy(own, targets) == pytest.approx(
        -np.log(probs[np.arange(500), labels]).mean(), abs=1e-12
    )
    assert metrics.accuracy(own, targets) == (probs.argmax(1) == labels).mean()
    assert metrics.negative_log_likelihood(own.softmax(1), targets) == pytest.approx(
        metrics.cross_entropy(own, targets), abs=1e-12
    )


def test_float32_logits_are_summed_in_float64():
    logits = torch.tensor([[100.0, 0.0]]).repeat(10_000, 1)
    labels = torch.zeros(10_000, dtype=torch.long)
    labels[0] = 1
    assert metrics.cross_entropy(logits, labels) == pytest.approx(100 / 10_000, rel=1e-12)


def test_a_probability_of_nought_is_a_large_loss_not_an_infinite_one():
    loss = metrics.negative_log_likelihood(torch.tensor([[1.0, 0.0]]), torch.tensor([1]))
    assert 80 < loss < math.inf


def test_softmax_average_is_the_mean_of_probabilities(logits):
    ours = average_probs(torch.from_numpy(logits))
    np.testing.assert_allclose(ours, softmax(logits).mean(0), atol=1e-12)


def test_logit_average_is_the_softmax_of_the_mean(logits):
    ours = average_probs(torch.from_numpy(logits), "logits")
    np.testing.assert_allclose(ours, softmax(logits.mean(0)), atol=1e-12)
    assert not np.allclose(ours, softmax(logits).mean(0), atol=1e-2), "the two averages ought to differ"


def test_a_mixture_never_loses_more_than_its_members_mean(logits, labels):
    # Jensen's inequality: −log of a mean is at most the mean of −logs.
    targets = torch.from_numpy(labels)
    members = [metrics.cross_entropy(torch.from_numpy(own), targets) for own in logits]
    ensemble = metrics.negative_log_likelihood(average_probs(torch.from_numpy(logits)), targets)
    assert ensemble < np.mean(members)


def test_unknown_average(logits):
    with pytest.raises(ValueError, match="'median'"):
        average_probs(torch.from_numpy(logits), "median")
