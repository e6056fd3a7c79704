"""What the training scripts share: the images on the device, augmented batches out of them, and the cosine schedule.

A batch's way: `dataset.load` gives uint8 arrays; `TrainLoader` keeps them on the device as one tensor, augments a chunk
of some thousand images at a time (augment.py), cuts the chunk into batches and normalises each.
"""

import ctypes
import functools
import math
import os
import platform
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import augment
import dataset
import parallel
from dataset import Dataset, Split
from errors import UserError
from recipe import Recipe

# Of the training images of CIFAR-10, by channel, for values of 0 to 1.
MEAN = (0.4914, 0.4824, 0.4467)
STD = (0.2471, 0.2436, 0.2616)

WHOLE_RUN = 2**32  # the "epoch" whose random numbers belong to a run as a whole
# Pixels augmented in one go: small enough on the CPU to stay near its caches, large enough on a GPU that starting the
# operators costs nothing beside running them. 1,024 and 16,384 images of 32×32.
CHUNK_PIXELS = {"cpu": 2**20, "cuda": 16 * 2**20, "mps": 4 * 2**20}


def pick_device(name: str, *, deterministic: bool = False) -> torch.device:
    """The device that --device names; `auto` takes CUDA, then MPS, then the CPU. Sets what makes it fast.

    `deterministic` also has it give the same bits in each run, at a price on CUDA; the CPU does so anyway.

    Raises UserError where it is not there.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, is_there in there.items() if is_there)
    if not there[name]:
        have = ", ".join(kind for kind, is_there in there.items() if is_there)
        raise UserError(f"--device {name}: PyTorch {torch.__version__} finds no such device here, only {have}")
    if name == "cuda" and deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # a guard for code that reads such memory
    if name == "cpu":
        keep_freed_memory()
        refuse_memory_that_is_not_there()
    if name == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
        # The sizes stay the same for a whole run: try which algorithm is fastest, where the choice may differ by run.
        torch.backends.cudnn.benchmark = not deterministic
    return torch.device(name)


def pick_precision(choice: str, device: torch.device) -> str:
    """What --precision comes to: "float32" or "bfloat16".

    `auto` takes bfloat16 on CUDA and on a CPU with instructions for it; without them it is slower than float32, by up
    to 499 times (github.com/pytorch/pytorch/issues/146508).
    """
    if choice != "auto":
        return choice
    fast = device.type == "cuda" or (device.type == "cpu" and cpu_has_bfloat16())
    return "bfloat16" if fast else "float32"


def cpu_has_bfloat16() -> bool:
    """Whether this CPU has instructions for products of bfloat16 numbers, and PyTorch may use them.

    ATEN_CPU_CAPABILITY=avx2 in the environment, PyTorch's own variable, forbids it.
    """
    there = torch.cpu.get_capabilities()
    if there.get("avx2") and torch.backends.cpu.get_cpu_capability() == "AVX2":
        return False
    return any(there.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def keep_freed_memory() -> None:
    """Have the C library keep large blocks that PyTorch frees, for the next layer to take.

    By default glibc hands each back to the system, which then clears every page anew: an eighth to a third of the time
    of a training step on two cores (benchmarks/memory.py). Other C libraries are left as they are.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
        mallopt(m_trim_threshold, -1)  # never shrink the heap
        mallopt(m_mmap_max, 0)  # take no block from outside it


def refuse_memory_that_is_not_there() -> None:
    """Have allocations fail beyond what is free now, with an error that can be explained, on Linux.

    By default Linux grants any amount and kills the process, without a word, when it comes to use it.
    """
    if sys.platform != "linux":
        return
    import resource

    kilobytes = {}
    for path in ("/proc/meminfo", "/proc/self/status"):
        for line in Path(path).read_text().splitlines():
            name, _, value = line.partition(":")
            if value.endswith(" kB"):
                kilobytes[name] = int(value.split()[0])
    limit = 1024 * (kilobytes["VmData"] + kilobytes["MemAvailable"])
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if soft == resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device or the host had no memory left, in whichever of its ways PyTorch says so."""
    signs = ("out of memory", "ALLOC_FAILED", "not enough memory", "DefaultCPU")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
    )


def normalize(images: Tensor, mean: tuple[float, ...] = MEAN, std: tuple[float, ...] = STD) -> Tensor:
    """uint8 (B, 3, H, W) to float32 of the same shape in channels-last order: (image / 255 − mean) / std."""
    shift, scale = _in_grey_levels(mean, images.device), _in_grey_levels(std, images.device)
    return images.to(torch.float32, memory_format=torch.channels_last).sub_(shift).div_(scale)


@functools.cache  # a copy to the device for every batch would make the host wait each time
def _in_grey_levels(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device).mul_(255).view(1, 3, 1, 1)


def load_data(recipe: Recipe) -> Dataset:
    """The images that a recipe's flags name, as arrays on the host."""
    with parallel.first_here():  # what it downloads and decodes, the others find there
        return dataset.load(
            recipe.data,
            image_size=recipe.image_size,
            train_size=recipe.train_size,
            test_size=recipe.test_size,
            val_size=recipe.val_size,
            test_split=recipe.test_split,
            split_seed=recipe.split_seed,
            data_url=recipe.data_url,
        )


def augmentation_of(recipe: Recipe) -> augment.Augmentation:
    return augment.Augmentation(**{item.name: getattr(recipe, item.name) for item in fields(augment.Augmentation)})


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """A CPU generator for one epoch (from 0) of a run; every pair of seed and epoch gives another stream."""
    state = np.random.SeedSequence((seed, epoch)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


class TrainLoader:
    """Augmented and normalised batches of a split, made on the device.

    The order of the images and all their draws follow from (seed, epoch) alone: neither the batch size nor the chunk
    changes what becomes of an image. The last batch may be smaller. Of several processes each gets its share of every
    batch.

    From epoch `crop_and_flip_from` on, crop and flip alone are left of the augmentation.

    `ahead` (by default on CUDA) keeps the work off the critical path: a thread draws for the next epoch while this one
    is trained, and the device augments the next chunk beside the training steps on this one.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        augmentation: augment.Augmentation,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        crop_and_flip_from: int | None = None,
        chunk_size: int | None = None,
        ahead: bool | None = None,
    ):
        self.images = torch.from_numpy(split.images).to(device)
        self.labels = torch.from_numpy(split.labels).to(device)
        self.device = self.images.device
        self.batch_size, self.augmentation, self.seed = batch_size, augmentation, seed
        self.size = self.images.shape[-1]
        self.crop_and_flip_from = math.inf if crop_and_flip_from is None else crop_and_flip_from
        self.augmenters = {
            settings: augment.Augmenter(self.size, settings, device)
            for settings in (augmentation, augmentation.crop_and_flip())
        }
        self.flip_phase = torch.rand(len(self.images), generator=epoch_generator(seed, WHOLE_RUN), dtype=torch.float64)
        self.rank, self.world_size = parallel.rank(), parallel.world_size()
        self.own_size = len(range(batch_size)[self.share(batch_size)])
        chunk_size = chunk_size or CHUNK_PIXELS[self.device.type] // self.size**2
        self.chunk_size = max(1, chunk_size // self.own_size) * self.own_size
        ahead = self.device.type == "cuda" if ahead is None else ahead
        self.thread = ThreadPoolExecutor(1, "plan") if ahead else None
        self.planned: dict[int, Future] = {}  # by epoch
        self.stream = torch.cuda.Stream(self.device) if ahead and self.device.type == "cuda" else None

    def __len__(self) -> int:
        return -(-len(self.images) // self.batch_size)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches `start` and after of an epoch (both from 0): images, float32 (B, 3, H, W), and labels, int64 (B,)."""
        if start >= len(self):
            return
        waiting = self.planned.pop(epoch, None) if start == 0 else None
        plan = waiting.result() if waiting else self.plan(epoch, start)
        if self.thread:
            self.planned = {epoch + 1: self.thread.submit(self.plan, epoch + 1)}
        for images, labels in self.chunks(plan.to(self.device), self.augmenter(epoch)):
            for batch, targets in zip(images.split(self.own_size), labels.split(self.own_size), strict=True):
                yield normalize(batch), targets

    def share(self, count: int) -> slice:
        return parallel.share(count, self.rank, self.world_size)

    def settings(self, epoch: int) -> augment.Augmentation:
        return self.augmentation if epoch < self.crop_and_flip_from else self.augmentation.crop_and_flip()

    def augmenter(self, epoch: int) -> augment.Augmenter:
        return self.augmenters[self.settings(epoch)]

    def images_in(self, step: int) -> int:
        """How many images a step's batch has, in all processes together."""
        return min(self.batch_size, len(self.images) - step * self.batch_size)

    def plan(self, epoch: int, start: int = 0) -> augment.Plan:
        generator = epoch_generator(self.seed, epoch)
        settings = self.settings(epoch)
        draws = augment.draw(len(self.images), self.size, settings, generator)
        if settings.alternating_flip:
            draws = replace(draws, flip=augment.alternating_flip(self.flip_phase, epoch, settings.flip))
        order = torch.randperm(len(self.images), generator=generator)[start * self.batch_size :]
        order = torch.cat([batch[self.share(len(batch))] for batch in order.split(self.batch_size)])
        return augment.plan(order, draws, self.chunk_size)

    def chunks(self, plan: augment.Plan, augmenter: augment.Augmenter) -> Iterator[tuple[Tensor, Tensor]]:
        """Augmented images, uint8 (chunk, 3, H, W), and their labels."""
        if self.stream is None:
            for number in range(len(plan)):
                yield self.chunk(plan, number, augmenter)
            return
        training = torch.cuda.current_stream(self.device)

        def augment_beside(number: int) -> tuple[Tensor, Tensor]:
            # Behind what was given to the training stream until now: the plan's copy, and the last use of the memory of
            # the chunk before, which the next one may get.
            self.stream.wait_stream(training)
            with torch.cuda.stream(self.stream):
                return self.chunk(plan, number, augmenter)

        try:
            ready = augment_beside(0)
            for number in range(len(plan)):
                chunk = ready
                training.wait_stream(self.stream)
                if number + 1 < len(plan):
                    ready = augment_beside(number + 1)
                yield chunk
        finally:
            training.wait_stream(self.stream)  # which may still read the plan when the epoch is broken off

    def chunk(self, plan: augment.Plan, number: int, augmenter: augment.Augmenter) -> tuple[Tensor, Tensor]:
        index = plan.index[number * plan.chunk : (number + 1) * plan.chunk]
        return augmenter(self.images, plan, number), self.labels.index_select(0, index)


@dataclass(frozen=True)
class CosineSchedule:
    """The learning rate of every step: a linear climb, then half a cosine down.

    From `lr` to `min_lr`, Loshchilov and Hutter 2017, arXiv:1608.03983, without restarts; the climb over the first part
    of the run, `warmup`, is that of Goyal et al. 2017, arXiv:1706.02677. `each` says when the rate changes: "epoch" or
    "batch".
    """

    lr: float
    min_lr: float
    epochs: int
    warmup: float = 0.0
    each: str = "epoch"

    def __call__(self, epoch: int, step: int, steps: int) -> float:
        """The rate of step `step` of the `steps` in epoch `epoch`, the first two counted from 0."""
        done, stride = (epoch * steps + step, 1) if self.each == "batch" else (epoch * steps, steps)
        total = self.epochs * steps
        climb = self.warmup * total
        if done < climb:
            return self.lr * min(1.0, (done + stride) / climb)
        turn = (done - climb) / (total - climb)
        return self.min_lr + (self.lr - self.min_lr) * (1 + math.cos(math.pi * turn)) / 2
