"""What a user would otherwise write: a plain loop, and a DataLoader with torchvision's transforms, image by image."""

from collections.abc import Callable

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
from utils import MEAN, STD

BASELINE_BATCH_SIZE = 64
WORKERS = {"baseline": 2, "tuned": num_cores(), "tuned_bfloat16": num_cores()}  # processes of the DataLoader

Step = Callable[[Tensor, Tensor], None]  # trains on images and labels


class PilImages(torch.utils.data.Dataset):
    """A split as torchvision's own data sets give it: one PIL image at a time, transformed."""

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
    """Shuffled batches on the host: images, float32 (B, 3, H, W), and labels, int64 (B,). Its processes stay."""
    transform = transforms.Compose(
        [
            transforms.RandomCrop(split.images.shape[-1], padding=settings.crop_padding),
            transforms.ColorJitter(settings.brightness, settings.contrast, settings.saturation, settings.hue),
            transforms.RandomHorizontalFlip(settings.flip),
            transforms.RandAugment(settings.randaugment_ops, settings.randaugment_magnitude),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    return torch.utils.data.DataLoader(
        PilImages(split, transform),
        batch_size,
        shuffle=True,
        num_workers=workers,
        pin_memory=pin_memory,
        persistent_workers=True,
    )


def baseline_step(model: nn.Module, device: torch.device) -> Step:
    model.to(device)
    optimizer = plain_optimizer(model)
    loss_sum = hits = 0

    def step(images: Tensor, labels: Tensor) -> None:
        nonlocal loss_sum, hits
        images, labels = images.to(device), labels.to(device)
        optimizer.zero_grad()
        logits = model(images)
        loss = F.cross_entropy(logits, labels)
        loss.backward()
        optimizer.step()
        loss_sum += loss.item()
        hits += (logits.argmax(1) == labels).sum().item()

    return step


def tuned_step(model: nn.Module, device: torch.device, precision: str) -> Step:
    model.to(device, memory_format=torch.channels_last)
    optimizer = plain_optimizer(model)
    loss_sum, hits = torch.zeros((), device=device), torch.zeros((), dtype=torch.int64, device=device)

    def step(images: Tensor, labels: Tensor) -> None:
        images = images.to(device, memory_format=torch.channels_last, non_blocking=True)
        labels = labels.to(device, non_blocking=True)
        optimizer.zero_grad()
        with autocast(device, precision):
            logits = model(images)
            loss = F.cross_entropy(logits, labels)
        loss.backward()
        optimizer.step()
        loss_sum.add_(loss.detach())
        hits.add_((logits.argmax(1) == labels).sum())

    return step


def plain_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
