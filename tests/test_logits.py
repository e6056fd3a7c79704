"""Logits as the network gives them, and as they come back from the cache beside the checkpoint."""

import shutil
from pathlib import Path

from common import files
from common.errors import UserError

import numpy as np
import pytest
import torch

import models
from evaluation import logits as logits_cache
from evaluation import members
from evaluation.logits import member_logits
from training import checkpoint, loop

CPU = torch.device("cpu")


@pytest.fixture
def contents(tiny, tiny_recipe, tiny_data):
    """Two checkpoints, each with its path."""
    recipes = [tiny_recipe(name=f"tiny{seed}", epochs=1, seed=seed) for seed in range(2)]
    for recipe in recipes:
        loop.fit(tiny(), tiny_data(), recipe)
    return [(recipe.checkpoint_path, checkpoint.read(recipe.checkpoint_path)) for recipe in recipes]


@pytest.fixture
def images():
    return torch.randint(0, 256, (11, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def never_built(monkeypatch):
    """From here on a network that is built is an error."""

    def forbid():
        def build(path, content):
            raise AssertionError(f"{path} is built")

        monkeypatch.setattr(logits_cache, "build_member", build)

    return forbid


def kept(contents):
    return sorted((contents[0][0].parent / logits_cache.CACHE).iterdir())


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [None, 4])
def test_logits_of_the_images_and_of_their_mirror_images(contents, images, batch_size):
    logits = member_logits(contents, images, CPU, mirrored=True, batch_size=batch_size)
    assert (logits.dtype, logits.shape) == (torch.float32, (2, 2, 11, 3))
    ensemble = members.build(contents)
    torch.testing.assert_close(logits[:, 0], ensemble.logits(images), rtol=1e-5, atol=1e-5)
    mirrored = torch.from_numpy(images.numpy()[..., ::-1].copy())
    torch.testing.assert_close(logits[:, 1], ensemble.logits(mirrored), rtol=1e-5, atol=1e-5)
    assert (logits[:, 0] - logits[:, 1]).abs().max() > 1e-4, "the two views ought to differ"


def test_a_second_time_nothing_is_built(contents, images, never_built):
    first = member_logits(contents, images, CPU)
    never_built()
    assert torch.equal(member_logits(contents, images, CPU), first)
    assert torch.equal(member_logits(contents[::-1], images, CPU), first.flip(0))


def test_whatever_decides_the_logits_makes_another_file(contents, images, never_built, monkeypatch):
    member_logits(contents, images, CPU)
    never_built()
    other = images.clone()
    other[3, 0, 0, 0] += 1
    for changed in (
        {"images": other},
        {"images": images[:10]},
        {"images": images, "mirrored": True},
        {"images": images, "precision": "bfloat16"},
    ):
        with pytest.raises(AssertionError, match="is built"):
            member_logits(contents, device=CPU, **changed)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "0.4")
        with pytest.raises(AssertionError, match="is built"):
            member_logits(contents, images, CPU)
    path, content = contents[1]
    content["model"]["classifier.bias"][0] += 1
    checkpoint.write(path, content)
    contents[1] = path, checkpoint.read(path)
    with pytest.raises(AssertionError, match=r"tiny1\.pt is built"):
        member_logits(contents, images, CPU)


def test_an_edited_network_is_asked_again(contents, images, never_built, monkeypatch, tmp_path):
    member_logits(contents, images, CPU)
    never_built()
    shutil.copytree(Path(models.__file__).parent, tmp_path / "models")
    with (tmp_path / "models" / "mobilenetv2.py").open("a") as file:
        file.write("\n# edited\n")
    with monkeypatch.context() as patch:
        patch.setattr(models, "__file__", str(tmp_path / "models" / "__init__.py"))
        logits_cache.sources.cache_clear()
        with pytest.raises(AssertionError, match="is built"):
            member_logits(contents, images, CPU)
    logits_cache.sources.cache_clear()


def test_without_the_cache_its_entry_is_removed(contents, images):
    member_logits(contents, images, CPU)
    assert len(kept(contents)) == 2
    member_logits(contents, images, CPU, cached=False)
    assert kept(contents) == []


def test_a_checkpoint_that_is_replaced_meanwhile_keeps_its_own_logits(contents, images):
    old = member_logits(contents, images, CPU, cached=False)
    path, content = contents[0]
    changed = {**content, "model": {**content["model"], "classifier.bias": content["model"]["classifier.bias"] + 1}}
    checkpoint.write(path, changed)
    assert torch.equal(member_logits(contents, images, CPU), old)
    contents[0] = path, checkpoint.read(path)
    new = member_logits(contents, images, CPU)
    torch.testing.assert_close(new[0], old[0] + 1)


@pytest.mark.parametrize("damage", ["cut", "flipped", "other shape", "not finite", "no archive"])
def test_damaged_logits_are_made_anew(contents, images, capsys, damage):
    first = member_logits(contents, images, CPU)
    path = kept(contents)[0]
    raw = path.read_bytes()
    if damage == "cut":
        path.write_bytes(raw[: len(raw) // 2])
    elif damage == "flipped":
        place = raw.index(b"\x93NUMPY") + 150
        path.write_bytes(raw[:place] + bytes([raw[place] ^ 255]) + raw[place + 1 :])
    elif damage == "no archive":
        path.write_bytes(b"")
    else:
        shape = (11, 4) if damage == "other shape" else (11, 3)
        np.savez(path, logits=np.full(shape, np.inf if damage == "not finite" else 0, np.float32))
    assert torch.equal(member_logits(contents, images, CPU), first)
    assert f"{path} is damaged" in capsys.readouterr().err
    assert torch.equal(member_logits(contents, images, CPU), first)
    assert capsys.readouterr().err == ""


def test_a_place_that_cannot_be_written_is_only_noted(contents, images, capsys, monkeypatch):
    expected = member_logits(contents, images, CPU, cached=False)

    def refuse(*arguments, **options):
        raise UserError("no room")

    monkeypatch.setattr(files, "replacing", refuse)
    assert torch.equal(member_logits(contents, images, CPU), expected)
    assert "warning: no room" in capsys.readouterr().err


def test_without_the_cache_nothing_is_kept(contents, images):
    member_logits(contents, images, CPU, cached=False)
    assert not (contents[0][0].parent / logits_cache.CACHE).exists()


def test_logits_that_are_not_finite_are_refused_and_not_kept(contents, images):
    path, content = contents[0]
    content["model"]["classifier.weight"].fill_(3e38)  # finite, but too much for a sum
    with pytest.raises(UserError, match=r"tiny0\.pt: its predictions are not finite"):
        member_logits(contents, images, CPU)
    assert not (path.parent / logits_cache.CACHE).exists()
