"""An ensemble: several networks that see the same image, and one prediction from all of theirs.

>>> import models.ensemble
>>> ensemble = models.ensemble.load(["checkpoints/densenet.pt", "checkpoints/resnext.pt"])
>>> probs = ensemble(images)  # uint8 (B, 3, H, W) in, float32 (B, classes) out
>>> names = [ensemble.classes[number] for number in probs.argmax(1)]
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import checkpoint
from errors import UserError

AVERAGES = ("softmax", "logits")
TEMPERATURES = (0.05, 20.0)  # what may divide an average's logits; beyond, all are sure of one class, or of none
# The members of the ensemble that is taken where none are named, and what makes them.
SCRIPTS = {"densenet.pt": "dense.py", "mobilenetv2.pt": "mobilenetv2.py", "resnext.pt": "resnext.py"}


def average_probs(logits: Tensor, average: str = "softmax", temperature: float | Tensor = 1.0) -> Tensor:
    """Probabilities (N, C) of an ensemble from its members' logits (M, N, C), in their precision.

    "softmax" is the mean of the members' probabilities, the mixture that the members together are. "logits" is the
    softmax of their mean logits: the geometric mean, normalised, in which a confident member weighs more.

    A temperature above 1 makes what was averaged less sure of itself, below 1 surer (Rahaman and Thiery 2021,
    arXiv:2007.08792).
    """
    return (average_logits(logits, average) / temperature).softmax(1)


def average_logits(logits: Tensor, average: str = "softmax") -> Tensor:
    """Logits (N, C) whose softmax is the average of members' logits (M, N, C)."""
    if average == "softmax":
        return torch.logsumexp(logits.log_softmax(2), 0)
    if average == "logits":
        return logits.mean(0)
    raise ValueError(f"average is {average!r}; it is one of {', '.join(AVERAGES)}")


Contents = Sequence[tuple[Path, dict[str, Any]]]  # of checkpoints, each with its path


class Member(nn.Module):
    """A trained network and the normalisation of its images: uint8 (B, 3, H, W) to logits (B, classes)."""

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.network = network
        # In grey levels, so that the images need not be divided first.
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
        """What each member says, (M, B, classes)."""
        return torch.stack([member(images) for member in self.members])


def load(paths: Sequence[str | Path], *, average: str = "softmax", temperature: float = 1.0) -> Ensemble:
    """The ensemble of one or more checkpoints, on the CPU, in evaluation mode.

    Raises UserError for a checkpoint that is missing, unusable or given twice, and for members of other classes or
    another image size than the first.
    """
    return build(read_all(paths), average=average, temperature=temperature)


def read_all(paths: Sequence[str | Path]) -> Contents:
    """Read checkpoints; one whose training is not finished gets a warning on stderr.

    Raises UserError for one that is missing, naming the script that makes it, or unusable.
    """
    contents = []
    for path in map(Path, paths):
        if not os.path.exists(path):
            script = f"python {SCRIPTS[path.name]} makes it" if path.name in SCRIPTS else "give one that is there"
            raise UserError(f"{path}: there is no such checkpoint; {script}")
        content = checkpoint.read(path)
        if not content["finished"]:
            done, epochs = content["training"]["epoch"], content["recipe"]["epochs"]
            print(
                f"warning: {path} is not finished, {done} of {epochs} epochs; it is used as it stands", file=sys.stderr
            )
        contents.append((path, content))
    return contents


def check_temperature(value: float) -> None:
    """Raises UserError for a --temperature outside `TEMPERATURES`."""
    low, high = TEMPERATURES
    if not low <= value <= high:
        raise UserError(f"--temperature is {value:g}; it must be {low:g} to {high:g}")


def names(paths: Sequence[Path]) -> list[str]:
    """What to call the members: file names without their ending, or whole paths where two would be the same."""
    stems = [path.stem for path in paths]
    return stems if len(set(stems)) == len(stems) else [str(path) for path in paths]


def build(contents: Contents, *, average: str = "softmax", temperature: float = 1.0) -> Ensemble:
    """The ensemble of checkpoints that `read_all` has read; raises as `load` does."""
    check(contents)
    members = [build_member(path, content) for path, content in contents]
    data = contents[0][1]["data"]
    ensemble = Ensemble(members, data["classes"], data["image_size"], average=average, temperature=temperature)
    return ensemble.to(memory_format=torch.channels_last).eval().requires_grad_(False)


def build_member(path: Path, content: dict[str, Any]) -> Member:
    """The network of one checkpoint, in evaluation mode. Raises UserError where its weights do not fit."""
    data = content["data"]
    return Member(checkpoint.build_model(path, content), data["mean"], data["std"]).eval()


def check(contents: Contents) -> None:
    """See that checkpoints can be averaged.

    Raises UserError for none, for one given twice, and for other classes or another image size than the first's.
    """
    if not contents:
        raise UserError("an ensemble needs one checkpoint or more; none is given")
    if len({path.resolve() for path, _ in contents}) < len(contents):
        raise UserError("a checkpoint is given twice; it would count twice in the average")
    (first_path, first), *others = contents
    for path, content in others:
        for what, key in (("classes", "classes"), ("image size", "image_size")):
            ours, theirs = content["data"][key], first["data"][key]
            if ours != theirs:
                raise UserError(
                    f"these members do not go together:\n  {what}: {_shown(theirs)} in {first_path}, {_shown(ours)} in "
                    f"{path}"
                )


def _shown(value: Any) -> str:
    return ", ".join(value) if isinstance(value, list) else str(value)
