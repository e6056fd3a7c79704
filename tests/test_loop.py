"""The training loop: compared with a naive loop, checkpoints and CSV, errors, signals, resumed runs."""

import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

from common import files
from common.device import free_memory, pick_precision
from common.errors import UserError

import naive_loop
import numpy as np
import pytest
import torch
from command_line import changed
from command_line import run as run_script
from conftest import ALL_ON, ROOT, TIMES, assert_same, at_call, without_times
from torch.nn import functional as F

import mobilenetv2
import utils
from training import checkpoint, loop, messages
from training.history import read_csv
from utils import predict

STEPS = 6  # of an epoch of tiny_data: five batches of 4 and one of 2


@pytest.fixture
def path(tmp_path):
    return tmp_path / "checkpoints" / "tiny.pt"


@pytest.fixture
def csv_path(tmp_path):
    return tmp_path / "plots" / "tiny.csv"


def send(*numbers):
    def action(_):
        for number in numbers:
            signal.raise_signal(number)

    return action


def assert_same_end(path, expected_path):
    """Two checkpoints are of identical runs: everything but the times and the recipe (paths, --resume) is equal."""
    contents = [checkpoint.read(path), checkpoint.read(expected_path)]
    for content in contents:
        content["history"] = without_times(content["history"])
        del content["digest"], content["training"]["seconds"], content["recipe"]
    assert_same(*contents)


@pytest.mark.parametrize("changes", [{}, {"warmup": 0.4}, ALL_ON], ids=["baseline", "warm-up", "all on"])
@pytest.mark.parametrize("val", [False, True], ids=["", "val"])
def test_weights_and_history_equal_a_naive_loop(
    train, tiny, tiny_data, tiny_recipe, path, csv_path, monkeypatch, val, changes
):
    monkeypatch.setitem(utils.EVAL_PIXELS, "cpu", 4 * 8 * 8)  # the test images in three batches
    data, model = tiny_data(val=val), tiny()
    expected, tested = naive_loop.train(model, data, tiny_recipe(**changes))
    run = train(data, **changes)
    assert [row.keys() - TIMES for row in run.history] == [row.keys() for row in expected]
    for found, row in zip(run.history, expected, strict=True):
        assert {name: found[name] for name in row} == pytest.approx(row, rel=1e-5, abs=1e-6)
    assert expected[-1]["train_loss"] < 0.95 * expected[0]["train_loss"], "the network should learn"
    for name, value in model.state_dict().items():
        torch.testing.assert_close(run.model.state_dict()[name], value, rtol=1e-5, atol=1e-6)
        if name != "norm.num_batches_tracked":  # not averaged by the EMA
            torch.testing.assert_close(run.eval_model.state_dict()[name], tested[name], rtol=1e-5, atol=1e-6)
    assert all(row["seconds"] > 0 and row["images_per_second"] > 0 for row in run.history)
    assert read_csv(csv_path) == checkpoint.read(path)["history"] == run.history
    if not val:
        assert checkpoint.read(path)["chosen"] == {"epoch": 3, "by": "last"}
        assert_same(checkpoint.read(path)["model"], run.eval_model.state_dict())


@pytest.mark.parametrize(("step_seconds", "least", "most"), [(0.01, 1, 1), (0.5, 3, 4)])
def test_the_sums_are_read_once_a_second_and_at_the_end_of_an_epoch(train, monkeypatch, step_seconds, least, most):
    clock, reads, read = [1000.0], [], loop.Trainer.read_sums
    monkeypatch.setattr(messages, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(loop.Trainer, "read_sums", lambda *arguments: reads.append(arguments[1]) or read(*arguments))

    def take_time(model, logits):
        clock[0] += step_seconds
        return logits

    train(on_forward=take_time)
    for epoch in range(3):
        assert least <= reads.count(epoch) <= most


def test_predict_uses_smaller_batches_for_larger_images(monkeypatch):
    monkeypatch.setitem(utils.EVAL_PIXELS, "cpu", 4 * 8 * 8)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    sizes = []

    def network(batch):
        sizes.append(len(batch))
        assert not torch.backends.cudnn.benchmark, "cuDNN would search for algorithms for each batch size"
        return torch.zeros(len(batch), 3)

    predict(network, torch.zeros(9, 3, 8, 8, dtype=torch.uint8), torch.device("cpu"))
    predict(network, torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.device("cpu"))
    assert sizes == [4, 4, 1, 1, 1]
    assert torch.backends.cudnn.benchmark


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_missing_device_is_an_error(train):
    with pytest.raises(UserError, match=r"--device cuda.* finds no such device"):
        train(device="cuda")


def test_with_validation_the_checkpoint_has_the_best_and_the_last_weights(train, path, monkeypatch):
    accuracies = {"test": iter([0.9, 0.1, 0.2, 1.0]), "val": iter([0.2, 0.5, 0.5, 0.4])}
    contents, write = [], checkpoint.write

    def evaluate(run, trainer, splits, stop):
        assert {name: len(labels) for name, (_, labels) in splits.items()} == {"test": 9, "val": 8}
        row = {f"{name}_accuracy": next(accuracies[name]) for name in splits}
        return row | {f"{name}_loss": 1.0 for name in splits}

    def write_and_read(*arguments):
        write(*arguments)
        contents.append(checkpoint.read(path))

    monkeypatch.setattr(loop, "evaluate", evaluate)
    monkeypatch.setattr(checkpoint, "write", write_and_read)
    train(val=True, epochs=4, on_forward=at_call(2 * STEPS + 1, send(signal.SIGINT)))
    run = train(val=True, epochs=4, resume=True)
    # The third checkpoint was written after the signal. Of two equally good epochs, the first one is kept.
    assert [content["chosen"]["epoch"] for content in contents] == [1, 2, 2, 2, 2]
    assert {content["chosen"]["by"] for content in contents} == {"val_accuracy"}
    best, last = contents[1], contents[-1]
    assert_same(last["model"], best["model"])
    assert_same(last["training"]["model"], run.model.state_dict())
    assert not torch.equal(last["model"]["conv.weight"], last["training"]["model"]["conv.weight"])
    assert [row["val_accuracy"] for row in last["history"]] == [0.2, 0.5, 0.5, 0.4]


@pytest.mark.parametrize("epochs_done", [0, 1])
def test_a_full_disk_keeps_the_last_checkpoint_and_the_error_says_what_is_saved(train, path, monkeypatch, epochs_done):
    kept = []

    def fill(_):
        kept.extend(file.read_bytes() for file in path.parent.glob("[!.]*"))
        monkeypatch.setattr(files.os, "fsync", mock.Mock(side_effect=OSError(28, "No space left on device")))

    with pytest.raises(UserError) as error:
        train(on_forward=at_call(epochs_done * STEPS + 2, fill))
    assert f"{path}: the checkpoint could not be written (No space left" in str(error.value)
    saved = f"{path} holds epoch 1; --resume continues from there" if epochs_done else "nothing of this run is saved"
    assert str(error.value).endswith(saved)
    assert [file.read_bytes() for file in path.parent.glob("[!.]*")] == kept


@pytest.mark.parametrize("folder", ["checkpoints", "plots"])
def test_a_deleted_folder_ends_the_run_and_is_not_created_again(train, tmp_path, folder):
    def vanish(_):
        shutil.move(tmp_path / folder, tmp_path / "elsewhere")

    with pytest.raises(UserError) as error:
        train(on_forward=at_call(STEPS + 2, vanish))
    assert f"{tmp_path / folder}: this folder was deleted during the run" in str(error.value)
    assert "tiny.pt holds epoch 1; --resume continues from there" in str(error.value)
    assert not (tmp_path / folder).exists()
    moved = tmp_path / ("elsewhere" if folder == "checkpoints" else "checkpoints") / "tiny.pt"
    assert checkpoint.read(moved)["training"]["epoch"] == 1


def test_another_seed_trains_another_network(train):
    first, second = (train(name=f"seed{seed}", seed=seed).history[0]["train_loss"] for seed in (3, 4))
    assert first != second


@pytest.fixture
def in_background(monkeypatch):
    """Save in the background, as on a GPU."""
    saver = checkpoint.Saver
    monkeypatch.setattr(checkpoint, "Saver", lambda recipe, _: saver(recipe, ThreadPoolExecutor(1)))


def test_saving_in_the_background_saves_the_state_at_the_end_of_the_epoch(train, path, csv_path, monkeypatch, request):
    train(name="whole", **ALL_ON)
    request.getfixturevalue("in_background")
    written, contents = checkpoint.write, []

    def write_late(target, content):
        time.sleep(0.1)  # while the next epoch is trained
        written(target, content)
        contents.append(checkpoint.read(target))

    monkeypatch.setattr(checkpoint, "write", write_late)
    train(**ALL_ON)
    assert_same_end(path, path.with_name("whole.pt"))
    assert without_times(read_csv(csv_path)) == without_times(read_csv(csv_path.with_name("whole.csv")))
    weights = [content["model"]["conv.weight"] for content in contents]
    train(overwrite=True, on_forward=at_call(2 * STEPS, send(signal.SIGINT)), **ALL_ON)
    assert [content["training"]["epoch"] for content in contents] == [1, 2, 3, 1, 2, 2]
    assert_same([content["model"]["conv.weight"] for content in contents[3:5]], weights[:2])
    assert not torch.equal(weights[0], weights[1])
    train(resume=True, **ALL_ON)
    assert_same_end(path, path.with_name("whole.pt"))


def test_an_error_while_saving_in_the_background_ends_the_run(train, monkeypatch, in_background):
    written = []

    def write(target, content):
        written.append(content["training"]["epoch"])
        raise UserError(f"{target}: full")

    monkeypatch.setattr(checkpoint, "write", write)
    with pytest.raises(UserError, match=r"tiny\.pt: full"):
        train(epochs=1)  # also an error in the last epoch is raised
    with pytest.raises(UserError, match=r"tiny\.pt: full"):
        train()
    assert written == [1, 1], "after a failed write, no later epoch is written"


@pytest.mark.parametrize(
    ("error", "memory", "training"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "device memory", True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "device memory", False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), "device memory", True),
        (RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory: you tried to"), "memory", True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"), "memory", False),
        (MemoryError(), "memory", True),
    ],
)
def test_out_of_memory_suggests_a_smaller_batch_size(train, path, error, memory, training):
    kept = []

    def run_out(_):
        kept.append(path.read_bytes())
        raise error

    with pytest.raises(UserError, match=rf"--batch-size 4: out of {memory}(?: \(.*\))?; try --batch-size 2"):
        train(on_forward=at_call(STEPS + 2 if training else 1, run_out, training=training))
    assert path.read_bytes() == kept[0]


def test_out_of_memory_with_two_images_and_other_errors(train):
    with pytest.raises(UserError, match=r"--batch-size 2: .* try smaller images or a smaller network"):
        train(batch_size=2, on_forward=mock.Mock(side_effect=MemoryError))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        train(on_forward=mock.Mock(side_effect=RuntimeError("shapes do not match")))


@pytest.mark.skipif(sys.platform != "linux", reason="the files of Linux")
@pytest.mark.parametrize("version", [None, 1, 2])
def test_free_memory_respects_the_limit_of_the_container(tmp_path, version):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "meminfo").write_text("MemTotal:  9000 kB\nMemAvailable:  8000 kB\n")
    folder = tmp_path / "sys" / "fs" / "cgroup" / ("memory" if version == 1 else "")
    folder.mkdir(parents=True)
    limit, used = (
        ("memory.limit_in_bytes", "memory.usage_in_bytes") if version == 1 else ("memory.max", "memory.current")
    )
    if version:
        (folder / limit).write_text("3000000\n")
        (folder / used).write_text("2000000\n")
        (folder / "memory.stat").write_text("inactive_file 500000\n")
    assert free_memory(tmp_path) == (1_500_000 if version else 8_192_000)
    (folder / limit).write_text("max\n" if version == 2 else f"{2**63 - 4096}\n")
    assert free_memory(tmp_path) == 8_192_000


def times_nan(logits):
    return logits * math.nan


def stop_and_spoil(logits):
    signal.raise_signal(signal.SIGINT)
    return times_nan(logits)


@pytest.mark.parametrize(
    ("spoil", "number", "where"),
    [
        (times_nan, STEPS, "the loss is not finite at epoch 2, step 1"),
        # A fourth class, without images, gets all the probability.
        (lambda logits: F.pad(logits - math.inf, (0, 1)), STEPS + 3, "the loss is not finite at epoch 2, step 4"),
        (times_nan, 2 * STEPS - 1, "the loss is not finite at epoch 2, step 6"),
        (stop_and_spoil, STEPS + 2, "the loss is not finite at epoch 2, step 3"),
        (times_nan, 1, "the test loss is not finite at epoch 2, step 6"),  # the second evaluation
    ],
    ids=["first step", "infinite", "last step", "with a signal", "evaluation"],
)
def test_a_non_finite_loss_ends_the_run_and_is_not_saved(train, path, csv_path, spoil, number, where):
    kept = []

    def keep_and_spoil(logits):
        kept.extend([path.read_bytes(), csv_path.read_bytes()])
        return spoil(logits)

    with pytest.raises(UserError) as error:
        train(on_forward=at_call(number, keep_and_spoil, training="test" not in where))
    said = f"{where}, learning rate 0.03775; nothing of this epoch is saved. Lower --base-lr"
    assert said in str(error.value)
    assert [path.read_bytes(), csv_path.read_bytes()] == kept


@pytest.mark.parametrize(
    ("number", "flags", "instead"),
    [(signal.SIGINT, {}, ""), (signal.SIGTERM, {"overwrite": True}, " instead of --overwrite")],
)
def test_a_signal_stops_the_run_after_the_step_and_says_how_to_resume(train, path, capsys, number, flags, instead):
    before = signal.getsignal(number)
    run = train(on_forward=at_call(STEPS + 3, send(number)), **flags)
    assert run.exit_status == 128 + number
    said = f"stopped in epoch 2 after step 4 of 6, saved to {path}; the same command with --resume{instead} continues"
    assert said in capsys.readouterr().out
    content = checkpoint.read(path)
    assert (content["training"]["epoch"], content["training"]["step"], content["finished"]) == (1, 4, False)
    assert len(content["history"]) == 1
    assert signal.getsignal(number) is before
    assert train(resume=True).exit_status == 0
    assert f"resuming from {path}: epoch 2, step 5" in capsys.readouterr().out


# When each part of a run gets a signal: at this forward pass of training or evaluation, counted from its start. An
# evaluation has 3 batches of test images, then 2 of validation images, if there are any.
PIECES = {
    "first step": [("train", 0)],
    "mid-epoch": [("train", 8)],
    "last step of an epoch": [("train", STEPS - 1)],
    "very last step": [("train", 3 * STEPS - 1)],
    "evaluation": [("eval", 0)],
    "evaluation's end": [("eval", 2), ("eval", 1)],
    "evaluation, again and again": [("eval", 0), ("eval", 1), ("eval", 0), ("eval", 6)],
    "many": [("train", 2), ("train", 1), ("eval", 1), ("train", 0), ("train", 5), ("train", 2)],
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "settings",
    [{}, {"val": True}, {**ALL_ON, "precision": "bfloat16"}, {"val": True, **ALL_ON}],
    ids=["", "val", "all on, bfloat16", "val, all on"],
)
@pytest.mark.parametrize("pieces", PIECES.values(), ids=PIECES)
def test_a_resumed_run_is_bit_identical_to_an_uninterrupted_one(train, path, csv_path, monkeypatch, pieces, settings):
    monkeypatch.setitem(utils.EVAL_PIXELS, "cpu", 4 * 8 * 8)
    whole = train(**settings, name="whole")
    for kind, number in pieces:
        stop = at_call(number, send(signal.SIGTERM), training=kind == "train")
        assert train(**settings, resume=True, on_forward=stop).exit_status == 143
        plotted = read_csv(csv_path) if csv_path.exists() else []
        assert plotted == checkpoint.read(path)["history"]
    run = train(**settings, resume=True)
    assert run.exit_status == 0
    assert_same_end(path, path.with_name("whole.pt"))
    assert_same(run.model.state_dict(), whole.model.state_dict())
    assert_same(run.eval_model.state_dict(), whole.eval_model.state_dict())
    whole_csv = read_csv(csv_path.with_name("whole.csv"))
    assert without_times(read_csv(csv_path)) == without_times(whole_csv)


def test_a_split_off_test_set_is_printed_once(train, tiny_data, capsys):
    train(replace(tiny_data(), test_split=0.25), split_seed=3)
    said = "made up has no test set: 25 % of each class is used as one (--test-split 0.25, --split-seed 3)"
    assert capsys.readouterr().out.splitlines().count(said) == 1


def test_a_resumed_run_keeps_its_precision(train, path, capsys):
    whole = train(precision="bfloat16")
    assert ", in bfloat16" in capsys.readouterr().out
    assert not torch.equal(whole.model.conv.weight, train(name="other", precision="float32").model.conv.weight)
    path.unlink()
    train(precision="bfloat16", on_forward=at_call(STEPS + 2, send(signal.SIGTERM)))
    with pytest.raises(UserError, match="--precision: bfloat16 in the checkpoint, float32 now"):
        train(resume=True, precision="float32")
    assert_same(train(resume=True).model.state_dict(), whole.model.state_dict())
    assert checkpoint.read(path)["recipe"]["precision"] == "bfloat16"


@pytest.mark.parametrize(
    ("there", "allowed", "device", "expected"),
    [
        ({"avx2": True, "avx512_f": True, "avx512_bf16": False}, "AVX512", "cpu", "float32"),
        ({"avx2": True, "avx512_f": True, "avx512_bf16": True}, "AVX512", "cpu", "bfloat16"),
        ({"avx2": True, "avx512_f": True, "avx512_bf16": True}, "AVX2", "cpu", "float32"),  # by ATEN_CPU_CAPABILITY
        ({"amx_bf16": True}, "DEFAULT", "cpu", "bfloat16"),
        ({"architecture": "aarch64", "bf16": True}, "DEFAULT", "cpu", "bfloat16"),
        ({}, "DEFAULT", "cuda", "bfloat16"),
        ({"avx512_bf16": True}, "DEFAULT", "mps", "float32"),
    ],
)
def test_precision_auto_is_bfloat16_if_there_are_instructions_for_it(monkeypatch, there, allowed, device, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: there)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: allowed)
    for choice in ("auto", "float32", "bfloat16"):
        assert pick_precision(choice, torch.device(device)) == (expected if choice == "auto" else choice)


@pytest.mark.skipif(platform.machine() != "x86_64" or sys.platform != "linux", reason="the files of Linux")
def test_bfloat16_detection_agrees_with_proc_cpuinfo():
    command = [sys.executable, "-c", "from common.device import cpu_has_bfloat16; print(cpu_has_bfloat16())"]
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "avx512"}
    printed = subprocess.check_output(command, env=environment, cwd=ROOT, text=True)
    expected = {"avx512_bf16", "amx_bf16"} & set(Path("/proc/cpuinfo").read_text().split())
    assert printed.strip() == str(bool(expected))


def test_the_time_of_a_resumed_epoch_includes_its_first_part(train, path):
    train(on_forward=at_call(3, send(signal.SIGINT)))
    changed(path, lambda content: content["training"].update(seconds=1000.0))
    row, *_ = train(resume=True).history
    assert 1000 < row["seconds"] < 1100
    assert 22 / 1100 < row["images_per_second"] < 22 / 1000


def test_a_signal_after_the_last_epoch_still_finishes_the_run(train, path):
    assert train(epochs=1, on_forward=at_call(0, send(signal.SIGINT), training=False)).exit_status == 0
    assert checkpoint.read(path)["finished"]


def test_a_finished_run_has_nothing_left_to_train(train, path, csv_path, capsys):
    weights = dict(train().model.state_dict())
    whole, curves = path.read_bytes(), csv_path.read_bytes()
    csv_path.unlink()  # as if the run was killed after writing the checkpoint and before writing the CSV
    run = train(resume=True, on_forward=lambda *_: pytest.fail("trained"))
    assert "is finished: all 3 epochs are done" in capsys.readouterr().out
    assert run.exit_status == 0
    assert_same(run.model.state_dict(), weights)
    assert [path.read_bytes(), csv_path.read_bytes()] == [whole, curves]


def test_a_checkpoint_is_not_read_while_another_process_writes_it(train, tiny_recipe, path, monkeypatch):
    train()
    monkeypatch.setattr(checkpoint, "read", lambda path: pytest.fail("read without the lock"))
    with (
        files.locked(path, "the checkpoint"),
        pytest.raises(UserError, match="another process is writing"),
        checkpoint.previous_run(tiny_recipe(resume=True)),
    ):
        pass


def test_a_model_that_is_not_the_recipes_is_refused(tiny, tiny_recipe, tiny_data, tmp_path):
    with pytest.raises(UserError, match="the model is not the recipe's tiny"):
        loop.fit(tiny(channels=5), tiny_data(), tiny_recipe())
    assert not (tmp_path / "checkpoints").exists()


def test_resume_with_other_images_is_refused(train, tiny_data, path):
    train()
    whole = path.read_bytes()
    other = replace(tiny_data(seed=1), source="elsewhere")
    with pytest.raises(UserError, match=r"--data elsewhere does not hold .* \(--data made up\)"):
        train(other, resume=True)
    assert path.read_bytes() == whole
    assert train(replace(tiny_data(), source="elsewhere"), resume=True).exit_status == 0, "the same images, moved"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: content["network"].update(name="densenet"), "holds a densenet, not a tiny"),
        (lambda content: content.pop("history"), "not usable, history is missing"),
        (
            lambda content: content["model"].update({"classifier.bias": torch.zeros(4)}),
            "not usable (Error(s) in loading state_dict for Tiny: size mismatch for classifier.bias",
        ),
        (lambda content: content["training"]["optimizer"].clear(), "not usable"),
    ],
    ids=["another network", "no history", "other shapes", "no momentum"],
)
def test_resume_from_an_unusable_checkpoint_is_refused(train, path, change, words):
    train()
    before = changed(path, change).read_bytes()
    with pytest.raises(UserError) as error:
        train(resume=True)
    assert str(error.value).startswith(str(path))
    assert words in str(error.value)
    assert path.read_bytes() == before


@pytest.mark.parametrize("folder", ["checkpoint_dir", "plot_dir"])
def test_an_unwritable_folder_is_an_error_before_training(train, tmp_path, folder):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"file.*could not be written"):
        train(on_forward=lambda *_: pytest.fail("trained"), **{folder: str(tmp_path / "file")})


def script(folder, *flags):
    """Run mobilenetv2.py in `folder`: exit status, stdout, stderr."""
    small = "--data digits --image-size 16 --train-size 40 --test-size 20 --width 0.25 --epochs 1 --device cpu"
    done = run_script(folder, mobilenetv2, *small.split(), *flags)
    return done.returncode, done.stdout, done.stderr


def test_a_script_trains_and_protects_its_checkpoint(tmp_path):
    status, out, err = script(tmp_path, "--name", "small")
    assert status == 0, err
    path = tmp_path / "checkpoints" / "small.pt"
    assert "weights: checkpoints/small.pt   curves: plots/small.png, plots/small.csv" in out
    assert (tmp_path / "plots" / "small.png").read_bytes().startswith(b"\x89PNG")
    whole = path.read_bytes()

    status, _, err = script(tmp_path, "--name", "small")
    assert status == 2
    assert err.startswith("error: checkpoints/small.pt already exists; --resume continues from it, --overwrite")
    status, out, err = script(tmp_path, "--name", "small", "--resume", "--base-lr", "0.02")
    assert status == 2
    assert "--base-lr: 0.05 in the checkpoint, 0.02 now" in err
    assert path.read_bytes() == whole
    path.write_bytes(whole[: len(whole) // 2])
    status, _, err = script(tmp_path, "--name", "small", "--resume")
    assert (status, err.count("\n")) == (2, 1)
    assert err.startswith("error: checkpoints/small.pt: truncated")

    assert script(tmp_path, "--name", "small", "--overwrite", "--seed", "1")[0] == 0
    assert checkpoint.read(path)["recipe"]["seed"] == 1


def test_missing_tensorboard_is_an_error_before_training(train, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=r"--tensorboard .* pip install tensorboard"):
        train(tensorboard=True, on_forward=lambda *_: pytest.fail("trained"))
    assert [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"] == []
    train()


def test_tensorboard_has_the_values_of_the_csv(train, csv_path, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(val=True, tensorboard=True, on_forward=at_call(STEPS + 2, send(signal.SIGINT)))
    train(val=True, tensorboard=True, resume=True)
    events = EventAccumulator(str(tmp_path / "plots" / "tensorboard" / "tiny")).Reload()
    history = read_csv(csv_path)
    assert set(events.Tags()["scalars"]) == history[0].keys() - {"epoch"}
    for name in events.Tags()["scalars"]:
        scalars = [(scalar.step, scalar.value) for scalar in events.Scalars(name)]
        assert scalars == [(row["epoch"], float(np.float32(row[name]))) for row in history]
