"""A step as a CUDA graph or compiled trains the same as in eager mode; if either fails, the run ends with an error."""

import contextlib
import functools
import math
from unittest import mock

from common.device import explain_out_of_memory
from common.errors import UserError

import pytest
import torch
from conftest import ALL_ON, assert_same, without_times
from torch import nn

from dataset import Split
from training import cuda_graph, loop
from training.cuda_graph import FastStep, pick_compile
from utils import TrainLoader


@pytest.fixture
def train(train):
    return functools.partial(train, overwrite=True, **ALL_ON)


class Compiled(nn.Module):
    """Replaces torch.compile's result: records the batch sizes of its calls, and fails in `fails_in`."""

    def __init__(self, model, fails_in=None):
        super().__init__()
        self.model, self.fails_in, self.sizes = model, fails_in, []

    def forward(self, images):
        self.sizes.append(len(images))
        if self.fails_in == "forward":
            raise RuntimeError("no compiler found\nand more lines")
        logits = self.model(images)
        if self.fails_in == "backward":
            logits.register_hook(lambda _: (_ for _ in ()).throw(ValueError("cannot lower")))
        return logits


@pytest.fixture
def compiler(monkeypatch):
    """Replace torch.compile by `Compiled`; returns the list of compiled networks."""
    made = []

    def install(fails_in=None):
        monkeypatch.setattr(torch, "compile", lambda model, **_: made.append(Compiled(model, fails_in)) or made[-1])
        return made

    return install


def assert_same_run(found, expected):
    assert without_times(found.history) == without_times(expected.history)
    assert_same(found.model.state_dict(), expected.model.state_dict())
    assert_same(found.ema.averages, expected.ema.averages)
    assert_same(found.optimizer.state_dict()["state"], expected.optimizer.state_dict()["state"])


def test_compiled_steps_train_the_same_and_the_smaller_last_batch_is_not_compiled(train, compiler):
    plain, made = train(), compiler()
    assert_same_run(train(compile="inductor"), plain)
    assert len(made) == 1
    assert made[0].sizes == 16 * [4]  # one to prepare, then five in each epoch; the sixth is a batch of 2


@pytest.mark.parametrize(("fails_in", "reason"), [("forward", "no compiler found"), ("backward", "cannot lower")])
def test_a_compiler_that_fails_ends_the_run_with_one_line(train, compiler, fails_in, reason):
    compiler(fails_in)
    with pytest.raises(UserError, match=rf"^--compile inductor failed \({reason}\); use --compile none$"):
        train(compile="inductor")


@pytest.mark.parametrize(
    ("choice", "device", "mode"),
    [("auto", "cuda", "graph"), ("auto", "cpu", "none"), ("graph", "cpu", "none"), ("inductor", "cpu", "inductor")],
)
def test_the_device_decides_about_graphs_and_a_refused_flag_is_answered_with_a_line(capsys, choice, device, mode):
    assert pick_compile(choice, torch.device(device)) == mode
    assert capsys.readouterr().out == ("--compile graph needs CUDA; using none\n" if choice == "graph" else "")


@pytest.mark.slow
def test_inductor_trains_nearly_the_same(train):
    plain, run = train(epochs=1), train(epochs=1, compile="inductor")
    assert run.history[0]["train_loss"] == pytest.approx(plain.history[0]["train_loss"], rel=1e-4)
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(run.model.state_dict()[name], value, rtol=1e-3, atol=1e-4)


class Graph:
    """Replaces torch.cuda.CUDAGraph without a GPU: a replay repeats the captured step."""

    capturing = None


@pytest.fixture
def graphs(monkeypatch):
    """Replace the parts of torch.cuda that a capture needs, for tensors on the CPU."""

    @contextlib.contextmanager
    def capture(graph, pool, **_):
        assert pool == "pool"
        Graph.capturing = graph
        yield
        Graph.capturing = None

    for name, value in {
        "current_stream": mock.Mock, "Stream": mock.Mock, "stream": lambda _: contextlib.nullcontext(),
        "CUDAGraph": Graph, "graph": capture, "graph_pool_handle": lambda: "pool",
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)


@pytest.mark.parametrize("choice", ["graph", "both"])
def test_a_captured_step_is_replayed_on_each_batch(tiny, tiny_recipe, tiny_data, graphs, compiler, choice):
    made = compiler()
    recipe, data, device, ends = tiny_recipe(**ALL_ON), tiny_data(), torch.device("cpu"), []
    for mode in ("none", choice):
        model, steps = tiny(), []
        run = loop.Run(model, loop.make_optimizer(model, recipe, device), loop.ModelEma(model, 0.9))
        trainer = loop.Trainer(run, data.train, recipe, device)

        def step(images, labels, network, trainer=trainer, steps=steps):
            if Graph.capturing:  # a capture records the step without running it

                def replay():
                    trainer.step(images, labels, network)
                    images.fill_(math.nan)  # each replay must fill its buffers first
                    labels.zero_()

                Graph.capturing.replay = replay
                return
            steps.append(len(images))
            trainer.step(images, labels, network)

        trainer.fast_step = FastStep(step, model, trainer.state, choice=mode, batch_size=recipe.batch_size)
        model.train()
        for epoch in range(2):
            for number, (images, labels) in enumerate(trainer.loader.epoch(epoch)):
                trainer.train_step(epoch, number, images, labels)
        ends.append(trainer.state())
        warm_up = cuda_graph.WARM_UP_STEPS * [4] + cuda_graph.WARM_UP_STEPS * [2]
        assert steps == (2 * [4, 4, 4, 4, 4, 2] if mode == "none" else warm_up)
    assert_same(ends[1], ends[0])
    assert [set(compiled.sizes) for compiled in made] == ([{4}] if choice == "both" else [])


@pytest.mark.parametrize(
    ("fails_in", "error", "reason"),
    [
        ("step", ValueError("this operator cannot"), r"\(this operator cannot; the capture was aborted\)"),
        ("end", RuntimeError("the capture was aborted"), r"\(the capture was aborted\)"),
        ("step", torch.OutOfMemoryError("CUDA out of memory"), None),
    ],
)
def test_a_failed_capture_leaves_the_state_unchanged(
    tiny, tiny_recipe, tiny_data, graphs, monkeypatch, fails_in, error, reason
):
    recipe, device, capturing = tiny_recipe(**ALL_ON), torch.device("cpu"), []

    @contextlib.contextmanager
    def capture(*_, **__):
        capturing.append(True)
        try:
            yield
        finally:
            raise RuntimeError("the capture was aborted")  # as PyTorch does at the end of a failed capture

    def step(images, labels, network):
        if capturing and fails_in == "step":
            raise error
        trainer.step(images, labels, network)

    monkeypatch.setattr(torch.cuda, "graph", capture)
    model = tiny()
    run = loop.Run(model, loop.make_optimizer(model, recipe, device), loop.ModelEma(model, 0.9))
    trainer = loop.Trainer(run, tiny_data().train, recipe, device)
    trainer.fast_step = FastStep(step, model, trainer.state, choice="graph", batch_size=recipe.batch_size)
    before = [tensor.clone() for tensor in trainer.state()]
    words = rf"^--compile graph failed {reason}; use --compile none$" if reason else "--batch-size 4: out of"
    with pytest.raises(UserError, match=words), explain_out_of_memory(recipe.batch_size):
        trainer.train_step(0, 0, *next(trainer.loader.epoch(0)))
    assert_same(trainer.state(), before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_run_deletes_its_graphs_at_the_end(train, monkeypatch):
    trainers, original = [], loop.Trainer
    monkeypatch.setattr(loop, "Trainer", lambda *values: trainers.append(original(*values)) or trainers[-1])
    train(epochs=1)
    assert trainers[0].fast_step.prepared == {}


def test_a_step_is_prepared_by_the_batch_size_over_all_processes_and_the_size_of_the_images():
    prepared = []
    fast_step = FastStep(None, nn.Linear(1, 1), list, choice="none", batch_size=9)
    fast_step.prepare = lambda images, labels, is_full_batch: (
        prepared.append(is_full_batch) or (lambda images, labels: None)
    )
    # 3 images each time: a third of 9, or the largest part of 7
    for global_batch_size, size in ((9, 24), (9, 24), (7, 24), (9, 32), (7, 32), (9, 24)):
        fast_step(torch.zeros(3, 3, size, size), torch.zeros(3), global_batch_size)
    assert prepared == [True, False, True, False]


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with CUDA")


@needs_cuda
@pytest.mark.parametrize("choice", ["graph", "inductor", "both"])
def test_on_a_gpu_every_compile_mode_trains_the_same(train, choice):
    plain, run = (train(device="cuda", epochs=2, compile=mode) for mode in ("none", choice))
    for found, expected in zip(without_times(run.history), without_times(plain.history), strict=True):
        assert found == pytest.approx(expected, rel=0.02, abs=0.12)  # an image more or less, in bfloat16
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(run.model.state_dict()[name], value, rtol=0.05, atol=0.05)


@needs_cuda
def test_on_a_gpu_batches_equal_those_of_the_cpu(tiny_recipe):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (200, 3, 16, 16), dtype=torch.uint8, generator=generator)
    split = Split(images.numpy(), torch.arange(200).numpy())
    settings = tiny_recipe(cutout=5, randaugment_ops=2).augmentation()
    for epoch in range(2):
        here, there = (
            list(TrainLoader(split, 30, settings, device=device, chunk_size=60).epoch(epoch))
            for device in ("cpu", "cuda")
        )
        for (images, labels), (images_there, labels_there) in zip(here, there, strict=True):
            assert torch.equal(labels_there.cpu(), labels)
            levels = (images_there.cpu() - images).abs() * 0.26 * 255
            assert (levels > 0.5).float().mean() < 0.05, "later operators can enlarge a difference of one level"


@needs_cuda
def test_on_a_gpu_two_deterministic_runs_are_bit_identical(train):
    """Two separate processes would be a stricter test."""
    try:
        one, other = (train(device="cuda", deterministic=True, compile="graph") for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same_run(one, other)
