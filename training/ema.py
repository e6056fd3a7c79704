"""The exponential moving average (EMA) of a model's weights. The average is tested and saved."""

import copy

import torch
from torch import nn


class ModelEma:
    """A moving average of the weights and of the batch-norm statistics (Polyak and Juditsky 1992).

    After t steps the decay is min(decay, (1 + t) / (10 + t)), so that the random initial weights are soon forgotten.
    This is the warm-up of TensorFlow's ExponentialMovingAverage.

    Not torch.optim.swa_utils.AveragedModel: its decay is a Python float, which a CUDA graph would never update.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.decay = decay
        self.update_rate = torch.zeros((), device=next(model.parameters()).device)  # 1 − decay of the next update
        pairs = zip(self.model.state_dict().values(), model.state_dict().values(), strict=True)
        pairs = [(average, value) for average, value in pairs if average.is_floating_point()]
        self.averages, self.values = [average for average, _ in pairs], [value for _, value in pairs]

    def set_update_rate(self, steps_done: int) -> None:
        self.update_rate.fill_(1 - min(self.decay, (1 + steps_done) / (10 + steps_done)))

    def update(self) -> None:
        change = torch._foreach_sub(self.values, self.averages)
        torch._foreach_mul_(change, self.update_rate)
        torch._foreach_add_(self.averages, change)
