"""The messages, the progress bar and the warnings of a training run, and the dry run."""

import itertools
import math
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from common import distributed
from common.device import peak_memory
from common.text import duration, pluralize

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dataset import Dataset
from training.recipe import REFERENCE_BATCH, Recipe
from utils import eval_batch_size, multiply_adds, normalize, predict

if TYPE_CHECKING:
    from training.loop import Run, Trainer


def announce(run: "Run", trainer: "Trainer", data: Dataset, recipe: Recipe) -> None:
    """Print the network, the device, the data and the learning rate before the first step."""
    print_rank0, device = distributed.print_rank0, trainer.device
    network = describe_network(recipe.network, recipe.network_arguments())
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    where = f"{device.type.upper()}, {pluralize(torch.get_num_threads(), 'thread')}"
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    if distributed.world_size() > 1:
        where += f", in {distributed.world_size()} processes"
    print_rank0(f"{network}, {parameters:,} parameters, on {where}, in {recipe.precision}")
    val = f" + {len(data.val):,} for validation" if data.val is not None else ""
    print_rank0(
        f"{data.source}: {len(data.train):,} training{val} + {len(data.test):,} test images of {recipe.image_size}×"
        f"{recipe.image_size}, {len(data.classes)} classes; {pluralize(recipe.epochs, 'epoch')} of "
        f"{pluralize(len(trainer.loader), 'step')}"
    )
    if trainer.loader.size(0) < recipe.image_size:
        small, first = trainer.loader.small_size, trainer.loader.full_size_from + 1
        print_rank0(f"before epoch {first}, training on the central {small}×{small} pixels (--small-until)")
    if data.test_split is not None:
        print_rank0(
            f"{data.source} has no test set: {100 * data.test_split:.0f} % of each class is used as one "
            f"(--test-split {data.test_split:g}, --split-seed {recipe.split_seed})"
        )
    if recipe.recipe == "baseline":
        print_rank0("using the baseline's recipe")
    if distributed.world_size() > 1:
        print_rank0(f"batches of {recipe.batch_size} images over all processes")
    if recipe.batch_size == len(data.train):
        print_rank0(f"one batch has all {recipe.batch_size} training images; a smaller --batch-size gives more steps")
    if recipe.batch_size != REFERENCE_BATCH:
        print_rank0(
            f"peak learning rate {recipe.lr:g} = {recipe.base_lr:g} × {recipe.batch_size}/{REFERENCE_BATCH} (scaled "
            "with the batch size, Goyal et al. 2017)"
        )
    if run.epoch == recipe.epochs:
        print_rank0(f"{recipe.checkpoint_path} is finished: all {recipe.epochs} epochs are done")
    elif run.epoch or run.step:
        print_rank0(f"resuming from {recipe.checkpoint_path}: epoch {run.epoch + 1}, step {run.step + 1}")


def describe_network(name: str, arguments: dict[str, Any]) -> str:
    sizes = ", ".join(f"{size.replace('_', ' ')} {value}" for size, value in arguments.items())
    return f"{name} ({sizes})"


class EpochReport:
    """Prints, logs and plots the epochs, in the main process. Plotting takes at most about 5 % of the time."""

    def __init__(self, recipe: Recipe, num_classes: int, log: Callable[[dict], Any], plot_history: Callable):
        self.recipe, self.log, self.plot_history = recipe, log, plot_history
        self.high_loss = 1.5 * math.log(num_classes)  # 1.5 × the loss of uniform probabilities
        self.next_plot = time.monotonic() + 20.0

    def epoch(self, history: list[dict[str, Any]]) -> None:
        if not distributed.is_main_process():
            return
        row, epochs = history[-1], self.recipe.epochs
        val = f"   val {row['val_loss']:.4f} {row['val_accuracy']:7.2%}" if "val_loss" in row else ""
        distributed.print_rank0(
            f"epoch {row['epoch']:{len(str(epochs))}}/{epochs}   lr {row['learning_rate']:.6f}   "
            f"train {row['train_loss']:.4f} {row['train_accuracy']:7.2%}   "
            f"test {row['test_loss']:.4f} {row['test_accuracy']:7.2%}{val}   "
            f"{row['seconds']:.1f} s   {row['images_per_second']:,.0f} images/s"
        )
        self.warn_of_growing_loss(history)
        self.log(row)
        if time.monotonic() >= self.next_plot:
            self.plot(history)

    def warn_of_growing_loss(self, history: list[dict[str, Any]]) -> None:
        """Warn once, if two successive losses are above 1.2 × the first epoch's or 1.8 × that of uniform guessing."""
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
        self.plot_history(history, self.recipe)
        now = time.monotonic()
        self.next_plot = now + 20 * (now - started)

    def end(self, run: "Run", num_steps: int) -> None:
        recipe = self.recipe
        if run.stopped_by is not None:
            instead = " instead of --overwrite" if recipe.overwrite else ""
            distributed.print_rank0(
                f"stopped in epoch {run.epoch + 1} after step {run.step} of {num_steps}, saved to "
                f"{recipe.checkpoint_path}; the same command with --resume{instead} continues from there"
            )
        if not run.history or not distributed.is_main_process():
            return
        if run.best:
            test_accuracy = run.history[run.best["epoch"] - 1]["test_accuracy"]
            distributed.print_rank0(
                f"saved the weights of epoch {run.best['epoch']}: validation accuracy {run.best['accuracy']:.2%}, "
                f"test accuracy {test_accuracy:.2%}"
            )
        self.plot(run.history)
        distributed.print_rank0(f"weights: {recipe.checkpoint_path}   curves: {recipe.plot_path}, {recipe.csv_path}")


class RemainingTime:
    """Estimates how long a run still takes. Prints it once, after 60 s.

    It measures from the first call on: before, a resumed run may have tested, and a new one compiled kernels.
    """

    def __init__(self, total_steps: float):
        self.total, self.first, self.started, self.printed = total_steps, None, 0.0, False

    def estimate(self, steps_done: float) -> str:
        if self.first is None:
            self.first, self.started = steps_done, time.monotonic()
            return "?"
        seconds = time.monotonic() - self.started
        left = duration((self.total - steps_done) * seconds / (steps_done - self.first))
        if seconds >= 60 and not self.printed and distributed.is_main_process():
            self.printed = True
            tqdm.write(f"about {left} left")
        return left


class ProgressBar(tqdm):
    """The progress bar of an epoch. Once a second it reads loss and accuracy, which synchronizes with the device."""

    def __init__(self, run: "Run", trainer: "Trainer"):
        self.run, self.trainer, self.last_read = run, trainer, time.monotonic()
        super().__init__(
            total=trainer.loader.num_images, initial=self.images_seen(), desc=f"epoch {run.epoch + 1}", unit=" images",
            unit_scale=True, leave=False, disable=None if distributed.is_main_process() else True,
        )  # fmt: skip

    def images_seen(self) -> int:
        return min(self.run.step * self.trainer.loader.batch_size, self.trainer.loader.num_images)

    def show(self) -> None:
        if time.monotonic() - self.last_read < 1:
            return
        run, trainer = self.run, self.trainer
        loss_sum, num_correct = trainer.read_sums(run.epoch, run.step)
        part = self.images_seen() / distributed.world_size()  # of this process
        left = trainer.remaining_time.estimate(trainer.work(run.epoch, run.step))
        self.set_postfix_str(f"loss {loss_sum / part:.4f}, accuracy {num_correct / part:.2%}, run: {left} left", False)
        self.update(self.images_seen() - self.n)
        self.last_read = time.monotonic()


def dry_run(run: "Run", trainer: "Trainer", images: Tensor, recipe: Recipe) -> None:
    """Train two steps and print size, memory, speed and expected time. `images`: the test's, uint8 (N, 3, S, S)."""
    device, loader = trainer.device, trainer.loader
    last = recipe.epochs - 1  # of full-size images
    for step, batch in zip(range(2), loader.epoch(last), strict=False):
        started = time.perf_counter()
        trainer.train_step(0, step, *batch)
        trainer.read_sums(0, step + 1)  # waits for the device
        step_seconds = time.perf_counter() - started
    model, part = run.eval_model.eval(), images[: eval_batch_size(images, device)]
    started = time.perf_counter()
    predict(lambda batch: model(normalize(batch)), part, device, precision=trainer.precision)
    test_seconds = (time.perf_counter() - started) * len(images) / len(part)

    work_seconds = step_seconds / (trainer.work(last, 1) - trainer.work(last))
    run_seconds = trainer.work(recipe.epochs) * work_seconds + recipe.epochs * test_seconds
    layers = sum(isinstance(layer, nn.Conv2d | nn.Linear) for layer in run.model.modules())
    memory = "device memory" if device.type == "cuda" else "memory"
    peak = peak_memory(device)
    peak_text = f"peak {memory} {peak / 2**30:.1f} GiB" if peak else "peak memory not measured"
    distributed.print_rank0(
        f"{layers} layers with weights, {multiply_adds(run.model, recipe.image_size) / 1e6:,.1f} M multiply-adds\n"
        f"{loader.batch_size / step_seconds:,.0f} images/s in the last step, {peak_text}\n"
        f"{pluralize(recipe.epochs, 'epoch')} in about {duration(run_seconds)}"
    )
