"""What the tests share: a network, images and a recipe so small that an epoch takes a fraction of a second."""

import functools
import os
import signal
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._pytree import keystr, tree_flatten_with_path

from dataset import Dataset, Split
from models import NETWORKS
from training import checkpoint, loop
from training.recipe import Recipe, flag

# The same precision on every machine: on a CPU with bfloat16 instructions, --precision auto would be bfloat16. PyTorch
# reads this when it runs its first operator.
os.environ.setdefault("ATEN_CPU_CAPABILITY", "avx2")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for --deterministic; cuBLAS reads it at its start

ROOT = Path(__file__).parents[1]
TIMES = ("seconds", "images_per_second")  # the columns that differ between two identical runs


# All options that the baseline's recipe does not use, at once.
ALL_ON = {
    "nesterov": True, "norm_lr_factor": 3.0, "decay_norms": False, "label_smoothing": 0.1, "ema_horizon": 0.1,
    "warmup": 0.4, "schedule_step": "batch", "optimizer": "muon", "cutout": 3, "augment_until": 0.5,
}  # fmt: skip


def without_times(history):
    return [{name: value for name, value in row.items() if name not in TIMES} for row in history]


def assert_same(found, expected):
    """Bit-identical: tensors, numbers and nested containers."""
    found, expected = (dict(tree_flatten_with_path(content)[0]) for content in (found, expected))
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert found[path].dtype == value.dtype, keystr(path)
            assert torch.equal(found[path], value), keystr(path)
        else:
            assert found[path] == value, keystr(path)


@dataclass(frozen=True, kw_only=True)
class TinyRecipe(Recipe):
    network: ClassVar[str] = "tiny"
    channels: int = flag("channels of the only layer", group="network", at_least=1)


class Tiny(nn.Module):
    """One convolution and one norm. `on_forward(network, logits)`, if set, may change the logits."""

    def __init__(self, num_classes: int, *, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.classifier = nn.Linear(channels, num_classes)
        self.on_forward = None

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits = self.classifier(self.norm(self.conv(images)).relu().mean((2, 3)))
        return self.on_forward(self, logits) if self.on_forward else logits


def at_call(number, action, *, training=True):
    """An `on_forward` that calls `action(logits)` at forward pass `number` (from 0) of training or of evaluation."""
    calls = Counter()

    def on_forward(model, logits):
        calls[model.training] += 1
        if model.training == training and calls[training] == number + 1:
            new = action(logits)
            return logits if new is None else new
        return logits

    return on_forward


def pytest_configure():
    """One thread: for such small networks, more threads are not faster, and on a busy machine they are slower."""
    torch.set_num_threads(1)


def tiny_network(num_classes: int = 3, channels: int = 4) -> Tiny:
    """The tiny network, always with the same initial weights."""
    torch.manual_seed(7)
    return Tiny(num_classes, channels=channels)


def tiny_recipe_in(folder: Path, **changes) -> TinyRecipe:
    values = {
        "name": "tiny", "channels": 4, "epochs": 3, "batch_size": 4, "base_lr": 0.8, "base_min_lr": 0.016,
        "warmup": 0.0, "schedule_step": "epoch", "norm_lr_factor": 1.0, "optimizer": "sgd", "muon_scale": 0.5,
        "momentum": 0.9, "nesterov": False, "weight_decay": 5e-4, "decay_norms": True, "label_smoothing": 0.0,
        "ema_horizon": 0.0, "compile": "none", "crop_padding": 2, "brightness": 0.2, "contrast": 0.2, "saturation": 0.2,
        "hue": 0.2, "flip": 0.5, "randaugment_ops": 1, "randaugment_magnitude": 9, "cutout": 0, "augment_until": 1.0,
        "small_until": 0.0, "image_size": 8, "device": "cpu",
        "checkpoint_dir": str(folder / "checkpoints"), "plot_dir": str(folder / "plots"),
    }  # fmt: skip
    return TinyRecipe(**{**values, **changes})


def tiny_images(*, val: bool = False, train_size: int = 22, seed: int = 0) -> Dataset:
    """22 training, 9 test and, with `val`, 8 validation images of 8×8. The class is the channel with higher values."""
    rng = np.random.default_rng(seed)

    def split(size: int) -> Split:
        labels = np.arange(size) % 3
        images = rng.integers(0, 190, (size, 3, 8, 8), np.uint8)
        images[np.arange(size), labels] += 65
        return Split(images, labels.astype(np.int64))

    train, test, held_out = split(train_size), split(9), split(8)
    return Dataset("made up", ("red", "green", "blue"), train, test, held_out if val else None, f"digest {seed}")


@pytest.fixture(autouse=True)
def signals_as_before():
    """Restore the signal handlers, because scripts that run in this process replace them."""
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def tiny(monkeypatch):
    """Build the tiny network, which is registered in NETWORKS."""
    monkeypatch.setitem(NETWORKS, "tiny", Tiny)
    return tiny_network


@pytest.fixture
def tiny_recipe(tmp_path):
    return functools.partial(tiny_recipe_in, tmp_path)


@pytest.fixture
def tiny_data():
    return tiny_images


@pytest.fixture
def train(tiny, tiny_recipe, tiny_data):
    """Train the tiny network as the main of a script does; a test can replace `data` and set `on_forward`."""

    def run(data=None, *, val=False, on_forward=None, **changes):
        recipe = tiny_recipe(**changes)
        with checkpoint.previous_run(recipe) as previous:
            recipe, data = recipe.resumed(previous), data or tiny_data(val=val)
            model = tiny(len(data.classes), recipe.channels)
            model.on_forward = on_forward
            return loop.fit(model, data, recipe, previous)

    return run


@pytest.fixture
def images():
    """Noise."""
    return torch.randint(0, 256, (11, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
