"""A run that is interrupted, killed and resumed, in real processes, against one that was left alone: bit for bit."""

import os
import random
import signal
import time

import pytest
from conftest import assert_same, without_times

from training import checkpoint
from training.history import read_csv

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals between processes"),
]

FLAGS = [
    "--data", "digits", "--image-size", "16", "--train-size", "200", "--test-size", "100", "--width", "0.25",
    "--device", "cpu", "--batch-size", "16", "--epochs", "5", "--resume",
]  # fmt: skip
STEPS = 13  # of an epoch, the last one of 8 images
WITH_VAL = ["--val-size", "50"]


def checkpoint_of(folder):
    return folder / "checkpoints" / "mobilenetv2.pt"


def assert_same_run(folder, expected_folder):
    """Two folders hold the same finished run; only the time it took may differ."""
    contents, curves = [], []
    for place in (folder, expected_folder):
        content = checkpoint.read(checkpoint_of(place))
        assert content["finished"]
        curve = read_csv(place / "plots" / "mobilenetv2.csv")
        assert curve == content["history"]
        content["history"] = without_times(content["history"])
        del content["digest"], content["training"]["seconds"]
        contents.append(content)
        curves.append(without_times(curve))
    assert_same(*contents)
    assert_same(*curves)
    left = [path.name for path in folder.rglob("*") if path.is_file()]
    assert sorted(left) == ["mobilenetv2.csv", "mobilenetv2.png", "mobilenetv2.pt"]


@pytest.fixture(scope="module")
def launch(start):
    return lambda folder, *flags: start(folder, "mobilenetv2.py", *FLAGS, *flags)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, launch):
    """Folders of the run that nothing disturbed, without and with validation, and how long an epoch of it took."""
    folders = [tmp_path_factory.mktemp(name) for name in ("whole", "whole-val")]
    processes = [launch(folder, *flags) for folder, flags in zip(folders, ([], WITH_VAL), strict=True)]
    for process in processes:
        status, _, err = end_of(process)
        assert status == 0, err
    seconds = min(row["seconds"] for row in checkpoint.read(checkpoint_of(folders[0]))["history"])
    return *folders, seconds


def end_of(process):
    """Exit status, and what it printed that was not read yet."""
    out, err = process.stdout.read(), process.stderr.read()
    return process.wait(), out, err


def until_training(process, epochs=0):
    """Read what a run prints until it trains, and until it has reported so many epochs."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        epochs -= line.startswith("epoch ")
        if epochs <= 0 and any(line.startswith(("digits:", "epoch ")) for line in lines):
            return lines
    pytest.fail(f"ended early: {process.stderr.read()}")


@pytest.mark.parametrize(
    ("numbers", "val", "seed"),
    [
        ([signal.SIGINT, signal.SIGTERM, signal.SIGINT], False, 0),
        ([signal.SIGKILL, signal.SIGKILL], False, 1),
        ([signal.SIGTERM, signal.SIGKILL, signal.SIGINT], True, 2),
    ],
    ids=["signals", "kills", "both, with validation"],
)
def test_a_run_in_pieces_is_the_whole_run(whole, launch, tmp_path, numbers, val, seed):
    *wholes, epoch_seconds = whole
    flags = WITH_VAL if val else []
    delays, path = random.Random(seed), checkpoint_of(tmp_path)
    steps = []
    for count, number in enumerate(numbers):
        process = launch(tmp_path, *flags)
        # The first piece ends in its first epoch, a later one a whole epoch further on.
        lines = until_training(process, epochs=min(count, 1))
        time.sleep(delays.uniform(0.1, 0.9) * epoch_seconds)
        process.send_signal(number)
        status, out, err = end_of(process)
        reported = [line for line in [*lines, *out.splitlines()] if line.startswith("epoch ")]

        if number == signal.SIGKILL:
            assert status == -number
            if not path.exists():
                assert not reported
                continue
        else:
            assert status == 128 + number, err
            assert err == ""
            assert "saved to checkpoints/mobilenetv2.pt; the same command with --resume continues from there" in out
        content = checkpoint.read(path)
        done = content["training"]["epoch"]
        # What was reported was saved before.
        assert not reported or done >= int(reported[-1].split("/")[0].removeprefix("epoch"))
        assert len(content["history"]) == done
        steps.append(content["training"]["step"])

    if signal.SIGKILL not in numbers:
        assert any(0 < step < STEPS for step in steps), f"no signal fell in mid-epoch: {steps}"
    status, out, err = end_of(launch(tmp_path, *flags))
    assert status == 0, err
    assert "resuming from checkpoints/mobilenetv2.pt" in out
    assert_same_run(tmp_path, wholes[val])


def test_a_second_signal_ends_the_process_at_once_and_its_files_are_whole(launch, tmp_path):
    process = launch(tmp_path)
    until_training(process, epochs=1)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    sent = time.monotonic()
    status, out, err = end_of(process)
    assert status in (128 + signal.SIGINT, 128 + signal.SIGTERM)
    assert time.monotonic() - sent < 60
    assert "stopped in epoch" not in out  # as it says after the first one
    assert err == ""
    content = checkpoint.read(checkpoint_of(tmp_path))
    assert content["training"]["epoch"] >= 1
    assert read_csv(tmp_path / "plots" / "mobilenetv2.csv") == content["history"]
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 2
