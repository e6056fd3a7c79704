"""The exponential moving average (EMA) of a model's weights, which is what a run tests and keeps."""

import copy

import torch
from torch import Tensor, nn


class ModelEma:
    """A moving average of the weights and of the batch-norms' statistics, which belong to them.

    After t steps the decay is min(decay, (1 + t) / (10 + t)), so that the random initial weights are soon forgotten:
    the warm-up of TensorFlow's ExponentialMovingAverage. Averaging: Polyak and Juditsky 1992.

    Not torch.optim.swa_utils.AveragedModel: the decay must be a tensor, or a CUDA graph would repeat the first one.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.decay = decay
        self.weight = torch.zeros((), device=next(model.parameters()).device)  # of the new value, at the next step
        pairs = zip(self.model.state_dict().values(), model.state_dict().values(), strict=True)
        pairs = [(own, new) for own, new in pairs if own.is_floating_point()]
        self.own, self.new = [own for own, _ in pairs], [new for _, new in pairs]
        pairs = zip(self.model.buffers(), model.buffers(), strict=True)
        self.counters = [(own, new) for own, new in pairs if not own.is_floating_point()]

    def set_weight(self, steps_done: int) -> None:
        self.weight.fill_(1 - min(self.decay, (1 + steps_done) / (10 + steps_done)))

    def update(self) -> None:
        change = torch._foreach_sub(self.new, self.own)
        torch._foreach_mul_(change, self.weight)
        torch._foreach_add_(self.own, change)

    def state_dict(self) -> dict[str, Tensor]:
        if self.counters:
            torch._foreach_copy_(*map(list, zip(*self.counters, strict=True)))
        return self.model.state_dict()


def ema_decay(horizon: float, total_steps: int) -> float:
    """The decay with which the average covers about the last `horizon`, a fraction of the run."""
    return 1 - 1 / max(1.0, horizon * total_steps)
