"""ResNeXt-29 for small images.

Xie, Girshick, Dollár, Tu, He: "Aggregated Residual Transformations for Deep Neural Networks", CVPR 2017,
arXiv:1611.05431. The network of section 5.3, which the authors designed for CIFAR; cardinality and base width are flags
(8×64d and 16×64d in the paper). The weights are initialized as described in models/__init__.py.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .classifier import Classifier


class GroupedConv2d(nn.Conv2d):
    """3×3 grouped convolution. With `dense`, the same result by a dense convolution, with zeros between the groups.

    A dense one has `groups` times as many operations, but in bfloat16 and channels-last, cuDNN can be many times slower
    with groups (github.com/pytorch/pytorch/pull/99773). benchmarks/layers.py measures both.
    """

    def __init__(self, channels: int, *, groups: int, stride: int, dense: bool):
        super().__init__(channels, channels, 3, stride, padding=1, groups=groups, bias=False)
        self.dense = dense

    def forward(self, x: Tensor) -> Tensor:
        if not self.dense:
            return super().forward(x)
        size = self.weight.shape[1]  # channels per group
        blocks = [
            F.pad(block, (0, 0, 0, 0, number * size, (self.groups - 1 - number) * size))
            for number, block in enumerate(self.weight.split(size))
        ]
        return F.conv2d(x, torch.cat(blocks), None, self.stride, self.padding)


class Bottleneck(nn.Module):
    """1×1, grouped 3×3 and 1×1 convolution, each with a norm, added to a shortcut (figure 3c)."""

    def __init__(self, in_channels: int, width: int, out_channels: int, *, groups: int, stride: int, dense: bool):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = GroupedConv2d(width, groups=groups, stride=stride, dense=dense)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(out_channels)
        nn.init.zeros_(self.norm3.weight)  # the residual branch starts at zero (Goyal et al. 2017, arXiv:1706.02677)
        self.shortcut = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        new = F.relu(self.norm1(self.conv1(x)))
        new = F.relu(self.norm2(self.conv2(new)))
        return F.relu(self.norm3(self.conv3(new)) + self.shortcut(x))


class ResNeXt(nn.Module):
    """Images, float (B, 3, H, W), to logits (B, num_classes): a 3×3 stem and three stages of three blocks."""

    def __init__(self, cardinality: int, base_width: int, num_classes: int, *, dense: bool):
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(64)
        blocks, in_channels = [], 64
        for stage in range(3):
            # When the resolution is halved, the width of the groups and of the output is doubled.
            width, out_channels = cardinality * base_width * 2**stage, 256 * 2**stage
            for number in range(3):
                stride = 2 if stage and number == 0 else 1
                block = Bottleneck(in_channels, width, out_channels, groups=cardinality, stride=stride, dense=dense)
                blocks.append(block)
                in_channels = out_channels
        self.stages = nn.Sequential(*blocks)
        self.classifier = Classifier(in_channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(images)))
        return self.classifier(self.stages(x))


def resnext29(num_classes: int = 10, *, cardinality: int = 2, base_width: int = 64, dense: bool = False) -> ResNeXt:
    """Build a ResNeXt-29; 2×64d has 9,130,314 parameters, 8×64d 34,426,698, 16×64d 68,155,210.

    `dense`: how the grouped convolutions are computed, see GroupedConv2d. It does not change parameters or outputs.
    """
    return ResNeXt(cardinality, base_width, num_classes, dense=dense)
