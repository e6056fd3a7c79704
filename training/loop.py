"""Training: a step, an epoch, a run.

`fit` guarantees: the checkpoint file is always complete; after Ctrl-C, SIGTERM or SIGHUP the run finishes its step,
saves and stops (several GPUs: within 16 steps); a killed run loses at most the current epoch (on a GPU two, because
saving overlaps training); on the CPU a resumed run is bit-identical to an uninterrupted one.
"""

import contextlib
import functools
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from common import distributed
from common.device import autocast, explain_out_of_memory, pick_precision, set_up_device
from common.errors import UserError

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from dataset import Dataset, Split
from models import NETWORKS
from training import checkpoint, history, messages
from training.cuda_graph import FastStep, pick_compile
from training.ema import ModelEma
from training.muon import Muon
from training.recipe import Recipe
from training.signals import StopSignals
from utils import CosineSchedule, TrainLoader, eval_batch_size, normalize, predict, steps_per_epoch

Splits = dict[str, tuple[Tensor, Tensor]]  # "test", and "val" if there is one: images on the device, labels on the host


@dataclass
class Run:
    """The state of a training run, returned by `fit`."""

    model: nn.Module
    optimizer: Optimizer
    ema: ModelEma | None = None
    history: list[dict[str, Any]] = field(default_factory=list)  # one row per finished epoch, see history.COLUMNS
    epoch: int = 0  # finished epochs
    step: int = 0  # finished steps of the current epoch
    sums: list[float] | None = None  # summed loss and correct predictions of these steps
    seconds: float = 0.0  # duration of these steps
    best: dict[str, Any] | None = None  # with a validation split: accuracy, epoch and weights of the best epoch
    stopped_by: int | None = None  # the signal that ended the run early

    @property
    def exit_status(self) -> int:
        return 0 if self.stopped_by is None else 128 + self.stopped_by

    @property
    def eval_model(self) -> nn.Module:
        """The model that is tested and saved: the moving average, if there is one."""
        return self.ema.model if self.ema else self.model


class Trainer:
    """The batches, the learning rates and the training step of a run."""

    def __init__(self, run: Run, train: Split, recipe: Recipe, device: torch.device):
        self.model, self.optimizer, self.ema, self.device = run.model, run.optimizer, run.ema, device
        self.loader = train_loader(recipe, train, device)
        steps = len(self.loader)
        self.lr_at = CosineSchedule(recipe.lr, recipe.min_lr, recipe.epochs, steps, recipe.warmup, recipe.schedule_step)
        self.label_smoothing, self.precision = recipe.label_smoothing, pick_precision(recipe.precision, device)
        # Of the current epoch: summed loss, correct predictions, steps until a loss is not finite. MPS has no float64.
        self.sums = torch.zeros(3, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
        self.remaining_time = messages.RemainingTime(self.work(recipe.epochs))
        self.global_batch_size = recipe.batch_size  # images of the current batch, over all processes
        choice = pick_compile(recipe.compile, device)
        self.fast_step = FastStep(self.step, self.model, self.state, choice=choice, batch_size=recipe.batch_size)

    def step(self, images: Tensor, labels: Tensor, network: nn.Module) -> None:
        """One training step. It never synchronizes host and device, so that a CUDA graph can capture it."""
        with autocast(self.device, self.precision):
            logits = network(images)
            # Loss in float32: CUDA's autocast would leave the softmax in bfloat16.
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        loss.backward()
        distributed.average_gradients(self.model, weight=len(labels) / self.global_batch_size)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema:
            self.ema.update()
        self.add_to_sums(logits.detach(), labels)

    def add_to_sums(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch. The loss is without label smoothing, so that it is comparable with the test loss."""
        loss_sum, num_correct, finite_steps = self.sums.unbind()
        loss_sum += F.cross_entropy(logits.float(), labels, reduction="sum")
        num_correct += (logits.argmax(1) == labels).sum()
        finite_steps += loss_sum.isfinite()  # a non-finite sum stays non-finite

    def train_step(self, epoch: int, step: int, images: Tensor, labels: Tensor) -> None:
        """Run one step, compiled or captured as --compile says; `epoch` and `step` count from 0."""
        for group in self.optimizer.param_groups:
            group["lr"].fill_(self.lr_at(epoch, step) * group["lr_factor"])
        if self.ema:
            self.ema.set_update_rate(epoch * len(self.loader) + step)
        self.global_batch_size = self.loader.global_batch_size(step)
        self.fast_step(images, labels, self.global_batch_size)

    def work(self, epochs: int, steps: int = 0) -> float:
        """The cost of the first `epochs` epochs and of `steps` steps of the next one, in steps of full-size images."""
        loader = self.loader
        total = epochs * len(loader) + steps
        small = min(total, loader.full_size_from * len(loader))
        return total - small * (1 - (loader.small_size / loader.image_size) ** 2)

    def state(self) -> list[Tensor]:
        """Every tensor that a step changes."""
        buffers = [value for state in self.optimizer.state.values() for value in state.values()]
        averages = self.ema.averages if self.ema else []
        return [*self.model.state_dict().values(), *buffers, *averages, self.sums]

    def read_sums(self, epoch: int, step: int) -> list[float]:
        """Summed loss and correct predictions of this process. Waits for the device.

        Raises UserError if a loss before `step` was not finite.
        """
        loss_sum, num_correct, finite_steps = self.sums.tolist()
        if finite_steps < step:
            raise UserError(self.not_finite("loss", epoch, int(finite_steps)))
        return [loss_sum, num_correct]

    def not_finite(self, what: str, epoch: int, step: int) -> str:
        return (
            f"the {what} is not finite at epoch {epoch + 1}, step {step + 1}, learning rate "
            f"{self.lr_at(epoch, step):g}; nothing of this epoch is saved. Lower --base-lr, or look for broken images"
        )


def train_epoch(run: Run, trainer: Trainer, stop: StopSignals) -> None:
    """Train the current epoch from step `run.step` until its end or a signal. Updates `run`."""
    started = time.monotonic() - run.seconds
    # A resumed epoch continues the sums over all processes: each process starts with an equal part of them.
    parts = [value / distributed.world_size() for value in run.sums or (0.0, 0.0)]
    trainer.sums.copy_(torch.tensor([*parts, run.step], dtype=trainer.sums.dtype))
    run.model.train()
    with messages.ProgressBar(run, trainer) as bar:
        for images, labels in trainer.loader.epoch(run.epoch, run.step):
            trainer.train_step(run.epoch, run.step, images, labels)
            run.step += 1
            bar.show()
            if stop.should_stop(run.step, trainer.device):
                break
    run.sums = distributed.all_reduce(trainer.read_sums(run.epoch, run.step))
    run.seconds = time.monotonic() - started


def evaluate(run: Run, trainer: Trainer, splits: Splits, stop: StopSignals) -> dict | None:
    """Loss and accuracy of the run's model on each split; None if a signal stopped the evaluation."""
    distributed.broadcast(run.eval_model.buffers())
    model, row = run.eval_model.eval(), {}
    for name, (images, labels) in splits.items():
        part = distributed.local_slice(len(labels))
        logits = predict(
            lambda batch: model(normalize(batch)),
            images[part],
            trainer.device,
            precision=trainer.precision,
            # Limited by --batch-size, so that a smaller one also saves memory here.
            batch_size=min(eval_batch_size(images, trainer.device), 16 * trainer.loader.batch_size),
            # With several processes, all would have to stop at the same batch; they finish the evaluation instead.
            stop=lambda: distributed.world_size() == 1 and stop,
            label=name if distributed.is_main_process() else None,
        )
        if logits is None:
            return None
        loss_sum = F.cross_entropy(logits.double(), labels[part], reduction="sum").item()
        num_correct = float((logits.argmax(1) == labels[part]).sum())
        loss_sum, num_correct = distributed.all_reduce([loss_sum, num_correct])
        if not math.isfinite(loss_sum):  # the last update can ruin the weights although its loss was finite
            message = trainer.not_finite(f"{name} loss", run.epoch, run.step - 1)
            raise UserError(message, silent=not distributed.is_main_process())
        row |= {f"{name}_loss": loss_sum / len(labels), f"{name}_accuracy": num_correct / len(labels)}
    return row


def run_epoch(run: Run, trainer: Trainer, splits: Splits, stop: StopSignals) -> bool:
    """Train and evaluate the current epoch, and add it to the history. False if a signal stopped it.

    A run that was stopped during the evaluation resumes with it: the epoch has no step left to train.
    """
    train_epoch(run, trainer, stop)
    started = time.monotonic()
    evaluated = evaluate(run, trainer, splits, stop) if run.step == len(trainer.loader) else None
    if evaluated is None:
        return False
    num_images = trainer.loader.num_images
    row = {
        "epoch": run.epoch + 1,
        "learning_rate": trainer.lr_at(run.epoch, run.step - 1),
        "train_loss": run.sums[0] / num_images,
        "train_accuracy": run.sums[1] / num_images,
        **evaluated,
        "seconds": run.seconds + time.monotonic() - started,
        "images_per_second": num_images / run.seconds,
    }
    run.history.append(row)
    run.epoch, run.step, run.sums, run.seconds = run.epoch + 1, 0, None, 0.0
    if "val_accuracy" in row and (run.best is None or row["val_accuracy"] > run.best["accuracy"]):
        weights = checkpoint.copy_to_host(dict(run.eval_model.state_dict()))
        run.best = {"epoch": run.epoch, "accuracy": row["val_accuracy"], "model": weights}
    return True


def fit(
    model: nn.Module,
    data: Dataset,
    recipe: Recipe,
    previous: dict[str, Any] | None = None,
    plot_history: Callable[[list[dict], Recipe], Any] = lambda history, recipe: None,
) -> Run:
    """Train `model` on `data` with `recipe`, from the start or from the checkpoint `previous`.

    The checkpoint and the CSV are written after every epoch and when a signal stops the run. `plot_history` is called
    at the end, and after an epoch unless it would slow the run down. At the end, `model` has the last weights.

    Raises UserError for a loss that is not finite, if memory runs out, and if `data` is not the checkpoint's.
    """
    device = set_up_device(recipe.device, deterministic=recipe.deterministic)
    distributed.from_main_process(lambda: check(model, data, recipe, previous, device))
    if recipe.init and not previous:
        distributed.print_rank0(checkpoint.load_init_weights(model, recipe, data.classes))
    recipe = recipe.resumed(previous)
    recipe = replace(recipe, precision=pick_precision(recipe.precision, device))
    if recipe.sync_bn:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    with (
        StopSignals() as stop,
        explain_out_of_memory(recipe.batch_size),
        ThreadPoolExecutor(1, "save") as thread,
        contextlib.ExitStack() as at_the_end,
    ):
        saver = checkpoint.Saver(recipe, thread if device.type == "cuda" else None)
        # The learning rate is scaled with the batch size that is really used.
        recipe = replace(recipe, batch_size=min(recipe.batch_size, len(data.train)))
        model.to(device, memory_format=torch.channels_last)
        distributed.broadcast(model.state_dict().values())
        run = Run(model, make_optimizer(model, recipe, device), make_ema(model, recipe, data.train))
        if previous:
            saver.restore(run, previous)
        trainer = Trainer(run, data.train, recipe, device)
        at_the_end.callback(trainer.fast_step.prepared.clear)  # NCCL cannot shut down while a CUDA graph uses it
        report = messages.EpochReport(recipe, len(data.classes), history.tensorboard(recipe, run.epoch), plot_history)
        messages.announce(run, trainer, data, recipe)
        splits = {
            name: (torch.from_numpy(split.images).to(device), torch.from_numpy(split.labels))
            for name, split in {"test": data.test, "val": data.val}.items()
            if split is not None
        }
        if recipe.dry_run:
            messages.dry_run(run, trainer, splits["test"][0], recipe)
            return run
        while run.epoch < recipe.epochs and run.stopped_by is None:
            is_finished = run_epoch(run, trainer, splits, stop)
            saver.save(run, data)
            if is_finished:
                report.epoch(run.history)
            if stop.in_any_process() and run.epoch < recipe.epochs:
                run.stopped_by = stop.number
        saver.wait()
        report.end(run, len(trainer.loader))
    return run


def train_loader(recipe: Recipe, train: Split, device: torch.device | str = "cpu") -> TrainLoader:
    crop_and_flip_from = math.floor(recipe.augment_until * recipe.epochs)
    full_size_from = math.floor(recipe.small_until * recipe.epochs)
    starts = {"crop_and_flip_from": crop_and_flip_from, "full_size_from": full_size_from}
    return TrainLoader(train, recipe.batch_size, recipe.augmentation(), seed=recipe.seed, device=device, **starts)


def make_optimizer(model: nn.Module, recipe: Recipe, device: torch.device) -> Optimizer:
    """SGD or Muon. Learning rates are tensors on the device: a captured CUDA graph reads the current values from them.

    The momentum buffers exist from the start, filled with zeros, which gives the same first step.
    """
    norms_and_biases = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [
        {"params": [parameter for parameter in model.parameters() if parameter.ndim >= 2], "lr_factor": 1.0},
        {"params": norms_and_biases, "lr_factor": recipe.norm_lr_factor}
        | ({} if recipe.decay_norms else {"weight_decay": 0.0}),
    ]
    for group in groups:
        group["lr"] = torch.zeros((), device=device)
    settings = {"weight_decay": recipe.weight_decay, "fused": True}
    kind = torch.optim.SGD
    if recipe.optimizer == "muon":
        dtype = torch.bfloat16 if pick_precision(recipe.precision, device) == "bfloat16" else None
        kind = functools.partial(Muon, scale=recipe.muon_scale, dtype=dtype)
    optimizer = kind(groups, **settings, momentum=recipe.momentum, nesterov=recipe.nesterov)
    # A CUDA graph needs fixed addresses: a step with learning rate zero allocates the buffers now.
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for state in optimizer.state.values():
        for buffer in state.values():
            buffer.zero_()
    return optimizer


def make_ema(model: nn.Module, recipe: Recipe, train: Split) -> ModelEma | None:
    """An EMA over about `ema_horizon` of the run's steps; None if that is 0."""
    if not recipe.ema_horizon:
        return None
    device = next(model.parameters()).device
    total_steps = recipe.epochs * steps_per_epoch(len(train), recipe.batch_size, device)
    return ModelEma(model, decay=1 - 1 / max(1.0, recipe.ema_horizon * total_steps))


def check(model: nn.Module, data: Dataset, recipe: Recipe, previous: dict | None, device: torch.device) -> None:
    """Raise UserError if model, data, recipe, checkpoint, files and device do not fit together."""
    with torch.device("meta"):
        expected = NETWORKS[recipe.network](len(data.classes), **recipe.network_arguments())
    shapes = [{name: value.shape for name, value in net.state_dict().items()} for net in (model, expected)]
    if shapes[0] != shapes[1]:
        raise UserError(f"the model is not the recipe's {recipe.network}; build that one")
    if previous and previous["data"]["digest"] != data.digest:
        raise UserError(
            f"--resume: --data {data.source} does not hold the images that {recipe.checkpoint_path} was trained on "
            f"(--data {previous['data']['source']}); use those, or start another run with --name or --overwrite"
        )
    world_size = distributed.world_size()
    if recipe.sync_bn and (device.type != "cuda" or world_size == 1):
        raise UserError(f"--sync-bn needs several processes on CUDA; found {world_size} on {device.type.upper()}")
    if min(recipe.batch_size, len(data.train)) < 2 * world_size:
        raise UserError(
            f"--batch-size {recipe.batch_size} with {len(data.train):,} training images leaves fewer than two for each "
            f"of {world_size} processes, and batch norm needs two; use larger batches or fewer processes"
        )
    checkpoint.check_files(recipe, previous)
