"""--resume with and without more epochs, --init, --dry-run, unusual batch sizes, warnings, plots and remaining time."""

import math
import threading
from dataclasses import replace

from common.errors import UserError
from common.text import pluralize

import numpy as np
import pytest
import torch
from conftest import assert_same, without_times

from dataset import Split
from training import checkpoint, loop, messages


def test_resume_takes_the_recipe_from_the_checkpoint(train, tmp_path):
    unusual = {"base_lr": 0.3, "weight_decay": 1e-3, "seed": 4, "label_smoothing": 0.1, "ema_horizon": 0.2}
    places = {"checkpoint_dir": str(tmp_path / "whole"), "plot_dir": str(tmp_path / "whole")}
    whole = train(epochs=3, **unusual, **places)
    train(epochs=2, **unusual)
    # With a third epoch, it continues with the schedule of three epochs; the weights differ from the whole run's.
    longer = train(resume=True, epochs=3, given=frozenset({"resume", "epochs"}))
    assert [row["epoch"] for row in longer.history] == [1, 2, 3]
    assert longer.history[2]["learning_rate"] == whole.history[2]["learning_rate"]
    again = train(resume=True, given=frozenset({"resume"}))
    assert_same(without_times(again.history), without_times(longer.history))
    stored = checkpoint.read(tmp_path / "checkpoints" / "tiny.pt")["recipe"]
    assert {name: stored[name] for name in unusual} == unusual
    assert stored["epochs"] == 3
    assert "given" not in stored


def test_resume_reports_a_new_or_longer_run_and_refuses_a_shorter_one(train, capsys):
    train(resume=True, epochs=2)
    assert "tiny.pt: there is no checkpoint to resume from; starting a new run" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"--epochs 1: .* is already in epoch 2"):
        train(resume=True, epochs=1, given=frozenset({"epochs"}))
    train(resume=True, epochs=4, given=frozenset({"epochs"}))
    assert "4 epochs instead of 2" in capsys.readouterr().out


def test_init_starts_from_the_weights_of_a_checkpoint(train, tmp_path, tiny_data, capsys):
    train(name="first", epochs=1)
    first = tmp_path / "checkpoints" / "first.pt"
    theirs = checkpoint.read(first)["model"]

    def start(data, **changes):
        """The initial weights of a run: its weights after an epoch with a learning rate of almost zero."""
        run = train(data, init=str(first), epochs=1, base_lr=1e-30, base_min_lr=0.0, **changes)
        return {name: value for name, value in run.model.state_dict().items() if "running" not in name}

    same = start(tiny_data(), name="same")
    assert all(torch.equal(value, theirs[name]) for name, value in same.items() if "num_batches" not in name)
    assert f"starting from the weights of {first}\n" in capsys.readouterr().out
    assert checkpoint.read(tmp_path / "checkpoints" / "same.pt")["recipe"]["init"] == str(first)

    data = tiny_data()
    two = replace(data, classes=("warm", "cold"), train=replace(data.train, labels=data.train.labels % 2),
                  test=replace(data.test, labels=data.test.labels % 2))  # fmt: skip
    other = start(two, name="other")
    assert torch.equal(other["conv.weight"], theirs["conv.weight"])
    assert other["classifier.weight"].shape == (2, 4)
    assert "with a new classifier for 2 classes: they differ from its 3" in capsys.readouterr().out

    with pytest.raises(UserError, match=r"--init .*first\.pt holds tiny \(channels 4\), not tiny \(channels 5\)"):
        start(tiny_data(), name="wide", channels=5)
    with pytest.raises(UserError, match="no such checkpoint"):
        train(init=str(tmp_path / "nowhere.pt"), name="none")


def test_a_dry_run_prints_the_cost_of_a_run_and_saves_nothing(train, tmp_path, capsys):
    run = train(dry_run=True, tensorboard=True)
    said = capsys.readouterr().out
    multiply_adds = 64 * (3 * 4 * 9) + 4 * 3  # the convolution on 8×8 pixels, and the classifier
    assert f"2 layers with weights, {multiply_adds / 1e6:,.1f} M multiply-adds" in said
    assert "images/s in the last step" in said
    assert "3 epochs in about" in said
    assert run.history == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("batch_size", "steps"), [(4, 6), (7, 3), (21, 1), (500, 1)])
def test_batches_are_neither_too_small_nor_larger_than_the_data_set(train, tmp_path, batch_size, steps, capsys):
    run = train(batch_size=batch_size, epochs=2)  # of 22 images, batches of 7 and 21 would leave a batch of one
    assert run.optimizer.state[next(run.model.parameters())]["momentum_buffer"].isfinite().all()
    said, real_size = capsys.readouterr().out, min(batch_size, 22)
    assert f"2 epochs of {pluralize(steps, 'step')}\n" in said
    # The learning rates are scaled with the real batch size.
    rates = [row["learning_rate"] for row in run.history]
    assert rates == pytest.approx([0.8 * real_size / 64, 0.408 * real_size / 64])
    assert f"peak learning rate {0.8 * real_size / 64:g} = 0.8 × {real_size}/64" in said
    assert 0 < run.history[-1]["train_accuracy"] <= 1
    stored = checkpoint.read(tmp_path / "checkpoints" / "tiny.pt")["recipe"]
    assert stored["batch_size"] == batch_size, "--resume with the same flags continues"


def test_each_epoch_drops_a_different_image(tiny_recipe, tiny_data):
    loader = loop.train_loader(tiny_recipe(batch_size=7), tiny_data().train)
    seen = [len(torch.cat([labels for _, labels in loader.epoch(epoch)])) for epoch in range(3)]
    assert seen == [21, 21, 21]
    orders = [loader.plan(epoch).index.sort().values.tolist() for epoch in range(3)]
    assert len({tuple(order) for order in orders}) > 1


def test_a_growing_loss_gives_one_warning(tiny_recipe, capsys):
    def warnings(*losses, num_classes=10):
        report = messages.EpochReport(tiny_recipe(), num_classes, lambda row: None, lambda *_: None)
        for number in range(len(losses)):
            report.warn_of_growing_loss([{"train_loss": loss} for loss in losses[: number + 1]])
        return capsys.readouterr().err

    assert warnings(2.4, 2.5, 2.0, 1.0, 1.1) == ""
    assert warnings(1.0, 2.5, 0.9, 0.8) == "", "a single bad epoch is no reason to warn"
    assert warnings(2.0, 1.0, 2.5, 2.6, 2.7, 1.0, 3.0, 3.0).count("warning") == 1
    once = warnings(9.0, 9.5, 9.6)  # worse than uniform guessing, log(10) = 2.3, from the start
    assert once.count("warning") == once.count("grown to 9.500") == 1
    assert "--base-lr below 0.8; the peak learning rate is 0.05" in once
    limit = 1.2 * 1.5 * math.log(3)
    assert warnings(*[limit - 0.01] * 3, num_classes=3) == ""


def test_plots_between_epochs_take_at_most_5_percent_of_the_time(tiny_recipe, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(messages.time, "monotonic", lambda: now[0])
    plotted = []

    def plot(history, recipe):
        plotted.append(len(history))
        now[0] += 2

    report = messages.EpochReport(tiny_recipe(), 10, lambda row: None, plot)
    row = {"epoch": 1, "learning_rate": 0.1, "train_loss": 1.0, "train_accuracy": 0.5, "test_loss": 1.0}
    row |= {"test_accuracy": 0.5, "seconds": 15.0, "images_per_second": 10.0}
    for number in range(1, 9):
        now[0] += 15
        report.epoch([row] * number)
    assert plotted == [2, 5, 8]  # the first plot is expected to take 1 s; the others take 2 s, at most every 40 s


def test_the_remaining_time_is_printed_after_a_minute(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(messages.time, "monotonic", lambda: now[0])
    remaining_time = messages.RemainingTime(1000)
    now[0] += 500  # testing, in a run that was stopped before its test
    assert remaining_time.estimate(10) == "?"
    now[0] += 30
    assert remaining_time.estimate(20) == "49.0 min"
    assert capsys.readouterr().out == ""
    now[0] += 60
    assert remaining_time.estimate(40) == remaining_time.estimate(40) == "48.0 min"
    assert capsys.readouterr().out == "about 48.0 min left\n"


def test_training_works_in_a_thread(train):
    runs = []
    thread = threading.Thread(target=lambda: runs.append(train(epochs=1)))
    thread.start()
    thread.join()
    assert len(runs[0].history) == 1


def test_a_dry_run_resumes_with_the_checkpoints_recipe(train, tmp_path, capsys):
    train(epochs=2, base_lr=0.3)
    before = (tmp_path / "checkpoints" / "tiny.pt").read_bytes()
    capsys.readouterr()
    train(resume=True, dry_run=True, given=frozenset({"resume", "dry_run"}))
    assert "2 epochs in about" in capsys.readouterr().out
    assert (tmp_path / "checkpoints" / "tiny.pt").read_bytes() == before
    with pytest.raises(UserError, match=r"nowhere\.csv: cannot be read"):
        train(dry_run=True, reference="nowhere.csv", name="other")


def test_fit_does_not_replace_a_checkpoint_without_overwrite(train, tiny, tiny_data, tiny_recipe):
    train(epochs=1)
    with pytest.raises(UserError, match=r"tiny\.pt already exists; --resume continues"):
        loop.fit(tiny(), tiny_data(), tiny_recipe(epochs=1))
    assert loop.fit(tiny(), tiny_data(), tiny_recipe(epochs=1, overwrite=True)).epoch == 1


def test_a_short_run_also_ends_with_only_crop_and_flip(tiny_recipe, tiny_data):
    train = tiny_data().train
    starts = [
        loop.train_loader(tiny_recipe(epochs=epochs, augment_until=0.85), train).crop_and_flip_from
        for epochs in (3, 8, 20, 100)
    ]
    assert starts == [2, 6, 17, 85]
    assert loop.train_loader(tiny_recipe(epochs=3, augment_until=1.0), train).crop_and_flip_from == 3


def test_the_epochs_with_smaller_images_are_announced_and_cost_less(tiny, tiny_recipe, tiny_data, capsys):
    train = Split(np.zeros((22, 3, 32, 32), np.uint8), tiny_data().train.labels)
    recipe = tiny_recipe(epochs=4, batch_size=11, image_size=32, small_until=0.7)  # 2 of 4 epochs, 2 steps each
    run = loop.Run(tiny(), loop.make_optimizer(tiny(), recipe, torch.device("cpu")))
    trainer = loop.Trainer(run, train, recipe, torch.device("cpu"))
    assert trainer.loader.full_size_from == 2
    small = (24 / 32) ** 2
    assert [trainer.work(*done) for done in ((0,), (0, 1), (1,), (2,), (2, 1), (4,))] == [
        0, small, 2 * small, 4 * small, 4 * small + 1, 4 * small + 4,
    ]  # fmt: skip
    messages.announce(run, trainer, replace(tiny_data(), train=train), recipe)
    assert "before epoch 3, training on the central 24×24 pixels" in capsys.readouterr().out
