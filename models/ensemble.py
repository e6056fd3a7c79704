"""An ensemble: several networks that see the same image, and the average of their predictions.

evaluation/members.py builds one from checkpoints.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

AVERAGES = ("softmax", "logits")


def average_probs(logits: Tensor, average: str = "softmax", temperature: float = 1.0) -> Tensor:
    """Probabilities (N, C) of an ensemble from its members' logits (M, N, C), in their precision.

    "softmax" is the mean of the members' probabilities. "logits" is the softmax of their mean logits: the normalised
    geometric mean of the probabilities, in which a confident member weighs more.

    A temperature above 1 makes the average less confident, below 1 more (Rahaman and Thiery 2021, arXiv:2007.08792).
    """
    if average == "softmax" and temperature == 1.0:
        return logits.softmax(2).mean(0)
    return (average_logits(logits, average) / temperature).softmax(1)


def average_logits(logits: Tensor, average: str = "softmax") -> Tensor:
    """Logits (N, C) whose softmax is the average of members' logits (M, N, C).

    Computed in log space: a probability that underflows to 0 would have the logarithm −inf.
    """
    if average == "softmax":
        return torch.logsumexp(logits.log_softmax(2), 0)
    if average == "logits":
        return logits.mean(0)
    raise ValueError(f"average is {average!r}; it is one of {', '.join(AVERAGES)}")


class Member(nn.Module):
    """A trained network and the normalisation of its images: uint8 (B, 3, H, W) to logits (B, classes)."""

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.network = network
        # On the scale of uint8, 0 to 255, so that the images need not be divided by 255 first.
        self.register_buffer("mean", 255 * torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(std).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.network((images.float() - self.mean) / self.std)


class Ensemble(nn.Module):
    """Images, uint8 (B, 3, S, S), to probabilities, float32 (B, classes).

    `classes` are their names, `image_size` is S. Raises ValueError for images of another type or shape.
    """

    def __init__(
        self,
        members: Sequence[Member],
        classes: Sequence[str],
        image_size: int,
        *,
        average: str = "softmax",
        temperature: float = 1.0,
    ):
        super().__init__()
        self.members = nn.ModuleList(members)
        self.classes, self.image_size = list(classes), image_size
        self.average, self.temperature = average, temperature

    def forward(self, images: Tensor) -> Tensor:
        size = self.image_size
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1:] != (3, size, size):
            raise ValueError(
                f"images are {images.dtype} of shape {tuple(images.shape)}; expected torch.uint8, values 0 to 255, of "
                f"shape (B, 3, {size}, {size})"
            )
        return average_probs(self.logits(images).float(), self.average, self.temperature)

    def logits(self, images: Tensor) -> Tensor:
        """Of each member, (M, B, classes)."""
        return torch.stack([member(images) for member in self.members])
