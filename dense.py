"""Train DenseNet-121 on CIFAR-10.

Huang, Liu, van der Maaten, Weinberger 2017, "Densely Connected Convolutional Networks", arXiv:1608.06993.
"""

from dataclasses import dataclass
from typing import ClassVar

from common import distributed, errors

import torch

from models.densenet import BLOCKS, densenet
from training import checkpoint
from training.history import plotter
from training.loop import fit
from training.recipe import Recipe, flag, load_data, parse_flags


@dataclass(frozen=True, kw_only=True)
class DenseNetRecipe(Recipe):
    network: ClassVar[str] = "densenet"
    depth: int = flag("layers: 121, 169, 201, 264 as in the paper, or 37", group="network", choices=tuple(BLOCKS))
    growth_rate: int = flag("channels that each layer adds, k in the paper", group="network", at_least=1, at_most=1024)


# Batch, average and augmentation are those that a search found for MobileNetV2; the rate and the decay were tried on a
# small DenseNet as well (benchmarks/README.md).
RECIPE = DenseNetRecipe(
    name="densenet",  # checkpoints/densenet.pt, plots/densenet.png and .csv
    depth=121,
    growth_rate=32,  # the paper's for ImageNet: 6.96 M parameters
    epochs=50,  # a quarter of the baseline's, not tried yet
    batch_size=128,  # small batches learn most from an image, and are no slower on a CPU
    base_lr=0.05,  # for a batch of 64. half of it and twice it did worse
    base_min_lr=0.0,  # the last steps are the smallest
    warmup=0.15,  # a fraction, so that runs of any length have a warm-up: the peak rate is high
    schedule_step="batch",  # with few epochs, steps of a whole epoch would be coarse
    momentum=0.9,  # as the paper
    nesterov=True,  # as the paper
    weight_decay=5e-4,  # the usual one beside a rate of 0.1; 1e-3 did as well; the paper's is 1e-4
    decay_norms=False,  # norms and biases need no regularization (He et al. 2019, arXiv:1812.01187)
    label_smoothing=0.0,  # 0.1 cost accuracy and loss in the search; the ensemble's average softens already
    ema_horizon=0.025,  # the last 2.5 % of the run, where the learning rate is near 0; 0.1 did worse
    crop_padding=4,  # as the paper
    brightness=0.1,  # weaker augmentation than the baseline's, whose strength cost 2 to 3 points in short runs
    contrast=0.1,
    saturation=0.1,
    hue=0.05,
    flip=0.5,
    randaugment_ops=1,
    randaugment_magnitude=5,
    cutout=0,  # RandAugment leaves little for it to add
    augment_until=0.85,  # crop and flip alone at the end (He et al. 2019, arXiv:1909.09148): 4 points in short runs
    compile="auto",  # a graph needs no compiler; which way is fastest is not measured yet
)


def main() -> int:
    recipe = parse_flags(RECIPE, __doc__)
    with distributed.processes(recipe.device), checkpoint.previous_run(recipe) as previous:
        recipe = recipe.resumed(previous)
        data = load_data(recipe)
        torch.manual_seed(recipe.seed)
        model = densenet(len(data.classes), depth=recipe.depth, growth_rate=recipe.growth_rate)
        run = fit(model, data, recipe, previous, plotter(recipe))
    return run.exit_status


if __name__ == "__main__":
    errors.run(main)
