"""The networks, by the name under which a checkpoint stores them."""

from collections.abc import Callable

from torch import nn

from .densenet import densenet
from .mobilenetv2 import mobilenetv2
from .resnext import resnext29

NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "densenet": densenet,
    "mobilenetv2": mobilenetv2,
    "resnext29": resnext29,
}
