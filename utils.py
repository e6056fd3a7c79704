"""What the training scripts share: the images on the device, augmented batches out of them, and the cosine schedule.

A batch's way: `dataset.load` gives uint8 arrays; `TrainLoader` keeps them on the device as one tensor, augments a chunk
of some thousand images at a time (augment.py), cuts the chunk into batches and normalises each.
"""

import ctypes
import functools
import platform
from collections.abc import Iterator
from dataclasses import fields

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

import augment
import dataset
from dataset import Dataset, Split
from errors import UserError
from recipe import Recipe

# Of the training images of CIFAR-10, by channel, for values of 0 to 1.
MEAN = (0.4914, 0.4824, 0.4467)
STD = (0.2471, 0.2436, 0.2616)

# Pixels augmented in one go: small enough on the CPU to stay near its caches, large enough on a GPU that starting the
# operators costs nothing beside running them. 1,024 and 16,384 images of 32×32.
CHUNK_PIXELS = {"cpu": 2**20, "cuda": 16 * 2**20, "mps": 4 * 2**20}


def pick_device(name: str) -> torch.device:
    """The device that --device names; `auto` takes CUDA, then MPS, then the CPU. Makes the CPU ready where it is that.

    Raises UserError where it is not there.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, is_there in there.items() if is_there)
    if not there[name]:
        have = ", ".join(kind for kind, is_there in there.items() if is_there)
        raise UserError(f"--device {name}: PyTorch {torch.__version__} finds no such device here, only {have}")
    if name == "cpu":
        keep_freed_memory()
    return torch.device(name)


def keep_freed_memory() -> None:
    """Have the C library keep large blocks that PyTorch frees, for the next layer to take.

    By default glibc hands each back to the system, which then clears every page anew: a third of the time of a training
    step on two cores (benchmarks/memory.py). Other C libraries are left as they are.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
        mallopt(m_trim_threshold, -1)  # never shrink the heap
        mallopt(m_mmap_max, 0)  # take no block from outside it


def normalize(images: Tensor, mean: tuple[float, ...] = MEAN, std: tuple[float, ...] = STD) -> Tensor:
    """uint8 (B, 3, H, W) to float32 of the same shape in channels-last order: (image / 255 − mean) / std."""
    shift, scale = _in_grey_levels(mean, images.device), _in_grey_levels(std, images.device)
    return images.to(torch.float32, memory_format=torch.channels_last).sub_(shift).div_(scale)


@functools.cache  # a copy to the device for every batch would make the host wait each time
def _in_grey_levels(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device).mul_(255).view(1, 3, 1, 1)


def load_data(recipe: Recipe) -> Dataset:
    """The images that a recipe's flags name, as arrays on the host."""
    return dataset.load(
        recipe.data,
        image_size=recipe.image_size,
        train_size=recipe.train_size,
        test_size=recipe.test_size,
        val_size=recipe.val_size,
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
    changes what becomes of an image. The last batch may be smaller.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        augmentation: augment.Augmentation,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        chunk_size: int | None = None,
    ):
        self.images = torch.from_numpy(split.images).to(device)
        self.labels = torch.from_numpy(split.labels).to(device)
        self.batch_size, self.augmentation, self.seed = batch_size, augmentation, seed
        self.size = self.images.shape[-1]
        self.augmenter = augment.Augmenter(self.size, augmentation, device)
        chunk_size = chunk_size or CHUNK_PIXELS[self.images.device.type] // self.size**2
        self.chunk_size = max(1, chunk_size // batch_size) * batch_size

    def __len__(self) -> int:
        return -(-len(self.images) // self.batch_size)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches `start` and after of an epoch (both from 0): images, float32 (B, 3, H, W), and labels, int64 (B,)."""
        if start >= len(self):
            return
        generator = epoch_generator(self.seed, epoch)
        draws = augment.draw(len(self.images), self.size, self.augmentation, generator)
        order = torch.randperm(len(self.images), generator=generator)[start * self.batch_size :]
        plan = augment.plan(order, draws, self.chunk_size, self.images.device)
        for number in range(len(plan)):
            chunk = self.augmenter(self.images, plan, number)
            labels = self.labels[plan.index[number * plan.chunk : (number + 1) * plan.chunk]]
            for images, targets in zip(chunk.split(self.batch_size), labels.split(self.batch_size), strict=True):
                yield normalize(images), targets


def cosine_schedule(optimizer: Optimizer, epochs: int, min_lr: float) -> CosineAnnealingLR:
    """From the optimiser's rate in the first epoch to `min_lr` after the last, half a cosine, one step an epoch.

    Loshchilov and Hutter 2017, arXiv:1608.03983, without restarts.
    """
    return CosineAnnealingLR(optimizer, T_max=epochs, eta_min=min_lr)
