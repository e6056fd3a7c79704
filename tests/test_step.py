"""What a training step may do to be captured as a CUDA graph, watched operator by operator, on the CPU."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from conftest import tiny_images
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dense
import mobilenetv2
import resnext
from models import NETWORKS
from training import loop

SMALL = {
    dense: {"depth": 37, "growth_rate": 4},
    mobilenetv2: {"width": 0.25},
    resnext: {"base_width": 2},
}
CPU = torch.device("cpu")
# Operators for which the host waits for the device: their result decides what is run, or how large it is.
SYNCHRONIZING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2"}


class Watch(TorchDispatchMode):
    """Counts operators, and collects the storages that were there before and are written."""

    def __init__(self):
        super().__init__()
        self.operators, self.made, self.written = Counter(), set(), set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.operators[function._schema.name.split("::")[1]] += 1
        values = dict(zip((argument.name for argument in function._schema.arguments), args, strict=False))
        values |= kwargs or {}
        changed = set()
        for argument in function._schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                changed |= storages(values.get(argument.name))
        self.written |= changed - self.made
        self.made |= storages(result) - storages((args, kwargs))
        return result


def storages(values):
    return {value.untyped_storage().data_ptr() for value in tree_leaves(values) if isinstance(value, torch.Tensor)}


@pytest.fixture(params=SMALL, ids=lambda script: script.__name__)
def trainer(request):
    """The trainer of a script's own recipe, after a first step."""
    script = request.param
    recipe = replace(script.RECIPE, **SMALL[script], image_size=16, batch_size=4, epochs=2, precision="bfloat16")
    data = tiny_images()
    model = NETWORKS[recipe.network](3, **recipe.network_arguments()).to(memory_format=torch.channels_last).train()
    run = loop.Run(model, loop.make_optimizer(model, recipe, CPU), loop.make_ema(model, recipe, data.train))
    trainer = loop.Trainer(run, data.train, recipe, CPU)
    step(trainer)
    return trainer


def step(trainer, images=None):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, 3, 16, 16, generator=generator).to(memory_format=torch.channels_last)
    trainer.step(images, torch.tensor([0, 1, 2, 0]), trainer.model)


def test_a_step_writes_nothing_that_its_state_does_not_name(trainer):
    with Watch() as watch:
        step(trainer)
    known, parameters = storages(trainer.state()), storages(list(trainer.model.parameters()))
    assert parameters <= watch.written <= known  # batch norm writes its statistics without saying so


def test_a_step_makes_the_host_wait_for_nothing_and_copies_no_activation(trainer):
    with Watch() as watch:
        step(trainer)
    assert not SYNCHRONIZING & watch.operators.keys()
    assert watch.operators["clone"] == 0


def test_addresses_stay_the_same(trainer):
    before = [tensor.data_ptr() for tensor in (*trainer.state(), trainer.lr_tensor, trainer.ema.update_rate)]
    for number in range(3):
        trainer.train_step(0, number, torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 0]))
    after = [tensor.data_ptr() for tensor in (*trainer.state(), trainer.lr_tensor, trainer.ema.update_rate)]
    assert after == before
    assert len(set(before)) == len(before)
