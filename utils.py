"""What the scripts share: the loader of augmented batches, normalization, prediction, and the cosine schedule.

The path of a batch: `dataset.load` returns uint8 arrays. `TrainLoader` keeps them on the device as one tensor, augments
a chunk of them at a time (dataset/transforms.py), splits the chunk into batches and normalizes each batch.
"""

import copy
import functools
import logging
import math
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from common import distributed
from common.device import autocast

import numpy as np
import torch
from torch import Tensor, nn
from torch.backends import cudnn
from tqdm import tqdm

from dataset import Split, transforms

# Of CIFAR-10's training images, per channel, for values from 0 to 1.
MEAN = (0.4914, 0.4824, 0.4467)
STD = (0.2471, 0.2436, 0.2616)

# Pixels per augmentation chunk. On the CPU it fits into the caches (1,024 images of 32×32); on a GPU it is large enough
# to hide kernel launches (16,384 images).
CHUNK_PIXELS = {"cpu": 2**20, "cuda": 16 * 2**20, "mps": 4 * 2**20}
# Pixels per evaluation batch: 512 images of 32×32 on the CPU.
EVAL_PIXELS = {"cpu": 2**19, "cuda": 2**21, "mps": 2**20}


def normalize(images: Tensor, mean: tuple[float, ...] = MEAN, std: tuple[float, ...] = STD) -> Tensor:
    """(image / 255 − mean) / std, from uint8 (B, 3, H, W) to float32 of the same shape, channels-last."""
    shift, scale = _scale_to_255(mean, images.device), _scale_to_255(std, images.device)
    return images.to(torch.float32, memory_format=torch.channels_last).sub_(shift).div_(scale)


def small_size(size: int) -> int:
    """The side of the images in the first part of a run: about 3/4 of `size`, in multiples of 8."""
    return max(8, round(0.75 * size / 8) * 8)


@functools.cache  # copying them to the device for each batch would synchronize host and device
def _scale_to_255(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device).mul_(255).view(1, 3, 1, 1)


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """A CPU generator for one epoch, counted from 0. Every pair (seed, epoch) has its own random stream."""
    state = np.random.SeedSequence((seed, epoch)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def steps_per_epoch(num_images: int, batch_size: int, device: torch.device) -> int:
    """The number of batches in an epoch.

    A smaller last batch is dropped if it has fewer than two images per process, which batch norm needs. On CUDA a batch
    of another size needs its own graph and cuDNN search: it is also dropped if it has less than 1 % of the images.
    """
    whole, rest = divmod(num_images, batch_size)
    at_least = max(2 * distributed.world_size(), num_images / 100 if device.type == "cuda" else 0)
    return whole + (rest >= at_least or not whole)


class TrainLoader:
    """Shuffled, augmented and normalized batches of a split, made on the device.

    The order of the images and their random augmentation depend only on (seed, epoch), not on the batch or chunk size.
    The last batch may be smaller (see `steps_per_epoch`). With several processes, each gets its part of every batch.
    Before epoch `full_size_from`, the batches have the centers of the augmented images (see `small_size`). From epoch
    `crop_and_flip_from` on, only crop and flip are applied.

    On CUDA, a thread samples the random parameters of the next epoch during an epoch, and a second stream augments the
    next chunk in parallel with the training steps on the current one.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        augmentation: transforms.Augmentation,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        crop_and_flip_from: float = math.inf,
        full_size_from: int = 0,
        chunk_size: int | None = None,
    ):
        self.images = torch.from_numpy(split.images).to(device)
        self.labels = torch.from_numpy(split.labels).to(device)
        self.device = self.images.device
        self.batch_size, self.augmentation, self.seed = batch_size, augmentation, seed
        self.image_size, self.small_size = self.images.shape[-1], small_size(self.images.shape[-1])
        self.crop_and_flip_from, self.full_size_from = crop_and_flip_from, full_size_from
        self.augmenters = {
            settings: transforms.Augmenter(self.image_size, settings, device)
            for settings in (augmentation, augmentation.crop_and_flip())
        }
        self.num_images = min(len(self.images), len(self) * batch_size)  # in an epoch
        self.local_batch_size = len(range(batch_size)[distributed.local_slice(batch_size)])
        chunk_size = chunk_size or CHUNK_PIXELS[self.device.type] // self.image_size**2
        self.chunk_size = max(1, chunk_size // self.local_batch_size) * self.local_batch_size
        on_cuda = self.device.type == "cuda"
        self.thread = ThreadPoolExecutor(1, "plan") if on_cuda else None
        self.planned: dict[tuple[int, int], Future] = {}  # by epoch and first batch
        self.stream = torch.cuda.Stream(self.device) if on_cuda else None

    def __len__(self) -> int:
        return steps_per_epoch(len(self.images), self.batch_size, self.device)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch, from batch `start` on: images, float32 (B, 3, S, S), and labels, int64 (B,)."""
        if start >= len(self):
            return
        planned = self.planned.pop((epoch, start), None)
        plan = planned.result() if planned else self.plan(epoch, start)
        if self.thread:
            self.planned = {(epoch + 1, 0): self.thread.submit(self.plan, epoch + 1)}
        size, border = self.local_batch_size, (self.image_size - self.size(epoch)) // 2
        inside = slice(border, border + self.size(epoch))
        for images, labels in self.chunks(plan.to(self.device), self.augmenters[self.settings(epoch)]):
            for batch, targets in zip(images.split(size), labels.split(size), strict=True):
                yield normalize(batch[..., inside, inside]), targets

    def settings(self, epoch: int) -> transforms.Augmentation:
        return self.augmentation if epoch < self.crop_and_flip_from else self.augmentation.crop_and_flip()

    def size(self, epoch: int) -> int:
        return self.small_size if epoch < self.full_size_from else self.image_size

    def global_batch_size(self, step: int) -> int:
        """The number of images in a step, over all processes."""
        return min(self.batch_size, self.num_images - step * self.batch_size)

    def plan(self, epoch: int, start: int = 0) -> transforms.Plan:
        generator = epoch_generator(self.seed, epoch)
        settings = self.settings(epoch)
        params = transforms.sample_params(len(self.images), self.image_size, settings, generator)
        order = torch.randperm(len(self.images), generator=generator)[start * self.batch_size : self.num_images]
        order = torch.cat([batch[distributed.local_slice(len(batch))] for batch in order.split(self.batch_size)])
        return transforms.make_plan(order, params, self.chunk_size)

    def chunks(self, plan: transforms.Plan, augmenter: transforms.Augmenter) -> Iterator[tuple[Tensor, Tensor]]:
        """Augmented images, uint8 (chunk, 3, H, W), and their labels."""

        def augment(number: int) -> tuple[Tensor, Tensor]:
            index = plan.index[number * plan.chunk : (number + 1) * plan.chunk]
            return augmenter(self.images, plan, number), self.labels.index_select(0, index)

        if self.stream is None:
            yield from map(augment, range(len(plan)))
            return
        training = torch.cuda.current_stream(self.device)

        def augment_in_parallel(number: int) -> tuple[Tensor, Tensor]:
            # Wait for the work queued on the training stream so far: the copy of the plan, and the steps on the
            # previous chunk, whose memory may be reused.
            self.stream.wait_stream(training)
            with torch.cuda.stream(self.stream):
                return augment(number)

        try:
            ready = augment_in_parallel(0)
            for number in range(len(plan)):
                chunk = ready
                training.wait_stream(self.stream)
                if number + 1 < len(plan):
                    ready = augment_in_parallel(number + 1)
                yield chunk
        finally:
            training.wait_stream(self.stream)  # after an early end of the epoch, it may still read the plan


@torch.no_grad()
def predict(
    network: Callable[[Tensor], Tensor],
    images: Tensor,
    device: torch.device,
    *,
    precision: str = "float32",
    batch_size: int | None = None,
    stop: Callable[[], object] = lambda: False,
    label: str | None = None,
) -> Tensor | None:
    """Logits of `network` for `images`, uint8 (N, 3, H, W): float32 (N, classes) on the CPU.

    `network` takes uint8 batches. Returns None as soon as `stop()` is true. `label`: text of the progress bar, if any.
    """
    batches, logits = images.split(batch_size or eval_batch_size(images, device)), []
    # cuDNN would search for the fastest algorithms for each batch size, which takes longer than it saves here.
    searched, cudnn.benchmark = cudnn.benchmark, False
    try:
        for batch in tqdm(batches, desc=label, unit=" batches", leave=False, disable=None if label else True):
            if stop():
                return None
            with autocast(device, precision):
                logits.append(network(batch.to(device, memory_format=torch.channels_last)).float())
    finally:
        cudnn.benchmark = searched
    return torch.cat(logits).cpu()


def eval_batch_size(images: Tensor, device: torch.device) -> int:
    return max(1, EVAL_PIXELS[device.type] // (images.shape[2] * images.shape[3]))


def multiply_adds(model: nn.Module, image_size: int) -> int:
    """Multiply-adds of the forward pass for one image (convolutions and matrix products)."""
    # The import warns if PyTorch with CUDA has no Triton, as on Windows.
    logging.getLogger("torch.utils.flop_counter").setLevel(logging.ERROR)
    from torch.utils.flop_counter import FlopCounterMode

    images = torch.empty(1, 3, image_size, image_size, device="meta")  # counting needs only shapes
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        copy.deepcopy(model).to("meta").eval()(images)
    return counter.get_total_flops() // 2


@dataclass(frozen=True)
class CosineSchedule:
    """The learning rate of every step: linear warm-up, then cosine annealing.

    The rate rises to `lr` over the fraction `warmup` of the run (Goyal et al. 2017, arXiv:1706.02677), then falls to
    `min_lr` (Loshchilov and Hutter 2017, arXiv:1608.03983). `schedule_step`: it is updated every "epoch" or "batch".
    """

    lr: float
    min_lr: float
    epochs: int
    steps_per_epoch: int
    warmup: float = 0.0
    schedule_step: str = "epoch"

    def __call__(self, epoch: int, step: int) -> float:
        """The learning rate of step `step` of epoch `epoch`, both from 0."""
        stride = self.steps_per_epoch if self.schedule_step == "epoch" else 1
        step = (epoch * self.steps_per_epoch + step) // stride * stride
        total_steps = self.epochs * self.steps_per_epoch
        warmup_steps = self.warmup * total_steps
        if step < warmup_steps:
            return self.lr * min(1.0, (step + stride) / warmup_steps)
        progress = (step - warmup_steps) / (total_steps - warmup_steps)
        return self.min_lr + (self.lr - self.min_lr) * (1 + math.cos(math.pi * progress)) / 2
