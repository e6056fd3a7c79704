"""The networks, by the names that checkpoints store.

Weights are initialized by PyTorch's defaults. The papers of DenseNet and ResNeXt use the larger weights of He et al.
2015 (arXiv:1502.01852). Since a norm follows every convolution, the scale of a convolution's weights only changes its
effective learning rate (van Laarhoven 2017, arXiv:1706.05350), which is higher for smaller weights. The weights of the
last norm in a residual block start at zero.
"""

from .densenet import densenet
from .mobilenetv2 import mobilenetv2
from .resnext import resnext29

NETWORKS = {"densenet": densenet, "mobilenetv2": mobilenetv2, "resnext29": resnext29}
