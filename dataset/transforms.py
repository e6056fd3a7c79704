"""RandomCrop, ColorJitter, RandomHorizontalFlip, RandAugment and Cutout on a whole batch, each image with its own draw.

The results are torchvision's, the implementation is not. torchvision takes one image and one draw at a time; here
all draws of an epoch are made first, on the CPU, and an operator then runs once over every image that drew it.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from dataset import operators
from dataset.operators import GEOMETRIC_OPS, RANDAUGMENT_OPS, SIGNED_OPS

JITTER_OPS = ("brightness", "contrast", "saturation", "hue")

Operator = Callable[[Tensor, Tensor], Tensor]

JITTER: tuple[Operator, ...] = (
    operators.adjust_brightness,
    operators.adjust_contrast,
    operators.adjust_saturation,
    operators.adjust_hue,
)
# What RandAugment's operators other than the geometric ones do, in their order.
RANDAUGMENT: dict[str, Operator] = {
    "Brightness": operators.adjust_brightness,
    "Color": operators.adjust_saturation,
    "Contrast": operators.adjust_contrast,
    "Sharpness": operators.adjust_sharpness,
    "Posterize": operators.posterize,
    "Solarize": operators.solarize,
    "AutoContrast": lambda images, _: operators.autocontrast(images),
    "Equalize": lambda images, _: operators.equalize(images),
}
# Images are grouped by operator; the identity is group 0, the geometric operators together group 1.
RANDAUGMENT_GROUPS = torch.tensor([0] + [1] * len(GEOMETRIC_OPS) + [2 + k for k in range(len(RANDAUGMENT))])
NUM_GROUPS = 2 + len(RANDAUGMENT)


@dataclass(frozen=True)
class Augmentation:
    """How strong the augmentations are; the fields have the names of the recipe's."""

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
        """The same without all that changes colours or shapes."""
        return replace(self, brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0, randaugment_ops=0, cutout=0)


@dataclass(frozen=True)
class Draws:
    """What chance decided for N images, one row each; all int32 or float32, so that they travel as one tensor."""

    crop: Tensor  # (N,) row of `crop_sources`
    jitter_op: Tensor  # (N, 4) the order of JITTER_OPS
    jitter_change: Tensor  # (N, 4) the strength of each of JITTER_OPS
    flip: Tensor  # (N,) 0 or 1
    randaugment_op: Tensor  # (N, K) index into RANDAUGMENT_OPS
    randaugment_magnitude: Tensor  # (N, K) with its sign
    cutout: Tensor  # (N,) flat index of the square's centre

    def __getitem__(self, rows: Tensor | slice | int) -> "Draws":
        return Draws(*(getattr(self, field.name)[rows] for field in fields(self)))


def draw(num_images: int, size: int, settings: Augmentation, generator: torch.Generator) -> Draws:
    """Draw for every image of an epoch, on the CPU: each value as torchvision's transforms define it.

    Row i is image i's, whatever place in the epoch it comes at.
    """

    def uniform(*shape: int) -> Tensor:
        return torch.rand(num_images, *shape, generator=generator)

    def below(stop: int, *shape: int) -> Tensor:
        return torch.randint(stop, (num_images, *shape), generator=generator, dtype=torch.int32)

    ops = settings.randaugment_ops
    crop = below((2 * settings.crop_padding + 1) ** 2)
    jitter_op = uniform(len(JITTER_OPS)).argsort(1).int()
    reach = torch.tensor([getattr(settings, name) for name in JITTER_OPS])
    # A factor from [max(0, 1 − reach), 1 + reach] for the first three, a shift from [−reach, reach] for the hue.
    low = torch.cat((-reach[:3].clamp(max=1), -reach[3:]))
    jitter_change = low + uniform(len(JITTER_OPS)) * (reach - low)
    flip = (uniform() < settings.flip).int()
    randaugment_op = below(len(RANDAUGMENT_OPS), ops)
    strengths = torch.stack(
        [operators.op_magnitude(name, settings.randaugment_magnitude, size) for name in RANDAUGMENT_OPS]
    )
    signed = torch.tensor([name in SIGNED_OPS for name in RANDAUGMENT_OPS])
    chosen = randaugment_op.long()
    sign = torch.where(signed[chosen] & (uniform(ops) < 0.5), -1.0, 1.0)
    # Drawn last, and only where it is wanted: it changes no other draw.
    cutout = below(size * size) if settings.cutout else torch.zeros(num_images, dtype=torch.int32)
    return Draws(crop, jitter_op, jitter_change, flip, randaugment_op, strengths[chosen] * sign, cutout)


@dataclass(frozen=True)
class Plan:
    """An epoch's draws, in the order in which the images come.

    An operator runs at once on all images of a chunk that drew it. Which those are is sorted out on the CPU: asking a
    GPU would make the host wait for it.
    """

    index: Tensor  # (N,) int32, the image that comes at each place
    draws: Draws  # in the same order
    rows: Tensor  # (N, 4 + K) int32: for each step, a chunk's rows, numbered from its start, sorted by operator
    places: Tensor  # (N, 4 + K) int32: where in that order each row stands
    counts: list[list[list[int]]]  # [chunk][step][group]: how many rows drew its operators
    chunk: int

    def __len__(self) -> int:
        return len(self.counts)

    def to(self, device: torch.device | str) -> "Plan":
        """The same plan on `device`, copied there in one piece."""
        parts = [self.index, self.rows, self.places, *(getattr(self.draws, field.name) for field in fields(self.draws))]
        table = torch.cat([part.reshape(len(part), -1).view(torch.int32) for part in parts], 1)
        if torch.device(device).type == "cuda":
            table = table.pin_memory()
        columns = table.to(device, non_blocking=True).split([part[0].numel() for part in parts], 1)
        index, rows, places, *draws = (
            column.contiguous().view(part.dtype).view(part.shape) for column, part in zip(columns, parts, strict=True)
        )
        return Plan(index, Draws(*draws), rows, places, self.counts, self.chunk)


def plan(order: Tensor, draws: Draws, chunk: int) -> Plan:
    """Put `draws` into `order` (int64, N) and sort each chunk by operator, on the CPU."""
    draws = draws[order]
    groups = torch.cat((draws.jitter_op.long(), RANDAUGMENT_GROUPS[draws.randaugment_op.long()]), 1)
    chunk_of = torch.arange(len(order)) // chunk
    num_chunks = -(-len(order) // chunk)
    key = chunk_of[:, None] * NUM_GROUPS + groups
    rows = key.argsort(stable=True, dim=0)
    places = rows.argsort(dim=0)
    start = (chunk_of * chunk)[:, None]
    counts = torch.stack([column.bincount(minlength=num_chunks * NUM_GROUPS) for column in key.T])
    counts = counts.view(key.shape[1], num_chunks, NUM_GROUPS).transpose(0, 1).tolist()
    return Plan(order.int(), draws, (rows - start).int(), (places - start).int(), counts, chunk)


class Augmenter:
    """The chain RandomCrop, ColorJitter, RandomHorizontalFlip, RandAugment, Cutout for square images on one device."""

    def __init__(self, size: int, settings: Augmentation, device: torch.device | str = "cpu"):
        self.cutout = settings.cutout
        self.crop_sources = operators.crop_sources(size, settings.crop_padding).to(device)
        self.geometric_sources = operators.geometric_sources(size, settings.randaugment_magnitude).to(device)
        # As in torchvision, a jitter of no strength is left out.
        self.jitter = [
            operator if getattr(settings, name) > 0 else None for name, operator in zip(JITTER_OPS, JITTER, strict=True)
        ]

    def __call__(self, images: Tensor, plan: Plan, number: int) -> Tensor:
        """Augment chunk `number` of a plan.

        `images` is the whole data set, uint8 (N, 3, H, W); the result is uint8 (B, 3, H, W), the chunk's images in the
        epoch's order.
        """
        chunk = slice(number * plan.chunk, (number + 1) * plan.chunk)
        draws, rows, places = plan.draws[chunk], plan.rows[chunk].unbind(1), plan.places[chunk].unbind(1)
        counts = plan.counts[number]

        def by_group(batch: Tensor, step: int, groups: list[tuple[Operator | None, Tensor]]) -> Tensor:
            """Run the operator of each group, with the value that each of its images drew, on that group."""
            done = []
            for chosen, (operator, values) in zip(rows[step].split(counts[step]), groups, strict=False):
                group = batch.index_select(0, chosen)
                done.append(operator(group, values.index_select(0, chosen)) if operator and len(chosen) else group)
            return torch.cat(done).index_select(0, places[step])

        batch = images.index_select(0, plan.index[chunk])
        batch = operators.remap(batch, self.crop_sources.index_select(0, draws.crop))
        jitter = list(zip(self.jitter, draws.jitter_change.unbind(1), strict=True))
        for step in range(len(JITTER)):
            batch = by_group(batch, step, jitter)
        batch = operators.choose(draws.flip.to(torch.uint8).mul_(255).view(-1, 1, 1, 1), batch.flip(3), batch)
        for k in range(draws.randaugment_op.shape[1]):
            op, magnitude = draws.randaugment_op[:, k], draws.randaugment_magnitude[:, k]
            others = [(operator, magnitude) for operator in RANDAUGMENT.values()]
            groups = [(None, op), (self.move, 2 * (op - 1) + (magnitude < 0)), *others]
            batch = by_group(batch, len(JITTER) + k, groups)
        return operators.cut_out(batch, draws.cutout, self.cutout) if self.cutout else batch

    def move(self, images: Tensor, variants: Tensor) -> Tensor:
        """RandAugment's geometric operators; `variants`, int32 (B,), are rows of `geometric_sources`."""
        return operators.remap(images, self.geometric_sources.index_select(0, variants))
