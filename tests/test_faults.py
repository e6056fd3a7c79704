"""Runs that are killed or stopped many times, at any moment, end bit-identical to uninterrupted runs.

FAULTS=N is the number of kills; there are half as many signals (SIGINT and SIGTERM). `make test-faults` has 200 kills.
"""

import contextlib
import os
import random
import signal
import sys
import time
from collections.abc import Callable

from common import errors, files

import pytest
import tiny_run
from conftest import assert_same, without_times

from training import checkpoint
from training.history import read_csv

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals between processes"),
]

FAULTS = int(os.environ.get("FAULTS", "8"))
FAULTS_IN_A_RUN = 40
FLAGS = [
    "mobilenetv2.py", "--data", "digits", "--image-size", "16", "--train-size", "200", "--test-size", "50",
    "--width", "0.25", "--device", "cpu", "--batch-size", "32", "--compile", "none", "--resume",
]  # fmt: skip
WRITING = ("before", "fsync", "replace", "after")  # moments during a write at which a process can kill itself


def train(folder: str, flags: list[str], log: str, moment: str | None, count: int) -> None:
    """Run the script's main. With `moment`, the process kills itself at that moment of its write number `count`."""
    import torch

    import mobilenetv2

    os.chdir(folder)
    sys.argv = [*FLAGS, *flags]
    torch.set_num_threads(1)
    if moment:
        die_writing(moment, count)
    sys.stdout = sys.stderr = open(log, "w", encoding="utf-8", buffering=1)  # noqa: SIM115 (catches tracebacks too)
    errors.run(mobilenetv2.main)


def die_writing(moment: str, count: int) -> None:
    left = [count]

    def die() -> None:
        left[0] -= 1
        if left[0] <= 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def dying(function: Callable, before: str, after: str) -> Callable:
        def call(*arguments: object) -> None:
            if moment == before:
                die()
            function(*arguments)
            if moment == after:
                die()

        return call

    # Before fsync, a part of the file is still in a buffer of Python or the system.
    files.os.fsync, files.os.replace = dying(os.fsync, "before", "fsync"), dying(os.replace, "replace", "after")


@pytest.fixture(scope="module")
def forks():
    # If each of 200 processes imported PyTorch first, most would be killed during the import.
    with tiny_run.forkserver("mobilenetv2", "sklearn.datasets", "torchvision.transforms.v2", "test_faults") as context:
        yield context


@pytest.fixture(scope="module")
def seconds(forks, tmp_path_factory):
    """The time until a process is killed or stopped, at most: enough for a few epochs on this machine."""
    folder = tmp_path_factory.mktemp("timed")
    for name in ("first", "second"):  # the first process also waits for the imports
        started = time.monotonic()
        process = Chain(forks, folder / name, "--epochs", 1000).start_and_save()
        seconds = time.monotonic() - started
        process.kill()
    return 2 * seconds


class Chain:
    """A run in its own folder that is started many times."""

    def __init__(self, forks, folder, *flags):
        self.forks, self.folder, self.flags = forks, folder, list(map(str, flags))
        self.path = folder / "checkpoints" / "mobilenetv2.pt"
        self.done = 0  # whole epochs in the checkpoint
        folder.mkdir()

    def start(self, moment=None, count=0):
        self.log = self.folder / "log"
        self.log.unlink(missing_ok=True)
        arguments = (str(self.folder), self.flags, str(self.log), moment, count)
        process = self.forks.Process(target=train, args=arguments)
        process.start()
        return process

    def start_and_save(self):
        """Start and wait for the first checkpoint."""
        process = self.start()
        while not self.path.exists():
            assert process.is_alive(), self.log.read_text()
            time.sleep(0.01)
        return process

    def check(self):
        """Check what must be true after every end: no reported epoch is lost, and the files are undamaged."""
        said = self.log.read_text() if self.log.exists() else ""
        assert "Traceback" not in said, said
        reported = [line for line in said.splitlines() if line.startswith("epoch ")]
        before = self.done
        if self.path.exists():
            content = checkpoint.read(self.path)
            self.done = content["training"]["epoch"]
            curves = self.folder / "plots" / "mobilenetv2.csv"
            if curves.exists():  # after a kill it may lack the last epoch, which the resumed run adds
                rows = read_csv(curves)
                assert rows == content["history"][: len(rows)]
                assert len(rows) >= self.done - 1
        if reported:
            assert self.done >= int(reported[-1].split("/")[0].removeprefix("epoch"))
        assert self.done >= before
        return said

    def finish(self):
        process = self.start()
        process.join(300)
        assert process.exitcode == 0, self.check()
        self.check()
        content = checkpoint.read(self.path)
        assert content["finished"]
        history = read_csv(self.folder / "plots" / "mobilenetv2.csv")
        assert history == content["history"]
        content["history"] = without_times(content["history"])
        del content["digest"], content["training"]["seconds"]
        return content


def assert_equals_uninterrupted(chain):
    alone = Chain(chain.forks, chain.folder.with_name("uninterrupted"), *chain.flags)
    assert_same(chain.finish(), alone.finish())
    left = sorted(path.name for path in chain.folder.rglob("*") if path.is_file())
    assert left == ["log", "mobilenetv2.csv", "mobilenetv2.png", "mobilenetv2.pt"]


def batches(total):
    """Split `total` into parts of at most FAULTS_IN_A_RUN, and number them."""
    return list(enumerate([min(FAULTS_IN_A_RUN, total - at) for at in range(0, total, FAULTS_IN_A_RUN)]))


@pytest.mark.parametrize(("seed", "count"), batches(FAULTS))
def test_kills_at_any_moment(forks, tmp_path, seconds, seed, count):
    rng, epochs = random.Random(seed), 3 * count
    chain = Chain(forks, tmp_path / "killed", "--seed", seed, "--epochs", epochs)
    killed = 0
    while killed < count and chain.done < epochs - 1:
        if rng.random() < 0.5:  # it kills itself while it writes the checkpoint or the CSV
            process = chain.start(rng.choice(WRITING), rng.randrange(1, 7))
        else:
            process = chain.start()
            time.sleep(rng.uniform(0, seconds))
            process.kill()
        process.join(60)
        assert process.exitcode in (-signal.SIGKILL, 0), chain.log.read_text()
        killed += process.exitcode != 0
        chain.check()
    assert killed == count, "the run was finished too early; give it more epochs"
    assert_equals_uninterrupted(chain)


@pytest.mark.parametrize(("seed", "count"), batches(FAULTS // 2))
def test_signals_at_any_moment(forks, tmp_path, seconds, seed, count):
    rng, epochs = random.Random(1000 + seed), 4 * count
    chain = Chain(forks, tmp_path / "stopped", "--seed", seed, "--epochs", epochs, "--val-size", 40)
    sent = saved = 0
    while (sent < count or saved == 0) and chain.done < epochs:
        number, sent = rng.choice([signal.SIGINT, signal.SIGTERM]), sent + 1
        process = chain.start()
        time.sleep(rng.uniform(0.2 * seconds, seconds))
        with contextlib.suppress(ProcessLookupError):  # it has ended already
            os.kill(process.pid, number)
        process.join(60)
        said = chain.check()
        # Before the script has started, the signal ends Python.
        assert process.exitcode in (0, 128 + number, -number, 1), said
        if "stopped in epoch" in said:
            assert process.exitcode == 128 + number
            assert "the same command with --resume continues from there" in said
            step = int(said.split("after step ")[1].split()[0])
            assert checkpoint.read(chain.path)["training"]["step"] == step, "at most the current step is lost"
            saved += 1
    assert saved > 0, "no signal came during training"
    assert_equals_uninterrupted(chain)


def test_a_second_signal_exits_at_once_and_damages_no_file(forks, tmp_path):
    chain = Chain(forks, tmp_path / "twice", "--epochs", 1000)
    process = chain.start_and_save()
    for number in (signal.SIGSTOP, signal.SIGINT, signal.SIGTERM, signal.SIGCONT):  # so that both arrive at once
        os.kill(process.pid, number)
    process.join(20)
    assert process.exitcode in (128 + signal.SIGINT, 128 + signal.SIGTERM)
    assert "stopped in epoch" not in chain.check(), "that is the message after one signal"
    assert chain.done >= 1
