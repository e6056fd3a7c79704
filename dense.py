"""Train DenseNet-121 on CIFAR-10.

Huang, Liu, van der Maaten, Weinberger 2017, "Densely Connected Convolutional Networks", arXiv:1608.06993.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

import engine
import errors
import plotting
from models.densenet import BLOCKS, densenet
from recipe import Recipe, flag, parse_flags
from utils import load_data


@dataclass(frozen=True, kw_only=True)
class DenseNetRecipe(Recipe):
    network: ClassVar[str] = "densenet"
    depth: int = flag("layers: 121, 169, 201, 264 as in the paper, or 37", group="network", choices=tuple(BLOCKS))
    growth_rate: int = flag("channels that each layer adds, k in the paper", group="network", at_least=1)


RECIPE = DenseNetRecipe(
    name="densenet",  # checkpoints/densenet.pt, plots/densenet.png and .csv
    depth=121,
    growth_rate=32,  # the paper's for ImageNet: 6.96 M parameters
    epochs=200,  # as the original; the paper trains 300 on CIFAR
    batch_size=64,  # as the paper
    lr=0.01,  # a tenth of the paper's, as the original: a cosine needs no high plateau to fall from
    min_lr=0.0001,  # as the original
    momentum=0.9,  # as the paper
    weight_decay=5e-4,  # as the original; the paper has 1e-4 and fewer augmentations
    crop_padding=4,  # as the paper, like the flip
    brightness=0.2,  # ColorJitter and RandAugment as the original
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
    model = densenet(len(data.classes), depth=recipe.depth, growth_rate=recipe.growth_rate)
    run = engine.fit(model, data, recipe, previous)
    if run.history:
        plotting.plot_training(run.history, recipe.plot_path, title=recipe.name, reference=recipe.reference)
        print(f"weights: {recipe.checkpoint_path}   curves: {recipe.plot_path}, {recipe.csv_path}")
    return run.exit_status


if __name__ == "__main__":
    errors.run(main)
