"""checkpoint.py: files are written atomically, and only undamaged checkpoints are read."""

import copy
import hashlib
import pickle
import zipfile
from unittest import mock

from common import files
from common.errors import UserError

import pytest
import torch
from conftest import assert_same

from evaluation import members
from models import NETWORKS
from training import checkpoint

CONTENT = {
    "network": {"name": "mobilenetv2", "arguments": {"num_classes": 2, "width": 0.25}},
    "model": {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1, 2]), "c": torch.tensor(1 / 3)},
    "chosen": {"epoch": 1, "by": "last"},
    "finished": False,
    "recipe": {"epochs": 2, "base_lr": 0.01, "nesterov": True, "reference": None},
    "data": {"source": "Größe", "classes": ["klein", "groß"], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.1 + 0.2]},
    "history": [{"epoch": 1, "test_loss": 0.1 + 0.2}],
    "training": {"epoch": 1, "step": 3, "totals": [0.1, 2.0]},
}


class RunsCode:
    """Unpickling it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture
def path(tmp_path):
    """A checkpoint file with `CONTENT`."""
    path = tmp_path / "net.pt"
    checkpoint.write(path, CONTENT)
    return path


def refusal(path) -> str:
    with pytest.raises(UserError) as error:
        checkpoint.read(path)
    assert str(path) in str(error.value)
    return str(error.value)


def with_digest(archive: bytes) -> bytes:
    """Any archive, with its SHA-256 as comment."""
    body = archive[:-2] + checkpoint.COMMENT_LENGTH.to_bytes(2, "little")
    return body + checkpoint.DIGEST_PREFIX + hashlib.sha256(body).hexdigest().encode()


def assert_holds_content(found):
    assert_same({name: found[name] for name in CONTENT}, CONTENT)


def test_plain_torch_can_read_a_checkpoint(path):
    assert_holds_content(checkpoint.read(path))
    assert_holds_content(torch.load(path, weights_only=True))
    assert zipfile.ZipFile(path).testzip() is None


def test_a_flipped_bit_in_any_byte_is_detected(path):
    raw = path.read_bytes()
    for position in range(len(raw)):
        flipped = bytearray(raw)
        flipped[position] ^= 1
        path.write_bytes(flipped)
        words = refusal(path)
        assert "damaged" in words or position >= len(raw) - 71, position
        assert any(word in words for word in ("damaged", "truncated", "not a checkpoint")), position


def test_a_file_truncated_anywhere_is_detected(path):
    raw = path.read_bytes()
    for length in range(4, len(raw)):
        path.write_bytes(raw[:length])
        assert "truncated" in refusal(path), f"{length} bytes of {len(raw)}"
    for length in range(4):  # too short to recognize a zip archive
        path.write_bytes(raw[:length])
        assert ("empty" if length == 0 else "not a checkpoint") in refusal(path)


@pytest.mark.parametrize("more", [b"\n", b"\0" * 71, b"x" * 5000], ids=len)
def test_added_bytes_are_detected(path, more):
    path.write_bytes(path.read_bytes() + more)
    refusal(path)


def foreign_files(folder, content):
    """Files that are no checkpoints of this project; their names say what they are."""
    torch.save(content, folder / "torch.save")
    torch.save(content, folder / "legacy torch.save", _use_new_zipfile_serialization=False)
    (folder / "pickle").write_bytes(pickle.dumps(content))
    (folder / "text").write_text("epoch,loss\n1,0.5\n" * 20)
    with zipfile.ZipFile(folder / "zip with a comment", "w") as archive:
        archive.writestr("readme.txt", "hello")
        archive.comment = b"x" * 71
    with zipfile.ZipFile(folder / "zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    for name in ("zip", "torch.save"):
        (folder / f"{name} with our digest").write_bytes(with_digest((folder / name).read_bytes()))
    checkpoint.write(folder / "other content", content)
    checkpoint.write(folder / "other format", {"format": "something else"})
    return sorted(folder.iterdir())


def test_other_files_are_refused_and_code_in_them_does_not_run(tmp_path):
    made, folder = tmp_path / "made by the file", tmp_path / "files"
    folder.mkdir()
    content = {**CONTENT, "network": RunsCode(made)}
    pickle.loads(pickle.dumps(content))["network"].close()
    assert made.exists(), "unpickling it should run its code"
    made.unlink()
    for path in foreign_files(folder, content):
        assert "not a checkpoint" in refusal(path), path.name
        assert not made.exists(), path.name


def test_a_later_version_asks_for_an_update(path, monkeypatch):
    monkeypatch.setattr(checkpoint, "VERSION", checkpoint.VERSION + 1)
    checkpoint.write(path, CONTENT)
    monkeypatch.undo()
    assert "later version" in refusal(path)
    assert f"format {checkpoint.VERSION + 1}" in refusal(path)


def test_a_missing_file_and_a_folder_are_errors(tmp_path):
    assert "no such checkpoint" in refusal(tmp_path / "net.pt")
    assert "not readable" in refusal(tmp_path)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_ctrl_c_while_writing_leaves_the_old_file(path, monkeypatch, call):
    before = path.read_bytes()
    monkeypatch.setattr(files.os, call, mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        checkpoint.write(path, {"other": 1})
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_full_disk_leaves_the_old_file(path):
    """The operating system raises the error, in the middle of the file."""
    before = path.read_bytes()
    resource = pytest.importorskip("resource", reason="Windows has no limits on files")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(UserError) as error:
            checkpoint.write(path, {"large": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"{path}: the checkpoint could not be written" in str(error.value)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: content["network"].update(name="alexnet"), "'alexnet'; expected one of densenet, mob"),
        (lambda content: content["network"]["arguments"].update(depth=121), "depth"),
        (lambda content: content["network"]["arguments"].update(width=0.5), "size mismatch for features.0.weight"),
        (lambda content: content["model"].pop("classifier.bias"), 'Missing key(s) in state_dict: "classifier.bias"'),
    ],
    ids=["unknown name", "unknown argument", "other width", "missing key"],
)
def test_content_that_does_not_fit_the_network_is_an_error(path, change, words):
    content = {**copy.deepcopy(CONTENT), "model": dict(NETWORKS["mobilenetv2"](2, width=0.25).state_dict())}
    change(content)
    checkpoint.write(path, content)
    with pytest.raises(UserError) as error:
        members.build_member(path, checkpoint.read(path))
    assert str(path) in str(error.value)
    assert words in str(error.value)


def test_an_earlier_version_has_usable_weights_but_cannot_be_resumed(tiny_recipe, monkeypatch):
    recipe = tiny_recipe(resume=True)
    model = NETWORKS["mobilenetv2"](2, width=0.25)
    monkeypatch.setattr(checkpoint, "VERSION", 1)
    content = {**CONTENT, "model": model.state_dict(), "training": {"epoch": 1, "schedule": {"last_epoch": 1}}}
    checkpoint.write(recipe.checkpoint_path, content)
    monkeypatch.undo()
    built = members.build_member(recipe.checkpoint_path, checkpoint.read(recipe.checkpoint_path))
    assert_same(dict(built.network.state_dict()), dict(model.state_dict()))
    assert not built.training
    with (
        pytest.raises(UserError, match=r"tiny\.pt is from an earlier version .*\(format 1, here 6\).* train again"),
        checkpoint.previous_run(recipe),
    ):
        pass
