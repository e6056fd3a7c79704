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


def cascade_probs(probs: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Probabilities (N, C) of a cascade, and how many members saw each image, int64 (N,), from probabilities (M, N, C).

    Stops at the first member at which the averaged top probability reaches `threshold`. (Wang et al. 2022, "Wisdom of
    Committees", arXiv:2012.01988)
    """
    averages = torch.stack([probs[:count].mean(0) for count in range(1, len(probs) + 1)])
    goes_on = (averages[:-1].amax(2) < threshold).long().cumprod(0)
    seen = 1 + goes_on.sum(0)
    return averages.take_along_dim((seen - 1)[None, :, None], 0)[0], seen


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

    `classes` are their names, `image_size` is S. With `cascade`, a threshold, a member sees only the images for which
    the averaged top probability of the members before it is below the threshold, as in `cascade_probs`. Raises
    ValueError for images of another type or shape, and for a cascade with another average than softmax.
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
        """Of each member, (M, B, classes)."""
        return torch.stack([member(images) for member in self.members])

    def logits_and_seen(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of each member, float32 (M, B, classes), and how many members saw each image, int64 (B,).

        In a cascade, a member's logits are 0 for an image that it did not see.
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
        """Probabilities (N, C) from what `logits_and_seen` returns: averaged over the members that saw the image."""
        if self.cascade is None:
            return average_probs(logits, self.average, self.temperature)
        has_seen = torch.arange(len(logits), device=logits.device)[:, None] < seen
        return (logits.softmax(2) * has_seen[..., None]).sum(0) / seen[:, None]
