"""Every operator, the random parameters and the whole augmentation, compared with torchvision on the same images."""

import platform
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import combinations

from common import distributed

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from dataset import Split, operators, transforms
from dataset.operators import GEOMETRIC_OPS, MAGNITUDE_BINS
from dataset.transforms import Augmentation, Augmenter
from utils import MEAN, STD, TrainLoader, epoch_generator, normalize, steps_per_epoch

RANDAUGMENT = v2.RandAugment()
SPACE = RANDAUGMENT._AUGMENTATION_SPACE
NOTHING = Augmentation(
    crop_padding=0, brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0, flip=0.0, randaugment_ops=0
)

# Operators that blend two images round once with a fused multiply-add, and twice without. Our addcmul may differ from
# torchvision's add in this, and a value just below an integer is truncated to the next lower one. On x86-64 they agree,
# in default, AVX2 and AVX-512 kernels. All other operators must be equal on any processor.
ROUNDS_ALIKE = platform.machine().lower() in ("x86_64", "amd64")
BLENDING = ("contrast", "saturation", "Color", "Contrast", "Sharpness")


def photos(count, size, seed=0):
    """Smooth colored shapes with some texture; brightness and contrast differ between images."""
    generator = torch.Generator().manual_seed(seed)
    shapes = torch.rand(count, 3, 4, 4, generator=generator)
    shapes = interpolate(shapes, size=(size, size), mode="bicubic", align_corners=False)
    texture = torch.randn(count, 1, size, size, generator=generator) * 0.04
    light, contrast = torch.rand(2, count, 1, 1, 1, generator=generator)
    values = (shapes + texture - 0.5) * (0.3 + 1.2 * contrast) + 0.3 + 0.4 * light
    return values.mul(255).round().clamp(0, 255).to(torch.uint8)


def odd_images(size):
    """Difficult images: noise, ramps, gray, few values, one value, black and white, pure colors."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randint(256, (2, 3, size, size), generator=generator, dtype=torch.uint8)
    ramp = torch.linspace(0, 255, size).to(torch.uint8)
    ramps = torch.stack(torch.broadcast_tensors(ramp[:, None], ramp, ramp.flip(0)))[None]
    gray = photos(2, size, seed=2)[:, :1].expand(-1, 3, -1, -1)
    narrow = noise[:1] // 32 + 100
    two_values = (noise[:1] > 127).to(torch.uint8) * 255
    checks = (torch.arange(size)[:, None] + torch.arange(size)).remainder(2).to(torch.uint8).mul(255)
    checks = checks.expand(1, 3, -1, -1)
    colors = [(0, 0, 0), (1, 1, 1), (128, 128, 128), (255, 255, 255)]
    colors += [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255), (255, 0, 255), (200, 100, 37)]
    flat = torch.tensor(colors, dtype=torch.uint8).view(-1, 3, 1, 1).expand(-1, -1, size, size)
    speck = flat[2:3].clone()
    speck[0, :, size // 2, size // 3] = torch.tensor([200, 0, 127], dtype=torch.uint8)
    return torch.cat((noise, ramps, gray, narrow, two_values, checks, flat, speck))


def images_of(size):
    return torch.cat((photos(6, size), odd_images(size)))


def assert_same(found, expected, *, blending=True, chain=False):
    assert found.dtype == expected.dtype == torch.uint8
    assert found.shape == expected.shape
    differs = found != expected
    if ROUNDS_ALIKE or not blending:
        assert not differs.any(), f"{differs.sum()} of {found.numel()} values differ, first at {differs.nonzero()[0]}"
    else:
        assert differs.float().mean() < 0.05
        # A difference of one level early in a chain can become larger later (equalize, posterize).
        assert chain or (found.int() - expected.int()).abs().max() <= 1


JITTER = {
    "brightness": lambda image, change: TF.adjust_brightness(image, 1.0 + change),
    "contrast": lambda image, change: TF.adjust_contrast(image, 1.0 + change),
    "saturation": lambda image, change: TF.adjust_saturation(image, 1.0 + change),
    "hue": TF.adjust_hue,
}


def by_torchvision(image, name, magnitude):
    """torchvision's RandAugment operator, on one image or on several with the same magnitude."""
    return RANDAUGMENT._apply_image_or_video_transform(
        image, name, magnitude, interpolation=RANDAUGMENT.interpolation, fill=RANDAUGMENT._fill
    )


def mixed(operator, images, values):
    """Apply `operator` to each image with each value, in one shuffled batch: (values, images, 3, H, W)."""
    pairs = torch.randperm(len(values) * len(images), generator=torch.Generator().manual_seed(3))
    result = operator(images[pairs % len(images)], values[pairs // len(images)])
    return result[pairs.argsort()].view(len(values), *images.shape)


@pytest.mark.parametrize("size", [32, 21])
@pytest.mark.parametrize("name", transforms.JITTER)
def test_jitter_equals_torchvision(name, size):
    reach = 0.5 if name == "hue" else 1.0
    edges = torch.tensor([0.0, 0.2, -0.2, 1 / 6, -1 / 6, 1 / 3, 0.5, -0.5, reach, -reach])
    changes = torch.rand(60, generator=torch.Generator().manual_seed(4)) * 2 * reach - reach
    changes = torch.cat((edges, changes))
    images = images_of(size)
    found = mixed(transforms.JITTER[name], images, changes)
    expected = torch.stack([JITTER[name](images, float(change)) for change in changes])
    assert_same(found, expected, blending=name in BLENDING)


def magnitudes_of(name, size):
    """torchvision's strengths for all bins, float32 (31,) without signs; zeros for operators without a strength."""
    bins = RANDAUGMENT.num_magnitude_bins
    magnitudes = SPACE[name][0](bins, size, size)
    return torch.zeros(bins) if magnitudes is None else magnitudes.float()


@pytest.mark.parametrize("size", [32, 21])
@pytest.mark.parametrize("name", transforms.RANDAUGMENT)
def test_randaugment_colors_equal_torchvision(name, size):
    magnitudes = magnitudes_of(name, size)
    if SPACE[name][1]:
        magnitudes = torch.cat((magnitudes, -magnitudes))
    images = images_of(size)
    found = mixed(transforms.RANDAUGMENT[name], images, magnitudes)
    expected = torch.stack([by_torchvision(images, name, float(magnitude)) for magnitude in magnitudes])
    assert_same(found, expected, blending=name in BLENDING)


@pytest.mark.parametrize("size", [16, 32, 33])
@pytest.mark.parametrize("name", GEOMETRIC_OPS)
def test_geometric_operators_equal_torchvision(name, size):
    images = torch.cat((photos(2, size), odd_images(size)[:2]))
    row = 2 * GEOMETRIC_OPS.index(name)
    for magnitude in range(MAGNITUDE_BINS):
        sources = operators.geometric_sources(size, magnitude)
        strength = float(magnitudes_of(name, size)[magnitude])
        for signed, source in zip((strength, -strength), sources[row : row + 2], strict=True):
            expected = by_torchvision(images, name, signed)
            assert_same(operators.remap(images, source.expand(len(images), -1)), expected, blending=False)


@pytest.mark.parametrize("size", [16, 32, 48])
@pytest.mark.parametrize("name", SPACE)
def test_magnitudes_equal_torchvision(name, size):
    found = torch.stack([operators.op_magnitude(name, magnitude, size).float() for magnitude in range(MAGNITUDE_BINS)])
    assert torch.equal(found, magnitudes_of(name, size))


def chain_of_torchvision(image, params, settings):
    """All augmentations by torchvision on one image, uint8 (3, H, W), with `params`, its random parameters."""
    size, padding, side = image.shape[-1], settings.crop_padding, settings.cutout
    top, left = divmod(int(params.crop), 2 * padding + 1)
    image = TF.crop(TF.pad(image, [padding]), top, left, size, size)
    for op in params.jitter_op.tolist():
        name = list(transforms.JITTER)[op]
        if getattr(settings, name) > 0:  # as ColorJitter does
            image = JITTER[name](image, float(params.jitter_change[op]))
    if params.flip:
        image = TF.horizontal_flip(image)
    for op, magnitude in zip(params.randaugment_op.tolist(), params.randaugment_magnitude.tolist(), strict=True):
        image = by_torchvision(image, list(SPACE)[op], magnitude)
    if side:  # torchvision has no Cutout
        image, (top, left) = image.clone(), (place - side // 2 for place in divmod(int(params.cutout), size))
        square = image[:, max(0, top) : max(0, top + side), max(0, left) : max(0, left + side)]
        square[:] = torch.tensor(operators.MEAN_COLOR).view(3, 1, 1)
    return image


CHAINS = {
    "default": (32, Augmentation()),
    "one operation, strongest": (32, Augmentation(randaugment_ops=1, randaugment_magnitude=30, cutout=40)),
    "three operations": (32, Augmentation(randaugment_ops=3, randaugment_magnitude=17, hue=0.5, cutout=1)),
    "no RandAugment": (32, Augmentation(randaugment_ops=0, brightness=1.5, contrast=1.0, saturation=0.7)),
    "part of the jitter": (32, Augmentation(brightness=0.0, hue=0.0, crop_padding=0)),
    "small images": (20, Augmentation(crop_padding=2, randaugment_magnitude=0, cutout=4)),
    "large images": (48, Augmentation(crop_padding=6, randaugment_magnitude=15, cutout=5)),
}


@pytest.mark.parametrize("chain", CHAINS)
def test_chain_equals_torchvision(chain):
    size, settings = CHAINS[chain]
    images = torch.cat((photos(330, size), odd_images(size)))
    generator = torch.Generator().manual_seed(5)
    params = transforms.sample_params(len(images), size, settings, generator)
    order = torch.randperm(len(images), generator=generator)
    plan, augmenter = transforms.make_plan(order, params, 64), Augmenter(size, settings)
    found = torch.cat([augmenter(images, plan, number) for number in range(len(plan))])
    expected = torch.stack([chain_of_torchvision(images[i], params[i], settings) for i in order])
    assert_same(found, expected, chain=True)


# Each frequency must be within four standard errors of torchvision's probability, or within six in the large tables of
# pairs. The seed is fixed, so the result is always the same; with another seed, one of 16,000 frequencies would exceed
# four standard errors by chance. The chi-square of a table must also be within four standard deviations, which detects
# many small errors.
NUM_DRAWS = 200_000
SIGMAS, MANY_SIGMAS = 4.0, 6.0


def assert_uniform(cells, num_cells, sigmas=SIGMAS):
    """Check that `cells`, integers (N,), have each of `num_cells` values equally often."""
    counts = torch.bincount(cells.long(), minlength=num_cells).double()
    assert len(counts) == num_cells
    expected = len(cells) / num_cells
    assert ((counts - expected).abs() < sigmas * (expected * (1 - 1 / num_cells)) ** 0.5).all(), counts
    chi_square, freedom = float(((counts - expected) ** 2 / expected).sum()), num_cells - 1
    assert chi_square < freedom + SIGMAS * (2 * freedom) ** 0.5


def assert_share(hits, probability):
    error = (probability * (1 - probability) / len(hits)) ** 0.5
    assert abs(float(hits.double().mean()) - probability) <= SIGMAS * error


@pytest.mark.parametrize("reach", [(0.2, 0.2, 0.2, 0.2), (0.5, 1.0, 1.7, 0.5), (0.9, 0.1, 0.4, 0.05)])
def test_jitter_is_uniform_in_torchvisions_range(reach):
    settings = Augmentation(**dict(zip(transforms.JITTER, reach, strict=True)))
    changes = transforms.sample_params(NUM_DRAWS, 32, settings, torch.Generator().manual_seed(7)).jitter_change
    expected = v2.ColorJitter(*reach)
    for column, name in enumerate(transforms.JITTER):
        low, high = getattr(expected, name)
        values = changes[:, column] if name == "hue" else 1 + changes[:, column]
        width = high - low
        assert low - 1e-6 <= values.min() < low + 1e-3 * width
        assert high - 1e-3 * width < values.max() <= high + 1e-6
        assert_uniform(((values - low) / width * 40).clamp(0, 39).floor(), 40)


def test_strengths_equal_torchvision_and_signs_are_even():
    settings = Augmentation(randaugment_magnitude=14)
    params = transforms.sample_params(NUM_DRAWS, 20, settings, torch.Generator().manual_seed(10))
    for ops, magnitudes in zip(params.randaugment_op.T, params.randaugment_magnitude.T, strict=True):
        for number, (name, (_, signed)) in enumerate(SPACE.items()):
            of_op = magnitudes[ops == number]
            assert torch.equal(of_op.abs(), magnitudes_of(name, 20)[14].expand_as(of_op)), name
            if signed:
                assert_share(of_op < 0, 0.5)
            else:
                assert not of_op.signbit().any(), name


def test_all_random_parameters_are_uniform_and_independent():
    params = transforms.sample_params(NUM_DRAWS, 32, Augmentation(cutout=9), torch.Generator().manual_seed(6))
    assert_uniform(params.cutout, 32 * 32)
    assert torch.equal(params.jitter_op.sort(1).values, torch.arange(4, dtype=torch.int32).expand(NUM_DRAWS, 4))
    op, sign = params.randaugment_op, params.randaugment_magnitude < 0
    fourths = (params.jitter_change * 10 + 2).floor().clamp(0, 3)  # of −0.2 … 0.2
    order = params.jitter_op.unique(dim=0, return_inverse=True)[1]
    columns = [(params.crop, 81), (order, 24), (params.flip, 2)]
    columns += [(column, 4) for column in fourths.T]
    table = columns + [(column, 14) for column in op.T]
    # The signs, for the images with two signed operators.
    rows = ((op >= 1) & (op <= 9)).all(1)
    signed = [(column[rows], count) for column, count in columns]
    signed += [(column[rows] - 1, 9) for column in op.T] + [(column[rows].int(), 2) for column in sign.T]
    for column, count in table:
        assert_uniform(column, count)
        assert_uniform(column[:-1] * count + column[1:], count**2, sigmas=MANY_SIGMAS)  # and of the next image's
    for (one, num_one), (other, num_other) in (*combinations(table, 2), *combinations(signed, 2)):
        assert_uniform(one * num_other + other, num_one * num_other, sigmas=MANY_SIGMAS)


COUNT = 150


@pytest.fixture(scope="module")
def split():
    """Images whose labels are their row numbers, so that the output of a loader can be identified."""
    return Split(photos(COUNT, 16).numpy(), np.arange(COUNT))


def epoch_of(loader, epoch=0, start=0):
    """All images and labels of an epoch, in order; checks the sizes of the batches."""
    batches = list(loader.epoch(epoch, start))
    assert len(batches) == len(loader) - start
    assert {len(labels) for _, labels in batches[:-1]} <= {loader.batch_size}
    assert all(images.is_contiguous(memory_format=torch.channels_last) for images, _ in batches)
    return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])


@pytest.fixture(scope="module")
def usual(split):
    return epoch_of(TrainLoader(split, 64, Augmentation(), seed=3), epoch=2)


@pytest.mark.parametrize(
    ("batch_size", "chunk_size", "start"),
    [(64, 128, 0), (64, 1, 0), (50, None, 0), (7, 30, 0), (1000, 10, 0), (64, 64, 2), (10, 30, 4), (1, 1, 149)],
)
def test_batch_size_chunk_size_and_start_do_not_change_the_images(split, usual, batch_size, chunk_size, start):
    loader = TrainLoader(split, batch_size, Augmentation(), seed=3, chunk_size=chunk_size)
    images, labels = epoch_of(loader, epoch=2, start=start)
    assert torch.equal(labels, usual[1][start * batch_size :])
    assert torch.equal(images, usual[0][start * batch_size :])
    assert list(loader.epoch(2, len(loader))) == []


def test_every_image_occurs_once_per_epoch_with_its_label(split):
    loader = TrainLoader(split, 64, NOTHING, chunk_size=64)
    for epoch in range(3):
        batches = list(loader.epoch(epoch))
        assert [len(images) for images, _ in batches] == [len(labels) for _, labels in batches] == [64, 64, 22]
        images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        assert labels.sort().values.tolist() == list(range(COUNT))
        assert torch.equal(images, normalize(torch.from_numpy(split.images)[labels]))


@pytest.mark.parametrize(
    ("num_images", "batch_size", "processes", "on_cpu", "on_cuda"),
    [
        (50_000, 128, 1, 391, 390),  # 80 images are left
        (1000, 90, 1, 12, 12),  # 10 of 1000
        (1000, 99, 1, 11, 11),
        (1001, 100, 1, 10, 10),  # batch norm needs two images, in each process
        (1003, 100, 1, 11, 10),
        (1003, 100, 2, 10, 10),
        (3, 100, 1, 1, 1),
    ],
)
def test_a_last_batch_that_is_too_small_is_dropped(monkeypatch, num_images, batch_size, processes, on_cpu, on_cuda):
    monkeypatch.setattr(distributed, "world_size", lambda: processes)
    found = [steps_per_epoch(num_images, batch_size, torch.device(device)) for device in ("cpu", "cuda")]
    assert found == [on_cpu, on_cuda]


def test_in_the_last_epochs_there_is_only_crop_and_flip(split):
    settings = Augmentation(cutout=4)
    loader = TrainLoader(split, 64, settings, seed=3, crop_and_flip_from=2)
    whole = TrainLoader(split, 64, settings, seed=3)
    mild = TrainLoader(split, 64, replace(NOTHING, crop_padding=4, flip=0.5), seed=3)
    for epoch in (0, 1, 2, 1):  # also backwards: a resumed run may start anywhere
        expected = whole if epoch < 2 else mild
        assert all(map(torch.equal, epoch_of(loader, epoch), epoch_of(expected, epoch))), epoch


def test_the_first_epochs_are_of_the_centers():
    split = Split(photos(100, 32).numpy(), np.arange(100))
    loader = TrainLoader(split, 64, Augmentation(), seed=3, full_size_from=2)
    for epoch in (0, 1, 2, 1):
        images, labels = epoch_of(TrainLoader(split, 64, Augmentation(), seed=3), epoch)
        expected = images[..., 4:28, 4:28] if epoch < 2 else images
        found = epoch_of(loader, epoch)
        assert torch.equal(found[0], expected)
        assert torch.equal(found[1], labels)


@pytest.mark.parametrize(("size", "expected"), [(8, 8), (9, 8), (16, 16), (24, 16), (28, 24), (32, 24), (64, 48)])
def test_the_small_size_is_a_multiple_of_8(size, expected):
    images = Split(np.zeros((2, 3, size, size), np.uint8), np.zeros(2, np.int64))
    loader = TrainLoader(images, 2, Augmentation(), full_size_from=1)
    assert [next(loader.epoch(epoch))[0].shape[2:] for epoch in (0, 1)] == [(expected, expected), (size, size)]


@pytest.mark.parametrize(("seed", "epoch"), [(3, 3), (4, 2), (2, 3), (0, 2), (3, 0)])
def test_another_epoch_or_seed_gives_other_random_parameters(split, usual, seed, epoch):
    images, labels = epoch_of(TrainLoader(split, 64, Augmentation(), seed=seed), epoch=epoch)
    assert (labels == usual[1]).sum() < 10
    same = (images[labels.argsort()] == usual[0][usual[1].argsort()]).flatten(1).all(1)
    assert same.sum() < 10


def test_epochs_do_not_depend_on_the_global_random_state(split, usual):
    loader = TrainLoader(split, 64, Augmentation(), seed=3)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    for _ in range(2):
        assert all(map(torch.equal, epoch_of(loader, epoch=2), usual))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(loader.images, torch.from_numpy(split.images))


def test_batches_are_augmented_and_normalized(split, usual):
    settings, images = Augmentation(), torch.from_numpy(split.images)
    params = transforms.sample_params(COUNT, 16, settings, epoch_generator(3, 2))
    expected = torch.stack([chain_of_torchvision(images[row], params[row], settings) for row in usual[1]])
    assert usual[0].dtype == torch.float32
    assert usual[1].dtype == torch.int64
    found = (usual[0] * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)).mul(255)
    assert_same(found.round().to(torch.uint8), expected, chain=True)


def test_prefetching_gives_the_same_batches(split):
    plain, prefetch = (TrainLoader(split, 30, Augmentation(), seed=3, chunk_size=60) for _ in range(2))
    prefetch.thread = ThreadPoolExecutor(1)  # as on CUDA
    for epoch, start in ((0, 0), (1, 0), (2, 0), (2, 2), (3, 0), (7, 1), (8, 0), (9, 1), (0, 0)):
        assert all(map(torch.equal, epoch_of(prefetch, epoch, start), epoch_of(plain, epoch, start)))


@pytest.mark.parametrize(("mean", "std"), [(MEAN, STD), ((0.0, 0.5, 1.0), (1.0, 0.1, 2.0))])
def test_normalize_equals_torchvision(mean, std):
    images = images_of(32)
    found = normalize(images, mean, std)
    expected = TF.normalize(TF.to_dtype(images, torch.float32, scale=True), mean, std)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert found.is_contiguous(memory_format=torch.channels_last)
