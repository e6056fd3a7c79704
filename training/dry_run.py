"""--dry-run: two training steps and one batch of test images, to see that all fits and how long a run will take."""

import sys
import time
from typing import TYPE_CHECKING

from common import distributed
from common.device import kilobytes
from common.text import counted, duration

import torch
from torch import Tensor, nn

from training.recipe import Recipe
from utils import eval_batch_size, multiply_adds, normalize, predict

if TYPE_CHECKING:
    from training.loop import Run, Trainer


def try_out(run: "Run", trainer: "Trainer", images: Tensor, recipe: Recipe) -> None:
    """Print the network's size, and memory and speed of a step; `images` are those of the test, uint8 (N, 3, S, S)."""
    device, loader = trainer.device, trainer.loader
    for step, batch in zip(range(2), loader.epoch(0), strict=False):
        started = time.perf_counter()
        trainer.train_step(0, step, *batch)
        trainer.sums.read(0, step + 1)  # waits for the device
        step_seconds = time.perf_counter() - started
    model, part = run.eval_model.eval(), images[: eval_batch_size(images, device)]
    started = time.perf_counter()
    predict(lambda batch: model(normalize(batch)), part, device, precision=trainer.precision)
    test_seconds = (time.perf_counter() - started) * len(images) / len(part)

    epoch_seconds = len(loader) * step_seconds + test_seconds
    layers = sum(isinstance(layer, nn.Conv2d | nn.Linear) for layer in run.model.modules())
    lines = [
        f"{layers} layers with weights, {multiply_adds(run.model, recipe.image_size) / 1e6:,.1f} M multiply-adds",
        f"{loader.batch_size / step_seconds:,.0f} images/s in the last step, {peak_memory(device)}",
        f"{counted(recipe.epochs, 'epoch')} in about {duration(recipe.epochs * epoch_seconds)}",
    ]
    distributed.print_rank0("\n".join(lines))


def peak_memory(device: torch.device) -> str:
    if device.type == "cuda":
        return f"peak device memory {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB"
    if sys.platform != "linux":
        return "peak memory not measured"
    return f"peak memory {kilobytes('/proc/self/status', 'VmHWM') / 2**20:.1f} GiB"
