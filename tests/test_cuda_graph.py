"""A step as CUDA graph or compiled: it trains the same; a way that fails is left for eager mode."""

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
    """What torch.compile might give: it counts its calls, and fails where it is told to."""

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
    """Put `Compiled` in torch.compile's place; gives the networks that were compiled."""
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


def test_compiled_steps_train_the_same_and_the_last_batch_is_left_as_it_is(train, compiler):
    plain, made = train(), compiler()
    assert_same_run(train(compile="inductor"), plain)
    assert len(made) == 1
    assert made[0].sizes == 16 * [4]  # one to prepare, then five in each epoch; the sixth is a batch of 2


@pytest.mark.parametrize(("fails_in", "reason"), [("forward", "no compiler found"), ("backward", "cannot lower")])
def test_a_compiler_that_fails_ends_the_run_with_one_line(train, compiler, fails_in, reason):
    compiler(fails_in)
    with pytest.raises(UserError, match=rf"^--compile inductor fails here \({reason}\); take --compile none$"):
        train(compile="inductor")


@pytest.mark.parametrize("choice", ["graph", "both", "auto"])
def test_graphs_are_for_cuda_and_elsewhere_that_is_said_of_a_flag_that_was_given(train, capsys, choice):
    plain = train()
    capsys.readouterr()
    assert_same_run(train(compile=choice), plain)
    said = f"--compile {choice} needs CUDA; using none"
    assert capsys.readouterr().out.count(said) == (choice != "auto")


@pytest.mark.parametrize(("device", "way"), [("cpu", "none"), ("cuda", "graph")])
def test_auto_is_what_fits_the_device(device, way):
    assert pick_compile("auto", torch.device(device)) == way
    assert pick_compile("inductor", torch.device(device)) == "inductor"


@pytest.mark.slow
def test_inductor_itself_trains_a_network(train, capsys):
    plain, run = train(epochs=1), train(epochs=1, compile="inductor")
    if "fails here" in capsys.readouterr().out:
        pytest.skip("torch.compile does not work on this machine")
    assert run.history[0]["train_loss"] == pytest.approx(plain.history[0]["train_loss"], rel=1e-4)
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(run.model.state_dict()[name], value, rtol=1e-3, atol=1e-4)


class Graph:
    """Stands in for a CUDA graph where there is no GPU: a replay repeats the step that was recorded."""

    recording = None


@pytest.fixture
def graphs(monkeypatch):
    """The parts of torch.cuda that a recording needs, for tensors on the CPU."""

    @contextlib.contextmanager
    def record(graph, pool):
        assert pool == "pool"
        Graph.recording = graph
        yield
        Graph.recording = None

    for name, value in {
        "current_stream": mock.Mock, "Stream": mock.Mock, "stream": lambda _: contextlib.nullcontext(),
        "CUDAGraph": Graph, "graph": record, "graph_pool_handle": lambda: "pool",
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)


@pytest.mark.parametrize("choice", ["graph", "both"])
def test_a_recorded_step_is_replayed_on_each_batch(tiny, tiny_recipe, tiny_data, graphs, compiler, choice):
    made = compiler()
    recipe, data, device, ends = tiny_recipe(**ALL_ON), tiny_data(), torch.device("cpu"), []
    for way in ("none", choice):
        model, steps = tiny(), []
        run = loop.Run(model, loop.make_optimizer(model, recipe, device), loop.ModelEma(model, 0.9))
        trainer = loop.Trainer(run, data.train, recipe, device)

        def step(images, labels, network, trainer=trainer, steps=steps):
            if Graph.recording:  # CUDA records what a step would do, and does nothing

                def replay():
                    trainer.step(images, labels, network)
                    images.fill_(math.nan)  # every replay has to fill its buffers again
                    labels.zero_()

                Graph.recording.replay = replay
                return
            steps.append(len(images))
            trainer.step(images, labels, network)

        trainer.fast_step = FastStep(step, model, trainer.state, choice=way, batch_size=recipe.batch_size)
        model.train()
        for epoch in range(2):
            for number, (images, labels) in enumerate(trainer.loader.epoch(epoch)):
                trainer.train_step(epoch, number, images, labels)
        ends.append([*trainer.state(), *run.ema.averages])
        warm_up = cuda_graph.WARM_UP_STEPS * [4] + cuda_graph.WARM_UP_STEPS * [2]
        assert steps == (2 * [4, 4, 4, 4, 4, 2] if way == "none" else warm_up)
    assert_same(ends[1], ends[0])
    assert [set(compiled.sizes) for compiled in made] == ([{4}] if choice == "both" else [])


@pytest.mark.parametrize(
    ("fails_in", "error", "reason"),
    [
        ("start", RuntimeError("the stream is in use"), r"\(the stream is in use\)"),
        ("step", ValueError("this operator cannot"), r"\(this operator cannot; the recording is broken off\)"),
        ("end", RuntimeError("the recording is broken off"), r"\(the recording is broken off\)"),
        ("step", torch.OutOfMemoryError("CUDA out of memory"), None),
    ],
)
def test_a_recording_that_fails_leaves_the_state_as_it_was(
    tiny, tiny_recipe, tiny_data, graphs, monkeypatch, fails_in, error, reason
):
    recipe, device, recording = tiny_recipe(**ALL_ON), torch.device("cpu"), []

    @contextlib.contextmanager
    def record(*_, **__):
        if fails_in == "start":
            raise error
        recording.append(True)
        try:
            yield
        finally:
            raise RuntimeError("the recording is broken off")  # as the end of a recording does after any failure in it

    def step(images, labels, network):
        if recording and fails_in == "step":
            raise error
        trainer.step(images, labels, network)

    monkeypatch.setattr(torch.cuda, "graph", record)
    model = tiny()
    run = loop.Run(model, loop.make_optimizer(model, recipe, device), loop.ModelEma(model, 0.9))
    trainer = loop.Trainer(run, tiny_data().train, recipe, device)
    trainer.fast_step = FastStep(step, model, trainer.state, choice="graph", batch_size=recipe.batch_size)
    before = [tensor.clone() for tensor in trainer.state()]
    words = rf"^--compile graph fails here {reason}; take --compile none$" if reason else "--batch-size 4: out of"
    with pytest.raises(UserError, match=words), explain_out_of_memory(recipe.batch_size):
        trainer.train_step(0, 0, *next(trainer.loader.epoch(0)))
    assert_same(trainer.state(), before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_run_ends_without_its_graphs(train, monkeypatch):
    trainers, original = [], loop.Trainer
    monkeypatch.setattr(loop, "Trainer", lambda *values: trainers.append(original(*values)) or trainers[-1])
    train(epochs=1)
    assert trainers[0].fast_step.prepared == {}


def test_processes_prepare_a_step_together_though_one_may_have_as_many_images_as_before():
    prepared = []
    fast_step = FastStep(None, nn.Linear(1, 1), list, choice="none", batch_size=9)
    fast_step.prepare = lambda images, labels, is_full_batch: (
        prepared.append(is_full_batch) or (lambda images, labels: None)
    )
    for global_batch_size in (9, 9, 7):  # a third of 9, and of 7 images for the last of three processes
        fast_step(torch.zeros(3, 1), torch.zeros(3), global_batch_size)
    assert prepared == [True, False]


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with CUDA")


@needs_cuda
@pytest.mark.parametrize("choice", ["graph", "inductor", "both"])
def test_on_a_gpu_every_way_trains_the_same(train, capsys, choice):
    plain, run = (train(device="cuda", epochs=2, compile=way) for way in ("none", choice))
    assert "fails here" not in capsys.readouterr().out
    for found, expected in zip(without_times(run.history), without_times(plain.history), strict=True):
        assert found == pytest.approx(expected, rel=0.02, abs=0.12)  # an image more or less, in bfloat16
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(run.model.state_dict()[name], value, rtol=0.05, atol=0.05)


@needs_cuda
def test_on_a_gpu_batches_are_those_of_the_cpu(tiny_recipe):
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
            assert (levels > 0.5).float().mean() < 0.05, "one level lost early can become many in what follows"


@needs_cuda
def test_on_a_gpu_a_deterministic_run_has_the_same_bits_twice(train):
    """In processes of their own it would be stricter; here at least the same steps come out the same."""
    try:
        one, other = (train(device="cuda", deterministic=True, compile="graph") for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same_run(one, other)
