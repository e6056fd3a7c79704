"""Train MobileNetV2 on CIFAR-10.

Sandler, Howard, Zhu, Zhmoginov, Chen 2018, "MobileNetV2: Inverted Residuals and Linear Bottlenecks", arXiv:1801.04381.
"""

from dataclasses import dataclass
from typing import ClassVar

import openmp  # noqa: F401

import torch

import engine
import errors
import parallel
import plotting
from models.mobilenetv2 import mobilenetv2
from recipe import Recipe, flag, parse_flags
from utils import load_data


@dataclass(frozen=True, kw_only=True)
class MobileNetV2Recipe(Recipe):
    network: ClassVar[str] = "mobilenetv2"
    width: float = flag("width multiplier: scales the channels of every layer", group="network", above=0, at_most=100)


RECIPE = MobileNetV2Recipe(
    name="mobilenetv2",  # checkpoints/mobilenetv2.pt, plots/mobilenetv2.png and .csv
    width=1.0,  # the paper's baseline: 2.24 M parameters
    epochs=80,  # it learns more slowly than the others and costs less; not yet tried on a GPU
    batch_size=512,  # 64 leaves most of a large GPU idle; both rates grow along
    base_lr=0.01,  # as the original, for a batch of 64
    base_min_lr=0.0001,  # as the original
    warmup=0.025,  # two epochs: the rate of a batch of 512 is too high to start with (Goyal et al. 2017)
    schedule_step="batch",  # with so few epochs, steps of a whole one would be coarse
    momentum=0.9,  # as the paper
    nesterov=True,  # SGD's usual form for CIFAR since Wide ResNets (arXiv:1605.07146)
    weight_decay=1e-3,  # half the larger networks': it overfits less
    decay_norms=False,  # they scale what the next norm undoes, or are few (He et al. 2019, arXiv:1812.01187)
    label_smoothing=0.0,  # averaging three networks softens the probabilities already; more would cost test loss
    ema_horizon=0.025,  # about the last two epochs, over which the rate is next to nothing
    crop_padding=4,
    brightness=0.2,
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
        model = mobilenetv2(len(data.classes), width=recipe.width)
        run = engine.fit(model, data, recipe, previous)
        if run.history and parallel.is_first():
            plotting.plot_training(run.history, recipe.plot_path, title=recipe.name, reference=recipe.reference)
            print(f"weights: {recipe.checkpoint_path}   curves: {recipe.plot_path}, {recipe.csv_path}")
    return run.exit_status


if __name__ == "__main__":
    errors.run(main)
