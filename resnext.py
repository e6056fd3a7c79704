"""Train ResNeXt-29 2×64d on CIFAR-10.

Xie, Girshick, Dollár, Tu, He 2017, "Aggregated Residual Transformations for Deep Neural Networks", arXiv:1611.05431.
"""

from dataclasses import dataclass
from typing import ClassVar

import openmp  # noqa: F401

import torch

import engine
import errors
import parallel
import plotting
from models.resnext import resnext29
from recipe import Recipe, flag, parse_flags
from utils import load_data


@dataclass(frozen=True, kw_only=True)
class ResNeXtRecipe(Recipe):
    network: ClassVar[str] = "resnext29"
    cardinality: int = flag("groups of each 3×3 convolution, C in the paper", group="network", at_least=1, at_most=1024)
    base_width: int = flag(
        "channels of each group in the first stage, d in the paper", group="network", at_least=1, at_most=1024
    )


RECIPE = ResNeXtRecipe(
    name="resnext",  # checkpoints/resnext.pt, plots/resnext.png and .csv
    cardinality=2,  # 2×64d as the original, 9.13 M parameters; the paper has 8×64d and 16×64d
    base_width=64,
    epochs=50,  # a quarter of the original's: meant for ten minutes of one large GPU, not yet tried there
    batch_size=256,  # 64 leaves most of a large GPU idle; more would not fit a small one. Both rates grow along
    base_lr=0.01,  # as the original, for a batch of 64: the paper's 0.1 for 128 falls in steps
    base_min_lr=0.0001,  # as the original
    warmup=0.04,  # two epochs: the rate of a batch of 256 is too high to start with (Goyal et al. 2017)
    schedule_step="batch",  # with a quarter of the epochs, steps of a whole epoch would be coarse
    momentum=0.9,  # as the paper
    nesterov=True,  # as the authors' code, after fb.resnet.torch
    weight_decay=2e-3,  # rate × decay sets the pace behind a norm (arXiv:1706.05350): with 0.01, about the paper's
    decay_norms=False,  # they scale what the next norm undoes, or are few (He et al. 2019, arXiv:1812.01187)
    label_smoothing=0.0,  # averaging three networks softens the probabilities already; more would cost test loss
    ema_horizon=0.04,  # about the last two epochs, over which the rate is next to nothing
    crop_padding=4,  # as the paper, like the flip
    brightness=0.2,  # ColorJitter and RandAugment as the original
    contrast=0.2,
    saturation=0.2,
    hue=0.2,
    flip=0.5,
    alternating_flip=False,  # not tried yet
    randaugment_ops=2,
    randaugment_magnitude=9,
    cutout=0,  # RandAugment leaves little for it to add
    augment_until=1.0,  # to the end: an earlier end is not tried yet
    compile="auto",  # a graph needs no compiler; which way is fastest is not measured yet
)


def main() -> int:
    recipe = parse_flags(RECIPE, __doc__)
    with parallel.processes(recipe.device):  # those of torchrun, where it was used
        previous = engine.previous_run(recipe)
        data = load_data(recipe)
        torch.manual_seed(recipe.seed)
        model = resnext29(len(data.classes), cardinality=recipe.cardinality, base_width=recipe.base_width)
        run = engine.fit(model, data, recipe, previous)
        if run.history and parallel.is_first():
            plotting.plot_training(run.history, recipe.plot_path, title=recipe.name, reference=recipe.reference)
            print(f"weights: {recipe.checkpoint_path}   curves: {recipe.plot_path}, {recipe.csv_path}")
    return run.exit_status


if __name__ == "__main__":
    errors.run(main)
