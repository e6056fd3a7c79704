"""checkpoint.py: a file is written whole or not at all, and nothing but what was written is read back."""

import copy
import functools
import hashlib
import io
import itertools
import pickle
import signal
import threading
import zipfile
from collections import Counter, OrderedDict

import pytest
import torch
from conftest import assert_same, without_times

import checkpoint
import engine
import files
import models.ensemble
from errors import UserError
from models import NETWORKS

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


# ---------------------------------------------------------------------------------------------------------- build_model


def test_a_network_comes_back_with_its_weights(network):
    path, content, model = network
    built = checkpoint.build_model(path, content)
    assert not built.training
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(built(images), model.eval()(images))


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
    elif how == "enormous width":
        network["arguments"]["width"] = 1e6
    elif how == "immeasurable width":
        network["arguments"]["width"] = 1e300
    elif how == "other type":
        weights["classifier.bias"] = weights["classifier.bias"].double()
    elif how in ("nan", "inf"):
        weights["classifier.bias"][1] = float(how)
    elif how == "unknown argument":
        network["arguments"]["depth"] = 121


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("name", "'alexnet'; known are densenet, mobilenetv2, resnext29"),
        ("missing key", "classifier.bias is missing"),
        ("extra key", "classifier.extra is unknown to it"),
        ("shape", "classifier.bias is torch.float32 of shape (10,) instead of torch.float32 of shape (2,)"),
        ("other type", "classifier.bias is torch.float64"),
        ("other width", "features.0.weight is torch.float32 of shape (8, 3, 3, 3)"),
        ("enormous width", "features.0.weight is torch.float32 of shape (8, 3, 3, 3)"),
        ("immeasurable width", "its weights do not fit its mobilenetv2"),
        ("impossible width", "width is 0.0"),
        ("unknown argument", "depth"),
        ("nan", "its weights are not finite (classifier.bias); train it again with a lower --base-lr"),
        ("inf", "its weights are not finite (classifier.bias)"),
    ],
)
def test_weights_that_do_not_fit_are_refused(network, how, words):
    path, content, _ = network
    break_content(content, how)
    with pytest.raises(UserError) as error:
        checkpoint.build_model(path, content)
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
    built = checkpoint.build_model(recipe.checkpoint_path, checkpoint.read(recipe.checkpoint_path))
    assert_same(dict(built.state_dict()), dict(model.state_dict()))
    with pytest.raises(UserError, match=r"tiny\.pt is by an earlier version .*\(format 1\).* train again"):
        engine.previous_run(recipe)


# ------------------------------------------------------------------------------- files and contents broken in every way


STEPS = 6  # of an epoch of tiny_data
# By name: what the run is, and in which step, from 0, it was stopped; None for one that is finished.
RUNS = {
    "plain": ({}, None),
    "validation": ({"val": True}, STEPS + 2),
    "average": ({"ema_horizon": 0.9}, STEPS + 3),
    "both": ({"val": True, "ema_horizon": 0.9}, None),
}
# No key may hold most of these.
WRONG = [
    None, True, -1, 10**12, float("nan"), float("inf"), "text", "a\0b", b"bytes", [], {}, {"more": 1}, (1.0, 2.0, 3.0),
    torch.tensor(1.0), torch.tensor([1, 2]), [[1.0]], {1: 2},
]  # fmt: skip


# Some of these break what a reader has no use for.
HARMLESS = {
    "keys and entries missing", "keys too many", "values of another kind", "values that are not finite", "other shapes",
    "other types of tensor", "another network's weights", "contradictions",
}  # fmt: skip


class Stopped:
    """An `on_forward` that raises a SIGINT in training step so-and-so."""

    def __init__(self, step):
        self.steps_left = step

    def __call__(self, model, logits):
        if model.training:
            if self.steps_left == 0:
                signal.raise_signal(signal.SIGINT)
            self.steps_left -= 1
        return logits


@pytest.fixture
def trained(tiny, tiny_recipe, tiny_data):
    """Train the run of that name in `RUNS`, or go on with it; returns its recipe and where it stands."""

    def train(name, *, resume):
        settings, stop = RUNS[name]
        recipe = tiny_recipe(
            epochs=2, randaugment_ops=0, name=name, resume=resume, overwrite=not resume,
            val_size=8 if "val" in settings else 0, ema_horizon=settings.get("ema_horizon", 0.0),
        )  # fmt: skip
        previous = engine.previous_run(recipe)
        model = tiny()
        model.on_forward = Stopped(stop) if stop is not None and not resume else None
        return recipe, engine.fit(model, tiny_data(val="val" in settings), recipe, previous)

    return train


def paths_of(value, path=()):
    """The way to everything in a content, by keys and positions."""
    if path:
        yield path
    if isinstance(value, dict | list):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from paths_of(part, (*path, key))


def parent_of(content, path):
    for key in path[:-1]:
        content = content[key]
    return content


def found_at(content, path):
    return parent_of(content, path)[path[-1]]


def changed(content, *changes):
    """A copy in which each pair of a way and a value has been put in place."""
    content = copy.deepcopy(content)
    for path, value in changes:
        parent_of(content, path)[path[-1]] = value
    return content


def broken_tensors(tensor):
    """Kind and tensor."""
    yield "other shapes", tensor.new_zeros((*tensor.shape, 2))
    yield "other shapes", tensor.new_zeros(tensor.numel() + 1)
    yield "other shapes", tensor.new_zeros(()).expand(10**12)
    yield "other types of tensor", tensor.to(torch.complex64)
    yield "other types of tensor", tensor.to(torch.float16)
    yield "other types of tensor", torch.zeros(tensor.shape or 1).to_sparse()
    if tensor.is_floating_point():
        for number in ("nan", "inf"):
            spoilt = tensor.clone()
            spoilt[(0,) * spoilt.ndim] = float(number)
            yield "values that are not finite", spoilt


def broken_contents(content):
    """Kind and content: one thing after the other is gone, of another kind, or too much."""
    wrong = itertools.cycle(WRONG)
    for path in paths_of(content):
        value = found_at(content, path)
        lacking = copy.deepcopy(content)
        del parent_of(lacking, path)[path[-1]]
        yield "keys and entries missing", lacking
        for other in itertools.islice(wrong, 2):
            # Another text in place of a text, and a flag in place of another, are as good.
            if type(other) is not type(value) or type(value) in (dict, list):
                yield "values of another kind", changed(content, (path, other))
        if isinstance(value, dict):
            yield "keys too many", changed(content, ((*path, "more"), 1))
            yield "keys too many", changed(content, ((*path, 7), torch.ones(2)))
        if isinstance(value, list):
            yield "entries too many", changed(content, (path, value + value[-1:] if value else [1]))
        if isinstance(value, torch.Tensor):
            for kind, tensor in broken_tensors(value):
                yield kind, changed(content, (path, tensor))


def contradictory_contents(content):
    """Kind and content: each value is of its kind, but they do not go together."""
    ways = {
        ("network", "name"): ["densenet", "mobilenetv2", "resnext29", "alexnet"],
        ("network", "arguments", "num_classes"): [2, 10, 10**12],
        ("network", "arguments", "channels"): [1, 5, 10**12, 10**30, 4.0],
        ("chosen", "epoch"): [10**12],
        ("finished",): [not content["finished"]],
        ("recipe", "epochs"): [1, 3, 10**12],
        ("recipe", "ema_horizon"): [0.0, 0.5, 0.9],
        ("recipe", "image_size"): [16, 10**12],
        ("data", "digest"): ["0" * 32],
        ("data", "classes"): [["red", "green"], ["red", "green", "blue", "yellow"]],
        ("data", "image_size"): [16, 10**12],
        ("data", "mean"): [[0.5, 0.5], [0.5] * 4],
        ("data", "std"): [[0.5, 0.5], [0.5, 0.0, 0.5], [0.5, -1.0, 0.5]],
        **{("data", "split", name): [5, 10**12] for name in engine.SPLIT_FLAGS},
        ("history",): [[], content["history"][:1] * 2, content["history"][::-1] * 3],
        ("training", "epoch"): [0, 3, 10**12],
        ("training", "step"): [0, 1, 7, 10**12],
        ("training", "totals"): [None, [1.0, 1.0, 1.0], [1.0, 1.0, 1e12], [float("nan"), 1.0, 1.0]],
        ("training", "best"): [None, {"epoch": 99, "accuracy": 0.5}, {"epoch": 1, "accuracy": 7.0}],
        ("training", "model"): [None if content["training"]["model"] else content["model"]],
        ("training", "average"): [None if content["training"]["average"] else content["model"]],
        ("training", "optimizer"): [{}, {0: {}}, {0: {"momentum_buffer": None}}, content["model"]],
    }
    for path, values in ways.items():
        for value in values:
            if not same(value, found_at(content, path)):
                yield "contradictions", changed(content, (path, value))
    late = [(("training", "step"), 7), (("training", "totals"), [1.0, 1.0, 7.0])]
    yield "contradictions", changed(content, *late)


def same(value, other):
    if type(value) is not type(other):
        return False
    try:
        assert_same(value, other)
    except AssertionError:
        return False
    return True


def foreign_weights(content):
    """Kind and content: the state dict of another network, and dicts and tensors that bite."""
    networks = [NETWORKS["tiny"](3, channels=5), NETWORKS["tiny"](4, channels=4), torch.nn.Linear(2, 3)]
    networks += [NETWORKS["mobilenetv2"](3, width=0.25)]
    for path in [("model",), ("training", "model"), ("training", "average")]:
        for network in networks:
            yield "another network's weights", changed(content, (path, network.state_dict()))
        weights = OrderedDict(content["model"])
        renamed = {f"module.{name}": value for name, value in weights.items()}
        yield "another network's weights", changed(content, (path, renamed))
        weights.keys = "not a method"
        yield "objects that bite", changed(content, (path, weights))
        yield "objects that bite", changed(content, (path, {**content["model"], "conv.weight": torch.nn.Parameter()}))
    stretched = {name: value.new_zeros(()).expand(10**6, *value.shape[1:]) for name, value in content["model"].items()}
    large = (("network", "arguments", "channels"), 10**6), (("recipe", "channels"), 10**6)
    yield "objects that bite", changed(content, *large, (("model",), stretched))
    itself = copy.deepcopy(content)
    itself["model"] = itself
    yield "objects that bite", itself


def pickled(content, **options):
    """What `checkpoint.write` would write."""
    buffer = io.BytesIO()
    torch.save({"format": checkpoint.FORMAT, "version": checkpoint.VERSION, **content}, buffer, **options)
    return buffer.getvalue()


def broken_files(raw, content, marker):
    """Kind and bytes."""
    yield "empty", b""
    borders = [position + step for position in find_all(raw, b"PK") for step in (0, 30)]
    for length in {*range(1, len(raw), len(raw) // 100), *borders, *range(len(raw) - 75, len(raw), 5)} - {0}:
        if length < len(raw):
            yield "cut off", raw[:length]
    for position in {*range(0, len(raw), len(raw) // 100), *borders, *range(len(raw) - 75, len(raw), 5)}:
        if position < len(raw):
            yield "a byte flipped", raw[:position] + bytes([raw[position] ^ 0x40]) + raw[position + 1 :]
    for more in (b"\n", bytes(71), raw):
        yield "bytes too many", raw + more
    yield "bytes too many", b"\n" + raw
    for value in (None, [1, 2, 3], "text", torch.ones(3), {}, {"format": checkpoint.FORMAT}):
        yield "other pickles", pickle.dumps(value)
        buffer = io.BytesIO()
        torch.save(value, buffer)
        yield "other pickles", buffer.getvalue()
        yield "other pickles", with_digest(buffer.getvalue())
    for version in (0, -1, True, "2", None, checkpoint.VERSION + 1, 10**12):
        yield "other formats", with_digest(pickled({**content, "version": version}))
    for path in [*[(name,) for name in content], ("network", "name"), ("training", "optimizer"), ("recipe", "base_lr")]:
        armed = changed(content, (path, RunsCode(marker)))
        yield "pickles that run code", with_digest(pickled(armed))
        yield "pickles that run code", pickled(armed)
        yield "pickles that run code", pickled(armed, _use_new_zipfile_serialization=False)
        yield "pickles that run code", pickle.dumps(armed)


def find_all(raw, mark):
    return [position for position in range(len(raw)) if raw.startswith(mark, position)]


def mutations(raw, content, marker):
    """Kind and bytes of everything above."""
    yield from broken_files(raw, content, marker)
    for broken in (broken_contents, contradictory_contents, foreign_weights):
        for kind, other in broken(content):
            yield kind, with_digest(pickled(other))


def outcomes(path, go_on):
    """What each reader makes of a file: the words of its refusal, or all that it took from the file."""

    def weights():
        return dict(checkpoint.build_model(path, checkpoint.read(path)).state_dict())

    def ensemble():
        ensemble = models.ensemble.load([path])
        return {"classes": ensemble.classes, "image_size": ensemble.image_size, **ensemble.state_dict()}

    def resume():
        _, run = go_on()
        average = dict(run.average.state_dict()) if run.average else None
        history = without_times(run.history)
        return {"model": dict(run.model.state_dict()), "average": average, "history": history, "best": run.best}

    # The last of them may write the file anew.
    for reader in (weights, ensemble, resume):
        try:
            yield reader.__name__, reader()
        except UserError as error:
            yield reader.__name__, str(error)


@pytest.mark.filterwarnings("ignore:Validating sparse tensor:UserWarning")
@pytest.mark.parametrize("name", RUNS)
def test_whatever_is_wrong_with_a_file_is_refused_or_makes_no_difference(trained, tmp_path, monkeypatch, name):
    """More than a thousand files, each through every reader; nothing that stands in one is executed."""
    monkeypatch.setattr(files.os, "fsync", lambda _: None)  # for speed: no power fails here
    marker, counts, refused = tmp_path / "made by the file", Counter(), Counter()
    recipe, _ = trained(name, resume=False)
    path = recipe.checkpoint_path
    raw, content = path.read_bytes(), checkpoint.read(path)
    go_on = functools.partial(trained, name, resume=True)
    untouched = dict(outcomes(path, go_on))
    assert not any(isinstance(outcome, str) for outcome in untouched.values()), untouched
    for kind, mutated in mutations(raw, content, marker):
        path.write_bytes(mutated)
        counts[kind] += 1
        for reader, outcome in outcomes(path, go_on):
            where = f"{kind} {counts[kind]}, {reader}"
            if isinstance(outcome, str):
                assert str(path) in outcome, where
                refused[kind, reader] += 1
            else:
                assert_same(outcome, untouched[reader], where)
        assert not marker.exists(), where
    assert counts.total() >= 1000
    for kind in counts.keys() - HARMLESS:
        assert {refused[kind, reader] for reader in untouched} == {counts[kind]}, kind
    for kind in HARMLESS - {"keys too many"}:
        assert refused[kind, "resume"] > counts[kind] / 2, kind


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


def with_content(*changes):
    return lambda raw, content, marker: with_digest(pickled(changed(content, *changes)))


# What is written in place of a checkpoint, from its bytes, its content and the file that code in it would make.
FILES = {
    "a folder": lambda raw, content, marker: None,
    "empty": lambda raw, content, marker: b"",
    "cut in half": lambda raw, content, marker: raw[: len(raw) // 2],
    "a byte flipped": lambda raw, content, marker: raw[:5000] + bytes([raw[5000] ^ 1]) + raw[5001:],
    "another pickle": lambda raw, content, marker: pickle.dumps({"model": 1}),
    "runs code": lambda raw, content, marker: with_digest(pickled({**content, "network": RunsCode(marker)})),
    "no recipe": with_content((("recipe",), None)),
    "history a text": with_content((("history",), "text")),
    "absurd number of classes": with_content((("network", "arguments", "num_classes"), 10**12)),
    "weights nan": with_content((("model", "classifier.bias"), torch.full((10,), float("nan")))),
    "weights of another shape": with_content((("model", "classifier.bias"), torch.zeros(11))),
}
ONLY_FOR_RESUME = {
    "no totals": with_content((("training", "step"), 2)),
    "no optimizer": with_content((("training", "optimizer"), {})),
    "momentum of another shape": with_content((("training", "optimizer", 0, "momentum_buffer"), torch.zeros(3))),
}


@pytest.mark.parametrize(
    ("script", "how"),
    [
        *itertools.product(["mobilenetv2.py", "main_ens.py"], FILES),
        *(("mobilenetv2.py", how) for how in ONLY_FOR_RESUME),
    ],
)
def test_a_broken_file_ends_the_process_with_a_line(digits_run, start, tmp_path, script, how):
    raw, content, flags = digits_run
    path, marker = tmp_path / "checkpoints" / "mobilenetv2.pt", tmp_path / "made by the file"
    path.parent.mkdir()
    broken = {**FILES, **ONLY_FOR_RESUME}[how](raw, content, marker)
    if broken is None:
        path.mkdir()
    else:
        path.write_bytes(broken)
    name = path.relative_to(tmp_path)
    process = start(tmp_path, script, *([*flags, "--resume"] if script == "mobilenetv2.py" else [str(name)]))
    _, err = process.communicate()
    assert process.returncode == 2, err
    assert err.startswith(f"error: {name}: ")
    assert "Traceback" not in err
    assert err.count("\n") == 1
    assert not marker.exists()
