"""Training: a step, an epoch, a run.

What `fit` promises: the checkpoint is whole at every moment; Ctrl-C and SIGTERM lose no more than the step in flight, a
kill no more than the epoch (on a GPU no more than two, since an epoch is saved while the next one is trained); and a
run that was stopped and resumed ends, on the CPU, with the very bits of one that was not.
"""

import functools
import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from common import distributed
from common.device import autocast, explain_out_of_memory, pick_precision, set_up_device
from common.errors import UserError

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from dataset import Dataset, Split
from models import NETWORKS
from training import checkpoint, dry_run, history, messages
from training.cuda_graph import FastStep, pick_compile
from training.ema import ModelEma, ema_decay
from training.recipe import Recipe
from training.signals import StopSignals
from utils import CosineSchedule, TrainLoader, eval_batch_size, normalize, predict, steps_per_epoch


@dataclass
class Run:
    """How far a training run is; what `fit` returns."""

    model: nn.Module
    optimizer: Optimizer
    ema: ModelEma | None = None
    history: list[dict[str, Any]] = field(default_factory=list)  # a row for each whole epoch, see history.COLUMNS
    epoch: int = 0  # whole epochs done
    step: int = 0  # steps done of the next one
    sums: list[float] | None = None  # of those steps: summed loss, correct predictions, and how many steps they are
    seconds: float = 0.0  # spent on them
    best: dict[str, Any] | None = None  # with a validation split: accuracy, epoch and weights of the best epoch
    stopped_by: int | None = None  # the signal that ended the run early

    @property
    def exit_status(self) -> int:
        return 0 if self.stopped_by is None else 128 + self.stopped_by

    @property
    def eval_model(self) -> nn.Module:
        """The model that is tested and kept: the moving average, where there is one."""
        return self.ema.model if self.ema else self.model


class Trainer:
    """A run's batches, its learning rates and its training step."""

    def __init__(self, run: Run, train: Split, recipe: Recipe, device: torch.device):
        self.model, self.optimizer, self.ema, self.device = run.model, run.optimizer, run.ema, device
        self.loader = train_loader(recipe, train, device)
        self.schedule = CosineSchedule(recipe.lr, recipe.min_lr, recipe.epochs, recipe.warmup, recipe.schedule_step)
        self.lr_tensor = run.optimizer.param_groups[0]["lr"]  # of all groups
        self.label_smoothing, self.precision = recipe.label_smoothing, pick_precision(recipe.precision, device)
        self.sums = RunningSums(device)
        steps = len(self.loader)
        self.pace = messages.Pace(run.epoch * steps + run.step, recipe.epochs * steps)
        self.batch_images = 0  # in the parts of the batch of all processes together
        network = wrap_ddp(self.model) if distributed.world_size() > 1 else self.model
        choice = pick_compile(recipe.compile, device)
        self.fast_step = FastStep(self.step, network, self.state, choice=choice, batch_size=self.loader.own_size)

    def step(self, images: Tensor, labels: Tensor, network: nn.Module) -> None:
        """A training step. Nothing here waits for the device or branches on its numbers: a CUDA graph can record it."""
        with autocast(self.device, self.precision):
            logits = network(images)
            loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)  # in float32, by autocast
        if distributed.world_size() > 1:  # DDP averages the gradients of parts that may differ by an image
            loss = loss * (len(labels) * distributed.world_size() / self.batch_images)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema:
            self.ema.update()
        self.sums.add(logits.detach(), labels)

    def train(self, epoch: int, step: int, images: Tensor, labels: Tensor) -> None:
        """Step `step` of epoch `epoch`, both from 0, in the way that --compile names."""
        self.lr_tensor.fill_(self.lr(epoch, step))
        if self.ema:
            self.ema.set_weight(epoch * len(self.loader) + step)
        self.batch_images = self.loader.images_in(step)
        self.fast_step(images, labels)

    def lr(self, epoch: int, step: int) -> float:
        return self.schedule(epoch, step, len(self.loader))

    def state(self) -> list[Tensor]:
        """Every tensor that a step changes."""
        buffers = [value for state in self.optimizer.state.values() for value in state.values()]
        ema = self.ema.own if self.ema else []
        return [*self.model.state_dict().values(), *buffers, *ema, self.sums.values]


def train_epoch(run: Run, trainer: Trainer, stop: StopSignals) -> None:
    """Train the epoch that `run` is in, from its step on, to its end or to a signal; `run` says how far it got."""
    started = time.monotonic() - run.seconds
    loader, sums, lr = trainer.loader, trainer.sums, functools.partial(trainer.lr, run.epoch)
    sums.start(run.sums, run.step)
    run.model.train()
    with messages.ProgressBar(loader, run.epoch, run.step, trainer.pace) as bar:
        for images, labels in loader.epoch(run.epoch, run.step):
            trainer.train(run.epoch, run.step, images, labels)
            run.step += 1
            bar.update(run.step, lambda: sums.read(run.epoch, run.step, lr))
            if stop.in_any_process():
                break
    run.sums = [*distributed.all_reduce_sum(sums.read(run.epoch, run.step, lr)), float(run.step)]
    run.seconds = time.monotonic() - started


def evaluate(run: Run, trainer: Trainer, splits: dict[str, tuple[Tensor, Tensor]], stop: StopSignals) -> dict | None:
    """Loss and accuracy of the run's model on each split, or None where a signal came first."""
    rank, world_size = distributed.rank(), distributed.world_size()
    distributed.copy_buffers(run.eval_model)
    model = run.eval_model.eval()
    row = {}
    for name, (images, labels) in splits.items():
        own = distributed.share(len(labels), rank, world_size)
        logits = predict(
            lambda batch: model(normalize(batch)),
            images[own],
            trainer.device,
            precision=trainer.precision,
            # A smaller --batch-size is to take less memory here as well.
            batch_size=min(eval_batch_size(images, trainer.device), 4 * trainer.loader.batch_size),
            # With several processes no stop: they would have to stop at the same batch.
            stop=lambda: world_size == 1 and stop,
            label=name if distributed.is_main_process() else None,
        )
        if logits is None:
            return None
        loss_sum = F.cross_entropy(logits.double(), labels[own], reduction="sum").item()
        num_correct = float((logits.argmax(1) == labels[own]).sum())
        loss_sum, num_correct = distributed.all_reduce_sum([loss_sum, num_correct])
        if not math.isfinite(loss_sum):  # the last step's loss can still be finite while the weights it leaves are not
            step = run.step - 1
            error = not_finite(f"{name} loss", run.epoch, step, trainer.lr(run.epoch, step))
            raise distributed.error_in_all(str(error))
        row |= {f"{name}_loss": loss_sum / len(labels), f"{name}_accuracy": num_correct / len(labels)}
    return row


def one_epoch(run: Run, trainer: Trainer, splits: dict[str, tuple[Tensor, Tensor]], stop: StopSignals) -> dict | None:
    """Train the epoch that `run` is in and evaluate the splits: the row of its history, or None after a signal."""
    train_epoch(run, trainer, stop)
    num_steps, num_images = len(trainer.loader), trainer.loader.num_images
    if run.step < num_steps:
        return None
    # A run that was stopped during its evaluation resumes here, with no step left.
    started = time.monotonic()
    evaluated = evaluate(run, trainer, splits, stop)
    if evaluated is None:
        return None
    row = {"epoch": run.epoch + 1, "learning_rate": trainer.lr(run.epoch, run.step - 1)}
    row |= {"train_loss": run.sums[0] / num_images, "train_accuracy": run.sums[1] / num_images}
    row |= evaluated
    row |= {"seconds": run.seconds + time.monotonic() - started, "images_per_second": num_images / run.seconds}
    return row


def fit(
    model: nn.Module,
    data: Dataset,
    recipe: Recipe,
    previous: dict[str, Any] | None = None,
    draw: Callable[[list[dict[str, Any]]], object] = lambda history: None,
) -> Run:
    """Train `model` on `data` by `recipe`, from the start or from the checkpoint `previous`.

    After every epoch, and when a signal ends the run, the checkpoint and the CSV are written, and `draw` is called with
    the history, unless that would slow the run down. `model` is moved to the recipe's device and left with the last
    epoch's weights.

    Raises UserError for a loss that is not finite, for memory that runs out, and for data other than the checkpoint's.
    """
    check(model, data, recipe, previous)
    if recipe.init and not previous:
        distributed.print_rank0(checkpoint.start_from(model, recipe, data.classes))
    if not recipe.dry_run:
        distributed.from_main_process(lambda: checkpoint.check_files(recipe))
    device = set_up_device(recipe.device, deterministic=recipe.deterministic)
    recipe = replace(recipe, precision=precision_of(recipe, previous, device))
    in_force = replace(recipe, batch_size=min(recipe.batch_size, len(data.train)))  # no rate for a larger batch
    if recipe.sync_bn:
        model = synchronized(model, device)
    with (
        StopSignals() as stop,
        explain_out_of_memory(recipe.batch_size),
        history.tensorboard(recipe, previous["training"]["epoch"] if previous else 0) as log,
        checkpoint.Saver(recipe, in_background=device.type == "cuda") as saver,
    ):
        model.to(device, memory_format=torch.channels_last)
        run = Run(model, make_optimizer(model, recipe, device), make_ema(model, in_force, data.train))
        if previous:
            saver.restore(run, previous)
        trainer = Trainer(run, data.train, in_force, device)
        messages.announce(run, data, in_force, device)
        report = messages.EpochReport(in_force, len(data.classes), log, draw)
        splits = {"test": data.test} if data.val is None else {"test": data.test, "val": data.val}
        splits = {
            name: (torch.from_numpy(s.images).to(device), torch.from_numpy(s.labels)) for name, s in splits.items()
        }
        if recipe.dry_run:
            dry_run.try_out(run, trainer, splits["test"][0], in_force)
            return run
        while run.epoch < recipe.epochs and run.stopped_by is None:
            row = one_epoch(run, trainer, splits, stop)
            if row is not None:
                finish_epoch(run, row)
            saver.save(run, data)
            if row is not None:
                report.epoch(run.history)
            if stop.in_any_process() and run.epoch < recipe.epochs:
                run.stopped_by = stop.number
                saver.wait()
                messages.announce_stop(run, recipe, len(trainer.loader))
        report.end(run)
    return run


def finish_epoch(run: Run, row: dict[str, Any]) -> None:
    run.history.append(row)
    run.epoch, run.step, run.sums, run.seconds = run.epoch + 1, 0, None, 0.0
    if "val_accuracy" in row and (run.best is None or row["val_accuracy"] > run.best["accuracy"]):
        weights = checkpoint.copied_to_host(dict((run.ema or run.model).state_dict()))
        run.best = {"epoch": run.epoch, "accuracy": row["val_accuracy"], "model": weights}


# ----------------------------------------------------------------------------------------------- what a run consists of


def train_loader(recipe: Recipe, train: Split, device: torch.device | str = "cpu") -> TrainLoader:
    return TrainLoader(
        train,
        recipe.batch_size,
        recipe.augmentation(),
        seed=recipe.seed,
        device=device,
        crop_and_flip_from=recipe.crop_and_flip_from,
    )


def make_optimizer(model: nn.Module, recipe: Recipe, device: torch.device) -> Optimizer:
    """SGD whose learning rate is a tensor on the device, for a CUDA graph to read what the schedule has set.

    Its momentum starts at zero instead of with the first gradient, which comes to the same.
    """
    norms_and_biases = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [
        {"params": [parameter for parameter in model.parameters() if parameter.ndim >= 2]},
        {"params": norms_and_biases} | ({} if recipe.decay_norms else {"weight_decay": 0.0}),
    ]
    settings = {"lr": torch.zeros((), device=device), "weight_decay": recipe.weight_decay, "fused": True}
    optimizer = torch.optim.SGD(groups, **settings, momentum=recipe.momentum, nesterov=recipe.nesterov)
    make_buffers(optimizer)
    return optimizer


def make_buffers(optimizer: Optimizer) -> None:
    """Have the optimizer make its buffers, such as the momentum, all zero: a CUDA graph needs their addresses."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # at a learning rate of zero
    optimizer.zero_grad(set_to_none=True)
    for parameter in parameters:
        for buffer in optimizer.state[parameter].values():
            buffer.zero_()


def make_ema(model: nn.Module, recipe: Recipe, train: Split) -> ModelEma | None:
    if not recipe.ema_horizon:
        return None
    return ModelEma(model, ema_decay(recipe.ema_horizon, total_steps(recipe, train)))


def total_steps(recipe: Recipe, train: Split) -> int:
    return recipe.epochs * steps_per_epoch(len(train), recipe.batch_size)


def precision_of(recipe: Recipe, previous: dict[str, Any] | None, device: torch.device) -> str:
    """The precision that a run is trained in; a resumed run keeps its own."""
    if previous and recipe.precision == "auto":
        return previous["recipe"]["precision"]
    return pick_precision(recipe.precision, device)


class RunningSums:
    """Summed loss, correct predictions, and number of steps before the first non-finite loss, on the device.

    Reading them synchronizes the host with the device; adding does not.
    """

    def __init__(self, device: torch.device):
        dtype = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
        self.values = torch.zeros(3, dtype=dtype, device=device)

    def start(self, values: list[float] | None, step: int) -> None:
        """Continue at `step` from `values`, loss and correct predictions of all processes, each with an equal part."""
        parts = [value / distributed.world_size() for value in (values or (0.0, 0.0))[:2]]
        self.values.copy_(torch.tensor([*parts, float(step)], dtype=self.values.dtype))

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch. The loss is without label smoothing, to be compared with the test loss."""
        loss_sum, num_correct, finite_steps = self.values.unbind()
        loss_sum += F.cross_entropy(logits.float(), labels, reduction="sum")
        num_correct += (logits.argmax(1) == labels).sum()
        finite_steps += loss_sum.isfinite()  # once it is not, it never is again

    def read(self, epoch: int, step: int, lr: Callable[[int], float]) -> list[float]:
        """Summed loss and correct predictions.

        Raises UserError where a loss before `step` was not finite; `lr` gives the learning rate of a step.
        """
        loss_sum, num_correct, finite_steps = self.values.tolist()
        if finite_steps < step:
            raise not_finite("loss", epoch, int(finite_steps), lr(int(finite_steps)))
        return [loss_sum, num_correct]


def not_finite(what: str, epoch: int, step: int, lr: float) -> UserError:
    return UserError(
        f"the {what} is not finite at epoch {epoch + 1}, step {step + 1}, learning rate {lr:g}; nothing of this epoch "
        "is saved. Lower --base-lr, or look for broken images"
    )


# ---------------------------------------------------------------------------------------------------- several processes


def wrap_ddp(model: nn.Module) -> nn.Module:
    """The model wrapped in DDP: gradients are averaged; batch-norm uses each process's own images."""
    with warnings.catch_warnings(category=FutureWarning, action="ignore"):  # PyTorch 2.11 has no newer name
        # The first process's statistics are kept: no need to copy them at every step.
        return DistributedDataParallel(model, broadcast_buffers=False)


def synchronized(model: nn.Module, device: torch.device) -> nn.Module:
    """The model with batch-norms over the images of all processes."""
    if device.type != "cuda" or distributed.world_size() == 1:
        found = f"{distributed.world_size()} on {device.type.upper()}"
        raise distributed.error_in_all(f"--sync-bn is for several processes on CUDA, and here is {found}; leave it out")
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


# -------------------------------------------------------------------------------------------------------------- checks


def check(model: nn.Module, data: Dataset, recipe: Recipe, previous: dict[str, Any] | None) -> None:
    """Raise UserError, in all processes, for what cannot be trained."""
    if problem := next(problems(model, data, recipe, previous), None):
        raise distributed.error_in_all(problem)


def problems(model: nn.Module, data: Dataset, recipe: Recipe, previous: dict[str, Any] | None) -> Iterator[str]:
    with torch.device("meta"):
        expected = NETWORKS[recipe.network](len(data.classes), **recipe.network_arguments()).state_dict()
    if {name: value.shape for name, value in model.state_dict().items()} != {
        name: value.shape for name, value in expected.items()
    }:
        yield f"the model is not the {recipe.network} of the recipe; a checkpoint of it could not be loaded"
    if previous and previous["data"]["digest"] != data.digest:
        yield (
            f"--resume: --data {data.source} does not hold the images that {recipe.checkpoint_path} was trained on "
            f"(--data {previous['data']['source']}); give those, or start another run with --name or --overwrite"
        )
    if min(recipe.batch_size, len(data.train)) < 2 * (world_size := distributed.world_size()):
        yield (
            f"--batch-size {recipe.batch_size} of {len(data.train):,} images leaves fewer than two for each of "
            f"{world_size} processes, and batch norm needs two; give more, or start fewer processes"
        )
