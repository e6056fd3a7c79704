"""The training loop against a naive one, what it writes, what it refuses, a run in pieces against a whole one."""

import copy
import csv
import functools
import itertools
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

from common import errors, files
from common.device import cpu_has_bfloat16, free_memory, pick_precision, set_up_device
from common.errors import UserError

import numpy as np
import pytest
import torch
from conftest import ALL_ON, TIMES, assert_same, without_times
from torch.nn import functional as F

import mobilenetv2
import utils
from dataset import Split
from evaluation import members
from training import checkpoint, loop, messages
from training.history import COLUMNS, OPTIONAL_COLUMNS, read_csv
from utils import CosineSchedule, normalize, predict

STEPS = 6  # of an epoch of tiny_data: five batches of 4 and one of 2


@pytest.fixture(autouse=True)
def signals_as_before():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def train(tiny, tiny_recipe, tiny_data):
    """Train the tiny network as a script's main does; `on_forward` and `data` are for the test to meddle with."""

    def run(data=None, *, val=False, on_forward=None, **changes):
        recipe = tiny_recipe(**changes)
        with checkpoint.previous_run(recipe) as previous:
            model = tiny()
            model.on_forward = on_forward
            return loop.fit(model, data or tiny_data(val=val), recipe, previous)

    return run


@pytest.fixture
def path(tmp_path):
    return tmp_path / "checkpoints" / "tiny.pt"


@pytest.fixture
def csv_path(tmp_path):
    return tmp_path / "plots" / "tiny.csv"


def at_call(number, action, *, training=True):
    """An `on_forward` that calls `action(logits)` at forward pass `number`, from 0, of training or of evaluation."""
    calls = Counter()

    def on_forward(model, logits):
        calls[model.training] += 1
        if model.training == training and calls[training] == number + 1:
            changed = action(logits)
            return logits if changed is None else changed
        return logits

    return on_forward


def send(*numbers):
    def action(_):
        for number in numbers:
            signal.raise_signal(number)

    return action


def assert_same_end(path, expected_path):
    """Two checkpoints of one recipe tell of the same run; only how long it took and how it was started may differ."""
    contents = [checkpoint.read(path), checkpoint.read(expected_path)]
    for content in contents:
        content["history"] = without_times(content["history"])
        del content["digest"], content["training"]["seconds"], content["recipe"]
    assert_same(*contents)


# ------------------------------------------------------------------------------------------------------------ the loop


def naive_average(averaged, model, decay, steps_done):
    """One entry of the state dict after the other, in float64."""
    keep = min(decay, (1 + steps_done) / (10 + steps_done))
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            averaged[name] = keep * averaged[name] + (1 - keep) * value.double()


@pytest.mark.parametrize("changes", [{}, ALL_ON], ids=["original", "all on"])
@pytest.mark.parametrize("val", [False, True], ids=["", "val"])
def test_weights_and_curves_are_those_of_a_naive_loop(train, tiny, tiny_data, tiny_recipe, val, changes):
    recipe, data, model = tiny_recipe(**changes), tiny_data(val=val), tiny()
    loader = loop.train_loader(recipe, data.train)
    undecayed = {"conv.weight", "classifier.weight"} ^ {name for name, _ in model.named_parameters()}
    sgd = torch.optim.SGD(
        [
            {"params": [parameter], "weight_decay": 0 if changes and name in undecayed else recipe.weight_decay}
            for name, parameter in model.named_parameters()
        ],
        lr=1.0,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
    )
    averaged = {name: value.double() for name, value in model.state_dict().items() if value.is_floating_point()}
    expected, steps_done = [], 0
    for epoch in range(recipe.epochs):
        losses, hits = [], 0
        model.train()
        for step, (images, labels) in enumerate(loader.epoch(epoch)):
            turn = (1 + math.cos(math.pi * epoch / recipe.epochs)) / 2
            rate = recipe.min_lr + (recipe.lr - recipe.min_lr) * turn
            if changes:  # a climb over two fifths of the 18 steps
                done, climb = epoch * STEPS + step, 0.4 * 18
                turn = (1 + math.cos(math.pi * (done - climb) / (18 - climb))) / 2
                rate = recipe.min_lr + (recipe.lr - recipe.min_lr) * turn
                rate = recipe.lr * min(1, (done + 1) / climb) if done < climb else rate
            for group in sgd.param_groups:
                group["lr"] = rate
            logits = model(images)
            targets = F.one_hot(labels, 3) * (1 - recipe.label_smoothing) + recipe.label_smoothing / 3
            sgd.zero_grad()
            (-targets * logits.log_softmax(1)).sum(1).mean().backward()
            sgd.step()
            naive_average(averaged, model, 1 - 1 / 1.8, steps_done)  # over a tenth of the 18 steps
            steps_done += 1
            losses += F.cross_entropy(logits, labels, reduction="none").tolist()
            hits += int((logits.argmax(1) == labels).sum())
        row = {"epoch": epoch + 1, "learning_rate": rate}
        row |= {"train_loss": sum(losses) / 22, "train_accuracy": hits / 22}
        tested = copy.deepcopy(model).eval()
        if recipe.ema_horizon:
            tested.load_state_dict({**model.state_dict(), **averaged})
        for name, split in [("test", data.test), ("val", data.val)][: 1 + val]:
            with torch.no_grad():
                logits = tested(normalize(torch.from_numpy(split.images)))
            labels = torch.from_numpy(split.labels)
            right = (logits.argmax(1) == labels).float().mean().item()
            row |= {f"{name}_loss": F.cross_entropy(logits, labels).item(), f"{name}_accuracy": right}
        expected.append(row)

    run = train(data, **changes)
    assert [row.keys() - TIMES for row in run.history] == [row.keys() for row in expected]
    for found, row in zip(run.history, expected, strict=True):
        assert {name: found[name] for name in row} == pytest.approx(row, rel=1e-5, abs=1e-6)
    assert expected[-1]["train_loss"] < 0.95 * expected[0]["train_loss"], "the network ought to have learned"
    for name, value in model.state_dict().items():
        torch.testing.assert_close(run.model.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    for name, value in averaged.items() if recipe.ema_horizon else ():
        torch.testing.assert_close(run.ema.state_dict()[name], value.float(), rtol=1e-5, atol=1e-6)


def test_with_an_average_it_is_the_average_that_is_kept(train, path):
    run = train(ema_horizon=0.5)
    content = checkpoint.read(path)
    assert_same(content["model"], run.ema.state_dict())
    assert_same(content["training"]["model"], run.model.state_dict())
    assert content["training"]["average"] is None, "it stands in the file already"
    assert content["model"]["norm.num_batches_tracked"] == 3 * STEPS
    for name in ("conv.weight", "norm.weight", "norm.running_mean", "norm.running_var"):
        assert not torch.equal(content["model"][name], content["training"]["model"][name]), name


def test_the_last_batch_is_trained_though_it_is_smaller(train):
    sizes = []

    def note(model, logits):
        if model.training:
            sizes.append(len(logits))
        return logits

    train(on_forward=note)
    assert sizes == 3 * [4, 4, 4, 4, 4, 2]


def test_a_last_batch_of_one_image_is_refused_before_anything_is_done(train, tiny_data, tmp_path):
    with pytest.raises(UserError, match="--batch-size 4 leaves a last batch of one image out of 21"):
        train(tiny_data(train_size=21), on_forward=lambda *_: pytest.fail("trained"))
    assert [path for path in tmp_path.rglob("*.*") if path.suffix != ".lock"] == []


def test_the_last_of_200_epochs_trains_at_0_000101():
    schedule = CosineSchedule(0.01, 0.0001, 200)
    rates = [schedule(epoch, step, 782) for epoch in range(200) for step in (0, 500, 781)]
    assert rates[::3] == rates[1::3] == rates[2::3]
    assert rates[::3] == pytest.approx(
        [0.0001 + 0.0099 * (1 + math.cos(math.pi * epoch / 200)) / 2 for epoch in range(200)], rel=1e-9
    )
    assert rates[0] == 0.01
    assert f"{rates[-1]:.6f}" == "0.000101"


@pytest.mark.parametrize("each", ["epoch", "batch"])
@pytest.mark.parametrize("warmup", [0.0, 0.2, 0.25])
def test_the_rate_climbs_and_then_falls_without_a_leap(each, warmup):
    schedule = CosineSchedule(0.08, 0.0008, 10, warmup, each)
    rates = [schedule(epoch, step, 5) for epoch in range(10) for step in range(5)]
    changes = 10 if each == "epoch" else 50
    top = rates.index(max(rates))
    assert rates[top] == pytest.approx(0.08)
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert rates[0] == pytest.approx(0.08 / (warmup * changes) if warmup else 0.08)
    assert 0.0008 < rates[-1] < 0.005
    assert len(set(rates)) in (changes, changes - 1)  # the climb's end and the cosine's start may be the same
    assert max(abs(a - b) for a, b in itertools.pairwise(rates)) < (0.05 if each == "epoch" else 0.01)


def test_twice_the_batch_doubles_both_rates_and_the_run_says_so(train, tiny_data, capsys):
    rates = {}
    for batch_size in (64, 128):
        run = train(tiny_data(train_size=66), batch_size=batch_size, name=f"batch{batch_size}", epochs=2)
        rates[batch_size] = [row["learning_rate"] for row in run.history]
        said = "learning rates 0.8 and 0.016 for a batch of 64 become 1.6 and 0.032 for a batch of 128"
        assert (said in capsys.readouterr().out) == (batch_size == 128)
    assert rates[64] == pytest.approx([0.8, 0.408])
    assert rates[128] == pytest.approx([1.6, 0.816])


@pytest.mark.parametrize(("step_seconds", "least", "most"), [(0.01, 1, 1), (0.5, 3, 4)])
def test_the_device_is_asked_once_a_second_and_at_the_end_of_an_epoch(train, monkeypatch, step_seconds, least, most):
    clock, reads, read = [1000.0], [], loop.RunningSums.read
    monkeypatch.setattr(messages, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(loop.RunningSums, "read", lambda *arguments: reads.append(arguments[1]) or read(*arguments))

    def take_time(model, logits):
        clock[0] += step_seconds
        return logits

    train(on_forward=take_time)
    for epoch in range(3):
        assert least <= reads.count(epoch) <= most


def test_predict_gives_the_logits_of_one_pass_and_leaves_the_network_alone(tiny):
    model = tiny().eval()
    model.norm.running_mean.uniform_(-1, 1)
    model.norm.running_var.uniform_(0.5, 2)
    before = copy.deepcopy(model.state_dict())
    images = torch.randint(0, 256, (11, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    device = torch.device("cpu")
    pieces = [
        predict(lambda batch: model(normalize(batch)), images, device, batch_size=size) for size in (None, 11, 4, 1)
    ]
    assert_same(dict(model.state_dict()), dict(before))
    expected = model(normalize(images)).detach()
    assert expected.std(0).min() > 1e-3, "the output ought to depend on the image"
    for logits in pieces:
        assert (logits.dtype, logits.shape) == (torch.float32, (11, 3))
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_predict_keeps_its_batches_small_for_large_images(tiny, monkeypatch):
    monkeypatch.setitem(utils.EVAL_PIXELS, "cpu", 4 * 8 * 8)
    sizes = []

    def network(batch):
        sizes.append(len(batch))
        return torch.zeros(len(batch), 3)

    predict(network, torch.zeros(9, 3, 8, 8, dtype=torch.uint8), torch.device("cpu"))
    predict(network, torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.device("cpu"))
    assert sizes == [3, 3, 3, 1, 1], "in equal parts"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there_is_refused(train):
    assert set_up_device("cpu").type == "cpu"
    with pytest.raises(UserError, match=r"--device cuda.* finds no such device"):
        train(device="cuda")


# ------------------------------------------------------------------------------------------------------ what it writes


def test_the_csv_and_the_checkpoint_tell_the_same(train, path, csv_path):
    for val in (False, True):
        run = train(val=val, overwrite=True)
        with csv_path.open(newline="") as file:
            header, *rows = csv.reader(file)
        assert header == [name for name in COLUMNS if val or name not in OPTIONAL_COLUMNS]
        assert [row[0] for row in rows] == ["1", "2", "3"]
        assert read_csv(csv_path) == checkpoint.read(path)["history"] == run.history
        for row in run.history:
            assert row["seconds"] > 0
            assert row["images_per_second"] > 0
            assert all(math.isfinite(value) for value in row.values())


def test_a_csv_that_was_lost_is_there_again_after_a_resume(train, csv_path):
    """As after a kill between writing the checkpoint and writing the CSV."""
    train()
    whole = csv_path.read_bytes()
    csv_path.unlink()
    train(resume=True)
    assert csv_path.read_bytes() == whole


def test_without_validation_the_checkpoint_is_the_last_epochs(train, path):
    run = train()
    content = checkpoint.read(path)
    assert content["chosen"] == {"epoch": 3, "by": "last"}
    assert content["finished"] is True
    assert_same(content["model"], run.model.state_dict())
    assert_same(members.build_member(path, content).network.state_dict(), run.model.state_dict())
    assert content["training"]["model"] is content["training"]["best"] is None


@pytest.fixture
def scripted(monkeypatch, path):
    """Decide the accuracies of every epoch, by split; get what the checkpoint was after each."""

    def script(test, val):
        written, contents = checkpoint.write, []
        left = {9: iter(test), 8: iter(val)}

        def evaluate(run, trainer, splits, stop):
            row = {f"{name}_loss": 1.0 / len(labels) for name, (_, labels) in splits.items()}
            return row | {f"{name}_accuracy": next(left[len(labels)]) for name, (_, labels) in splits.items()}

        monkeypatch.setattr(loop, "evaluate", evaluate)

        def write(*arguments):
            written(*arguments)
            contents.append(checkpoint.read(path))

        monkeypatch.setattr(checkpoint, "write", write)
        return contents

    return script


def test_with_validation_the_best_epoch_is_kept_beside_the_last(train, scripted):
    contents = scripted(test=[0.9, 0.1, 0.2, 1.0], val=[0.2, 0.5, 0.5, 0.4])
    run = train(val=True, epochs=4)
    assert [content["chosen"] for content in contents] == [
        {"epoch": 1, "by": "val_accuracy"},
        {"epoch": 2, "by": "val_accuracy"},
        {"epoch": 2, "by": "val_accuracy"},  # the first of two equals
        {"epoch": 2, "by": "val_accuracy"},
    ]
    last = contents[3]
    assert last["training"]["best"] == {"epoch": 2, "accuracy": 0.5}
    assert_same(last["model"], contents[1]["training"]["model"])
    assert_same(last["training"]["model"], run.model.state_dict())
    assert not torch.equal(last["model"]["conv.weight"], last["training"]["model"]["conv.weight"])
    assert [row["val_accuracy"] for row in last["history"]] == [0.2, 0.5, 0.5, 0.4]


def test_the_best_epoch_is_not_forgotten_when_a_run_is_stopped(train, scripted):
    contents = scripted(test=[0.0] * 4, val=[0.5, 0.1, 0.4, 0.2])
    train(val=True, epochs=4, on_forward=at_call(2 * STEPS + 1, send(signal.SIGINT)))
    train(val=True, epochs=4, resume=True)
    assert len(contents) == 5
    for content in contents:
        assert content["chosen"] == {"epoch": 1, "by": "val_accuracy"}
        assert_same(content["model"], contents[0]["model"])


@pytest.mark.parametrize("val", [False, True], ids=["", "val"])
def test_the_test_set_chooses_nothing(train, tiny_data, tmp_path, val):
    data = tiny_data(val=val)
    other = Split(255 - data.test.images[:5], 2 - data.test.labels[:5])
    train(data, name="one")
    train(replace(data, test=other), name="other")
    one, other = (checkpoint.read(tmp_path / "checkpoints" / f"{name}.pt") for name in ("one", "other"))
    assert one["history"][0]["test_loss"] != other["history"][0]["test_loss"]
    for name in ("model", "chosen"):
        assert_same(one[name], other[name])
    assert_same(one["training"]["optimizer"], other["training"]["optimizer"])


def test_a_checkpoint_describes_itself_in_plain_values(train, tiny_data, tiny_recipe, path):
    train(val=True)
    content = checkpoint.read(path)
    kinds = set()

    def walk(value):
        kinds.add(type(value))
        for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            walk(part)

    content["model"] = dict(content["model"])
    content["training"]["model"] = dict(content["training"]["model"])
    walk(content)
    assert kinds <= {dict, list, str, int, float, bool, type(None), torch.Tensor}
    assert content["network"] == {"name": "tiny", "arguments": {"num_classes": 3, "channels": 4}}
    assert content["recipe"] == tiny_recipe(precision="float32").as_dict()
    data = tiny_data()
    described = content["data"]
    assert (described["source"], described["digest"]) == (data.source, data.digest)
    assert (described["classes"], described["image_size"]) == (["red", "green", "blue"], 8)
    assert described["split"] == {
        "split_seed": 0, "train_size": None, "val_size": 0, "test_size": None, "test_split": 0.2,
    }  # fmt: skip
    assert normalize(torch.zeros(1, 3, 1, 1, dtype=torch.uint8)).flatten().tolist() == pytest.approx(
        [-mean / std for mean, std in zip(described["mean"], described["std"], strict=True)]
    )
    assert content["versions"]["torch"] == str(torch.__version__)


def test_a_disk_that_fills_up_keeps_the_epoch_before(train, path, monkeypatch):
    kept = []

    def refuse(_):
        raise OSError(28, "No space left on device")

    def fill(_):
        kept.append(path.read_bytes())
        monkeypatch.setattr(files.os, "fsync", refuse)

    with pytest.raises(UserError) as error:
        train(on_forward=at_call(STEPS + 2, fill))
    assert f"{path}: the checkpoint could not be written (No space left" in str(error.value)
    assert f"{path} holds epoch 1; --resume continues from there" in str(error.value)
    assert path.read_bytes() == kept[0]
    assert list(path.parent.glob("[!.]*")) == [path]


def test_a_disk_that_is_full_from_the_start_says_that_nothing_is_saved(train, monkeypatch):
    def refuse(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", refuse)
    with pytest.raises(UserError, match=r"No space left.*; nothing of this run is saved"):
        train()


@pytest.mark.parametrize("folder", ["checkpoints", "plots"])
def test_a_folder_that_vanishes_ends_the_run_and_is_not_made_anew(train, tmp_path, folder):
    def vanish(_):
        shutil.move(tmp_path / folder, tmp_path / "elsewhere")

    with pytest.raises(UserError) as error:
        train(on_forward=at_call(STEPS + 2, vanish))
    assert f"{tmp_path / folder}: this folder was deleted during the run" in str(error.value)
    assert "tiny.pt holds epoch 1; --resume continues from there" in str(error.value)
    assert not (tmp_path / folder).exists()
    moved = tmp_path / ("elsewhere" if folder == "checkpoints" else "checkpoints") / "tiny.pt"
    assert checkpoint.read(moved)["training"]["epoch"] == 1


def test_the_same_seed_gives_the_same_bits_and_another_does_not(train, path):
    for name, seed in (("one", 3), ("same", 3), ("other", 4)):
        train(name=name, seed=seed, **ALL_ON)
    one, same, other = (checkpoint.read(path.with_name(f"{name}.pt")) for name in ("one", "same", "other"))
    assert_same_end(path.with_name("one.pt"), path.with_name("same.pt"))
    assert [content["recipe"]["seed"] for content in (one, same, other)] == [3, 3, 4]
    assert not torch.equal(one["model"]["conv.weight"], other["model"]["conv.weight"])
    assert one["history"][0]["train_loss"] != other["history"][0]["train_loss"]


def test_what_is_saved_in_the_background_is_what_stood_there_then(train, tiny_recipe, path, csv_path, monkeypatch):
    train(name="whole", **ALL_ON)
    monkeypatch.setattr(checkpoint, "Saver", functools.partial(in_background, checkpoint.Saver))
    train(**ALL_ON)
    assert_same_end(path, path.with_name("whole.pt"))
    assert without_times(read_csv(csv_path)) == without_times(read_csv(csv_path.with_name("whole.csv")))
    written, contents = checkpoint.write, []

    def write_late(target, content):
        time.sleep(0.1)  # while the next epoch is trained
        written(target, content)
        contents.append(checkpoint.read(target))

    monkeypatch.setattr(checkpoint, "write", write_late)
    train(overwrite=True, **ALL_ON)
    weights = [content["model"]["conv.weight"] for content in contents]
    train(overwrite=True, on_forward=at_call(2 * STEPS, send(signal.SIGINT)), **ALL_ON)
    assert [content["training"]["epoch"] for content in contents] == [1, 2, 3, 1, 2, 2]
    assert_same([content["model"]["conv.weight"] for content in contents[3:5]], weights[:2])
    assert not torch.equal(weights[0], weights[1])
    train(resume=True, **ALL_ON)
    assert_same_end(path, path.with_name("whole.pt"))


def in_background(saver, recipe, **_):
    return saver(recipe, in_background=True)


def test_a_disk_that_fills_up_in_the_background_ends_the_run(train, path, monkeypatch):
    monkeypatch.setattr(checkpoint, "Saver", functools.partial(in_background, checkpoint.Saver))
    written = []

    def write(target, content):
        written.append(content["training"]["epoch"])
        raise UserError(f"{target}: full")

    monkeypatch.setattr(checkpoint, "write", write)
    with pytest.raises(UserError, match=r"tiny\.pt: full"):
        train(epochs=1)  # the last epoch's error is not lost either
    with pytest.raises(UserError, match=r"tiny\.pt: full"):
        train()
    assert written == [1, 1], "no epoch is written behind a lost one"


# ------------------------------------------------------------------------------------------------ memory that runs out


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "device memory"),
        (RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory: you tried to"), "memory"),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"), "memory"),
        (MemoryError(), "memory"),
    ],
)
@pytest.mark.parametrize("training", [True, False], ids=["step", "evaluation"])
def test_explain_out_of_memory_names_the_batch_size_and_a_smaller_one(train, path, error, memory, training):
    kept = []

    def run_out(_):
        kept.append(path.read_bytes())
        raise error

    with pytest.raises(UserError, match=rf"--batch-size 4: the {memory}.* is too small for it; try --batch-size 2"):
        train(on_forward=at_call(STEPS + 2 if training else 1, run_out, training=training))
    assert path.read_bytes() == kept[0]


def test_explain_out_of_memory_for_two_images_asks_for_smaller_ones(train, tiny_data):
    def run_out(_):
        raise MemoryError

    with pytest.raises(UserError, match=r"--batch-size 2: .* try smaller images or a smaller network"):
        train(batch_size=2, on_forward=at_call(0, run_out))


@pytest.mark.skipif(sys.platform != "linux", reason="the files of Linux")
@pytest.mark.parametrize("version", [None, 1, 2])
def test_memory_that_is_free_is_what_the_container_allows(tmp_path, version):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "meminfo").write_text("MemTotal:  9000 kB\nMemAvailable:  8000 kB\n")
    folder = tmp_path / "sys" / "fs" / "cgroup" / ("memory" if version == 1 else "")
    folder.mkdir(parents=True)
    limit, used = (
        ("memory.limit_in_bytes", "memory.usage_in_bytes") if version == 1 else ("memory.max", "memory.current")
    )
    if version:
        (folder / limit).write_text("3000000\n")
        (folder / used).write_text("2000000\n")
        (folder / "memory.stat").write_text("inactive_file 500000\n")
    assert free_memory(tmp_path) == (1_500_000 if version else 8_192_000)
    (folder / limit).write_text("max\n" if version == 2 else f"{2**63 - 4096}\n")
    assert free_memory(tmp_path) == 8_192_000


def test_other_errors_are_not_taken_for_a_lack_of_memory(train):
    def fail(_):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        train(on_forward=at_call(0, fail))


# ------------------------------------------------------------------------------------------- a loss that is not finite


@pytest.mark.parametrize("step", [0, 3, STEPS - 1])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_named_and_nothing_of_it_saved(train, path, csv_path, step, value):
    kept = []

    def spoil(logits):
        kept.extend([path.read_bytes(), csv_path.read_bytes()])
        if math.isinf(value):  # a fourth class, which no image has, takes all the probability
            return torch.cat((logits - math.inf, logits[:, :1]), 1)
        return logits * value

    with pytest.raises(UserError) as error:
        train(on_forward=at_call(STEPS + step, spoil))
    assert f"not finite at epoch 2, step {step + 1}, learning rate 0.03775;" in str(error.value)
    assert [path.read_bytes(), csv_path.read_bytes()] == kept
    assert len(checkpoint.read(path)["history"]) == 1


def test_a_rate_far_too_high_is_noticed_in_the_first_epoch(train, tmp_path):
    with pytest.raises(UserError, match=r"epoch 1, step \d, learning rate 6\.25e\+28; nothing .* Lower --base-lr"):
        train(base_lr=1e30)
    assert [path for path in tmp_path.rglob("*.*") if path.suffix != ".lock"] == []


def test_weights_that_the_last_step_broke_are_not_saved(train, path):
    kept = []

    def spoil(logits):
        kept.append(path.read_bytes())
        return logits * math.nan

    with pytest.raises(UserError, match=r"the test loss is not finite at epoch 2, step 6, learning rate 0\.03775"):
        train(on_forward=at_call(1, spoil, training=False))
    assert path.read_bytes() == kept[0]


def test_a_signal_does_not_save_a_loss_that_is_not_finite(train, path):
    kept = []

    def spoil(logits):
        kept.append(path.read_bytes())
        signal.raise_signal(signal.SIGINT)
        return logits * math.nan

    with pytest.raises(UserError, match="epoch 2, step 3"):
        train(on_forward=at_call(STEPS + 2, spoil))
    assert path.read_bytes() == kept[0]


# ------------------------------------------------------------------------------------------------- stopped and resumed


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_after_the_step_and_says_how_to_go_on(train, path, capsys, number):
    before = signal.getsignal(number)
    run = train(on_forward=at_call(STEPS + 3, send(number)))
    assert run.exit_status == 128 + number
    assert f"stopped in epoch 2 after step 4 of 6, saved to {path}; the same command with --resume" in (
        capsys.readouterr().out
    )
    content = checkpoint.read(path)
    assert (content["training"]["epoch"], content["training"]["step"], content["finished"]) == (1, 4, False)
    assert len(content["history"]) == 1
    assert signal.getsignal(number) is before
    assert train(resume=True).exit_status == 0
    assert f"resuming from {path}: epoch 2, step 5" in capsys.readouterr().out


# Where each piece is signalled: in forward pass so-and-so of training or of evaluation, counted from the piece's start.
# An evaluation is 3 batches of the test split, then 2 of the validation's if there is one.
PIECES = {
    "first step": [("train", 0)],
    "mid-epoch": [("train", 8)],
    "last step of an epoch": [("train", STEPS - 1)],
    "very last step": [("train", 3 * STEPS - 1)],
    "evaluation": [("eval", 0)],
    "evaluation's end": [("eval", 2), ("eval", 1)],
    "evaluation, again and again": [("eval", 0), ("eval", 1), ("eval", 0), ("eval", 6)],
    "many": [("train", 2), ("train", 1), ("eval", 1), ("train", 0), ("train", 5), ("train", 2)],
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "settings",
    [{}, {"val": True}, {**ALL_ON, "precision": "bfloat16"}, {"val": True, **ALL_ON}],
    ids=["", "val", "all on, bfloat16", "val, all on"],
)
@pytest.mark.parametrize("pieces", PIECES.values(), ids=PIECES)
def test_a_run_in_pieces_is_the_whole_run_to_the_last_bit(train, path, csv_path, monkeypatch, pieces, settings):
    monkeypatch.setitem(utils.EVAL_PIXELS, "cpu", 4 * 8 * 8)
    whole = train(**settings, name="whole")
    for kind, number in pieces:
        stop = at_call(number, send(signal.SIGTERM), training=kind == "train")
        assert train(**settings, resume=True, on_forward=stop).exit_status == 143
        plotted = read_csv(csv_path) if csv_path.exists() else []
        assert plotted == checkpoint.read(path)["history"]
    run = train(**settings, resume=True)
    assert run.exit_status == 0
    assert_same_end(path, path.with_name("whole.pt"))
    assert_same(run.model.state_dict(), whole.model.state_dict())
    assert_same(run.eval_model.state_dict(), whole.eval_model.state_dict())
    whole_csv = read_csv(csv_path.with_name("whole.csv"))
    assert without_times(read_csv(csv_path)) == without_times(whole_csv)


def test_images_that_were_split_off_for_the_test_are_told_once(train, tiny_data, capsys):
    train(replace(tiny_data(), test_split=0.25), split_seed=3)
    said = "25 % of each class are the test images, since made up has none of its own"
    said += " (--test-split 0.25, --split-seed 3)"
    assert capsys.readouterr().out.splitlines().count(said) == 1
    train(name="other")
    assert "test-split" not in capsys.readouterr().out


def test_a_run_keeps_its_precision_when_it_goes_on(train, path, capsys):
    whole = train(precision="bfloat16")
    assert ", in bfloat16" in capsys.readouterr().out
    assert not torch.equal(whole.model.conv.weight, train(name="other", precision="float32").model.conv.weight)
    path.unlink()
    train(precision="bfloat16", on_forward=at_call(STEPS + 2, send(signal.SIGTERM)))
    with pytest.raises(UserError, match="--precision: bfloat16 in the checkpoint, float32 now"):
        train(resume=True, precision="float32")
    assert_same(train(resume=True).model.state_dict(), whole.model.state_dict())
    assert checkpoint.read(path)["recipe"]["precision"] == "bfloat16"


@pytest.mark.parametrize(
    ("there", "device", "expected"),
    [
        ({"avx2": True, "avx512_f": True, "avx512_bf16": False}, "cpu", "float32"),
        ({"avx512_f": True, "avx512_bf16": True}, "cpu", "bfloat16"),
        ({"amx_bf16": True}, "cpu", "bfloat16"),
        ({"architecture": "aarch64", "bf16": True}, "cpu", "bfloat16"),
        ({"architecture": "aarch64"}, "cpu", "float32"),
        ({}, "cuda", "bfloat16"),
        ({"avx512_bf16": True}, "mps", "float32"),
    ],
)
def test_auto_takes_bfloat16_where_there_are_instructions_for_it(monkeypatch, there, device, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: there)
    allowed = "AVX512" if there.get("avx512_f") else "DEFAULT"
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: allowed)
    assert pick_precision("auto", torch.device(device)) == expected
    for choice in ("float32", "bfloat16"):
        assert pick_precision(choice, torch.device(device)) == choice


def test_the_instructions_do_not_count_where_pytorch_may_not_use_them(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": True})
    for allowed, expected in (("AVX512", True), ("AVX2", False)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda allowed=allowed: allowed)
        assert cpu_has_bfloat16() == expected


def test_what_the_processor_can_do_is_what_it_says_and_pytorchs_own_variable_counts():
    if sys.platform == "linux" and platform.machine() == "x86_64":
        words = set(Path("/proc/cpuinfo").read_text().split())
        command = [sys.executable, "-c", "from common.device import cpu_has_bfloat16; print(cpu_has_bfloat16())"]
        for capability in ("avx2", "avx512"):
            environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
            printed = subprocess.check_output(command, env=environment, cwd=Path(loop.__file__).parents[1], text=True)
            expected = capability == "avx512" and bool({"avx512_bf16", "amx_bf16"} & words)
            assert printed.strip() == str(expected)


def test_a_resumed_epoch_counts_its_first_part_in_its_time(train, path):
    train(on_forward=at_call(3, send(signal.SIGINT)))
    content = checkpoint.read(path)
    content["training"]["seconds"] = 1000.0
    checkpoint.write(path, content)
    row, *_ = train(resume=True).history
    assert 1000 < row["seconds"] < 1100
    assert 22 / 1100 < row["images_per_second"] < 22 / 1000


def test_a_signal_after_the_last_epoch_ends_a_run_that_is_finished(train, path):
    assert train(epochs=1, on_forward=at_call(0, send(signal.SIGINT), training=False)).exit_status == 0
    assert checkpoint.read(path)["finished"]


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_at_once_with_the_epoch_before(train, path, second):
    kept = []

    def stop(_):
        kept.append(path.read_bytes())
        send(signal.SIGINT, second)(_)
        pytest.fail("went on")

    with pytest.raises(SystemExit) as end:
        train(on_forward=at_call(STEPS + 2, stop))
    assert end.value.code == 128 + second
    assert path.read_bytes() == kept[0]
    assert list(path.parent.glob("[!.]*")) == [path]


# ------------------------------------------------------------------------------------- what may follow on a checkpoint


def test_a_checkpoint_is_neither_overwritten_nor_resumed_unasked(train, path):
    train()
    whole = path.read_bytes()
    with pytest.raises(UserError) as error:
        train()
    assert all(words in str(error.value) for words in (str(path), "--resume", "--overwrite", "--name"))
    assert path.read_bytes() == whole


def test_overwrite_starts_afresh(train, path):
    train(base_lr=0.5)
    run = train(overwrite=True)
    assert [row["epoch"] for row in run.history] == [1, 2, 3]
    assert checkpoint.read(path)["recipe"]["base_lr"] == 0.8
    train(name="other")
    assert_same_end(path, path.with_name("other.pt"))


def test_resume_without_a_checkpoint_starts_afresh(train):
    assert [row["epoch"] for row in train(resume=True).history] == [1, 2, 3]


def test_a_finished_run_has_nothing_left_to_train(train, path, capsys):
    weights = dict(train().model.state_dict())
    whole = path.read_bytes()
    run = train(resume=True, on_forward=lambda *_: pytest.fail("trained"))
    assert "is finished: all 3 epochs are done" in capsys.readouterr().out
    assert run.exit_status == 0
    assert_same(run.model.state_dict(), weights)
    assert path.read_bytes() == whole


def test_another_recipe_is_refused_flag_by_flag(train, path):
    train()
    whole = path.read_bytes()
    with pytest.raises(UserError) as error:
        train(resume=True, base_lr=0.7, batch_size=6, train_size=20)
    lines = str(error.value).splitlines()
    assert [line.strip() for line in lines[1:-1]] == [
        "--batch-size: 4 in the checkpoint, 6 now",
        "--base-lr: 0.8 in the checkpoint, 0.7 now",
        "--train-size: None in the checkpoint, 20 now",
    ]
    assert str(path) in lines[0]
    assert path.read_bytes() == whole


def test_a_checkpoint_is_not_read_while_another_process_writes_it(train, tiny_recipe, path, monkeypatch):
    train()
    monkeypatch.setattr(checkpoint, "read", lambda path: pytest.fail("read without the lock"))
    with (
        files.locked(path, "the checkpoint"),
        pytest.raises(UserError, match="another process is writing"),
        checkpoint.previous_run(tiny_recipe(resume=True)),
    ):
        pass


def test_another_network_than_the_recipes_is_refused(tiny, tiny_recipe, tiny_data, tmp_path):
    with pytest.raises(UserError, match="the model is not the tiny of the recipe"):
        loop.fit(tiny(channels=5), tiny_data(), tiny_recipe())
    assert not (tmp_path / "checkpoints").exists()


def test_other_images_are_refused(train, tiny_data, path):
    train()
    whole = path.read_bytes()
    other = replace(tiny_data(seed=1), source="elsewhere")
    with pytest.raises(UserError, match=r"--data elsewhere does not hold .* \(--data made up\)"):
        train(other, resume=True)
    assert path.read_bytes() == whole
    assert train(replace(tiny_data(), source="elsewhere"), resume=True).exit_status == 0, "the same images, moved"


def test_another_network_and_a_damaged_file_are_refused(train, tiny_recipe, path):
    train()
    content = checkpoint.read(path)
    content["network"]["name"] = "densenet"
    checkpoint.write(path, content)
    with (
        pytest.raises(UserError, match="holds a densenet, not a tiny"),
        checkpoint.previous_run(tiny_recipe(resume=True)),
    ):
        pass
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="truncated"), checkpoint.previous_run(tiny_recipe(resume=True)):
        pass


@pytest.mark.parametrize("folder", ["checkpoint_dir", "plot_dir"])
def test_a_folder_that_cannot_be_written_is_named_before_training(train, tmp_path, folder):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"file.*could not be written"):
        train(on_forward=lambda *_: pytest.fail("trained"), **{folder: str(tmp_path / "file")})


def test_after_overwrite_the_way_on_is_resume_instead(train, capsys):
    train(overwrite=True, on_forward=at_call(0, send(signal.SIGINT)))
    assert "the same command with --resume in place of --overwrite continues" in capsys.readouterr().out


@pytest.fixture
def script(tmp_path, monkeypatch, capsys):
    """Call mobilenetv2.py's main in the test's folder: exit status, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    flags = "--data digits --image-size 16 --train-size 40 --test-size 20 --width 0.25 --epochs 1 --device cpu"

    def call(*argv):
        monkeypatch.setattr(sys, "argv", ["mobilenetv2.py", *flags.split(), *argv])
        with pytest.raises(SystemExit) as end:
            errors.run(mobilenetv2.main)
        return end.value.code, *capsys.readouterr()

    return call


def test_a_script_trains_and_then_minds_its_checkpoint(script, tmp_path):
    status, out, err = script()
    assert status == 0, err
    path = tmp_path / "checkpoints" / "mobilenetv2.pt"
    assert "weights: checkpoints/mobilenetv2.pt   curves: plots/mobilenetv2.png, plots/mobilenetv2.csv" in out
    assert (tmp_path / "plots" / "mobilenetv2.png").read_bytes().startswith(b"\x89PNG")
    whole = path.read_bytes()

    status, _, err = script()
    assert status == 2
    assert err.startswith("error: checkpoints/mobilenetv2.pt exists already; --resume")
    status, out, err = script("--resume", "--base-lr", "0.02")
    assert status == 2
    assert "--base-lr: 0.05 in the checkpoint, 0.02 now" in err
    status, out, _ = script("--resume")
    assert status == 0
    assert "finished" in out
    assert path.read_bytes() == whole

    assert script("--overwrite", "--seed", "1")[0] == 0
    assert checkpoint.read(path)["recipe"]["seed"] == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_script_that_is_stopped_in_its_first_epoch_ends_in_good_order(script, monkeypatch, tmp_path, number):
    add = loop.RunningSums.add
    monkeypatch.setattr(loop.RunningSums, "add", lambda *arguments: add(*arguments) or signal.raise_signal(number))
    status, out, err = script("--batch-size", "10")
    assert status == 128 + number
    assert "stopped in epoch 1 after step 1 of 4" in out
    assert err == ""
    assert checkpoint.read(tmp_path / "checkpoints" / "mobilenetv2.pt")["training"]["step"] == 1


# --------------------------------------------------------------------------------------------------------- TensorBoard


def test_tensorboard_that_is_missing_is_asked_for_before_training(train, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=r"--tensorboard .* pip install tensorboard"):
        train(tensorboard=True, on_forward=lambda *_: pytest.fail("trained"))
    assert [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"] == []
    train()


def test_tensorboard_shows_what_the_csv_has(train, csv_path, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(val=True, tensorboard=True, on_forward=at_call(STEPS + 2, send(signal.SIGINT)))
    train(val=True, tensorboard=True, resume=True)
    events = EventAccumulator(str(tmp_path / "plots" / "tensorboard" / "tiny")).Reload()
    history = read_csv(csv_path)
    assert set(events.Tags()["scalars"]) == history[0].keys() - {"epoch"}
    for name in events.Tags()["scalars"]:
        scalars = [(scalar.step, scalar.value) for scalar in events.Scalars(name)]
        assert scalars == [(row["epoch"], float(np.float32(row[name]))) for row in history]
