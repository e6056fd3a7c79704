"""`fit` trains a network by a recipe, epoch by epoch; `predict` gives a network's logits for a split.

What `fit` promises: the checkpoint is whole at every moment; Ctrl-C and SIGTERM lose no more than the step in flight, a
kill no more than the epoch (on a GPU no more than two, since an epoch is saved while the next one is trained); and a
run that was stopped and resumed ends, on the CPU, with the very bits of one that was not.
"""

import contextlib
import copy
import functools
import importlib.metadata
import math
import os
import platform
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from tqdm import tqdm

import checkpoint
import files
import metrics
import parallel
import plotting
from dataset import Dataset, Split
from errors import UserError
from fast import FastStep, pick_compile
from recipe import REFERENCE_BATCH, Recipe
from utils import (
    MEAN,
    STD,
    CosineSchedule,
    TrainLoader,
    augmentation_of,
    is_out_of_memory,
    normalize,
    pick_device,
    pick_precision,
)

# Pixels evaluated in one go: 512 images of 32×32 on the CPU; on a GPU more, since starting the operators takes longer
# than running them on few images.
EVAL_PIXELS = {"cpu": 2**19, "cuda": 2**21, "mps": 2**20}


@dataclass
class Run:
    """Where a training run stands; what `fit` returns."""

    model: nn.Module
    optimizer: Optimizer
    average: "Average | None" = None  # of the weights, with --ema-decay
    history: list[dict[str, Any]] = field(default_factory=list)  # a row for each whole epoch, see plotting.write_csv
    epoch: int = 0  # whole epochs done
    step: int = 0  # steps done of the next one
    totals: list[float] | None = None  # of those steps: summed loss, hits, and how many they are
    seconds: float = 0.0  # spent on them
    best: dict[str, Any] | None = None  # with a validation split: accuracy, epoch and weights of the best epoch
    stopped_by: int | None = None  # the signal that ended the run early

    @property
    def exit_status(self) -> int:
        return 0 if self.stopped_by is None else 128 + self.stopped_by

    @property
    def tested(self) -> nn.Module:
        """The network that is tested and kept."""
        return self.average.model if self.average else self.model


class Totals:
    """Loss, hits and the steps before the first loss that is not finite, added up on the device.

    Reading them makes the host wait for the device, adding to them does not.
    """

    def __init__(self, device: torch.device):
        dtype = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
        self.values = torch.zeros(3, dtype=dtype, device=device)

    def start(self, values: list[float] | None, step: int, num_processes: int = 1) -> None:
        """Count on at `step` from `values`, summed loss and hits, or from equal parts of them in several processes."""
        parts = [value / num_processes for value in (values or (0.0, 0.0))[:2]]
        self.values.copy_(torch.tensor([*parts, float(step)], dtype=self.values.dtype))

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Of a batch. The loss is that of the plain labels, to be held beside the test loss: without smoothing."""
        loss_sum, hits, finite_steps = self.values.unbind()
        loss_sum += F.cross_entropy(logits.float(), labels, reduction="sum")
        hits += (logits.argmax(1) == labels).sum()
        finite_steps += loss_sum.isfinite()  # once it is not, it never is again

    def read(self, epoch: int, step: int, rate: Callable[[int], float]) -> list[float]:
        """Summed loss and hits. Raises UserError where a loss before `step` was not finite.

        `rate` gives a step's learning rate.
        """
        loss_sum, hits, finite_steps = self.values.tolist()
        if finite_steps < step:
            raise not_finite("loss", epoch, int(finite_steps), rate(int(finite_steps)))
        return [loss_sum, hits]


class Average:
    """A moving average of the weights and, since they belong to them, of the batch-norms' statistics.

    After t steps it keeps min(decay, (1 + t) / (10 + t)) of itself at a step, so that it forgets the random weights it
    started from: the warm-up of TensorFlow's ExponentialMovingAverage. Averaging: Polyak and Juditsky 1992.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.decay = decay
        self.weight = torch.zeros((), device=next(model.parameters()).device)  # of the new value, at the next step
        pairs = zip(self.model.state_dict().values(), model.state_dict().values(), strict=True)
        pairs = [(own, new) for own, new in pairs if own.is_floating_point()]
        self.own, self.new = [own for own, _ in pairs], [new for _, new in pairs]
        pairs = zip(self.model.buffers(), model.buffers(), strict=True)
        self.counters = [(own, new) for own, new in pairs if not own.is_floating_point()]

    def set_weight(self, steps_done: int) -> None:
        self.weight.fill_(1 - min(self.decay, (1 + steps_done) / (10 + steps_done)))

    def update(self) -> None:
        change = torch._foreach_sub(self.new, self.own)
        torch._foreach_mul_(change, self.weight)
        torch._foreach_add_(self.own, change)

    def state_dict(self) -> dict[str, Tensor]:
        for own, new in self.counters:
            own.copy_(new)
        return self.model.state_dict()


def not_finite(what: str, epoch: int, step: int, learning_rate: float) -> UserError:
    return UserError(
        f"the {what} is not finite at epoch {epoch + 1}, step {step + 1}, learning rate {learning_rate:g}; nothing of "
        "this epoch is saved. Lower --base-lr, or look for broken images"
    )


class StopSignals:
    """Within the block the first Ctrl-C or SIGTERM is noted, for the loop to end on; the second ends it at once.

    torchrun hands on what the terminal has sent already: under it only its own patience ends a process at once.
    """

    def __init__(self) -> None:
        self.number: int | None = None

    def __enter__(self) -> "StopSignals":
        self.previous = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def note(self, number: int, _: object) -> None:
        if self.number is not None and not parallel.under_torchrun():
            sys.exit(128 + number)
        self.number = number

    def __bool__(self) -> bool:
        return self.number is not None

    def agreed(self) -> bool:
        """Whether a signal has come to any of the processes; all of them must ask at the same place."""
        if number := int(parallel.most(self.number or 0)):  # not taken back here: a signal may have come meanwhile
            self.number = number
        return bool(number)


def previous_run(recipe: Recipe) -> dict[str, Any] | None:
    """The checkpoint that `recipe` is to go on from, or None for a fresh start.

    Raises UserError where a checkpoint would be overwritten unasked, is one of another recipe or of an earlier format.
    """
    return parallel.from_first(lambda: read_previous_run(recipe))


def read_previous_run(recipe: Recipe) -> dict[str, Any] | None:
    path = recipe.checkpoint_path
    if recipe.overwrite or not os.path.exists(path):
        return None
    if not recipe.resume:
        raise UserError(f"{path} exists already; --resume goes on from it, --overwrite starts afresh, --name renames")
    content = checkpoint.read(path)
    if content["version"] < checkpoint.VERSION:
        raise UserError(
            f"--resume: {path} is by an earlier version of this project (format {content['version']}), whose runs this "
            f"one (format {checkpoint.VERSION}) cannot go on with; train again with --name or --overwrite"
        )
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

    Raises UserError for a loss that is not finite, for memory that runs out, for data other than the checkpoint's, for
    a last batch of one image, which batch-norm cannot train on, and where another process writes the same checkpoint.
    """
    if len(data.train) % recipe.batch_size == 1:
        raise parallel.found_by_all(
            f"--batch-size {recipe.batch_size} leaves a last batch of one image out of {len(data.train):,}, which "
            "batch-norm cannot train on; choose another batch size or --train-size"
        )
    if previous and previous["data"]["digest"] != data.digest:
        raise parallel.found_by_all(
            f"--resume: --data {data.source} does not hold the images that {recipe.checkpoint_path} was "
            f"trained on (--data {previous['data']['source']}); give those, or start another run with --name or "
            "--overwrite"
        )
    least = parallel.world_size() * 2
    if parallel.world_size() > 1 and min(recipe.batch_size, len(data.train) % recipe.batch_size or least) < least:
        raise parallel.found_by_all(
            f"--batch-size {recipe.batch_size} leaves a process fewer than two images in each batch or in the last one "
            f"of {len(data.train):,}, and batch-norm needs two; choose another, or start fewer processes than "
            f"{parallel.world_size()}"
        )
    parallel.from_first(lambda: check_files(recipe))
    device = pick_device(recipe.device, deterministic=recipe.deterministic)
    if recipe.sync_bn:
        if device.type != "cuda" or parallel.world_size() == 1:
            found = f"{parallel.world_size()} on {device.type.upper()}"
            raise parallel.found_by_all(
                f"--sync-bn is for several processes on CUDA, and here is {found}; leave it out"
            )
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    with (
        contextlib.ExitStack() as locks,
        StopSignals() as stop,
        memory_that_runs_out(recipe.batch_size),
        scalar_writer(recipe, previous["training"]["epoch"] if previous else 0) as writer,
        Saver(in_background=device.type == "cuda") as saver,
    ):
        lock = files.locked(recipe.checkpoint_path, "the checkpoint", wait=False)
        parallel.from_first(lambda: locks.enter_context(lock))
        recipe = replace(recipe, precision=precision_of(recipe, previous, device))
        model.to(device, memory_format=torch.channels_last)
        average = Average(model, ema_decay(recipe, len(data.train))) if recipe.ema_horizon else None
        run = Run(model, make_optimizer(model, recipe, device), average)
        if previous:
            restore(run, previous, data, recipe)
            saver.kept = held(recipe, previous["training"])
            if run.history and parallel.is_first():  # a kill may have come between the checkpoint and the CSV
                plotting.write_csv(run.history, recipe.csv_path)
        announce(run, data, recipe, device)
        trainer = Trainer(run, data.train, recipe, device)
        splits = {"test": data.test} if data.val is None else {"test": data.test, "val": data.val}
        evaluated = {
            name: (torch.from_numpy(split.images).to(device), torch.from_numpy(split.labels))
            for name, split in splits.items()
        }
        while run.epoch < recipe.epochs:
            row = one_epoch(run, trainer, evaluated, stop)
            if row is not None:
                run.history.append(row)
                run.epoch, run.step, run.totals, run.seconds = run.epoch + 1, 0, None, 0.0
                if data.val is not None and (run.best is None or row["val_accuracy"] > run.best["accuracy"]):
                    run.best = {"epoch": run.epoch, "accuracy": row["val_accuracy"], "model": kept_weights(run)}
            if parallel.is_first():
                saver.save(run, data, recipe)
            if row is not None and parallel.is_first():
                report(row, recipe.epochs)
                writer(row)
            if stop.agreed() and run.epoch < recipe.epochs:
                run.stopped_by = stop.number
                saver.wait()
                instead = " in place of --overwrite" if recipe.overwrite else ""
                parallel.say(
                    f"stopped in epoch {run.epoch + 1} after step {run.step} of {len(trainer.loader)}, saved to "
                    f"{recipe.checkpoint_path}; the same command with --resume{instead} goes on from there"
                )
                break
        if run.best:
            best = f"epoch {run.best['epoch']}, with a validation accuracy of {run.best['accuracy']:.2%}"
            parallel.say(f"kept is the network of {best}")
    return run


def check_files(recipe: Recipe) -> None:
    """See now, and not at the end of the first epoch or of the last, that all can be read and written."""
    files.check_writable(recipe.checkpoint_dir, "the checkpoint")
    files.check_writable(recipe.plot_dir, "the plots")
    if recipe.reference:
        plotting.read_csv(recipe.reference)


def make_optimizer(model: nn.Module, recipe: Recipe, device: torch.device) -> Optimizer:
    """SGD whose learning rate is a tensor on the device: a recorded step reads there what the schedule has put.

    Its momentum starts at nought instead of with the first gradient, which comes to the same.
    """
    norms_and_biases = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    weights = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    optimizer = torch.optim.SGD(
        [
            {"params": weights, "weight_decay": recipe.weight_decay},
            {"params": norms_and_biases, "weight_decay": recipe.weight_decay if recipe.decay_norms else 0.0},
        ],
        lr=torch.zeros((), device=device),
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        fused=True,
    )
    if recipe.momentum:
        for parameter in model.parameters():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def ema_decay(recipe: Recipe, num_images: int) -> float:
    """What the moving average keeps of itself at a step, so that it reaches back over --ema-horizon of the run."""
    steps = recipe.epochs * math.ceil(num_images / recipe.batch_size)
    return 1 - 1 / max(1.0, recipe.ema_horizon * steps)


def precision_of(recipe: Recipe, previous: dict[str, Any] | None, device: torch.device) -> str:
    """The precision that a run is trained in; a run that goes on keeps its own."""
    if previous and recipe.precision == "auto":
        return previous["recipe"]["precision"]
    return pick_precision(recipe.precision, device)


def loader_of(recipe: Recipe, train: Split, device: torch.device | str = "cpu") -> TrainLoader:
    """The batches that a recipe trains on."""
    return TrainLoader(
        train,
        recipe.batch_size,
        augmentation_of(recipe),
        seed=recipe.seed,
        device=device,
        crop_and_flip_from=recipe.crop_and_flip_from,
    )


class Trainer:
    """A run's batches, its learning rates and its training step, which is all that a step needs."""

    def __init__(self, run: Run, train: Split, recipe: Recipe, device: torch.device):
        self.model, self.optimizer, self.average, self.device = run.model, run.optimizer, run.average, device
        self.loader = loader_of(recipe, train, device)
        self.schedule = CosineSchedule(recipe.lr, recipe.min_lr, recipe.epochs, recipe.warmup, recipe.schedule_step)
        self.learning_rate = run.optimizer.param_groups[0]["lr"]  # of all groups
        self.label_smoothing, self.precision = recipe.label_smoothing, precision_of(recipe, None, device)
        self.totals = Totals(device)
        self.batch_images = 0  # in all processes' shares of the batch together
        network, choice = self.model, pick_compile(recipe.compile, device)
        if parallel.world_size() > 1:
            # Each process goes by its own images' norms, and the first one's statistics are kept: no need to copy them
            # at every step.
            with warnings.catch_warnings(category=FutureWarning, action="ignore"):  # PyTorch 2.11 has no newer name
                network = DistributedDataParallel(self.model, broadcast_buffers=False)
            if choice in ("graph", "both") and device.type == "cuda":
                instead = {"graph": "none", "both": "inductor"}[choice]
                parallel.say(f"--compile {choice} records the step of one process; with several it is {instead} here")
                choice = instead
        self.fast_step = FastStep(
            self.step, network, self.state, choice=choice, batch_size=self.loader.own_size, device=device
        )

    def rate(self, epoch: int, step: int) -> float:
        return self.schedule(epoch, step, len(self.loader))

    def train(self, epoch: int, step: int, images: Tensor, labels: Tensor) -> None:
        """Step `step` of epoch `epoch` on its batch, in the way that --compile names."""
        self.learning_rate.fill_(self.rate(epoch, step))
        if self.average:
            self.average.set_weight(epoch * len(self.loader) + step)
        self.batch_images = self.loader.images_in(step)
        self.fast_step(images, labels)

    def step(self, images: Tensor, labels: Tensor, network: nn.Module) -> None:
        """The step itself. Nothing here waits for the device or branches on its numbers, so it can be recorded."""
        with autocast(self.device, self.precision):
            logits = network(images)
            loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)  # in float32, by autocast
        if parallel.world_size() > 1:  # which take the mean of their gradients, whose shares may differ by an image
            loss = loss * (len(labels) * parallel.world_size() / self.batch_images)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average:
            self.average.update()
        self.totals.add(logits.detach(), labels)

    def state(self) -> list[Tensor]:
        """Every tensor that a step changes."""
        buffers = [value for state in self.optimizer.state.values() for value in state.values()]
        average = self.average.own if self.average else []
        return [*self.model.state_dict().values(), *buffers, *average, self.totals.values]


def one_epoch(
    run: Run, trainer: Trainer, evaluated: dict[str, tuple[Tensor, Tensor]], stop: StopSignals
) -> dict[str, Any] | None:
    """Train the epoch that `run` stands in from its step on, then evaluate the splits of `evaluated`.

    Returns the epoch's row, or None where a signal came first; `run` then says how far it got.
    """
    started = time.monotonic() - run.seconds
    rate = functools.partial(trainer.rate, run.epoch)
    loader, totals, num_processes = trainer.loader, trainer.totals, parallel.world_size()
    totals.start(run.totals, run.step, num_processes)
    num_images = len(loader.images)
    images_seen = min(run.step * loader.batch_size, num_images)
    bar = tqdm(
        total=num_images, initial=images_seen, desc=f"epoch {run.epoch + 1}", unit=" images", unit_scale=True,
        leave=False, disable=None if parallel.is_first() else True,
    )  # fmt: skip
    last_read = time.monotonic()
    run.model.train()
    with bar:
        for images, labels in loader.epoch(run.epoch, run.step):
            trainer.train(run.epoch, run.step, images, labels)
            images_seen += loader.images_in(run.step)
            run.step += 1
            if time.monotonic() - last_read >= 1:
                loss_sum, hits = totals.read(run.epoch, run.step, rate)  # of this process's share
                seen = images_seen / num_processes
                bar.set_postfix_str(f"loss {loss_sum / seen:.4f}, accuracy {hits / seen:.2%}", False)
                bar.update(images_seen - bar.n)
                last_read = time.monotonic()
            if stop.agreed():
                break
    run.totals = [*parallel.total(totals.read(run.epoch, run.step, rate)), float(run.step)]
    run.seconds = time.monotonic() - started
    if run.step < len(loader):
        return None
    # A run that was stopped during its evaluation comes back to here with no step left, its training time behind it.
    training_seconds = run.seconds
    row = {"epoch": run.epoch + 1, "learning_rate": rate(run.step - 1)}
    row |= {"train_loss": run.totals[0] / num_images, "train_accuracy": run.totals[1] / num_images}
    parallel.copy_buffers(run.tested)
    tested = run.tested.eval()
    for name, (images, labels) in evaluated.items():
        own = parallel.share(len(labels), parallel.rank(), num_processes)
        # A smaller --batch-size is to take less memory here as well.
        batch_size = min(eval_batch_size(images, trainer.device), 4 * loader.batch_size)
        # Several processes could not agree in between.
        break_off = stop if num_processes == 1 else None
        logits = predict(
            lambda batch: tested(normalize(batch)),
            images[own],
            trainer.device,
            precision=trainer.precision,
            batch_size=batch_size,
            stop=break_off,
        )
        if logits is None:
            return None
        loss_sum, hits = parallel.total(metrics.sums(logits, labels[own]))
        if not math.isfinite(loss_sum):  # the last step's loss can still be finite while the weights it leaves are not
            message = str(not_finite(f"{name} loss", run.epoch, run.step - 1, row["learning_rate"]))
            raise parallel.found_by_all(message)
        row |= {f"{name}_loss": loss_sum / len(labels), f"{name}_accuracy": hits / len(labels)}
    row |= {"seconds": time.monotonic() - started, "images_per_second": num_images / training_seconds}
    return row


class Saver:
    """Writes the checkpoint and the CSV; `in_background` does so in a thread, while the next epoch is trained.

    What is saved is then a copy, made at once. An error comes out of the next `save` or `wait`, or of the block's end;
    it says what was saved before.
    """

    def __init__(self, *, in_background: bool, kept: str = "nothing of this run is saved"):
        self.thread = ThreadPoolExecutor(1, "save") if in_background else None
        self.pending: Future | None = None
        self.kept = kept  # what the checkpoint holds, in words

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if self.thread:
            self.thread.shutdown()
        if kind is None:
            self.wait()

    def save(self, run: Run, data: Dataset, recipe: Recipe) -> None:
        self.wait()
        content, history = describe(run, data, recipe), list(run.history)

        def write() -> None:
            try:
                for folder in (recipe.checkpoint_dir, recipe.plot_dir):  # both were there when the run began
                    if not Path(folder).is_dir():
                        raise UserError(f"{folder}: this folder has vanished; bring it back")
                checkpoint.write(recipe.checkpoint_path, content)
                self.kept = held(recipe, content["training"])
                if history:
                    plotting.write_csv(history, recipe.csv_path)
            except UserError as error:
                raise UserError(f"{error}; {self.kept}") from None

        if self.thread:
            content = copied_to_host(content)
            self.pending = self.thread.submit(write)
        else:
            write()

    def wait(self) -> None:
        if self.pending:
            self.pending.result()
            self.pending = None


def held(recipe: Recipe, training: dict[str, Any]) -> str:
    step = f" and step {training['step']} of the next" if training["step"] else ""
    return f"{recipe.checkpoint_path} holds epoch {training['epoch']}{step}; --resume goes on from there"


def copied_to_host(value: Any) -> Any:
    """The same dicts and lists with a copy of every tensor, on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: copied_to_host(part) for key, part in value.items()}
    return [copied_to_host(part) for part in value] if isinstance(value, list) else value


def kept_weights(run: Run) -> dict[str, Tensor]:
    """A copy, on the host, of the weights that are tested."""
    return copied_to_host(dict((run.average or run.model).state_dict()))


@contextlib.contextmanager
def memory_that_runs_out(batch_size: int) -> Iterator[None]:
    """Turn PyTorch's errors about memory into one that names --batch-size and a smaller one."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        on_host = isinstance(error, MemoryError) or "not enough memory" in str(error) or "DefaultCPU" in str(error)
        room = ""
        if not on_host and torch.cuda.is_available():
            room = f" of {torch.cuda.get_device_properties('cuda').total_memory / 2**30:.1f} GiB"
        smaller = f"--batch-size {batch_size // 2}" if batch_size >= 4 else "smaller images or a smaller network"
        raise UserError(
            f"--batch-size {batch_size}: the {'memory' if on_host else 'device memory'}{room} is too small for it; "
            f"try {smaller}"
        ) from None


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """With "bfloat16", convolutions and matrix products take and give it; the weights stay in float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


@torch.no_grad()
def predict(
    network: Callable[[Tensor], Tensor],
    images: Tensor,
    device: torch.device,
    *,
    precision: str = "float32",
    batch_size: int | None = None,
    stop: StopSignals | None = None,
) -> Tensor | None:
    """Logits of `network`, which takes uint8 (B, 3, H, W), for `images` of that kind: float32 (N, classes) on the CPU.

    None where `stop` came first.
    """
    parts = max(1, -(-len(images) // (batch_size or eval_batch_size(images, device))))
    logits = []
    for batch in images.tensor_split(parts):  # of equal size: cuDNN tries its algorithms out on each size
        if stop:
            return None
        with autocast(device, precision):
            logits.append(network(batch.to(device, memory_format=torch.channels_last)).float())
    return torch.cat(logits).cpu()


def eval_batch_size(images: Tensor, device: torch.device) -> int:
    return max(1, EVAL_PIXELS[device.type] // (images.shape[2] * images.shape[3]))


def restore(run: Run, content: dict[str, Any], data: Dataset, recipe: Recipe) -> None:
    """Put a fresh run where the checkpoint's stood.

    Raises UserError where what the checkpoint holds does not fit the run.
    """
    if problem := next(misfits(run, content, data, recipe), None):
        raise checkpoint.unusable(recipe.checkpoint_path, problem)
    training = content["training"]
    run.model.load_state_dict(dict(training["model"] or content["model"]), strict=True)
    if run.average:
        run.average.model.load_state_dict(dict(training["average"] or content["model"]), strict=True)
    own = by_number(run.optimizer.state_dict()["state"])
    for name, tensor in by_number(training["optimizer"]).items():
        own[name].copy_(tensor)
    run.history = content["history"]
    run.epoch, run.step, run.totals, run.seconds = (training[name] for name in ("epoch", "step", "totals", "seconds"))
    if best := training["best"]:
        run.best = {"epoch": best["epoch"], "accuracy": best["accuracy"], "model": content["model"]}


def misfits(run: Run, content: dict[str, Any], data: Dataset, recipe: Recipe) -> Iterator[str]:
    """What of a checkpoint's content does not fit a fresh run, in words."""
    training = content["training"]
    # Where `describe` puts them.
    wanted = {"model": bool(training["best"] or run.average), "average": bool(training["best"] and run.average)}
    for name, there in wanted.items():
        if (training[name] is not None) != there:
            yield f"training.{name} is {'missing' if there else 'not None'}"
    weights = {"model": content["model"]} | {f"training.{name}": training[name] for name in wanted if wanted[name]}
    pairs = {name: (tensors, run.model.state_dict()) for name, tensors in weights.items()}
    pairs["training.optimizer"] = by_number(training["optimizer"]), by_number(run.optimizer.state_dict()["state"])
    for name, (tensors, own) in pairs.items():
        if difference := checkpoint.misfit(tensors, own):
            yield f"{name} does not fit the network: {difference}"
        if broken := checkpoint.not_finite(tensors):
            yield f"{name}.{broken} is not finite"
    columns = [name for name in plotting.COLUMNS if data.val is not None or name not in plotting.OPTIONAL_COLUMNS]
    if any(row.keys() != set(columns) for row in content["history"]):
        yield f"history has other columns than {', '.join(columns)}"
    if (training["step"] - 1) * recipe.batch_size >= len(data.train):
        yield f"training.step is beyond the {len(data.train)} images of an epoch"


def by_number(state: dict[int, dict[str, Tensor]]) -> dict[str, Tensor]:
    """An optimizer's tensors: each by the number of its parameter, and its own name."""
    return {f"{number}.{name}": tensor for number, part in state.items() for name, tensor in part.items()}


def describe(run: Run, data: Dataset, recipe: Recipe) -> dict[str, Any]:
    """The checkpoint's content: the network, how it came to be, and all that a resumed run needs."""
    last, average = run.model.state_dict(), run.average.state_dict() if run.average else None
    tested = average if run.average else last
    return {
        "network": {
            "name": recipe.network,
            "arguments": {"num_classes": len(data.classes), **recipe.network_arguments()},
        },
        "model": run.best["model"] if run.best else tested,
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
            "torchvision": importlib.metadata.version("torchvision"),  # importing it for this takes a second
            "numpy": np.__version__,
        },
        "training": {
            # Where they are not the chosen ones already: the last weights, and their moving average.
            "model": last if run.best or run.average else None,
            "average": average if run.best else None,
            "best": {"epoch": run.best["epoch"], "accuracy": run.best["accuracy"]} if run.best else None,
            "optimizer": run.optimizer.state_dict()["state"],  # the rest follows from the recipe
            "epoch": run.epoch,
            "step": run.step,
            "totals": run.totals,
            "seconds": run.seconds,
        },
    }


SPLIT_FLAGS = ("split_seed", "train_size", "val_size", "test_size", "test_split")


def announce(run: Run, data: Dataset, recipe: Recipe, device: torch.device) -> None:
    sizes = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in recipe.network_arguments().items())
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    threads = torch.get_num_threads()
    where = f"{device.type.upper()}, {threads} thread{'s' if threads > 1 else ''}"
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    if parallel.world_size() > 1:
        where += f", in {parallel.world_size()} processes"
    parallel.say(f"{recipe.network} ({sizes}), {parameters:,} parameters, on {where}, in {recipe.precision}")
    val = f" + {len(data.val):,} for validation" if data.val is not None else ""
    parallel.say(
        f"{data.source}: {len(data.train):,} training{val} + {len(data.test):,} test images of {recipe.image_size}×"
        f"{recipe.image_size}, {len(data.classes)} classes"
    )
    if data.test_split is not None:
        parallel.say(
            f"{100 * data.test_split:.0f} % of each class are the test images, since {data.source} has none of its own "
            f"(--test-split {data.test_split:g}, --split-seed {recipe.split_seed})"
        )
    if recipe.recipe == "original":
        parallel.say("the original's recipe")
    if parallel.world_size() > 1:
        parallel.say(
            f"batches of {recipe.batch_size} in all processes together, learning rates {recipe.lr:g} and "
            f"{recipe.min_lr:g}"
        )
    if recipe.batch_size != REFERENCE_BATCH:
        parallel.say(
            f"learning rates {recipe.base_lr:g} and {recipe.base_min_lr:g} for a batch of {REFERENCE_BATCH} become "
            f"{recipe.lr:g} and {recipe.min_lr:g} for a batch of {recipe.batch_size} (in proportion, Goyal et al. 2017)"
        )
    if run.epoch == recipe.epochs:
        parallel.say(
            f"{recipe.checkpoint_path} is finished: all {recipe.epochs} epochs are done, nothing is left to train"
        )
    elif run.epoch or run.step:
        parallel.say(f"going on from {recipe.checkpoint_path}: epoch {run.epoch + 1}, step {run.step + 1}")


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
    if not recipe.tensorboard or not parallel.is_first():
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
