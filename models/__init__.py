"""The networks, by the name under which a checkpoint stores them.

All three start from PyTorch's own random weights, where the papers of DenseNet and ResNeXt take those of He et al. 2015
(arXiv:1502.01852). A norm follows every convolution, so a weight's scale changes only its effective learning rate
(van Laarhoven 2017, arXiv:1706.05350), which is higher for PyTorch's smaller weights. The last norm of a residual block
starts at zero.
"""

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
