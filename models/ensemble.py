"""Averages of what several networks predict for the same images."""

from torch import Tensor

AVERAGES = ("softmax", "logits")


def average_probs(logits: Tensor, average: str = "softmax") -> Tensor:
    """Probabilities (N, C), float64, of an ensemble from its members' logits (M, N, C).

    "softmax" is the mean of the members' probabilities, the mixture that the members together are. "logits" is the
    softmax of their mean logits: the geometric mean, normalised, in which a confident member weighs more.
    """
    logits = logits.double()
    if average == "softmax":
        return logits.softmax(2).mean(0)
    if average == "logits":
        return logits.mean(0).softmax(1)
    raise ValueError(f"average is {average!r}; it is one of {', '.join(AVERAGES)}")
