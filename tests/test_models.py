"""The networks: parameter counts, and outputs compared with torchvision's implementations."""

import copy

from common.device import autocast

import pytest
import torch
import torchvision
from torch import nn

from models import NETWORKS
from models.densenet import BLOCKS, densenet
from models.mobilenetv2 import DepthwiseConv2d, mobilenetv2, scale_channels
from models.resnext import resnext29

SMALL = [
    ("densenet", {"depth": 37, "growth_rate": 8}),
    ("mobilenetv2", {"width": 0.25}),
    ("resnext29", {"cardinality": 4, "base_width": 4}),
]
by_name = pytest.mark.parametrize(("name", "arguments"), SMALL, ids=[name for name, _ in SMALL])
both_modes = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])


@pytest.mark.parametrize(
    ("name", "count"), [("densenet", 6_956_298), ("mobilenetv2", 2_236_682), ("resnext29", 9_130_314)]
)
def test_parameter_count(name, count):
    with torch.device("meta"):
        model = NETWORKS[name](10)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def copy_weights(source, target):
    """Copy the weights in the order of both state dicts."""
    ours, theirs = source.state_dict(), target.state_dict()
    assert [tuple(value.shape) for value in ours.values()] == [tuple(value.shape) for value in theirs.values()]
    target.load_state_dict(dict(zip(theirs, ours.values(), strict=True)))


def images_for(model):
    dtype = next(model.parameters()).dtype
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=dtype)


def assert_same_output(ours, theirs):
    # In float64: in training mode, a norm over a nearly constant channel enlarges the rounding errors of float32.
    expected = theirs.double()(images_for(theirs))
    assert expected.std(0).min() > 1e-3, "the output should depend on the image"
    torch.testing.assert_close(ours.double()(images_for(ours)), expected, rtol=1e-6, atol=1e-6)


def with_trained_norms(model):
    """Set realistic statistics and random affine weights: with initial ones, a misplaced norm would not be noticed."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.copy_(torch.rand(module.weight.shape, generator=generator) + 0.5)
            module.bias.data.copy_(torch.rand(module.bias.shape, generator=generator) - 0.5)
            module.momentum = 1.0
    model.train()(images_for(model))
    return model


@both_modes
@pytest.mark.parametrize(("depth", "growth_rate"), [(121, 32), (169, 12)])
def test_densenet_equals_torchvision(depth, growth_rate, training):
    ours = with_trained_norms(densenet(10, depth=depth, growth_rate=growth_rate))
    theirs = torchvision.models.DenseNet(growth_rate, BLOCKS[depth], 2 * growth_rate, num_classes=10)
    theirs.features.conv0 = nn.Conv2d(3, 2 * growth_rate, 3, padding=1, bias=False)
    theirs.features.norm0 = theirs.features.relu0 = theirs.features.pool0 = nn.Identity()
    copy_weights(ours, theirs)
    assert_same_output(ours.train(training), theirs.train(training))


@both_modes
@pytest.mark.parametrize("width", [1.0, 0.35, 1.4])
def test_mobilenetv2_equals_torchvision(width, training):
    ours = with_trained_norms(mobilenetv2(10, width=width))
    # torchvision adds dropout, which the paper does not have.
    theirs = torchvision.models.MobileNetV2(num_classes=10, width_mult=width, dropout=0.0)
    theirs.features[0][0].stride = (1, 1)
    theirs.features[2].conv[1][0].stride = (1, 1)
    # The block has a shortcut if stride and channels allow it (section 3.3), as they do with width 0.35.
    theirs.features[2].use_res_connect = scale_channels(16, width) == scale_channels(24, width)
    copy_weights(ours, theirs)
    assert_same_output(ours.train(training), theirs.train(training))


@both_modes
@pytest.mark.parametrize(("cardinality", "base_width"), [(2, 64), (8, 4)])
def test_resnext_equals_torchvision(cardinality, base_width, training):
    ours = with_trained_norms(resnext29(10, cardinality=cardinality, base_width=base_width))
    theirs = torchvision.models.ResNet(
        torchvision.models.resnet.Bottleneck, [3, 3, 3, 1], 10, groups=cardinality, width_per_group=base_width
    )
    # Section 5.3: three stages, of 256, 512 and 1024 channels; the first keeps the image's resolution.
    theirs.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    theirs.maxpool, theirs.layer4, theirs.fc = nn.Identity(), nn.Identity(), nn.Linear(1024, 10)
    copy_weights(ours, theirs)
    assert_same_output(ours.train(training), theirs.train(training))


@by_name
@pytest.mark.parametrize("size", [8, 24, 64])
def test_image_sizes(name, arguments, size):
    assert NETWORKS[name](7, **arguments).eval()(torch.randn(2, 3, size, size)).shape == (2, 7)


def rounded_to_bfloat16(model):
    """Round the weights, the output of every layer and, in the backward pass, its gradient to bfloat16 numbers.

    The classifier stays in the precision of its weights.
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and name != "classifier.weight":
            parameter.data = parameter.data.bfloat16().to(parameter.dtype)
    for module in model.modules():
        if not list(module.children()) and module is not model.classifier:
            module.register_forward_hook(lambda _, __, output: output.bfloat16().to(output.dtype))
    return model


@by_name
def test_the_error_of_bfloat16_is_that_of_rounding(name, arguments):
    # With random weights the networks enlarge rounding errors, MobileNetV2's to 30 % of its logits. So the tolerance is
    # twice the effect that rounding alone has on the network in float64.
    torch.manual_seed(0)
    model = NETWORKS[name](10, **arguments).to(memory_format=torch.channels_last)
    images = nn.functional.interpolate(torch.randn(16, 3, 4, 4), size=(16, 16), mode="bicubic")
    labels = torch.arange(16) % 10

    def results(model, images, precision="float32"):
        with autocast(torch.device("cpu"), precision):
            logits = model(images)
        assert logits.dtype == images.dtype, "in bfloat16, the highest logits of an image may be equal"
        nn.functional.cross_entropy(logits, labels).backward()
        return logits.double(), torch.cat([parameter.grad.flatten().double() for parameter in model.parameters()])

    exact = results(copy.deepcopy(model).double(), images.double())
    rounded = results(rounded_to_bfloat16(copy.deepcopy(model).double()), images.bfloat16().double())
    found = results(model, images, "bfloat16")
    for ours, theirs, expected in zip(found, rounded, exact, strict=True):
        tolerance = (theirs - expected).norm()
        assert 0.5 * tolerance < (ours - expected).norm() < 2 * tolerance


@pytest.mark.parametrize("stride", [1, 2])
def test_depthwise_convolutions_have_the_right_gradients_in_bfloat16(stride):
    torch.manual_seed(0)
    convolution = DepthwiseConv2d(8, stride)
    images = torch.randn(4, 8, 7, 7).bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = convolution(images)
    outputs.float().square().sum().backward()

    exact, weight = (part.detach().double().requires_grad_() for part in (images, convolution.weight.bfloat16()))
    expected = nn.functional.conv2d(exact, weight, stride=stride, padding=1, groups=8)
    expected.backward(2 * outputs.detach().double())
    assert convolution.weight.grad.dtype == torch.float32
    # In bfloat16, one rounding changes a value by up to 2⁻⁹. CPUs without its instructions also round partial sums.
    for found, right in ((outputs, expected), (images.grad, exact.grad), (convolution.weight.grad, weight.grad)):
        assert (found.double() - right).norm() < 2**-7 * right.norm()


def test_grouped_convolutions_computed_as_dense_ones_train_the_same():
    torch.manual_seed(0)
    images, labels = torch.randn(4, 3, 16, 16, dtype=torch.float64), torch.tensor([0, 1, 2, 3])
    grouped = resnext29(4, cardinality=4, base_width=2).double()
    dense = resnext29(4, cardinality=4, base_width=2, dense=True).double()
    dense.load_state_dict(grouped.state_dict())
    for model in (grouped, dense):
        nn.functional.cross_entropy(model(images), labels).backward()
    torch.testing.assert_close(dense(images), grouped(images), rtol=0, atol=1e-9)
    for one, other in zip(dense.parameters(), grouped.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=1e-9)
