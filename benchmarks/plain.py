"""The usual code, to compare with: a plain loop, and a DataLoader with torchvision's transforms for single images."""

import time
from collections.abc import Callable
from typing import Any

from common.device import autocast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import transforms

from dataset import Split
from dataset.image_folder import num_cores
from dataset.transforms import Augmentation
from models import NETWORKS
from utils import MEAN, STD

BASELINE_BATCH_SIZE = 64
WORKERS = {"baseline": 2, "tuned": num_cores(), "tuned_bfloat16": num_cores()}  # DataLoader workers
LIBGOMP_SPINS = "300000"  # libgomp's default for GOMP_SPINCOUNT, which common/__init__.py replaces

Step = Callable[[Tensor, Tensor], None]  # one training step on images and labels


class PilImages(torch.utils.data.Dataset):
    """A split like torchvision's data sets: one transformed PIL image at a time."""

    def __init__(self, split: Split, transform: transforms.Compose):
        self.pixels = np.ascontiguousarray(split.images.transpose(0, 2, 3, 1))
        self.labels = split.labels.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[row])), self.labels[row]


def torchvision_loader(
    split: Split, settings: Augmentation, *, batch_size: int, workers: int, pin_memory: bool = False
) -> torch.utils.data.DataLoader:
    """Shuffled batches on the host: images, float32 (B, 3, H, W), and labels, int64 (B,). Its workers persist."""
    steps = [
        transforms.RandomCrop(split.images.shape[-1], padding=settings.crop_padding),
        transforms.ColorJitter(settings.brightness, settings.contrast, settings.saturation, settings.hue),
        transforms.RandomHorizontalFlip(settings.flip),
        transforms.RandAugment(settings.randaugment_ops, settings.randaugment_magnitude),
        transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
    ]
    images, own = PilImages(split, transforms.Compose(steps)), {"num_workers": workers, "pin_memory": pin_memory}
    return torch.utils.data.DataLoader(images, batch_size, shuffle=True, persistent_workers=True, **own)


def plain_step(model: nn.Module, device: torch.device, *, precision: str = "float32", tuned: bool = True) -> Step:
    """A step of the plain loop. `tuned`: channels-last, without synchronization of host and device."""
    layout = torch.channels_last if tuned else torch.contiguous_format
    model.to(device, memory_format=layout).train()
    optimizer = plain_optimizer(model)
    sums: list[Any] = [0, 0]  # losses and correct predictions

    def step(images: Tensor, labels: Tensor) -> None:
        images = images.to(device, memory_format=layout, non_blocking=tuned)
        labels = labels.to(device, non_blocking=tuned)
        optimizer.zero_grad()
        with autocast(device, precision):
            logits = model(images)
            loss = F.cross_entropy(logits, labels)
        loss.backward()
        optimizer.step()
        for number, value in enumerate((loss.detach(), (logits.argmax(1) == labels).sum())):
            sums[number] += value if tuned else value.item()

    return step


def plain_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)


def rate_on_one_batch(network: str, seconds: float, batch_size: int, **arguments: Any) -> float:
    """Images per second of the tuned loop on the CPU in float32, on one batch of noise, after two warm-up steps."""
    step = plain_step(NETWORKS[network](10, **arguments), torch.device("cpu"))
    images, labels = torch.randn(batch_size, 3, 32, 32), torch.randint(10, (batch_size,))
    step(images, labels)
    step(images, labels)
    started, count = time.perf_counter(), 0
    while (taken := time.perf_counter() - started) < seconds:
        step(images, labels)
        count += 1
    return count * batch_size / taken
