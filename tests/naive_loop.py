"""The training loop in plain PyTorch: what training/loop.py must compute, in one process or several."""

import copy
import math

import torch
from torch.nn import functional as F

from training import loop
from utils import normalize


def local_slice(count, part, num_parts):
    return slice(count * part // num_parts, count * (part + 1) // num_parts)


def lr_of(recipe, step, steps_in_epoch):
    """The learning rate of a step, counted from the start of the run: a linear warm-up, then a cosine."""
    stride = steps_in_epoch if recipe.schedule_step == "epoch" else 1
    step -= step % stride
    total = recipe.epochs * steps_in_epoch
    warmup_steps = recipe.warmup * total
    if step < warmup_steps:
        return recipe.lr * min(1, (step + stride) / warmup_steps)
    cosine = (1 + math.cos(math.pi * (step - warmup_steps) / (total - warmup_steps))) / 2
    return recipe.min_lr + (recipe.lr - recipe.min_lr) * cosine


@torch.no_grad()
def step_kernels(model, recipe, lr, velocities):
    """Muon for every convolution: the singular values of its update, normalized, become f(f(f(s)))."""
    for name, kernel in model.named_parameters():
        if kernel.ndim < 4:
            continue
        velocity = velocities[name] = recipe.momentum * velocities.get(name, 0) + kernel.grad
        update = kernel.grad + recipe.momentum * velocity if recipe.nesterov else velocity
        u, s, v = torch.linalg.svd(update.flatten(1), full_matrices=False)
        s = s / s.norm()
        for _ in range(3):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        update, norm = (u * s @ v).view(kernel.shape), kernel.norm()
        kernel -= recipe.muon_scale * lr * norm * update / update.norm()
        kernel *= norm / kernel.norm()
        kernel.grad = None


def train(model, data, recipe, world_size=1):
    """Train `model`; return the history, and the weights that are tested.

    Several processes are simulated one after the other on their parts of a batch. The batch-norm statistics are those
    of the first one.
    """
    dtype = next(model.parameters()).dtype
    loader = loop.train_loader(recipe, data.train)
    total = recipe.epochs * len(loader)
    decay = 1 - 1 / max(1.0, recipe.ema_horizon * total)
    average = {name: value.double().clone() for name, value in model.state_dict().items() if value.is_floating_point()}
    sgd = torch.optim.SGD(
        [
            {"params": [weight], "weight_decay": recipe.weight_decay if weight.ndim > 1 or recipe.decay_norms else 0}
            for weight in model.parameters()
        ],
        lr=1.0, momentum=recipe.momentum, nesterov=recipe.nesterov,
    )  # fmt: skip
    history, velocities = [], {}
    for epoch in range(recipe.epochs):
        loss_sum, num_correct = 0.0, 0
        model.train()
        for step, (images, labels) in enumerate(loader.epoch(epoch), epoch * len(loader)):
            rate = lr_of(recipe, step, len(loader))
            for group in sgd.param_groups:
                factor = 1 if group["params"][0].ndim > 1 else recipe.norm_lr_factor
                group["lr"] = torch.tensor(rate * factor).item()  # in training/loop.py it is a float32
            sgd.zero_grad()
            for part in range(world_size):
                own = local_slice(len(labels), part, world_size)
                before = {name: buffer.clone() for name, buffer in model.named_buffers()}
                logits = model(images[own].to(dtype))
                targets = F.one_hot(labels[own], 3).to(dtype)
                targets = targets * (1 - recipe.label_smoothing) + recipe.label_smoothing / 3
                (-(targets * logits.log_softmax(1)).sum() / len(labels)).backward()
                loss_sum += F.cross_entropy(logits, labels[own], reduction="sum").item()
                num_correct += int((logits.argmax(1) == labels[own]).sum())
                if part:
                    for name, buffer in model.named_buffers():
                        buffer.copy_(before[name])
            if recipe.optimizer == "muon":
                step_kernels(model, recipe, torch.tensor(rate).item(), velocities)
            sgd.step()
            new = torch.tensor(1 - min(decay, (1 + step) / (10 + step))).item()  # also a float32
            for name in average:
                average[name] = (1 - new) * average[name] + new * model.state_dict()[name].double()
        tested = copy.deepcopy(model).eval()
        if recipe.ema_horizon:
            tested.load_state_dict({**model.state_dict(), **average})
        row = {"epoch": epoch + 1, "learning_rate": rate}
        row |= {"train_loss": loss_sum / len(data.train), "train_accuracy": num_correct / len(data.train)}
        for name, split in [("test", data.test)] + ([("val", data.val)] if data.val else []):
            labels = torch.from_numpy(split.labels)
            with torch.no_grad():
                logits = tested(normalize(torch.from_numpy(split.images)).to(dtype))
            row[f"{name}_loss"] = F.cross_entropy(logits, labels).item()
            row[f"{name}_accuracy"] = (logits.argmax(1) == labels).double().mean().item()
        history.append(row)
    return history, tested.state_dict()
