"""The loader that a user would otherwise write: torchvision's transforms, one PIL image at a time, in a DataLoader."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms

from dataset import Split
from dataset.transforms import Augmentation
from utils import MEAN, STD


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
