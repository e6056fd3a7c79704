"""models/ensemble.py: from checkpoints to one network that takes images and gives probabilities."""

from common.errors import UserError

import numpy as np
import pytest
import torch
from command_line import changed

import models.ensemble
from evaluation import members
from models.ensemble import average_probs
from training import checkpoint
from utils import normalize


@pytest.fixture
def paths(train, tmp_path):
    """Checkpoints of three members."""
    for seed in range(3):
        train(name=f"tiny{seed}", epochs=1, seed=seed)
    return sorted((tmp_path / "checkpoints").glob("*.pt"))


@torch.no_grad()
@pytest.mark.parametrize("average", models.ensemble.AVERAGES)
def test_an_ensemble_gives_the_average_of_its_members(paths, images, average):
    changed(paths[1], lambda content: content["data"].update(mean=[0.5, 0.4, 0.3], std=[0.2, 0.3, 0.4]))
    ensemble = members.load(paths, average=average)
    assert (ensemble.classes, ensemble.image_size, ensemble.training) == (["red", "green", "blue"], 8, False)
    logits = []
    for path in paths:
        content = checkpoint.read(path)
        pixels = normalize(images, tuple(content["data"]["mean"]), tuple(content["data"]["std"]))
        logits.append(members.build_member(path, content).network(pixels))
    torch.testing.assert_close(ensemble.logits(images), torch.stack(logits), rtol=1e-5, atol=1e-5)
    probs = ensemble(images)
    assert (probs.dtype, probs.shape) == (torch.float32, (11, 3))
    torch.testing.assert_close(probs, average_probs(torch.stack(logits), average), rtol=1e-5, atol=1e-6)
    assert probs.std(0).min() > 1e-4, "the output ought to depend on the image"


@pytest.mark.parametrize("average", models.ensemble.AVERAGES)
def test_a_temperature_divides_the_logarithms_of_what_was_averaged(average):
    logits = torch.from_numpy(np.random.default_rng(0).normal(0, 3, (3, 50, 7)))
    for temperature in (0.5, 1.0, 3.0):
        powers = average_probs(logits, average).pow(1 / temperature)
        expected = powers / powers.sum(1, keepdim=True)
        torch.testing.assert_close(average_probs(logits, average, temperature), expected)


def test_no_member_is_no_ensemble():
    with pytest.raises(UserError, match="none is given"):
        members.load([])


def test_images_that_it_was_not_trained_for_are_refused(paths, images):
    ensemble = members.load(paths)
    for wrong in (images / 255, images[0], images[:, :, :4], images[:, :1]):  # floats, one image, another size, grey
        with pytest.raises(ValueError, match=r"expected torch\.uint8, values 0 to 255, of shape \(B, 3, 8, 8\)"):
            ensemble(wrong)
    assert not ensemble(images).requires_grad
