"""Several processes: the same training as in one process, errors, signals and restarts."""

import json
import os
import signal
import socket
import subprocess
import sys

from common import distributed

import naive_loop
import pytest
import tiny_run
import torch
from conftest import ALL_ON, ROOT, assert_same, tiny_images, tiny_network, tiny_recipe_in, without_times

from training import checkpoint
from training.history import read_csv
from training.signals import StopSignals
from utils import TrainLoader

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="PyTorch for Windows has no torchrun over Gloo")


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def environment(rank, world_size, port):
    """The environment variables that torchrun sets for a process."""
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONUTF8": "1",
    }  # fmt: skip


@pytest.fixture(scope="module")
def forks():
    with tiny_run.forkserver("tiny_run", "torchvision.transforms.v2") as context:
        yield context


@pytest.fixture
def run(forks, tmp_path):
    """Run tests/tiny_run.py in `world_size` processes; return their exit statuses and what each printed."""

    def run_processes(world_size, changes=None, *fault):
        argv = [str(tmp_path), json.dumps(changes or {}), *fault]
        port, processes, logs = free_port(), [], []
        for rank in range(world_size):
            logs.append(tmp_path / f"log{rank}")
            arguments = (environment(rank, world_size, port), argv, str(logs[-1]))
            processes.append(forks.Process(target=tiny_run.as_one_of, args=arguments))
            processes[-1].start()
        for process in processes:
            process.join(100)
            if process.is_alive():
                for other in processes:
                    other.kill()
                pytest.fail(f"hung: {[log.read_text() for log in logs]}")
        return [process.exitcode for process in processes], [log.read_text() for log in logs]

    return run_processes


def torchrun(num_processes, folder, arguments, *options, script="tests/tiny_run.py"):
    return subprocess.Popen(
        [
            sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={num_processes}",
            *(options or ["--standalone"]), str(ROOT / script), *arguments,
        ],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        start_new_session=True,
    )  # fmt: skip


def finish(process, seconds=150):
    try:
        return (*process.communicate(timeout=seconds), process.returncode)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"hung: {process.communicate()}")


@pytest.mark.parametrize("batch_size", [8, 11, 16])
def test_the_processes_parts_of_a_batch_make_up_the_batch(monkeypatch, tmp_path, batch_size):
    data, settings = tiny_images().train, tiny_recipe_in(tmp_path).augmentation()
    whole = list(TrainLoader(data, batch_size, settings).epoch(1, start=1))
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    shares = []
    for rank in range(3):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        shares.append(list(TrainLoader(data, batch_size, settings, chunk_size=batch_size).epoch(1, start=1)))
    for batch, *parts in zip(whole, *shares, strict=True):
        assert_same([torch.cat(part) for part in zip(*parts, strict=True)], list(batch))


@pytest.mark.parametrize(("device", "exchanges"), [("cpu", 40), ("cuda", 2)])
def test_processes_on_gpus_exchange_signals_every_16_steps(monkeypatch, device, exchanges):
    asked = []
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "all_reduce", lambda values, _: asked.append(values) or values)
    stop = StopSignals()
    stop.number = signal.SIGTERM
    stopped = [stop.should_stop(step, torch.device(device)) for step in range(1, 41)]
    assert len(asked) == sum(stopped) == exchanges


@pytest.mark.parametrize(("world_size", "batch_size"), [(2, 6), (3, 8)])
@pytest.mark.parametrize("settings", [{}, {**ALL_ON, "ema_horizon": 0.5}], ids=["baseline", "all on"])
def test_several_processes_equal_a_plain_loop_over_their_parts_of_a_batch(
    run, tmp_path, world_size, batch_size, settings
):
    settings = {**settings, "batch_size": batch_size}
    statuses, logs = run(world_size, settings)
    assert statuses == world_size * [0], logs
    model = tiny_network().double()
    history, tested = naive_loop.train(model, tiny_images(), tiny_recipe_in(tmp_path, **settings), world_size)
    found = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(world_size)]
    for one in found:
        assert without_times(one["history"]) == without_times(found[0]["history"])
        for name, value in tested.items():  # with the batch-norm statistics of the first process
            if "num_batches" in name:  # not averaged by the EMA
                continue
            torch.testing.assert_close(one["model"][name], value, rtol=1e-9, atol=1e-9)
    for row, expected in zip(found[0]["history"], history, strict=True):
        assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-6)  # of float32 logits
    content = checkpoint.read(tmp_path / "checkpoints" / "tiny.pt")
    assert_same(dict(content["model"]), dict(found[0]["model"]))
    for name, value in (content["training"]["model"] or {}).items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=1e-9, atol=1e-9)
    assert len(read_csv(tmp_path / "plots" / "tiny.csv")) == 3
    assert f"in {world_size} processes" in logs[0]
    assert f"batches of {batch_size} images over all processes" in logs[0]
    assert logs[1:] == (world_size - 1) * [""], "only rank 0 prints"


@pytest.mark.slow
def test_a_run_resumes_with_another_number_of_processes(run, tmp_path):
    settings = {**ALL_ON, "epochs": 6, "batch_size": 8, "resume": True}
    for world_size, fault in ((2, "1:5"), (3, "1:6")):
        (tmp_path / "killed").unlink(missing_ok=True)
        statuses, logs = run(world_size, settings, fault)
        assert statuses[1] == -signal.SIGKILL
        assert statuses[0] == 2
        assert "another process of this run has died" in logs[0]
        assert "Traceback" not in logs[0]
    assert run(1, settings)[0] == [0]
    content = checkpoint.read(tmp_path / "checkpoints" / "tiny.pt")
    assert [row["epoch"] for row in content["history"]] == [1, 2, 3, 4, 5, 6]
    assert content["training"]["model"]["norm.num_batches_tracked"] == 6 * 3


def test_a_loss_that_is_not_finite_ends_all_processes(run, tmp_path):
    statuses, logs = run(2, {"batch_size": 6, "base_lr": 1e30})
    assert statuses == [2, 2]
    assert "is not finite at epoch 1" in "".join(logs)
    assert not (tmp_path / "checkpoints" / "tiny.pt").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch_size": 3}, "--batch-size 3 with 22 training images leaves fewer than two for each of 2 processes"),
        ({"batch_size": 6, "sync_bn": True}, "--sync-bn needs several processes on CUDA; found 2 on CPU"),
        ({"batch_size": 6, "reference": "nowhere.csv"}, "nowhere.csv"),
        ({"batch_size": 6}, "already exists"),
    ],
)
def test_an_error_common_to_all_processes_is_printed_once(run, tmp_path, changes, words):
    if words == "already exists":
        (tmp_path / "checkpoints").mkdir()
        (tmp_path / "checkpoints" / "tiny.pt").touch()
    statuses, logs = run(2, changes)
    assert statuses == [2, 2]
    assert words in logs[0]
    assert "Traceback" not in logs[0]
    assert logs[1] == ""


def test_mps_allows_one_process(run):
    statuses, logs = run(2, {"batch_size": 6, "device": "mps"})
    assert statuses == [2, 2]
    assert "--device mps has one GPU" in logs[0]


@pytest.mark.slow
def test_torchrun_names_a_dead_process_and_restarts_from_the_checkpoint(run, tmp_path):
    arguments = [str(tmp_path), json.dumps({"batch_size": 6, "resume": True}), "1:6"]
    out, err, status = finish(torchrun(2, tmp_path, arguments, "--standalone", "--max-restarts=1"))
    assert status == 0, err
    assert "failed (exitcode: -9) local_rank: 1" in err
    assert "resuming from" in out
    assert [out.count(f"epoch {epoch}/3") for epoch in (1, 2, 3)] == [1, 1, 1]
    disturbed = checkpoint.read(tmp_path / "checkpoints" / "tiny.pt")
    run(2, {"batch_size": 6, "overwrite": True})
    undisturbed = checkpoint.read(tmp_path / "checkpoints" / "tiny.pt")
    assert_same(dict(disturbed["model"]), dict(undisturbed["model"]))
    assert without_times(disturbed["history"]) == without_times(undisturbed["history"])


@pytest.mark.parametrize(("world_size", "said"), [("2", "done\n"), ("1", "done\ntaken down\n")])
def test_one_of_several_processes_exits_without_pythons_shutdown(world_size, said):
    """With Python's shutdown, a Gloo thread aborted about one in four processes that exited after a collective."""
    code = "import atexit; atexit.register(print, 'taken down')"
    code += "; from common import errors; errors.run(lambda: print('done') or 3)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "WORLD_SIZE": world_size}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, encoding="utf-8")
    assert (ended.stdout, ended.returncode) == (said, 3)


@pytest.mark.slow
def test_two_agents_train_as_two_nodes(tmp_path):
    arguments = [str(tmp_path), json.dumps({"batch_size": 6})]
    agents = [
        torchrun(
            1, tmp_path, arguments, "--nnodes=2", "--rdzv_backend=c10d", "--rdzv_id=tiny",
            f"--rdzv_endpoint=127.0.0.1:{port}", "--local_addr=127.0.0.1",
        )
        for port in 2 * [free_port()]
    ]  # fmt: skip
    ends = [finish(agent) for agent in agents]
    assert [status for _, _, status in ends] == [0, 0], ends
    assert sum("in 2 processes" in out for out, _, _ in ends) == 1
    recipe = tiny_recipe_in(tmp_path, batch_size=6)
    _, expected = naive_loop.train(tiny_network().double(), tiny_images(), recipe, world_size=2)
    found = checkpoint.read(tmp_path / "checkpoints" / "tiny.pt")["model"]
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_torchrun_saves_the_step(tmp_path, number):
    process = torchrun(2, tmp_path, [str(tmp_path), json.dumps({"batch_size": 6, "epochs": 30_000})])
    while "epoch     2/" not in (line := process.stdout.readline()):
        assert line, process.communicate()
    os.killpg(process.pid, number)  # as a terminal does; torchrun then sends the signal again
    out, err, status = finish(process)
    assert status != 0
    assert "saved to" in out, err
    content = checkpoint.read(tmp_path / "checkpoints" / "tiny.pt")
    assert 2 <= content["training"]["epoch"] == len(content["history"]) < 30_000


def test_missing_data_ends_two_processes_without_a_traceback(tmp_path):
    """Without torchrun, which might kill the second process before it prints anything."""
    port = free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, ROOT / "mobilenetv2.py", "--data", "nowhere", "--device", "cpu"],
            cwd=tmp_path,
            env={**os.environ, **environment(rank, 2, port)},
            stderr=subprocess.PIPE,
            encoding="utf-8",
            start_new_session=True,
        )
        for rank in range(2)
    ]
    (_, first, status), (_, second, second_status) = map(finish, processes)
    assert (status, second_status) == (2, 2), [first, second]
    assert first.startswith("error: --data nowhere: there is no such folder")
    assert "error in process 1: another process of this run has died" in second
    assert "Traceback" not in first + second


@pytest.mark.slow
def test_a_script_trains_in_two_processes(tmp_path):
    flags = "--data digits --image-size 16 --train-size 60 --test-size 20 --width 0.25 --epochs 1 --batch-size 20"
    out, err, status = finish(torchrun(2, tmp_path, [*flags.split(), "--device", "cpu"], script="mobilenetv2.py"))
    assert status == 0, err
    assert out.count("weights: checkpoints/mobilenetv2.pt") == 1
    assert (tmp_path / "plots" / "mobilenetv2.png").exists()
