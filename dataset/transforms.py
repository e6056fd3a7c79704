"""RandomCrop, ColorJitter, RandomHorizontalFlip, RandAugment and Cutout, on many images at once.

The results equal torchvision's, which augments one image at a time. Here all random parameters of an epoch are sampled
first, on the CPU. Then the images are augmented in chunks: each operator runs once for all its images in a chunk.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dataset import operators
from dataset.operators import GEOMETRIC_OPS, RANDAUGMENT_OPS, SIGNED_OPS

Operator = Callable[[Tensor, Tensor], Tensor]

JITTER: dict[str, Operator] = {
    "brightness": operators.adjust_brightness,
    "contrast": operators.adjust_contrast,
    "saturation": operators.adjust_saturation,
    "hue": operators.adjust_hue,
}
# RandAugment's operators without the identity and the geometric ones, in the order of RANDAUGMENT_OPS.
RANDAUGMENT: dict[str, Operator] = {
    "Brightness": operators.adjust_brightness,
    "Color": operators.adjust_saturation,
    "Contrast": operators.adjust_contrast,
    "Sharpness": operators.adjust_sharpness,
    "Posterize": operators.posterize,
    "Solarize": operators.solarize,
    "AutoContrast": operators.autocontrast,
    "Equalize": operators.equalize,
}
# Images are grouped by operator. Group 0 is the identity; all geometric operators together are group 1.
RANDAUGMENT_GROUPS = torch.tensor([0] + [1] * len(GEOMETRIC_OPS) + [2 + k for k in range(len(RANDAUGMENT))])
NUM_GROUPS = 2 + len(RANDAUGMENT)


@dataclass(frozen=True)
class Augmentation:
    """Strengths of the augmentations, by default the baseline's. The fields have the same names in the recipe."""

    crop_padding: int = 4
    brightness: float = 0.2
    contrast: float = 0.2
    saturation: float = 0.2
    hue: float = 0.2
    flip: float = 0.5
    randaugment_ops: int = 2
    randaugment_magnitude: int = 9
    cutout: int = 0

    def crop_and_flip(self) -> "Augmentation":
        """Only the crop and the flip, without the other augmentations."""
        return replace(self, brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0, randaugment_ops=0, cutout=0)


@dataclass(frozen=True)
class RandomParams:
    """Random parameters of N images, one row each."""

    crop: Tensor  # (N,) int32, row of `crop_sources`
    jitter_op: Tensor  # (N, 4) int32, the order in which JITTER's operators run
    jitter_change: Tensor  # (N, 4) float32, the strength of each operator of JITTER
    flip: Tensor  # (N,) int32, 0 or 1
    randaugment_op: Tensor  # (N, K) int32, index into RANDAUGMENT_OPS
    randaugment_magnitude: Tensor  # (N, K) float32, signed
    cutout: Tensor  # (N,) int32, flat index of the square's center

    def __getitem__(self, rows: Tensor | slice | int) -> "RandomParams":
        return RandomParams(*(values[rows] for values in vars(self).values()))


def sample_params(num_images: int, size: int, settings: Augmentation, generator: torch.Generator) -> RandomParams:
    """Sample an epoch's parameters on the CPU, from torchvision's distributions. Row i belongs to image i."""

    def uniform(*shape: int) -> Tensor:
        return torch.rand(num_images, *shape, generator=generator)

    def below(stop: int, *shape: int) -> Tensor:
        return torch.randint(stop, (num_images, *shape), generator=generator, dtype=torch.int32)

    ops = settings.randaugment_ops
    crop = below((2 * settings.crop_padding + 1) ** 2)
    jitter_op = uniform(len(JITTER)).argsort(1).int()
    high = torch.tensor([getattr(settings, name) for name in JITTER])
    # The first three factors are from [max(0, 1 − high), 1 + high], the hue shift is from [−high, high].
    low = torch.cat((-high[:3].clamp(max=1), -high[3:]))
    jitter_change = low + uniform(len(JITTER)) * (high - low)
    flip = (uniform() < settings.flip).int()
    randaugment_op = below(len(RANDAUGMENT_OPS), ops)
    magnitude = settings.randaugment_magnitude
    strengths = torch.stack([operators.op_magnitude(name, magnitude, size) for name in RANDAUGMENT_OPS])
    signed = torch.tensor([name in SIGNED_OPS for name in RANDAUGMENT_OPS])
    chosen = randaugment_op.long()
    sign = torch.where(signed[chosen] & (uniform(ops) < 0.5), -1.0, 1.0)
    # Sampled last, so that --cutout does not change the other parameters.
    cutout = below(size * size) if settings.cutout else torch.zeros(num_images, dtype=torch.int32)
    return RandomParams(crop, jitter_op, jitter_change, flip, randaugment_op, strengths[chosen] * sign, cutout)


@dataclass(frozen=True)
class Plan:
    """The order and the random parameters of an epoch's images, and which images of a chunk each operator gets.

    The CPU does this grouping in advance, so that it never waits for the GPU.
    """

    index: Tensor  # (N,) int32, the shuffled images
    params: RandomParams  # in the same order
    sort_order: Tensor  # (N, 4 + K) int32, for each jitter and RandAugment step: argsort by operator within the chunk
    inverse_order: Tensor  # (N, 4 + K) int32, the inverse permutation
    counts: list[list[list[int]]]  # [chunk][step][group]: number of images
    chunk: int  # images per chunk

    def __len__(self) -> int:
        return len(self.counts)

    def to(self, device: torch.device | str) -> "Plan":
        """The same plan on `device`. The host does not wait for the copy."""
        on_cuda = torch.device(device).type == "cuda"

        def copied(values: Tensor) -> Tensor:
            return (values.pin_memory() if on_cuda else values).to(device, non_blocking=True)

        params = RandomParams(*map(copied, vars(self.params).values()))
        index, sort_order, inverse_order = map(copied, (self.index, self.sort_order, self.inverse_order))
        return Plan(index, params, sort_order, inverse_order, self.counts, self.chunk)


def make_plan(order: Tensor, params: RandomParams, chunk: int) -> Plan:
    """Reorder `params` by `order`, int64 (N,), and sort each chunk by operator, on the CPU."""
    params = params[order]
    groups = torch.cat((params.jitter_op.long(), RANDAUGMENT_GROUPS[params.randaugment_op.long()]), 1)
    chunk_of = torch.arange(len(order)) // chunk
    num_chunks = -(-len(order) // chunk)
    key = chunk_of[:, None] * NUM_GROUPS + groups
    sort_order = key.argsort(stable=True, dim=0)
    inverse_order = sort_order.argsort(dim=0)
    start = (chunk_of * chunk)[:, None]
    counts = torch.stack([column.bincount(minlength=num_chunks * NUM_GROUPS) for column in key.T])
    counts = counts.view(key.shape[1], num_chunks, NUM_GROUPS).transpose(0, 1).tolist()
    return Plan(order.int(), params, (sort_order - start).int(), (inverse_order - start).int(), counts, chunk)


class Augmenter:
    """RandomCrop, ColorJitter, RandomHorizontalFlip, RandAugment, Cutout, in this order, for square images."""

    def __init__(self, size: int, settings: Augmentation, device: torch.device | str = "cpu"):
        self.cutout = settings.cutout
        self.mean_color = torch.tensor(operators.MEAN_COLOR, dtype=torch.uint8, device=device).view(1, 3, 1, 1)
        self.crop_sources = operators.crop_sources(size, settings.crop_padding).to(device)
        if settings.randaugment_ops:
            self.geometric_sources = operators.geometric_sources(size, settings.randaugment_magnitude).to(device)
        # As in torchvision, jitter of strength zero is skipped.
        self.jitter = [operator if getattr(settings, name) > 0 else None for name, operator in JITTER.items()]

    def __call__(self, images: Tensor, plan: Plan, number: int) -> Tensor:
        """Augment chunk `number` of the plan: from all `images`, uint8 (N, 3, H, W), to uint8 (B, 3, H, W)."""
        chunk = slice(number * plan.chunk, (number + 1) * plan.chunk)
        params, counts = plan.params[chunk], plan.counts[number]
        sort_order, inverse_order = plan.sort_order[chunk].unbind(1), plan.inverse_order[chunk].unbind(1)

        def by_group(batch: Tensor, step: int, groups: list[tuple[Operator | None, Tensor]]) -> Tensor:
            """Run the operator of each group on the images of that group, each with its own value."""
            results = []
            # Jitter has only the first four groups; no image is in the others.
            for rows, (operator, values) in zip(sort_order[step].split(counts[step]), groups, strict=False):
                group = batch.index_select(0, rows)
                results.append(operator(group, values.index_select(0, rows)) if operator and len(rows) else group)
            return torch.cat(results).index_select(0, inverse_order[step])

        batch = images.index_select(0, plan.index[chunk])
        batch = operators.remap(batch, self.crop_sources.index_select(0, params.crop))
        jitter = list(zip(self.jitter, params.jitter_change.unbind(1), strict=True))
        for step in range(len(JITTER)):
            batch = by_group(batch, step, jitter)
        batch = operators.choose(params.flip.to(torch.uint8).mul_(255).view(-1, 1, 1, 1), batch.flip(3), batch)
        randaugment = zip(params.randaugment_op.unbind(1), params.randaugment_magnitude.unbind(1), strict=True)
        for step, (op, magnitude) in enumerate(randaugment, len(JITTER)):
            others = [(operator, magnitude) for operator in RANDAUGMENT.values()]
            groups = [(None, op), (self.move, 2 * (op - 1) + (magnitude < 0)), *others]
            batch = by_group(batch, step, groups)
        return operators.cut_out(batch, params.cutout, self.cutout, self.mean_color) if self.cutout else batch

    def move(self, images: Tensor, variants: Tensor) -> Tensor:
        """RandAugment's geometric operators. `variants`, int32 (B,), are rows of `geometric_sources`."""
        return operators.remap(images, self.geometric_sources.index_select(0, variants))
