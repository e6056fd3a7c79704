"""evaluation/logits.py: the logits of checkpoints, and their cache."""

import shutil
from pathlib import Path

from common import files
from common.errors import UserError

import pytest
import torch
from command_line import changed, forbid_building, overflow

import models
from evaluation import logits as logits_cache
from training import checkpoint

CPU = torch.device("cpu")


@pytest.fixture
def contents(train, tmp_path):
    """Two checkpoints: paths and contents."""
    for seed in range(2):
        train(name=f"tiny{seed}", epochs=1, seed=seed)
    return [(path, checkpoint.read(path)) for path in sorted((tmp_path / "checkpoints").glob("*.pt"))]


def member_logits(*arguments, **settings):
    """The logits, without the time they took."""
    return logits_cache.member_logits(*arguments, **settings)[0]


def test_the_time_is_cached_with_the_logits(contents, images, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(logits_cache.time, "perf_counter", lambda: now.append(now[-1] + 0.22) or now[-1])
    arguments = (contents, images, CPU)
    _, milliseconds = logits_cache.member_logits(*arguments, flip=True)
    assert milliseconds == pytest.approx([40.0, 40.0])  # 11 images, two views of 0.22 s
    forbid_building(monkeypatch)
    assert logits_cache.member_logits(*arguments, flip=True)[1] == milliseconds
    assert logits_cache.member_logits(*arguments)[1] == pytest.approx([20.0, 20.0])


def stored(contents):
    return sorted((contents[0][0].parent / logits_cache.CACHE).iterdir())


def test_everything_that_determines_the_logits_or_their_time_is_in_the_cache_key(
    contents, images, monkeypatch, tmp_path
):
    first = member_logits(contents, images, CPU)
    forbid_building(monkeypatch)
    assert torch.equal(member_logits(contents[::-1], images, CPU), first.flip(0))
    other = images.clone()
    other[3, 0, 0, 0] += 1
    for arguments in (
        {"images": other},
        {"images": images[:10]},
        {"images": images, "flip": True},
        {"images": images, "precision": "bfloat16"},
        {"images": images, "batch_size": 3},
    ):
        with pytest.raises(AssertionError, match="is built"):
            member_logits(contents, device=CPU, **arguments)
    for name, value in (("__version__", "0.4"), ("get_num_threads", lambda: 77)):
        with monkeypatch.context() as patch:
            patch.setattr(torch, name, value)
            with pytest.raises(AssertionError, match="is built"):
                member_logits(contents, images, CPU)
    shutil.copytree(Path(models.__file__).parent, tmp_path / "models")
    with (tmp_path / "models" / "mobilenetv2.py").open("a") as file:
        file.write("\n# edited\n")
    with monkeypatch.context() as patch:
        patch.setattr(models, "__file__", str(tmp_path / "models" / "__init__.py"))
        with pytest.raises(AssertionError, match="is built"):
            member_logits(contents, images, CPU)
    path = changed(contents[1][0], lambda content: content["model"]["classifier.bias"].add_(1))
    with pytest.raises(AssertionError, match=r"tiny1\.pt is built"):
        member_logits([contents[0], (path, checkpoint.read(path))], images, CPU)


def test_without_the_cache_nothing_is_stored_and_cached_logits_are_deleted(contents, images):
    member_logits(contents, images, CPU, cached=False)
    assert not (contents[0][0].parent / logits_cache.CACHE).exists()
    member_logits(contents, images, CPU)
    assert len(stored(contents)) == 2
    member_logits(contents, images, CPU, cached=False)
    assert stored(contents) == []


def test_logits_are_cached_for_the_checkpoint_that_was_read(contents, images):
    old = member_logits(contents, images, CPU, cached=False)
    path = changed(contents[0][0], lambda content: content["model"]["classifier.bias"].add_(1))
    assert torch.equal(member_logits(contents, images, CPU), old)
    new = member_logits([(path, checkpoint.read(path))], images, CPU)
    torch.testing.assert_close(new[0], old[0] + 1)


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw[: len(raw) // 2],
        lambda raw: raw[:250] + bytes([raw[250] ^ 255]) + raw[251:],
    ],
    ids=["cut", "one byte"],
)
def test_damaged_logits_are_computed_again(contents, images, capsys, damage):
    first = member_logits(contents, images, CPU)
    path = stored(contents)[0]
    path.write_bytes(damage(path.read_bytes()))
    assert torch.equal(member_logits(contents, images, CPU), first)
    assert f"{path} is damaged" in capsys.readouterr().err
    assert torch.equal(member_logits(contents, images, CPU), first)
    assert capsys.readouterr().err == ""


def test_a_cache_that_cannot_be_written_is_only_a_warning(contents, images, capsys, monkeypatch):
    expected = member_logits(contents, images, CPU, cached=False)

    def refuse(*arguments, **options):
        raise UserError("no room")

    monkeypatch.setattr(files, "atomic_write", refuse)
    assert torch.equal(member_logits(contents, images, CPU), expected)
    assert "warning: no room" in capsys.readouterr().err


def test_logits_that_are_not_finite_are_refused_and_not_stored(contents, images):
    path, content = contents[0]
    overflow(content)
    with pytest.raises(UserError, match=r"tiny0\.pt: its predictions are not finite"):
        member_logits(contents, images, CPU)
    assert not (path.parent / logits_cache.CACHE).exists()
