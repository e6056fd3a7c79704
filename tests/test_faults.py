"""Runs that are killed again and again, at any moment, against runs that were left alone: bit for bit.

FAULTS=N says how many kills there are, half as many Ctrl-Cs and SIGTERMs besides; `make test-faults` has 200.
"""

import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

from common import errors, files

import pytest
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
WRITING = ("before", "fsync", "replace", "after")  # the moments of a file's writing at which a process can kill itself
MOST_SECONDS = 1.5  # that a process is left alone: a few epochs


def train(folder: str, flags: list[str], log: str, moment: str | None, count: int) -> None:
    """What a process does: the script's main; with `moment`, until that moment of the file number `count` it writes."""
    import torch

    import mobilenetv2

    os.chdir(folder)
    sys.argv = [*FLAGS, *flags]
    torch.set_num_threads(1)
    if moment:
        die_writing(moment, count)
    sys.stdout = sys.stderr = open(log, "w", encoding="utf-8", buffering=1)  # noqa: SIM115 (for a traceback as well)
    errors.run(mobilenetv2.main)


def die_writing(moment: str, count: int) -> None:
    fsync, replace, left = os.fsync, os.replace, [count]

    def die() -> None:
        left[0] -= 1
        if left[0] <= 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def dying_fsync(number: int) -> None:
        if moment == "before":  # some of the file is still in Python's or the system's buffers
            die()
        fsync(number)
        if moment == "fsync":
            die()

    def dying_replace(*paths: str) -> None:
        if moment == "replace":
            die()
        replace(*paths)
        if moment == "after":
            die()

    files.os.fsync, files.os.replace = dying_fsync, dying_replace


@pytest.fixture(scope="module")
def forks():
    """Processes that have imported PyTorch when they start: of 200 that begin with it, most would die importing."""
    context = multiprocessing.get_context("forkserver")
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    context.set_forkserver_preload(["mobilenetv2", "sklearn.datasets", "test_faults"])
    yield context
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


class Chain:
    """A run in a folder of its own that is started again and again."""

    def __init__(self, forks, folder, seed, epochs):
        self.forks, self.folder = forks, folder
        self.flags = ["--seed", str(seed), "--epochs", str(epochs)]
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

    def check(self):
        """What holds after any end: nothing that was reported is lost, and the files are whole."""
        said = self.log.read_text() if self.log.exists() else ""
        assert "Traceback" not in said, said
        reported = [line for line in said.splitlines() if line.startswith("epoch ")]
        before = self.done
        if self.path.exists():
            content = checkpoint.read(self.path)
            self.done = content["training"]["epoch"]
            curves = self.folder / "plots" / "mobilenetv2.csv"
            if curves.exists():  # after a kill it may lack the checkpoint's last epoch, which a resumed run puts there
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


def assert_as_undisturbed(forks, tmp_path, chain, seed, epochs):
    assert_same(chain.finish(), Chain(forks, tmp_path / f"undisturbed{seed}", seed, epochs).finish())
    left = sorted(path.name for path in chain.folder.rglob("*") if path.is_file())
    assert left == ["log", "mobilenetv2.csv", "mobilenetv2.png", "mobilenetv2.pt"]


def batches(total):
    """Parts of `total` of FAULTS_IN_A_RUN or fewer, each with a number."""
    return list(enumerate([min(FAULTS_IN_A_RUN, total - at) for at in range(0, total, FAULTS_IN_A_RUN)]))


@pytest.mark.parametrize(("seed", "count"), batches(FAULTS))
def test_killed_at_any_moment(forks, tmp_path, seed, count):
    rng, epochs = random.Random(seed), 3 * count
    chain = Chain(forks, tmp_path / "killed", seed, epochs)
    killed = 0
    while killed < count and chain.done < epochs - 1:
        if rng.random() < 0.5:  # by itself, while it writes the checkpoint or the CSV
            process = chain.start(rng.choice(WRITING), rng.randrange(1, 7))
        else:
            process = chain.start()
            time.sleep(rng.uniform(0, MOST_SECONDS))
            process.kill()
        process.join(60)
        assert process.exitcode in (-signal.SIGKILL, 0), chain.log.read_text()
        killed += process.exitcode != 0
        chain.check()
    assert killed == count, "the run was finished too early; give it more epochs"
    assert_as_undisturbed(forks, tmp_path, chain, seed, epochs)


@pytest.mark.parametrize(("seed", "count"), batches(FAULTS // 2))
def test_stopped_at_any_moment(forks, tmp_path, seed, count):
    rng, epochs = random.Random(1000 + seed), 4 * count
    chain = Chain(forks, tmp_path / "stopped", seed, epochs)
    saved = 0
    for number in rng.choices([signal.SIGINT, signal.SIGTERM], k=count):
        process = chain.start()
        time.sleep(rng.uniform(0.3, MOST_SECONDS))
        os.kill(process.pid, number)
        process.join(60)
        said = chain.check()
        # Before the script has begun, Python itself ends on the signal.
        assert process.exitcode in (0, 128 + number, -number, 1), said
        if "stopped in epoch" in said:
            assert process.exitcode == 128 + number
            assert "the same command with --resume continues from there" in said
            step = int(said.split("after step ")[1].split()[0])
            assert checkpoint.read(chain.path)["training"]["step"] == step, "no more than the step in flight is lost"
            saved += 1
    assert saved > 0, "no signal came while it trained"
    assert_as_undisturbed(forks, tmp_path, chain, seed, epochs)


def limit_file_size() -> None:
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))


def test_a_file_that_may_not_grow_and_a_folder_that_may_not_be_written_keep_the_last_checkpoint(forks, tmp_path):
    chain = Chain(forks, tmp_path / "limited", 0, 1000)
    process = chain.start()
    while not chain.path.exists() and process.is_alive():
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    chain.check()
    before = chain.path.read_bytes()
    assert len(before) > 300_000
    process = forks.Process(target=train_limited, args=(str(chain.folder), chain.flags, str(chain.log)))
    process.start()
    process.join(60)
    assert process.exitcode == 2
    assert "checkpoints/mobilenetv2.pt: the checkpoint could not be written (File too large)" in chain.log.read_text()
    assert "checkpoints/mobilenetv2.pt holds epoch" in chain.log.read_text()
    assert chain.path.read_bytes() == before
    assert [path.name for path in chain.path.parent.iterdir()] == ["mobilenetv2.pt"]
    if os.geteuid() == 0:
        return  # whom no permission holds back
    chain.path.parent.chmod(0o500)
    process = chain.start()
    process.join(60)
    chain.path.parent.chmod(0o700)
    assert process.exitcode == 2
    assert "checkpoints: the checkpoint could not be written (Permission denied)" in chain.log.read_text()
    assert chain.path.read_bytes() == before


def train_limited(folder: str, flags: list[str], log: str) -> None:
    limit_file_size()
    train(folder, flags, log, None, 0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_twice_quits_at_once_and_the_files_are_whole(forks, tmp_path, number):
    chain = Chain(forks, tmp_path / "twice", 0, 1000)
    process = chain.start()
    while not chain.path.exists() and process.is_alive():
        time.sleep(0.05)
    os.kill(process.pid, number)
    os.kill(process.pid, number)
    started = time.monotonic()
    process.join(60)
    assert time.monotonic() - started < 20
    assert process.exitcode == 128 + number
    chain.check()
    assert chain.done >= 1


def test_a_second_run_on_the_same_checkpoint_is_refused_and_a_dead_ones_lock_is_not(forks, tmp_path):
    chain = Chain(forks, tmp_path / "shared", 0, 1000)
    first = chain.start()
    while not chain.path.exists() and first.is_alive():
        time.sleep(0.05)
    second = chain.start()
    second.join(60)
    assert second.exitcode == 2
    assert "another process is writing the checkpoint there" in chain.log.read_text()
    assert "checkpoints/mobilenetv2.pt: " in chain.log.read_text()
    first.kill()
    first.join(60)
    third = chain.start()
    while not (chain.log.exists() and "resuming from" in chain.log.read_text()):
        assert third.is_alive(), chain.log.read_text()
        time.sleep(0.05)
    third.kill()
    third.join(60)
