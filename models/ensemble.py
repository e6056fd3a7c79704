"""An ensemble: several networks classify the same images, and their predictions are averaged.

evaluation/members.py builds it from checkpoints.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

AVERAGES = ("softmax", "logits")


def average_probs(logits: Tensor, average: str = "softmax", temperature: float = 1.0) -> Tensor:
    """Probabilities of an ensemble, (N, C), from the logits of its members, (M, N, C), with the same dtype.

    "softmax" is the mean of the members' probabilities. "logits" is the softmax of their mean logits. That is the
    normalized geometric mean of the probabilities, in which confident members have more weight.

    A temperature above 1 makes the average less confident, below 1 more (Rahaman and Thiery 2021, arXiv:2007.08792).
    """
    if average == "softmax" and temperature == 1.0:
        return logits.softmax(2).mean(0)
    return (average_logits(logits, average) / temperature).softmax(1)


def average_logits(logits: Tensor, average: str = "softmax") -> Tensor:
    """Logits (N, C) whose softmax is the average of the members, from their logits (M, N, C).

    Computed in log space, because the logarithm of a probability that underflows to 0 would be −inf.
    """
    if average == "softmax":
        return torch.logsumexp(logits.log_softmax(2), 0)
    if average == "logits":
        return logits.mean(0)
    raise ValueError(f"average is {average!r}; expected one of {', '.join(AVERAGES)}")


def cascade_probs(probs: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Probabilities of a cascade, (N, C), and how many members each image needs, int64 (N,), from (M, N, C).

    Members are added until the top probability of their average reaches `threshold` (Wang et al. 2022, "Wisdom of
    Committees", arXiv:2012.01988).
    """
    averages = torch.stack([probs[:count].mean(0) for count in range(1, len(probs) + 1)])
    needs_next = (averages[:-1].amax(2) < threshold).long().cumprod(0)
    seen = 1 + needs_next.sum(0)
    return averages.take_along_dim((seen - 1)[None, :, None], 0)[0], seen


class Member(nn.Module):
    """A trained network with its own normalization: images, uint8 (B, 3, H, W), to logits (B, classes)."""

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.network = network
        # Scaled to pixel values, 0 to 255, so that the images need not be divided by 255.
        self.register_buffer("mean", 255 * torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(std).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.network((images.float() - self.mean) / self.std)


class Ensemble(nn.Module):
    """Images, uint8 (B, 3, S, S), to probabilities, float32 (B, classes).

    `classes` are the class names, `image_size` is S. `cascade` is a threshold as in `cascade_probs`: a member only runs
    on images for which the top probability of the previous members' average is below it. Raises ValueError for images
    of another dtype or shape, and for a cascade with a temperature or another average than softmax.
    """

    def __init__(
        self,
        members: Sequence[Member],
        classes: Sequence[str],
        image_size: int,
        *,
        average: str = "softmax",
        temperature: float = 1.0,
        cascade: float | None = None,
    ):
        super().__init__()
        if cascade is not None and (average != "softmax" or temperature != 1.0):
            raise ValueError("a cascade averages softmax outputs, at a temperature of 1")
        self.members = nn.ModuleList(members)
        self.classes, self.image_size = list(classes), image_size
        self.average, self.temperature, self.cascade = average, temperature, cascade

    def forward(self, images: Tensor) -> Tensor:
        size = self.image_size
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1:] != (3, size, size):
            raise ValueError(
                f"images are {images.dtype} of shape {tuple(images.shape)}; expected torch.uint8, values 0 to 255, of "
                f"shape (B, 3, {size}, {size})"
            )
        return self.average_seen(*self.logits_and_seen(images))

    def logits(self, images: Tensor) -> Tensor:
        """The logits of each member, (M, B, classes)."""
        return torch.stack([member(images) for member in self.members])

    def logits_and_seen(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of each member, float32 (M, B, classes), and how many members ran on each image, int64 (B,).

        In a cascade, the logits are 0 for the images on which a member did not run.
        """
        seen = torch.full((images.shape[0],), len(self.members), device=images.device)
        if self.cascade is None:
            return self.logits(images).float(), seen
        logits = torch.zeros(len(self.members), len(images), len(self.classes), device=images.device)
        rows = torch.arange(len(images), device=images.device)
        for number, member in enumerate(self.members):
            logits[number, rows] = member(images[rows]).float()
            seen[rows] = number + 1
            rows = rows[average_probs(logits[: number + 1, rows]).amax(1) < self.cascade]
            if not len(rows):
                break
        return logits, seen

    def average_seen(self, logits: Tensor, seen: Tensor) -> Tensor:
        """Probabilities (N, C) from the output of `logits_and_seen`, averaged over the members that ran on an image."""
        if self.cascade is None:
            return average_probs(logits, self.average, self.temperature)
        has_seen = torch.arange(len(logits), device=logits.device)[:, None] < seen
        return (logits.softmax(2) * has_seen[..., None]).sum(0) / seen[:, None]
