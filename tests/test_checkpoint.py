"""checkpoint.py: a file is written whole or not at all, and nothing but what was written is read back."""

import hashlib
import io
import pickle
import threading
import zipfile

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
    "recipe": {
        "epochs": 2, "base_lr": 0.01, "nesterov": True, "reference": None, "image_size": 16, "split_seed": 0,
        "train_size": None, "val_size": 0, "test_size": 20, "test_split": 0.2, "precision": "float32",
    },
    "data": {
        "source": "Größe 3×3", "digest": "0a1b", "classes": ["klein", "groß"], "image_size": 16,
        "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.1 + 0.2],
        "split": {"split_seed": 0, "train_size": None, "val_size": 0, "test_size": 20, "test_split": 0.2},
    },
    "history": [{"epoch": 1, "test_loss": 0.1 + 0.2}],
    "versions": {"torch": "2.11.0"},
    "training": {
        "model": None, "average": None, "best": None, "optimizer": {}, "epoch": 1, "step": 3,
        "totals": [0.1, 2.0, 3.0], "seconds": 1.5,
    },
}  # fmt: skip


class RunsCode:
    """Unpickled, it would make a file."""

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


@pytest.fixture
def network(tmp_path):
    """A checkpoint file with a small network, its content as read back, and the network itself."""
    model = NETWORKS["mobilenetv2"](2, width=0.25)
    checkpoint.write(tmp_path / "net.pt", {**CONTENT, "model": model.state_dict()})
    return tmp_path / "net.pt", checkpoint.read(tmp_path / "net.pt"), model


def refusal(path) -> str:
    with pytest.raises(UserError) as error:
        checkpoint.read(path)
    assert str(path) in str(error.value)
    return str(error.value)


def with_digest(archive: bytes) -> bytes:
    """An archive of whatever content with the comment that belongs to it."""
    body = archive[:-2] + checkpoint.COMMENT_LENGTH.to_bytes(2, "little")
    return body + checkpoint.MARK + hashlib.sha256(body).hexdigest().encode()


def assert_holds_content(found):
    assert_same({name: found[name] for name in CONTENT}, CONTENT)


def test_what_was_written_is_read_back(path):
    assert_holds_content(checkpoint.read(path))


def test_plain_torch_reads_it_too(path):
    assert_holds_content(torch.load(path, weights_only=True))
    assert zipfile.ZipFile(path).testzip() is None


def test_the_digest_is_that_of_all_bytes_before_it(path):
    raw = path.read_bytes()
    assert raw[-71:-64] == b"sha256:"
    assert hashlib.sha256(raw[:-71]).hexdigest().encode() == raw[-64:]


@pytest.mark.parametrize("bits", [0x01, 0xFF], ids=hex)
def test_any_byte_that_flips_is_noticed(path, bits):
    raw = path.read_bytes()
    for position in range(len(raw)):
        flipped = bytearray(raw)
        flipped[position] ^= bits
        path.write_bytes(flipped)
        words = refusal(path)
        assert "damaged" in words or position >= len(raw) - 71, position
        assert any(word in words for word in ("damaged", "truncated", "not a checkpoint")), position


def test_a_file_cut_anywhere_is_truncated(path):
    raw = path.read_bytes()
    for length in range(4, len(raw)):
        path.write_bytes(raw[:length])
        assert "truncated" in refusal(path), f"{length} bytes of {len(raw)}"
    for length in range(1, 4):  # too few bytes to tell what it was
        path.write_bytes(raw[:length])
        refusal(path)


def test_an_empty_file_is_called_empty(path):
    path.write_bytes(b"")
    assert "empty" in refusal(path)


@pytest.mark.parametrize("more", [b"\n", b"\0" * 71, b"x" * 5000], ids=len)
def test_bytes_behind_the_end_are_noticed(path, more):
    path.write_bytes(path.read_bytes() + more)
    refusal(path)


def foreign_files(folder):
    """Files of others, by name."""
    torch.save({"model": {"weight": torch.ones(3)}}, folder / "torch.save")
    torch.save({"weight": torch.ones(3)}, folder / "legacy torch.save", _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(folder / "zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with zipfile.ZipFile(folder / "zip with a comment", "w") as archive:
        archive.writestr("readme.txt", "hello")
        archive.comment = b"x" * 71
    (folder / "zip with our digest").write_bytes(with_digest((folder / "zip").read_bytes()))
    (folder / "torch.save with our digest").write_bytes(with_digest((folder / "torch.save").read_bytes()))
    (folder / "text").write_text("epoch,loss\n1,0.5\n" * 20)
    (folder / "one byte").write_bytes(b"P")
    (folder / "zeros").write_bytes(bytes(10_000))
    (folder / "only a digest").write_bytes(checkpoint.MARK + hashlib.sha256(b"").hexdigest().encode())
    (folder / "pickle").write_bytes(pickle.dumps({"format": checkpoint.FORMAT, "version": 1}))
    torch.save([1, 2, 3], folder / "list")
    (folder / "list").write_bytes(with_digest((folder / "list").read_bytes()))
    checkpoint.write(folder / "other format", {"format": "something else"})
    checkpoint.write(folder / "odd version", {"version": "new"})
    torch.save({"format": checkpoint.FORMAT}, folder / "no version")
    (folder / "no version").write_bytes(with_digest((folder / "no version").read_bytes()))
    return sorted(folder.iterdir())


def test_files_of_others_are_called_so(tmp_path):
    for path in foreign_files(tmp_path):
        assert "not a checkpoint" in refusal(path), path.name


def test_code_in_a_file_is_not_run(tmp_path):
    made, path = tmp_path / "made by the file", tmp_path / "net.pt"
    content = {**CONTENT, "network": RunsCode(made)}
    pickle.loads(pickle.dumps(content))["network"].close()
    assert made.exists(), "unpickling it ought to run its code"

    made.unlink()
    checkpoint.write(path, content)  # with a digest that fits
    whole = path.read_bytes()
    torch.save(content, path)
    plain = path.read_bytes()
    torch.save(content, path, _use_new_zipfile_serialization=False)
    for raw in (whole, plain, path.read_bytes(), pickle.dumps(content)):
        path.write_bytes(raw)
        assert "not a checkpoint" in refusal(path)
        assert not made.exists()


def test_a_later_format_asks_for_an_update(path, monkeypatch):
    monkeypatch.setattr(checkpoint, "VERSION", checkpoint.VERSION + 1)
    checkpoint.write(path, CONTENT)
    monkeypatch.undo()
    assert "later version" in refusal(path)
    assert f"format {checkpoint.VERSION + 1}" in refusal(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    assert "no such checkpoint" in refusal(tmp_path / "net.pt")
    assert "not readable" in refusal(tmp_path)


# ------------------------------------------------------------------------------------------------------------- writing


def test_folders_are_made(tmp_path):
    checkpoint.write(tmp_path / "a" / "b" / "net.pt", CONTENT)
    assert_holds_content(checkpoint.read(tmp_path / "a" / "b" / "net.pt"))


def failing(error):
    def call(*_, **__):
        raise error

    return call


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("old", [True, False], ids=["over an old file", "as a new file"])
def test_an_error_while_writing_leaves_what_was_there(tmp_path, monkeypatch, call, old):
    path = tmp_path / "net.pt"
    if old:
        checkpoint.write(path, CONTENT)
    before = {entry: entry.read_bytes() for entry in tmp_path.iterdir()}
    monkeypatch.setattr(files.os, call, failing(OSError(28, "No space left on device")))
    with pytest.raises(UserError) as error:
        checkpoint.write(path, {"other": 1})
    assert str(path) in str(error.value)
    assert "No space left on device" in str(error.value)
    assert {entry: entry.read_bytes() for entry in tmp_path.iterdir()} == before


def test_a_full_disk_leaves_what_was_there(path):
    """The system itself refuses, in mid-file."""
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


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_end_while_writing_leaves_what_was_there(path, monkeypatch, error):
    before = path.read_bytes()
    monkeypatch.setattr(files.os, "fsync", failing(error()))
    with pytest.raises(error):
        checkpoint.write(path, {"other": 1})
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_that_cannot_be_made_is_named(path):
    with pytest.raises(UserError, match=r"net\.pt/net\.pt: the checkpoint could not be written"):
        checkpoint.write(path / "net.pt", CONTENT)


def test_what_a_killed_writer_left_is_cleared_away(path):
    (path.parent / ".net.pt.part").write_bytes(b"half a file" * 10_000)
    checkpoint.write(path, CONTENT)
    assert_holds_content(checkpoint.read(path))
    assert list(path.parent.iterdir()) == [path]


def test_the_file_is_whole_at_every_moment(path):
    """What a reader finds at any time is what a kill at that time would leave."""
    contents = [{**CONTENT, "model": {"a": torch.full((50_000,), float(number))}} for number in range(2)]
    checkpoint.write(path, contents[0])
    done = threading.Event()

    def keep_writing():
        for number in range(10_000):
            if done.is_set():
                return
            checkpoint.write(path, contents[number % 2])

    writer = threading.Thread(target=keep_writing)
    writer.start()
    try:
        for _ in range(200):
            value = checkpoint.read(path)["model"]["a"]
            assert len(value) == 50_000
            assert value.unique().numel() == 1
    finally:
        done.set()
        writer.join()


# --------------------------------------------------------------------------------------------------------- its network


def test_a_network_comes_back_with_its_weights(network):
    path, content, model = network
    built = members.build_member(path, content)
    assert not built.training
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(built.network(images), model.eval()(images))


def break_content(content, how):
    weights, network = content["model"], content["network"]
    if how == "name":
        network["name"] = "alexnet"
    elif how == "missing key":
        del weights["classifier.bias"]
    elif how == "extra key":
        weights["classifier.extra"] = torch.zeros(4)
    elif how == "shape":
        weights["classifier.bias"] = torch.zeros(10)
    elif how == "other width":
        network["arguments"]["width"] = 0.5
    elif how == "impossible width":
        network["arguments"]["width"] = 0.0
    elif how == "unknown argument":
        network["arguments"]["depth"] = 121


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("name", "'alexnet'; known are densenet, mobilenetv2, resnext29"),
        ("missing key", 'Missing key(s) in state_dict: "classifier.bias"'),
        ("extra key", 'Unexpected key(s) in state_dict: "classifier.extra"'),
        ("shape", "size mismatch for classifier.bias"),
        ("other width", "size mismatch for features.0.weight"),
        ("impossible width", "width is 0.0"),
        ("unknown argument", "depth"),
    ],
)
def test_weights_that_do_not_fit_are_refused(network, how, words):
    path, content, _ = network
    break_content(content, how)
    with pytest.raises(UserError) as error:
        members.build_member(path, content)
    assert str(path) in str(error.value)
    assert words in str(error.value)


# ------------------------------------------------------------------------------------------------------ earlier formats


def test_of_an_earlier_format_the_weights_are_good_but_no_run_goes_on(tmp_path, tiny_recipe, monkeypatch):
    recipe = tiny_recipe(resume=True)
    model = NETWORKS["mobilenetv2"](2, width=0.25)
    monkeypatch.setattr(checkpoint, "VERSION", 1)
    content = {**CONTENT, "model": model.state_dict(), "training": {"epoch": 1, "schedule": {"last_epoch": 1}}}
    checkpoint.write(recipe.checkpoint_path, content)
    monkeypatch.undo()
    built = members.build_member(recipe.checkpoint_path, checkpoint.read(recipe.checkpoint_path))
    assert_same(dict(built.network.state_dict()), dict(model.state_dict()))
    with (
        pytest.raises(UserError, match=r"tiny\.pt is by an earlier version .*\(format 1\).* train again"),
        checkpoint.previous_run(recipe),
    ):
        pass


# ------------------------------------------------------------------------------------ broken files, as a user sees them


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory, start):
    """The checkpoint of a finished run of mobilenetv2.py: its bytes, its content, and the run's flags."""
    folder = tmp_path_factory.mktemp("digits")
    flags = "--data digits --image-size 16 --train-size 100 --test-size 50 --val-size 20 --width 0.25 --epochs 1"
    flags = [*flags.split(), "--batch-size", "32", "--device", "cpu"]
    process = start(folder, "mobilenetv2.py", *flags)
    _, err = process.communicate()
    assert process.returncode == 0, err
    path = folder / "checkpoints" / "mobilenetv2.pt"
    return path.read_bytes(), checkpoint.read(path), flags


def pickled(content, **options):
    """What `checkpoint.write` would write."""
    buffer = io.BytesIO()
    torch.save({"format": checkpoint.FORMAT, "version": checkpoint.VERSION, **content}, buffer, **options)
    return buffer.getvalue()


@pytest.mark.slow
def test_a_broken_file_ends_the_process_with_a_line(digits_run, start, tmp_path):
    raw, content, flags = digits_run
    path, marker = tmp_path / "checkpoints" / "mobilenetv2.pt", tmp_path / "made by the file"
    path.parent.mkdir()
    weights = {**content["model"], "classifier.bias": torch.zeros(11)}
    other_shape = {**content, "model": weights, "training": {**content["training"], "model": weights}}
    files = {
        "cut in half": raw[: len(raw) // 2],
        "runs code": with_digest(pickled({**content, "network": RunsCode(marker)})),
        "no recipe": with_digest(pickled({name: part for name, part in content.items() if name != "recipe"})),
        "weights of another shape": with_digest(pickled(other_shape)),
    }
    for how, broken in files.items():
        path.write_bytes(broken)
        name = path.relative_to(tmp_path)
        for command in (["mobilenetv2.py", *flags, "--resume"], ["main_ens.py", str(name)]):
            process = start(tmp_path, *command)
            _, err = process.communicate()
            assert process.returncode == 2, (how, err)
            assert err.startswith(f"error: {name}: "), how
            assert "Traceback" not in err
            assert err.count("\n") == 1
            assert not marker.exists()
