"""What a training run prints."""

import itertools
import math
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from common import distributed
from common.text import counted, duration

import torch
from tqdm import tqdm

from dataset import Dataset
from training.recipe import REFERENCE_BATCH, Recipe
from utils import TrainLoader, steps_per_epoch

if TYPE_CHECKING:
    from training.loop import Run


def announce(run: "Run", data: Dataset, recipe: Recipe, device: torch.device) -> None:
    """What is trained, on what and how, before the first step."""
    say = distributed.print_rank0
    sizes = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in recipe.network_arguments().items())
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    steps = steps_per_epoch(len(data.train), recipe.batch_size, device)
    where = f"{device.type.upper()}, {counted(torch.get_num_threads(), 'thread')}"
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    if distributed.world_size() > 1:
        where += f", in {distributed.world_size()} processes"
    say(f"{recipe.network} ({sizes}), {parameters:,} parameters, on {where}, in {recipe.precision}")
    val = f" + {len(data.val):,} for validation" if data.val is not None else ""
    say(
        f"{data.source}: {len(data.train):,} training{val} + {len(data.test):,} test images of {recipe.image_size}×"
        f"{recipe.image_size}, {len(data.classes)} classes; {counted(recipe.epochs, 'epoch')} of "
        f"{counted(steps, 'step')}"
    )
    if data.test_split is not None:
        say(
            f"{100 * data.test_split:.0f} % of each class is the test set; {data.source} has none "
            f"(--test-split {data.test_split:g}, --split-seed {recipe.split_seed})"
        )
    if recipe.recipe == "baseline":
        say("the baseline's recipe")
    if distributed.world_size() > 1:
        say(f"batches of {recipe.batch_size} images, over all processes")
    if recipe.batch_size == len(data.train):
        say(f"all {recipe.batch_size} training images are one batch; a smaller --batch-size takes more steps")
    if recipe.batch_size != REFERENCE_BATCH:
        say(
            f"peak learning rate {recipe.lr:g}, from {recipe.base_lr:g} × {recipe.batch_size}/{REFERENCE_BATCH} (in "
            "proportion to the batch size, Goyal et al. 2017)"
        )
    if run.epoch == recipe.epochs:
        say(f"{recipe.checkpoint_path} is finished: all {recipe.epochs} epochs are done; nothing to train")
    elif run.epoch or run.step:
        say(f"resuming from {recipe.checkpoint_path}: epoch {run.epoch + 1}, step {run.step + 1}")


def announce_stop(run: "Run", recipe: Recipe, num_steps: int) -> None:
    instead = " instead of --overwrite" if recipe.overwrite else ""
    distributed.print_rank0(
        f"stopped in epoch {run.epoch + 1} after step {run.step} of {num_steps}, saved to {recipe.checkpoint_path}; "
        f"the same command with --resume{instead} continues from there"
    )


class EpochReport:
    """Prints, logs and plots each epoch, in the main process; plotting takes at most 5 % of the time."""

    def __init__(
        self,
        recipe: Recipe,
        num_classes: int,
        log: Callable[[dict[str, Any]], object],
        draw: Callable[[list[dict[str, Any]]], object],
    ):
        self.recipe, self.log, self.draw = recipe, log, draw
        self.high_loss = 1.5 * math.log(num_classes)  # 1.5 × the loss of uniform guessing
        self.drawn, self.drawing_seconds = time.monotonic(), 1.0

    def epoch(self, history: list[dict[str, Any]]) -> None:
        if not distributed.is_main_process():
            return
        distributed.print_rank0(row_text(history[-1], self.recipe.epochs))
        self.warn_of_growing_loss(history)
        self.log(history[-1])
        if 0.05 * (time.monotonic() - self.drawn) >= self.drawing_seconds:
            self.plot(history)

    def warn_of_growing_loss(self, history: list[dict[str, Any]]) -> None:
        """Once, if the loss of two epochs is well above that of the first one, or of uniform guessing."""
        losses = [row["train_loss"] for row in history]
        limit = 1.2 * min(losses[0], self.high_loss)
        high = [loss > limit for loss in losses]
        if all(high[-2:]) and sum(map(all, itertools.pairwise(high))) == 1:
            print(
                f"warning: the training loss has grown to {losses[-1]:.3f}. If it stays high, start again with "
                f"--base-lr below {self.recipe.base_lr:g}; the peak learning rate is {self.recipe.lr:g}",
                file=sys.stderr,
            )

    def plot(self, history: list[dict[str, Any]]) -> None:
        started = time.monotonic()
        self.draw(history)
        self.drawn = time.monotonic()
        self.drawing_seconds = self.drawn - started

    def end(self, run: "Run") -> None:
        if run.best:
            test_accuracy = run.history[run.best["epoch"] - 1]["test_accuracy"]
            distributed.print_rank0(
                f"the weights of epoch {run.best['epoch']} are kept: validation accuracy {run.best['accuracy']:.2%}, "
                f"test accuracy {test_accuracy:.2%}"
            )
        if run.history and distributed.is_main_process():
            self.plot(run.history)
            paths = self.recipe.checkpoint_path, self.recipe.plot_path, self.recipe.csv_path
            distributed.print_rank0("weights: {}   curves: {}, {}".format(*paths))


def row_text(row: dict[str, Any], epochs: int) -> str:
    """An epoch as one line."""
    val = f"   val {row['val_loss']:.4f} {row['val_accuracy']:7.2%}" if "val_loss" in row else ""
    return (
        f"epoch {row['epoch']:{len(str(epochs))}}/{epochs}   lr {row['learning_rate']:.6f}   "
        f"train {row['train_loss']:.4f} {row['train_accuracy']:7.2%}   "
        f"test {row['test_loss']:.4f} {row['test_accuracy']:7.2%}{val}   "
        f"{row['seconds']:.1f} s   {row['images_per_second']:,.0f} images/s"
    )


class Pace:
    """How long a run still takes, by the steps that this process has done."""

    def __init__(self, steps_done: int, total_steps: int):
        self.first, self.total, self.started = steps_done, total_steps, time.monotonic()
        self.printed = False

    def left(self, steps_done: int) -> str:
        seconds = time.monotonic() - self.started
        left = duration((self.total - steps_done) * seconds / (steps_done - self.first))
        if seconds >= 60 and not self.printed and distributed.is_main_process():
            self.printed = True
            tqdm.write(f"about {left} left")
        return left


class ProgressBar(tqdm):
    """The bar of an epoch; once a second it reads loss and accuracy, which synchronizes with the device."""

    def __init__(self, loader: TrainLoader, epoch: int, step: int, pace: Pace):
        self.loader, self.pace, self.steps_before = loader, pace, epoch * len(loader)
        self.last_read = time.monotonic()
        seen = min(step * loader.batch_size, loader.num_images)
        super().__init__(
            total=loader.num_images, initial=seen, desc=f"epoch {epoch + 1}", unit=" images", unit_scale=True,
            leave=False, disable=None if distributed.is_main_process() else True,
        )  # fmt: skip

    def show(self, steps: int, sums: Callable[[], list[float]]) -> None:
        if time.monotonic() - self.last_read < 1:
            return
        loss_sum, num_correct = sums()  # of this process's part
        seen = min(steps * self.loader.batch_size, self.loader.num_images)
        part = seen / distributed.world_size()
        left = self.pace.left(self.steps_before + steps)
        self.set_postfix_str(f"loss {loss_sum / part:.4f}, accuracy {num_correct / part:.2%}, run: {left} left", False)
        self.update(seen - self.n)
        self.last_read = time.monotonic()
