"""The operators of the augmentation. Each one works on a whole batch, with one value per image.

Operators take `images`, uint8 (B, 3, H, W), and one value per image, (B,). They return uint8 (B, 3, H, W) and do not
change their input. `change` is torchvision's factor minus one, so 0 leaves an image unchanged. This is also more exact:
blending needs both the factor and one minus it.

The results are those of `torchvision.transforms.v2` on uint8 tensors (tests/test_transforms.py compares them): pixels
are integers after each operator, truncated instead of rounded where torchvision truncates.
"""

import math
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

# torchvision's RandAugment operators in its order. The five that move pixels are adjacent; one gather applies them all.
RANDAUGMENT_OPS = (
    "Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color", "Contrast",
    "Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize",
)  # fmt: skip
GEOMETRIC_OPS = RANDAUGMENT_OPS[1:6]
SIGNED_OPS = RANDAUGMENT_OPS[1:10]
MAGNITUDE_BINS = 31
# Mean color of CIFAR-10's training images, 0 to 255; almost zero after normalization.
MEAN_COLOR = (125, 123, 114)


def _torchvision() -> ModuleType:
    from torchvision.transforms.v2 import functional  # not at the top: it takes a second

    return functional


# On the CPU, PyTorch vectorizes minimum, maximum and bitwise operations on uint8. Its `where`, comparisons and
# `masked_fill` are not vectorized and about 50 times slower. So values are selected with bit masks.


def _column(values: Tensor) -> Tensor:
    return values.float().view(-1, 1, 1, 1)


def _truncate(pixels: Tensor) -> Tensor:
    """float to uint8, rounded towards zero. Converting through int16 is three times as fast as directly."""
    return pixels.to(torch.int16).to(torch.uint8)


def _bits_where_equal(a: Tensor, b: Tensor | int) -> Tensor:
    """uint8: 255 where a equals b, both uint8, and 0 elsewhere."""
    return (a ^ b).clamp_(max=1).sub_(1)


def choose(mask: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """uint8: `yes` where the mask is 255, `no` where it is 0."""
    return (yes & mask).bitwise_or_(no & ~mask)


def _gray(images: Tensor) -> Tensor:
    """Luma of each pixel, float32 (B, 1, H, W), rounded down to integers."""
    red, green, blue = images.unbind(1)
    return red.mul(0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114).floor_().unsqueeze(1)


def _blend(images: Tensor, other: Tensor, change: Tensor) -> Tensor:
    """images · (1 + change) + other · (−change), clipped to 0…255."""
    change = _column(change)
    return _truncate(torch.addcmul(images * (1 + change), other, -change).clamp_(0, 255))


def adjust_brightness(images: Tensor, change: Tensor) -> Tensor:
    """Multiply by 1 + change."""
    return _truncate((images * (1 + _column(change))).clamp_(0, 255))


def adjust_contrast(images: Tensor, change: Tensor) -> Tensor:
    """Move pixels away from (change > 0) or towards the mean gray of their image."""
    return _blend(images, _gray(images).mean((1, 2, 3), keepdim=True), change)


def adjust_saturation(images: Tensor, change: Tensor) -> Tensor:
    """Move pixels away from (change > 0) or towards their own gray value."""
    return _blend(images, _gray(images), change)


def adjust_sharpness(images: Tensor, change: Tensor) -> Tensor:
    """Move pixels away from (change > 0) or towards a 3×3 smoothing of the image; its border is unchanged."""
    pixels = images.float()
    inner = pixels[..., 1:-1, 1:-1]
    # The sum over the 3×3 window plus four times the center is an integer, so only the division by 13 rounds.
    rows = pixels[..., :-2, :] + pixels[..., 1:-1, :] + pixels[..., 2:, :]
    total = (rows[..., :-2] + rows[..., 1:-1]).add_(rows[..., 2:]).add_(inner, alpha=4)
    smooth = total.mul_(1 / 13).round_()
    inner.copy_(torch.addcmul(inner, smooth.sub_(inner), -_column(change)))
    return _truncate(pixels.clamp_(0, 255))


def adjust_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Add `shift`, −0.5 to 0.5, to the hue: from RGB to HSV and back."""
    red, green, blue = images.unbind(1)
    maximum, minimum = torch.maximum(torch.maximum(red, green), blue), torch.minimum(torch.minimum(red, green), blue)
    is_red = _bits_where_equal(red, maximum)
    is_green = _bits_where_equal(green, maximum) & ~is_red
    is_blue = ~(is_red | is_green)

    scaled, value = images.float().mul_(1 / 255), maximum.float().mul_(1 / 255)
    chroma = value - minimum.float().mul_(1 / 255)
    # The clamps avoid 0 / 0 for gray pixels, whose hue and saturation are zero.
    saturation = chroma / value.clamp(min=1 / 255)
    # How far each channel is below the maximum, as a fraction of the chroma.
    below = (value.unsqueeze(1) - scaled).div_(chroma.clamp_(min=1e-3).unsqueeze(1))
    below_red, below_green, below_blue = below.unbind(1)
    hue = (below_blue - below_green).mul_(is_red & 1)
    hue += (below_red + 2).sub_(below_blue).mul_(is_green & 1)
    hue += (below_green + 4).sub_(below_red).mul_(is_blue & 1)
    hue = hue.mul_(1 / 6).add_(1).frac_().add_(shift.float().view(-1, 1, 1))
    hue = hue.sub_(hue.floor()).mul_(6)

    # In each sixth of the color circle, one channel is the maximum, one the minimum, and the middle one rises (in even
    # sixths) or falls (in odd ones). A new hue changes only the order of the channels and the value of the middle one.
    sixth = hue.floor()
    part = saturation * hue.sub_(sixth)
    falling = (1 - part).mul_(value).clamp_(0, 1)
    rising = part.add_(1 - saturation).mul_(value).clamp_(0, 1)
    # torchvision's conversion of floats to uint8.
    falling, rising = (_truncate(values.mul_(255 + 1 - 1e-3)) for values in (falling, rising))
    sixth = _truncate(sixth)
    is_sixth = [_bits_where_equal(sixth, number) for number in range(6)]
    is_sixth[0] |= _bits_where_equal(sixth, 6)  # a hue rounded up to the full circle
    middle = choose(is_sixth[1] | is_sixth[3] | is_sixth[5], falling, rising)
    shifted = torch.empty_like(images)
    for channel, sixths in enumerate((((5, 0), (1, 4)), ((1, 2), (0, 3)), ((3, 4), (2, 5)))):
        is_maximum, is_middle = (is_sixth[a] | is_sixth[b] for a, b in sixths)
        shifted[:, channel] = choose(is_maximum, maximum, choose(is_middle, middle, minimum))
    return shifted


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """Keep the highest `bits` bits of each channel."""
    mask = (256 - torch.exp2(8 - bits.float())).to(torch.uint8)
    return images & mask.view(-1, 1, 1, 1)


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    """Invert all values at or above `threshold`, given as a fraction of 255."""
    # For an integer v, v ≥ t is the same as v ≥ ⌈t⌉. Flipping all bits of v gives 255 − v.
    limit = (255 * _column(threshold)).ceil().to(torch.int16)
    is_above = (images - limit + 1).clamp_(0, 1).to(torch.uint8)
    return images ^ is_above.mul_(255)


def autocontrast(images: Tensor, _: Tensor) -> Tensor:
    """Stretch each channel so that its darkest value becomes 0 and its lightest 255."""
    return _torchvision().autocontrast(images)


def equalize(images: Tensor, _: Tensor) -> Tensor:
    """Map the values of each channel so that its histogram becomes as flat as possible."""
    return _torchvision().equalize(images)


def cut_out(images: Tensor, center: Tensor, side: int, color: Tensor) -> Tensor:
    """Cutout: fill a square around the pixel with flat index `center` (DeVries and Taylor 2017, arXiv:1708.04552).

    `color`: uint8 (1, 3, 1, 1).
    """
    height, width = images.shape[2:]
    center = center.view(-1, 1)
    low_y, low_x = center // width - side // 2, center % width - side // 2
    y, x = torch.arange(height, device=images.device), torch.arange(width, device=images.device)
    in_rows, in_columns = (low_y <= y) & (y < low_y + side), (low_x <= x) & (x < low_x + side)
    inside = (in_rows.unsqueeze(2) & in_columns.unsqueeze(1)).to(torch.uint8).mul_(255).unsqueeze(1)
    return choose(inside, color, images)


def remap(images: Tensor, sources: Tensor) -> Tensor:
    """Move pixels. `sources`, int64 (B, H·W): the flat index of the pixel that each new pixel copies; −1 gives 0."""
    batch, channels, height, width = images.shape
    index = sources.clamp(min=0).unsqueeze(1).expand(-1, channels, -1)
    moved = images.flatten(2).gather(2, index)
    moved *= (sources >= 0).to(torch.uint8).unsqueeze(1)
    return moved.view(batch, channels, height, width)


def crop_sources(size: int, padding: int) -> Tensor:
    """`sources` of all possible crops for `remap`, int64 ((2·padding + 1)², size²).

    Row top · (2·padding + 1) + left is the crop at (top, left) of the image padded with zeros on all sides.
    """
    padded = F.pad(torch.arange(size * size).view(size, size), [padding] * 4, value=-1)
    return padded.unfold(0, size, 1).unfold(1, size, 1).flatten(2).flatten(0, 1)


def geometric_sources(size: int, magnitude: int) -> Tensor:
    """`sources` of RandAugment's geometric operators for `remap`, int64 (10, size²).

    Rows 2·k and 2·k + 1 are operator k of `GEOMETRIC_OPS` with positive and with negative strength.
    """
    # torchvision moves an image of the pixels' own numbers, counted from 1. It fills with 0.
    numbers = torch.arange(1, size * size + 1, dtype=torch.float32).view(1, size, size)
    strengths = [(name, float(op_magnitude(name, magnitude, size))) for name in GEOMETRIC_OPS]
    moved = [_move(numbers, name, signed) for name, strength in strengths for signed in (strength, -strength)]
    return torch.stack(moved).flatten(1).round().long() - 1


def _move(image: Tensor, name: str, strength: float) -> Tensor:
    """A geometric operator on one image, as torchvision's RandAugment calls it."""
    TF = _torchvision()
    if name == "Rotate":
        return TF.rotate(image, strength)
    along_x = name.endswith("X")
    if name.startswith("Translate"):
        shift = int(strength)
        return TF.affine(image, 0.0, [shift, 0] if along_x else [0, shift], 1.0, [0.0, 0.0])
    angle = math.degrees(math.atan(strength))
    return TF.affine(image, 0.0, [0, 0], 1.0, [angle, 0.0] if along_x else [0.0, angle], center=[0, 0])


def op_magnitude(name: str, magnitude: int, size: int) -> Tensor:
    """Strength of a RandAugment operator at bin `magnitude` of 31, without sign (Cubuk et al. 2019, arXiv:1909.13719).

    Shears are slopes, translations pixels, rotations degrees; brightness, color, contrast and sharpness are `change`;
    posterize is in bits, solarize a fraction of 255. Operators without a strength have 0.
    """
    if name == "Posterize":
        return 8 - (torch.arange(MAGNITUDE_BINS) / ((MAGNITUDE_BINS - 1) / 4)).round()[magnitude]
    strongest = {"ShearX": 0.3, "ShearY": 0.3, "Rotate": 30.0, "Solarize": 0.0}
    strongest |= dict.fromkeys(("TranslateX", "TranslateY"), 150.0 / 331.0 * size)
    strongest |= dict.fromkeys(("Brightness", "Color", "Contrast", "Sharpness"), 0.9)
    weakest = 1.0 if name == "Solarize" else 0.0
    return torch.linspace(weakest, strongest.get(name, 0.0), MAGNITUDE_BINS)[magnitude]
