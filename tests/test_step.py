"""What a training step and the loader may do on a GPU, checked on the CPU by tracing all operators."""

import contextlib
import json
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, tiny_images
from torch.cuda._sanitizer import EventHandler
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dense
import mobilenetv2
import resnext
from benchmarks import roofline
from dataset.transforms import Plan
from models import NETWORKS
from training import loop
from utils import TrainLoader

SMALL = {
    dense: {"depth": 37, "growth_rate": 4},
    mobilenetv2: {"width": 0.25},
    resnext: {"base_width": 2},
}
CPU = torch.device("cpu")
# Operators that synchronize host and device, because the host needs their result.
SYNCHRONIZING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2"}


class Watch(TorchDispatchMode):
    """Counts operators, and collects the storages that existed before and are written."""

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


def test_a_step_writes_only_its_state_and_neither_synchronizes_nor_copies_activations(trainer):
    with Watch() as watch:
        step(trainer)
    known, parameters = storages(trainer.state()), storages(list(trainer.model.parameters()))
    assert parameters <= watch.written <= known  # batch norm's schema does not declare that it writes its statistics
    assert not SYNCHRONIZING & watch.operators.keys()
    assert watch.operators["clone"] == 0


def test_tensors_keep_their_addresses(trainer):
    rates = [group["lr"] for group in trainer.optimizer.param_groups]
    before = [tensor.data_ptr() for tensor in (*trainer.state(), *rates, trainer.ema.update_rate)]
    for number in range(3):
        trainer.train_step(0, number, torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 0]))
    assert all(group["lr"] is rate for group, rate in zip(trainer.optimizer.param_groups, rates, strict=True))
    after = [tensor.data_ptr() for tensor in (*trainer.state(), *rates, trainer.ema.update_rate)]
    assert after == before
    assert len(set(before)) == len(before)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_operations_and_the_memory_traffic_of_a_step_equal_the_stored_ones(name):
    """After an intended change, run benchmarks/roofline.py again."""
    stored = json.loads((ROOT / "benchmarks/results/roofline.json").read_text())["networks"][name]
    counted = roofline.count(name)
    for quantity in ("flops", "kernels", "bytes_eager", "bytes_fused"):
        assert counted[quantity] == pytest.approx(stored[quantity], rel=0.02), quantity


class Streams(TorchDispatchMode):
    """Simulates CUDA streams. PyTorch's CUDA sanitizer finds two streams that use the same memory without waiting.

    As with CUDA's allocator, memory that one stream frees can be reused for a new tensor of the same stream.
    """

    def __init__(self):
        super().__init__()
        self.handler, self.current, self.num_events = EventHandler(), 0, 0
        self.owners, self.races = {}, []

    def stream(self, number):
        return SimpleNamespace(number=number, wait_stream=lambda other: self.wait(number, other.number))

    def wait(self, waiting, other):
        self.num_events += 1
        self.handler._handle_event_record(self.num_events, other)
        self.handler._handle_event_wait(self.num_events, waiting)

    @contextlib.contextmanager
    def on(self, stream):
        before, self.current = self.current, stream.number
        yield
        self.current = before

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        is_new = "lift_fresh" in str(function)  # the result of torch.tensor
        if is_new or not function.is_view:
            inputs, outputs = storages((args, kwargs)), storages(result)
            made = outputs if is_new else outputs - inputs
            self.owners |= dict.fromkeys(made, self.current)
            changed = set()
            for argument, value in zip(function._schema.arguments, args, strict=False):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    changed |= storages(value)
            read, written = (
                {(address, self.owners.get(address)) for address in addresses}
                for addresses in (inputs - changed - made, changed | made)
            )
            self.races += self.handler._handle_kernel_launch(
                self.current, read, written, set(), str(function), defaultdict(list)
            )
        return result


def test_the_loader_has_no_race_between_its_two_streams(monkeypatch):
    def copied(plan, _):
        params = {field.name: getattr(plan.params, field.name).clone() for field in fields(plan.params)}
        tensors = {name: getattr(plan, name).clone() for name in ("index", "sort_order", "inverse_order")}
        return replace(plan, **tensors, params=replace(plan.params, **params))

    streams = Streams()
    monkeypatch.setattr(Plan, "to", copied)  # a copy, as from the host to a GPU
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: streams.stream(streams.current))
    monkeypatch.setattr(torch.cuda, "stream", streams.on)
    settings = dense.RECIPE.augmentation()
    loader = TrainLoader(tiny_images(train_size=60).train, 4, settings, chunk_size=8)
    loader.thread, loader.stream = ThreadPoolExecutor(1), streams.stream(1)
    with streams:
        for epoch in range(3):
            for step, (images, _) in enumerate(loader.epoch(epoch)):
                images.square_()
                if epoch == 1 and step == 2:
                    break  # as after a signal
    assert streams.num_events > 20
    assert not streams.races, streams.races[0]
