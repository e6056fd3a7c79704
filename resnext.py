"""Train ResNeXt-29 2×64d on CIFAR-10.

Xie, Girshick, Dollár, Tu, He 2017, "Aggregated Residual Transformations for Deep Neural Networks", arXiv:1611.05431.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

import engine
import errors
import plotting
from models.resnext import resnext29
from recipe import Recipe, flag, parse_flags
from utils import load_data


@dataclass(frozen=True, kw_only=True)
class ResNeXtRecipe(Recipe):
    network: ClassVar[str] = "resnext29"
    cardinality: int = flag("groups of each 3×3 convolution, C in the paper", group="network", at_least=1)
    base_width: int = flag("channels of each group in the first stage, d in the paper", group="network", at_least=1)


RECIPE = ResNeXtRecipe(
    name="resnext",  # checkpoints/resnext.pt, plots/resnext.png and .csv
    cardinality=2,  # 2×64d as the original, 9.13 M parameters; the paper has 8×64d and 16×64d
    base_width=64,
    epochs=200,  # as the original; the paper trains 300
    batch_size=64,  # as the original; the paper has 128 on 8 GPUs
    lr=0.01,  # as the original; the paper starts at 0.1 and falls in two steps
    min_lr=0.0001,  # as the original
    momentum=0.9,  # as the paper
    weight_decay=5e-4,  # as the paper
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
    model = resnext29(len(data.classes), cardinality=recipe.cardinality, base_width=recipe.base_width)
    run = engine.fit(model, data, recipe, previous)
    if run.history:
        plotting.plot_training(run.history, recipe.plot_path, title=recipe.name, reference=recipe.reference)
        print(f"weights: {recipe.checkpoint_path}   curves: {recipe.plot_path}, {recipe.csv_path}")
    return run.exit_status


if __name__ == "__main__":
    errors.run(main)
