"""Train MobileNetV2 on CIFAR-10.

Sandler, Howard, Zhu, Zhmoginov, Chen 2018, "MobileNetV2: Inverted Residuals and Linear Bottlenecks", arXiv:1801.04381.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

import engine
import errors
import plotting
from models.mobilenetv2 import mobilenetv2
from recipe import Recipe, flag, parse_flags
from utils import load_data


@dataclass(frozen=True, kw_only=True)
class MobileNetV2Recipe(Recipe):
    network: ClassVar[str] = "mobilenetv2"
    width: float = flag("width multiplier: scales the channels of every layer", group="network", above=0)


RECIPE = MobileNetV2Recipe(
    name="mobilenetv2",  # checkpoints/mobilenetv2.pt, plots/mobilenetv2.png and .csv
    width=1.0,  # the paper's baseline: 2.24 M parameters
    epochs=200,  # this and all below as the original: the paper has no recipe for small images
    batch_size=64,
    lr=0.01,
    min_lr=0.0001,
    momentum=0.9,
    weight_decay=5e-4,  # the paper's is 4e-5, for ImageNet's 1.2 million images
    crop_padding=4,
    brightness=0.2,
    contrast=0.2,
    saturation=0.2,
    hue=0.2,
    flip=0.5,
    randaugment_ops=2,
    randaugment_magnitude=9,
)


def main() -> int:
    recipe = parse_flags(RECIPE, __doc__)
    previous = engine.previous_run(recipe)
    data = load_data(recipe)
    torch.manual_seed(recipe.seed)
    model = mobilenetv2(len(data.classes), width=recipe.width)
    run = engine.fit(model, data, recipe, previous)
    if run.history:
        plotting.plot_training(run.history, recipe.plot_path, title=recipe.name, reference=recipe.reference)
        print(f"weights: {recipe.checkpoint_path}   curves: {recipe.plot_path}, {recipe.csv_path}")
    return run.exit_status


if __name__ == "__main__":
    errors.run(main)
