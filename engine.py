"""`fit` trains a network by a recipe, epoch by epoch; `predict` gives a network's logits for a split.

What `fit` promises: the checkpoint is whole at every moment; Ctrl-C and SIGTERM lose no more than the step in flight, a
kill no more than the epoch; and a run that was stopped and resumed ends, on the CPU, with the very bits of one that was
not.
"""

import contextlib
import math
import platform
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm

import checkpoint
import files
import metrics
import plotting
from dataset import Dataset
from errors import UserError
from recipe import REFERENCE_BATCH, Recipe
from utils import MEAN, STD, TrainLoader, augmentation_of, cosine_schedule, normalize, pick_device

# Pixels evaluated in one go: 512 images of 32×32.
EVAL_PIXELS = 512 * 32 * 32


@dataclass
class Run:
    """Where a training run stands; what `fit` returns."""

    model: nn.Module
    optimizer: Optimizer
    schedule: LRScheduler
    history: list[dict[str, Any]] = field(default_factory=list)  # a row for each whole epoch, see plotting.write_csv
    epoch: int = 0  # whole epochs done
    step: int = 0  # steps done of the next one
    totals: list[float] | None = None  # of those steps, see Totals
    seconds: float = 0.0  # spent on them
    best: dict[str, Any] | None = None  # with a validation split: accuracy, epoch and weights of the best epoch
    stopped_by: int | None = None  # the signal that ended the run early

    @property
    def exit_status(self) -> int:
        return 0 if self.stopped_by is None else 128 + self.stopped_by


class Totals:
    """Loss, hits and the first step with a loss that is not finite, added up on the device.

    Reading them makes the host wait for the device, adding to them does not.
    """

    def __init__(self, device: torch.device, values: list[float] | None = None):
        dtype = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
        self.values = torch.tensor(values or [0.0, 0.0, math.inf], dtype=dtype, device=device)

    def add(self, step: int, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        loss = loss.detach()
        self.values[0] += loss * len(labels)
        self.values[1] += (logits.detach().argmax(1) == labels).sum()
        self.values[2].clamp_(max=torch.where(loss.isfinite(), math.inf, float(step)))

    def read(self, epoch: int, learning_rate: float) -> list[float]:
        """Summed loss, summed hits. Raises UserError where a loss was not finite."""
        values = self.values.tolist()
        if values[2] != math.inf:
            raise not_finite("loss", epoch, int(values[2]), learning_rate)
        return values


def not_finite(what: str, epoch: int, step: int, learning_rate: float) -> UserError:
    return UserError(
        f"the {what} is not finite at epoch {epoch + 1}, step {step + 1}, learning rate {learning_rate:g}; nothing of "
        "this epoch is saved. Lower --lr, or look for broken images"
    )


class StopSignals:
    """Within the block the first Ctrl-C or SIGTERM is noted, for the loop to end on; the second ends it at once."""

    def __init__(self) -> None:
        self.number: int | None = None

    def __enter__(self) -> "StopSignals":
        self.previous = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def note(self, number: int, _: object) -> None:
        if self.number is not None:
            sys.exit(128 + number)
        self.number = number

    def __bool__(self) -> bool:
        return self.number is not None


def previous_run(recipe: Recipe) -> dict[str, Any] | None:
    """The checkpoint that `recipe` is to go on from, or None for a fresh start.

    Raises UserError where a checkpoint would be overwritten unasked, or is one of another recipe.
    """
    path = recipe.checkpoint_path
    if recipe.overwrite or not path.exists():
        return None
    if not recipe.resume:
        raise UserError(f"{path} exists already; --resume goes on from it, --overwrite starts afresh, --name renames")
    content = checkpoint.read(path)
    if content["network"]["name"] != recipe.network:
        raise UserError(f"{path} holds a {content['network']['name']}, not a {recipe.network}; --name another file")
    if differences := recipe.differences(content["recipe"]):
        raise UserError(
            f"--resume: {path} was trained by another recipe:\n  " + "\n  ".join(differences) + "\nGive the "
            "checkpoint's values, or start another run with --name or --overwrite"
        )
    return content


def fit(model: nn.Module, data: Dataset, recipe: Recipe, previous: dict[str, Any] | None = None) -> Run:
    """Train `model` on `data` by `recipe`, from the start or from where `previous` stood.

    After every epoch, and when a signal ends the run, the checkpoint and the CSV are written. `model` is moved to the
    recipe's device and left with the last epoch's weights.

    Raises UserError for a loss that is not finite, for data other than the checkpoint's, and for a last batch of one
    image, which batch-norm cannot train on.
    """
    if len(data.train) % recipe.batch_size == 1:
        raise UserError(
            f"--batch-size {recipe.batch_size} leaves a last batch of one image out of {len(data.train):,}, which "
            "batch-norm cannot train on; choose another batch size or --train-size"
        )
    if previous and previous["data"]["digest"] != data.digest:
        raise UserError(
            f"--resume: --data {data.source} does not hold the images that the checkpoint was trained on "
            f"(--data {previous['data']['source']}); give those, or start another run with --name or --overwrite"
        )
    # Better now than at the end of the first epoch, or of the last.
    files.check_writable(recipe.checkpoint_dir, "the checkpoint")
    files.check_writable(recipe.plot_dir, "the plots")
    if recipe.reference:
        plotting.read_csv(recipe.reference)
    device = pick_device(recipe.device)
    model.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=recipe.lr * recipe.rate_scale,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
    )
    run = Run(model, optimizer, cosine_schedule(optimizer, recipe.epochs, recipe.min_lr * recipe.rate_scale))
    if previous:
        restore(run, previous)
        if run.history:  # a kill may have come between the checkpoint and the CSV
            plotting.write_csv(run.history, recipe.csv_path)
    announce(run, data, recipe, device)
    loader = TrainLoader(data.train, recipe.batch_size, augmentation_of(recipe), seed=recipe.seed, device=device)
    splits = {"test": data.test} if data.val is None else {"test": data.test, "val": data.val}
    evaluated = {
        name: (torch.from_numpy(split.images).to(device), torch.from_numpy(split.labels))
        for name, split in splits.items()
    }
    with StopSignals() as stop, scalar_writer(recipe, run.epoch) as writer:
        while run.epoch < recipe.epochs:
            row = one_epoch(run, loader, evaluated, device, stop)
            if row is not None:
                run.history.append(row)
                run.epoch, run.step, run.totals, run.seconds = run.epoch + 1, 0, None, 0.0
                run.schedule.step()
                if data.val is not None and (run.best is None or row["val_accuracy"] > run.best["accuracy"]):
                    weights = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
                    run.best = {"epoch": run.epoch, "accuracy": row["val_accuracy"], "model": weights}
            checkpoint.write(recipe.checkpoint_path, describe(run, data, recipe))
            if row is not None:
                plotting.write_csv(run.history, recipe.csv_path)
                report(row, recipe.epochs)
                writer(row)
            if stop and run.epoch < recipe.epochs:
                run.stopped_by = stop.number
                instead = " in place of --overwrite" if recipe.overwrite else ""
                print(
                    f"stopped in epoch {run.epoch + 1} after step {run.step} of {len(loader)}, saved to "
                    f"{recipe.checkpoint_path}; the same command with --resume{instead} goes on from there",
                    flush=True,
                )
                break
    return run


def one_epoch(
    run: Run,
    loader: TrainLoader,
    evaluated: dict[str, tuple[Tensor, Tensor]],
    device: torch.device,
    stop: StopSignals,
) -> dict[str, Any] | None:
    """Train the epoch that `run` stands in from its step on, then evaluate the splits of `evaluated`.

    Returns the epoch's row, or None where a signal came first; `run` then says how far it got.
    """
    started = time.monotonic() - run.seconds
    learning_rate = run.optimizer.param_groups[0]["lr"]
    totals = Totals(device, run.totals)
    num_images = len(loader.images)
    images_seen = min(run.step * loader.batch_size, num_images)
    bar = tqdm(
        total=num_images, initial=images_seen, desc=f"epoch {run.epoch + 1}", unit=" images", unit_scale=True,
        leave=False, disable=None,
    )  # fmt: skip
    last_read = time.monotonic()
    run.model.train()
    with bar:
        for images, labels in loader.epoch(run.epoch, run.step):
            with autocast(device):
                logits = run.model(images)
                loss = F.cross_entropy(logits, labels)
            loss.backward()
            run.optimizer.step()
            run.optimizer.zero_grad(set_to_none=True)

            totals.add(run.step, loss, logits, labels)
            run.step += 1
            images_seen += len(labels)
            if time.monotonic() - last_read >= 1:
                loss_sum, hits, _ = totals.read(run.epoch, learning_rate)
                bar.set_postfix_str(f"loss {loss_sum / images_seen:.4f}, accuracy {hits / images_seen:.2%}", False)
                bar.update(images_seen - bar.n)
                last_read = time.monotonic()
            if stop:
                break
    run.totals = totals.read(run.epoch, learning_rate)
    run.seconds = time.monotonic() - started
    if run.step < len(loader):
        return None
    # A run that was stopped during its evaluation comes back to here with no step left, its training time behind it.
    training_seconds = run.seconds
    row = {"epoch": run.epoch + 1, "learning_rate": learning_rate}
    row |= {"train_loss": run.totals[0] / num_images, "train_accuracy": run.totals[1] / num_images}
    for name, (images, labels) in evaluated.items():
        logits = predict(run.model, images, device, stop=stop)
        if logits is None:
            return None
        loss = metrics.cross_entropy(logits, labels)
        if not math.isfinite(loss):  # the last step's loss can still be finite while the weights it leaves are not
            raise not_finite(f"{name} loss", run.epoch, run.step - 1, learning_rate)
        row |= {f"{name}_loss": loss, f"{name}_accuracy": metrics.accuracy(logits, labels)}
    row |= {"seconds": time.monotonic() - started, "images_per_second": num_images / training_seconds}
    return row


def autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """bfloat16 where it is fast and float32 where it is not."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


@torch.no_grad()
def predict(
    model: nn.Module,
    images: Tensor,
    device: torch.device,
    *,
    mean: tuple[float, ...] = MEAN,
    std: tuple[float, ...] = STD,
    batch_size: int | None = None,
    stop: StopSignals | None = None,
) -> Tensor | None:
    """Logits of `model` in evaluation mode for `images`, uint8 (N, 3, H, W): float32 (N, classes) on the CPU.

    None where `stop` came first.
    """
    model.eval()
    batch_size = batch_size or max(1, EVAL_PIXELS // (images.shape[2] * images.shape[3]))
    logits = []
    for batch in images.split(batch_size):
        if stop:
            return None
        with autocast(device):
            logits.append(model(normalize(batch.to(device), mean, std)).float())
    return torch.cat(logits).cpu()


def restore(run: Run, content: dict[str, Any]) -> None:
    """Put a fresh run where the checkpoint's stood."""
    training = content["training"]
    run.model.load_state_dict(training["model"] or content["model"], strict=True)
    run.optimizer.step()  # without gradients it changes nothing, but the schedule warns where no step came before it
    run.optimizer.load_state_dict(training["optimizer"])
    run.schedule.load_state_dict(training["schedule"])
    run.history = content["history"]
    run.epoch, run.step, run.totals, run.seconds = (training[name] for name in ("epoch", "step", "totals", "seconds"))
    if training["best"]:
        run.best = {**training["best"], "model": content["model"]}


def describe(run: Run, data: Dataset, recipe: Recipe) -> dict[str, Any]:
    """The checkpoint's content: the network, how it came to be, and all that a resumed run needs."""
    last = run.model.state_dict()
    return {
        "network": {
            "name": recipe.network,
            "arguments": {"num_classes": len(data.classes), **recipe.network_arguments()},
        },
        "model": run.best["model"] if run.best else last,
        "chosen": {"epoch": run.best["epoch"] if run.best else run.epoch, "by": "val_accuracy" if run.best else "last"},
        "finished": run.epoch == recipe.epochs,
        "recipe": recipe.as_dict(),
        "data": {
            "source": data.source,
            "digest": data.digest,
            "classes": list(data.classes),
            "image_size": recipe.image_size,
            "mean": list(MEAN),
            "std": list(STD),
            "split": {name: getattr(recipe, name) for name in SPLIT_FLAGS},
        },
        "history": run.history,
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "torchvision": str(torchvision.__version__),
            "numpy": np.__version__,
        },
        "training": {
            "model": last if run.best else None,  # without a validation split the last weights are the chosen ones
            "best": {"epoch": run.best["epoch"], "accuracy": run.best["accuracy"]} if run.best else None,
            "optimizer": run.optimizer.state_dict(),
            "schedule": run.schedule.state_dict(),
            "epoch": run.epoch,
            "step": run.step,
            "totals": run.totals,
            "seconds": run.seconds,
        },
    }


SPLIT_FLAGS = ("split_seed", "train_size", "val_size", "test_size")


def announce(run: Run, data: Dataset, recipe: Recipe, device: torch.device) -> None:
    sizes = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in recipe.network_arguments().items())
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    threads = torch.get_num_threads()
    where = f"{device.type.upper()}, {threads} thread{'s' if threads > 1 else ''}"
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    print(f"{recipe.network} ({sizes}), {parameters:,} parameters, on {where}")
    val = f" + {len(data.val):,} for validation" if data.val is not None else ""
    print(
        f"{data.source}: {len(data.train):,} training{val} + {len(data.test):,} test images of {recipe.image_size}×"
        f"{recipe.image_size}, {len(data.classes)} classes"
    )
    if recipe.batch_size != REFERENCE_BATCH:
        high, low = recipe.lr * recipe.rate_scale, recipe.min_lr * recipe.rate_scale
        print(
            f"learning rates {recipe.lr:g} and {recipe.min_lr:g} for a batch of {REFERENCE_BATCH} become {high:g} and "
            f"{low:g} for a batch of {recipe.batch_size} (in proportion, Goyal et al. 2017)"
        )
    if run.epoch == recipe.epochs:
        print(f"{recipe.checkpoint_path} is finished: all {recipe.epochs} epochs are done, nothing is left to train")
    elif run.epoch or run.step:
        print(f"going on from {recipe.checkpoint_path}: epoch {run.epoch + 1}, step {run.step + 1}")
    sys.stdout.flush()


def report(row: dict[str, Any], epochs: int) -> None:
    val = f"   val {row['val_loss']:.4f} {row['val_accuracy']:7.2%}" if "val_loss" in row else ""
    print(
        f"epoch {row['epoch']:{len(str(epochs))}}/{epochs}   lr {row['learning_rate']:.6f}   "
        f"train {row['train_loss']:.4f} {row['train_accuracy']:7.2%}   "
        f"test {row['test_loss']:.4f} {row['test_accuracy']:7.2%}{val}   "
        f"{row['seconds']:.1f} s   {row['images_per_second']:,.0f} images/s",
        flush=True,
    )


@contextlib.contextmanager
def scalar_writer(recipe: Recipe, epochs_done: int) -> Iterator:
    """A function that takes an epoch's row and, with --tensorboard, writes its scalars; without, does nothing."""
    if not recipe.tensorboard:
        yield lambda row: None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs the package tensorboard: pip install tensorboard") from None
    folder = Path(recipe.plot_dir) / "tensorboard" / recipe.name
    with SummaryWriter(str(folder), purge_step=epochs_done + 1) as writer:

        def write(row: dict[str, Any]) -> None:
            for name, value in row.items():
                if name != "epoch":
                    writer.add_scalar(name, value, row["epoch"])
            writer.flush()

        yield write
