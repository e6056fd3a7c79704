"""DenseNet for small images.

Huang, Liu, van der Maaten, Weinberger: "Densely Connected Convolutional Networks", CVPR 2017, arXiv:1608.06993.
The networks of table 1 (DenseNet-BC: bottlenecks, and transitions that halve the channels), with two changes: the stem
keeps the resolution, as marked below, and the weights are initialized as described in models/__init__.py.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .classifier import Classifier

# Layers in each dense block, by depth: table 1 of the paper; 37 is our own, for 16×16 images.
BLOCKS = {
    37: (4, 4, 4, 4),
    121: (6, 12, 24, 16),
    169: (6, 12, 32, 32),
    201: (6, 12, 48, 32),
    264: (6, 12, 64, 48),
}


class DenseLayer(nn.Module):
    """Norm, ReLU, 1×1 convolution to 4·k channels, norm, ReLU, 3×3 convolution to k, concatenated with the input."""

    def __init__(self, in_channels: int, growth_rate: int):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, 4 * growth_rate, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(4 * growth_rate)
        self.conv2 = nn.Conv2d(4 * growth_rate, growth_rate, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        new = self.conv1(F.relu(self.norm1(x)))
        new = self.conv2(F.relu(self.norm2(new)))
        return torch.cat((x, new), 1)


class Transition(nn.Module):
    """Norm, ReLU, 1×1 convolution, 2×2 average pooling."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.norm = nn.BatchNorm2d(in_channels)
        self.conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv(F.relu(self.norm(x))), 2)


class DenseNet(nn.Module):
    """Images, float (B, 3, H, W), H and W at least 8, to logits (B, num_classes)."""

    def __init__(self, blocks: tuple[int, ...], growth_rate: int, num_classes: int):
        super().__init__()
        channels = 2 * growth_rate
        # Different from the ImageNet network: 3×3 with stride 1 instead of 7×7 with stride 2, without norm, ReLU and
        # max-pooling after it, so that the first block works at full resolution.
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 3, padding=1, bias=False)]
        for number, num_layers in enumerate(blocks):
            if number:
                layers.append(Transition(channels, channels // 2))
                channels //= 2
            for _ in range(num_layers):
                layers.append(DenseLayer(channels, growth_rate))
                channels += growth_rate
        self.features = nn.Sequential(*layers)
        self.norm = nn.BatchNorm2d(channels)
        self.classifier = Classifier(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.norm(self.features(images)))
        return self.classifier(x)


def densenet(num_classes: int = 10, *, depth: int = 121, growth_rate: int = 32) -> DenseNet:
    """Build a DenseNet. `depth` is a key of `BLOCKS`. DenseNet-121 with growth rate 32 has 6,956,298 parameters."""
    return DenseNet(BLOCKS[depth], growth_rate, num_classes)
