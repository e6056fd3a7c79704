"""MobileNetV2 for small images.

Sandler, Howard, Zhu, Zhmoginov, Chen: "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018,
arXiv:1801.04381. The network of table 2, with two strides of 1 instead of 2, as marked below. The weights are
initialized as described in models/__init__.py.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .classifier import Classifier

# Table 2: expansion t, channels c, blocks n, stride s of the first block.
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),  # different from the ImageNet network: stride 1 instead of 2
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def scale_channels(channels: int, width: float) -> int:
    """`channels` times the width multiplier, rounded to a multiple of 8, but not below 90 % of the product.

    This is `_make_divisible` of the authors' code (github.com/tensorflow/models).
    """
    exact = channels * width
    rounded = max(8, int(exact + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * exact else rounded + 8


class DepthwiseConv2d(nn.Conv2d):
    """3×3 depthwise convolution.

    In bfloat16 on a CPU, oneDNN has no fast kernel for the gradient of the input with stride 2: it takes 20 to 100
    times as long as in float32, half of the whole training step. So this gradient is computed in float32.
    """

    def __init__(self, channels: int, stride: int):
        super().__init__(channels, channels, 3, stride, 1, groups=channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == (1, 1) or x.dtype != torch.bfloat16 or x.device.type != "cpu":
            return super().forward(x)
        return DepthwiseBFloat16.apply(x, self.weight.to(x.dtype), self.stride)


class DepthwiseBFloat16(torch.autograd.Function):
    """The convolution of DepthwiseConv2d, but with the gradient of the input computed in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride = stride
        return F.conv2d(x, weight, None, stride, 1, groups=len(weight))

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        grad_x = nn.grad.conv2d_input(x.shape, weight.float(), grad_output.float(), ctx.stride, 1, groups=len(weight))
        grad_weight = nn.grad.conv2d_weight(x, weight.shape, grad_output, ctx.stride, 1, groups=len(weight))
        return grad_x.to(x.dtype), grad_weight, None


def conv_norm(in_channels: int, out_channels: int, kernel: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=False)
    return [convolution, nn.BatchNorm2d(out_channels)]


class InvertedResidual(nn.Module):
    """1×1 expansion by t, 3×3 depthwise, linear 1×1 projection; a shortcut if input and output have the same shape."""

    def __init__(self, in_channels: int, out_channels: int, expansion: int, stride: int):
        super().__init__()
        hidden = in_channels * expansion
        layers: list[nn.Module] = []
        if expansion > 1:
            layers += [*conv_norm(in_channels, hidden), nn.ReLU6()]
        layers += [DepthwiseConv2d(hidden, stride), nn.BatchNorm2d(hidden), nn.ReLU6()]
        layers += conv_norm(hidden, out_channels)
        self.layers = nn.Sequential(*layers)
        self.shortcut = stride == 1 and in_channels == out_channels
        if self.shortcut:  # the residual branch starts at zero (Goyal et al. 2017, arXiv:1706.02677)
            nn.init.zeros_(layers[-1].weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.shortcut else self.layers(x)


class MobileNetV2(nn.Module):
    """Images, float (B, 3, H, W), to logits (B, num_classes)."""

    def __init__(self, width: float, num_classes: int):
        super().__init__()
        channels = scale_channels(32, width)
        # Different from the ImageNet network: stride 1 instead of 2.
        layers: list[nn.Module] = [*conv_norm(3, channels, 3), nn.ReLU6()]
        for expansion, stage_channels, num_blocks, stride in STAGES:
            for block in range(num_blocks):
                out_channels = scale_channels(stage_channels, width)
                layers.append(InvertedResidual(channels, out_channels, expansion, stride if block == 0 else 1))
                channels = out_channels
        # A multiplier below 1 does not apply to the last convolution (section 5, "Trade-off hyper parameters").
        last_channels = scale_channels(1280, max(1.0, width))
        layers += [*conv_norm(channels, last_channels), nn.ReLU6()]
        self.features = nn.Sequential(*layers)
        self.classifier = Classifier(last_channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images))


def mobilenetv2(num_classes: int = 10, *, width: float = 1.0) -> MobileNetV2:
    """Build a MobileNetV2 with a width multiplier; at 1.0 it has 2,236,682 parameters."""
    return MobileNetV2(width, num_classes)
