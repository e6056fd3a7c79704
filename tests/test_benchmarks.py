"""The measuring scripts run, at a size that measures nothing, and write what they promise."""

import json
import math
import os
import re
import shutil
import statistics
from types import SimpleNamespace

import command_line
import numpy as np
import pytest
import torch
from command_line import MEMBERS, refused, softmax, succeeded
from conftest import ROOT
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import ensemble, harness, train
from models import NETWORKS

pytestmark = pytest.mark.slow

SMALL = ["--data", "digits", "--image-size", 16]


def run(folder, script, *flags):
    return command_line.in_a_process(folder, ROOT / "benchmarks" / script, *flags)


def measured_by(folder, script, *flags):
    """What a script writes, with where and how it was measured, and what it prints."""
    done = run(folder, script, "--output", "out.json", *flags)
    assert done.returncode == 0, done.stderr
    result = json.loads((folder / "out.json").read_text())
    assert {"device", "versions", "command"} <= result.keys()
    return result, done.stdout


def test_augment(tmp_path):
    result, printed = measured_by(tmp_path, "augment.py", *SMALL, "--images", 64, "--rounds", 1)
    rates = result["images_per_second"]
    assert result["ratio"] == rates["ours"] / rates["torchvision"]
    assert f"{rates['ours']:,.0f}" in printed


@pytest.mark.parametrize("script", ["augment.py", "train.py"])
def test_data_that_is_not_there_is_named(tmp_path, script):
    done = run(tmp_path, script, "--data", "nowhere", "--output", "out.json")
    assert done.returncode == 2
    assert "error: --data nowhere" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_memory(tmp_path):
    result, _ = measured_by(tmp_path, "memory.py", "--rounds", 1, "--steps", 1, "--networks", "mobilenetv2")
    network = result["networks"]["mobilenetv2"]
    assert network["ratio"] == network["images_per_second"]["kept"] / network["images_per_second"]["given_back"]


def test_train(tmp_path):
    flags = [*SMALL, "--images", 32, "--networks", "mobilenetv2", "--device", "cpu", "--rounds", 1, "--windows", 1]
    flags += ["--seconds", 0.01, "--batch-size", 24, "--tuned-batch-size", 16, "--compile", "none", "graph"]
    kinds = ("ours", "ours_float32", "baseline", "tuned_bfloat16")  # which is the tuned loop in another precision
    result, printed = measured_by(tmp_path, "train.py", *flags, "--kinds", *kinds)
    network = result["networks"]["mobilenetv2"]
    rate = network["images_per_second"]
    assert network["batch_size"] == 24
    assert list(network["compile"]) == ["none"], "on the CPU there are no graphs"
    assert network["compile"]["none"]["images_per_second"] == rate
    assert network["data_share"] == 1 - rate / statistics.median(network["compile"]["none"]["windows_on_chunk"])
    for kind, batch_size in (("ours_float32", 24), ("baseline", 64), ("tuned_bfloat16", 16)):
        assert network[kind]["batch_size"] == batch_size
        assert network["ratios"][kind] == rate / network[kind]["images_per_second"]
        assert math.isclose(result["geometric_mean_ratios"][kind], network["ratios"][kind])
        assert f"| {network['ratios'][kind]:.2f} |" in printed
        assert f"| {network[kind]['start_up_seconds']:.1f} s |" in printed
    assert f"| ours, images/s | {train.spelled(rate)} |" in printed


def test_layers(tmp_path):
    result, _ = measured_by(tmp_path, "layers.py", "--networks", "resnext29", "--batch-size", 2, "--rounds", 1)
    convolutions, norms = (result["networks"]["resnext29"][kind] for kind in ("convolutions", "norms"))
    assert [sum(row["count"] for row in layers["rows"]) for layers in (convolutions, norms)] == 2 * [1 + 9 * 3 + 3]
    grouped = [row for row in convolutions["rows"] if row["shape"][4] == 2]
    assert sum(row["count"] for row in grouped) == 9
    assert all(row["channels_last dense"] > 0 for row in grouped)
    assert convolutions["milliseconds"]["contiguous dense"] == pytest.approx(
        sum(row["count"] * row.get("contiguous dense", row["contiguous grouped"]) for row in convolutions["rows"])
    )
    for way in ("eager", "compiled"):
        assert norms["milliseconds"][way] == pytest.approx(sum(row["count"] * row[way] for row in norms["rows"]))


def test_gpu_names_what_is_missing(tmp_path):
    done = run(tmp_path, "gpu.py", ".")
    assert done.returncode == 1
    assert "compile-densenet.json" in done.stderr
    assert "tests.txt" in done.stderr


def test_search(tmp_path):
    flags = ["--data", "digits", "--val-size", 30, "--script", "mobilenetv2.py", "--run", "usual: --base-lr 0.02"]
    fixed = ["--", "--image-size", 16, "--width", 0.25, "--train-size", 40, "--epochs", 1, "--batch-size", 16]
    [first] = measured_by(tmp_path, "search.py", *flags, "--seeds", 0, *fixed)[0]["runs"]
    assert (first["label"], first["seed"], "commit" in first) == ("usual", 0, True)
    assert not any("test" in name for name in first)
    result, printed = measured_by(tmp_path, "search.py", *flags, "--seeds", 0, 1, *fixed)
    assert result["runs"][0] == first, "what is there is not run again"
    accuracies = [100 * row["val_accuracy"] for row in result["runs"]]
    mean, spread = statistics.mean(accuracies), statistics.stdev(accuracies)
    assert f"| usual | 2 | {mean:.2f} ± {spread:.2f} |" in printed


def test_race(tmp_path):
    flags = [*SMALL, "--epochs", 1, "--train-size", 100, "--picture", "r.png"]
    result, printed = measured_by(tmp_path, "race.py", *flags)
    for name in ("ours", "baseline"):
        last = result[name][-1]
        assert f"{name}: {100 * last['test_accuracy']:.2f} % after" in printed
        assert [point["seconds"] for point in result[name]] == sorted(point["seconds"] for point in result[name])
    assert result["ours"][-1]["epochs"] == 1
    # The baseline stops with the first step behind the other's time; the test of its network comes on top.
    assert result["baseline"][-1]["seconds"] > result["ours"][-1]["seconds"]
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(not shutil.which("taskset"), reason="needs taskset")
def test_busy(tmp_path):
    flags = ["--rounds", 1, "--spins", 4000, "--seconds", 0.1, "--batch-size", 2]
    figures = measured_by(tmp_path, "busy.py", *flags)[0]["figures"]
    assert [row["beside"] for row in figures] == ["nothing", "same session", "another session"]
    assert all(row["spins"] == "4000" and row["images_per_second"] > 0 for row in figures)


def test_operations_of_an_image_are_about_three_times_the_forward_pass():
    for name, recipe in train.RECIPES.items():
        with torch.device("meta"):
            model, images = NETWORKS[name](10, **recipe.network_arguments()), torch.empty(1, 3, 32, 32)
            model.eval()
        with FlopCounterMode(display=False) as counter:
            model(images)
        # Less the gradient of the images, which nobody asks for.
        assert 2.9 < harness.flops_per_image(recipe.network) / counter.get_total_flops() <= 3


def measurement(choice, rate):
    return {
        "kind": "ours", "precision": "float32", "choice": choice, "windows": [rate, rate + 1, rate + 5],
        "windows_on_chunk": [2 * rate], "batch_size": 8, "start_up_seconds": rate, "peak_memory_bytes": 1000 + rate,
    }  # fmt: skip


def test_rounds_are_pooled_by_the_way_of_running_a_step():
    network = train.summary(
        train.RECIPES["densenet"], [measurement("none", 10), measurement("graph", 90), measurement("none", 12)]
    )
    assert network["compile_choice"] == "graph", "the fastest, where the recipe's own was not measured"
    figures = network["compile"]["none"]
    assert figures["windows"] == [10, 11, 15, 12, 13, 17]
    assert figures["images_per_second"] == 12.5
    assert figures["start_up_seconds"] == 11
    assert figures["peak_memory_bytes"] == 1012
    assert figures["data_share"] == 1 - 12.5 / 22


DIGITS = ["--data", "digits", "--dense", "--depth 37 --growth-rate 4", "--mobilenetv2", "--width 0.25"]
DIGITS += ["--resnext", "--base-width 2"]
SHORT = ["--image-size", 16, "--epochs", 1, "--batch-size", 64, "--train-size", 200, "--test-size", 100]
SHORT += ["--base-lr", 0.1, "--device", "cpu"]


def files_in(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A folder with a run's output in `out`, after a first attempt that its time limit ended at once."""
    folder = tmp_path_factory.mktemp("measured")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONUTF8", "1")
        flags = [*DIGITS, "--work", "work", "--output", "out"]
        stopped = command_line.run(folder, ensemble, *flags, "--time-limit", 0.1, "--", *SHORT)
        assert stopped.returncode == 3, stopped.stderr
        assert "the same command goes on" in stopped.stdout
        assert files_in(folder / "out") == []
        before = json.loads((folder / "work" / "progress.json").read_text())
        assert before["finished"] == []
        done = succeeded(folder, ensemble, *flags, "--", *SHORT)
    return SimpleNamespace(folder=folder, stdout=done.stdout, seconds_before=before["seconds"])


def test_ensemble(measured):
    output = measured.folder / "out"
    pictures_and_histories = [f"{name}.{kind}" for name in MEMBERS for kind in ("csv", "png")]
    expected = [*pictures_and_histories, *ensemble.OF_ENSEMBLE, "logits.npz", "result.json"]
    assert files_in(output) == sorted(expected)
    result = json.loads((output / "result.json").read_text())
    assert {"device", "versions", "commit", "command", "data", "flags", "ensemble", "not_training"} <= result.keys()
    assert result["flags"]["dense.py"].endswith("--device cpu --depth 37 --growth-rate 4")
    seconds = result["seconds"]
    assert list(seconds) == ["dense.py", "mobilenetv2.py", "resnext.py", "main_ens.py"]
    assert result["total_seconds"] == sum(seconds.values())
    assert seconds["dense.py"] > measured.seconds_before["dense.py"] > 0
    assert result["starts"] == {"dense.py": 2, "mobilenetv2.py": 1, "resnext.py": 1, "main_ens.py": 1}
    assert 0 < result["not_training"] < 1
    assert 0 < result["cpu_seconds"] < os.cpu_count() * result["total_seconds"]
    assert f"| total | | | {result['total_seconds']:.1f} |" in measured.stdout
    tested = json.loads((output / "ensemble.json").read_text())
    assert result["ensemble"] == tested["ensemble"]
    for row, member in zip(result["members"], tested["members"], strict=True):
        assert row["epochs"] == 1
        assert row["images_per_second"] > 0
        assert all(row[name] == member[name] for name in ("name", "loss", "accuracy"))


def test_the_kept_logits_score_as_the_ensemble_did(measured):
    result = json.loads((measured.folder / "out" / "result.json").read_text())
    with np.load(measured.folder / "out" / "logits.npz") as arrays:
        assert arrays.files == [*MEMBERS, "labels", "classes"]
        assert [arrays[name].dtype for name in MEMBERS] == [np.float16] * 3
        assert arrays["classes"].tolist() == [str(digit) for digit in range(10)]
        labels = arrays["labels"]
        probs = np.mean([softmax(arrays[name].astype(float)) for name in MEMBERS], axis=0)
    assert labels.dtype == np.uint8
    assert len(labels) == result["num_images"]["test"] == 100
    # Half precision can turn a tie.
    assert np.mean(probs.argmax(1) == labels) == pytest.approx(result["ensemble"]["accuracy"], abs=0.011)
    loss = -np.log(probs[np.arange(100), labels]).mean()
    assert loss == pytest.approx(result["ensemble"]["loss"], abs=0.002)


def test_a_finished_run_is_compared_without_running_again(measured):
    flags = [*DIGITS, "--work", "work", "--output", "again"]
    done = succeeded(measured.folder, ensemble, *flags, "--against", "out", "--", *SHORT)
    first, again = (json.loads((measured.folder / name / "result.json").read_text()) for name in ("out", "again"))
    against = again.pop("against")
    assert again == first
    assert [row["name"] for row in against["rows"]] == [*MEMBERS, "ensemble"]
    for row in against["rows"]:
        for quantity in ("accuracy", "loss"):
            assert row[quantity]["difference"] == 0
            assert row[quantity]["interval"] == [0, 0]

    scored = succeeded(measured.folder, ensemble, "--score", "out", "--against", "out")
    assert "| ensemble | +0.00 (+0.00 to +0.00) | +0.0000 (+0.0000 to +0.0000) |" in scored.stdout
    assert scored.stdout.strip() in done.stdout


def test_a_run_goes_on_only_as_it_began(measured):
    flags = [*DIGITS, "--work", "work", "--output", "other", "--", *SHORT, "--seed", 1]
    error = refused(measured.folder, ensemble, *flags)
    assert "another setting" in error
    assert "--seed 1" in error
    assert files_in(measured.folder / "other") == []


def write_logits(folder, logits, labels):
    folder.mkdir()
    np.savez(folder / "logits.npz", **logits, labels=labels.astype(np.uint8), classes=np.array(["a", "b", "c"]))


def test_intervals_are_those_of_a_plain_bootstrap(tmp_path):
    rng = np.random.default_rng(7)
    labels = rng.integers(3, size=80)
    sharpness = np.array([1.5, 1.0]).reshape(2, 1, 1, 1)  # of two runs, of two members each
    logits = (rng.normal(0, 1, (2, 2, 80, 3)) + sharpness * np.eye(3)[labels]).astype(np.float16)
    for folder, (one, two) in zip(("a", "b"), logits, strict=True):
        write_logits(tmp_path / folder, {"one": one, "two": two}, labels)
    done = succeeded(tmp_path, ensemble, "--score", "a", "--against", "b")

    probs = softmax(logits.astype(float))
    probs = np.concatenate([probs, probs.mean(1, keepdims=True)], 1)
    scores = np.stack([100 * (probs.argmax(-1) == labels), -np.log(probs[..., np.arange(80), labels])])
    differences = scores[:, 0] - scores[:, 1]  # of accuracy and loss; of one, two and the ensemble; of each image
    draws = np.random.default_rng(0)
    means = np.stack([differences[..., draws.integers(80, size=80)].mean(-1) for _ in range(10_000)])
    expected = np.stack([differences.mean(-1), *np.percentile(means, [2.5, 97.5], axis=0)], -1)
    for number, name in enumerate(("one", "two", "ensemble")):
        line = next(line for line in done.stdout.splitlines() if line.startswith(f"| {name} |"))
        printed = [float(figure) for figure in re.findall(r"[+-][0-9.]+", line)]
        assert printed[:3] == pytest.approx(expected[0, number].tolist(), abs=0.0051)
        assert printed[3:] == pytest.approx(expected[1, number].tolist(), abs=0.000051)


def test_only_the_same_images_are_compared(tmp_path):
    logits = {"one": np.zeros((4, 3), np.float16)}
    write_logits(tmp_path / "a", logits, np.array([0, 1, 2, 0]))
    write_logits(tmp_path / "b", logits, np.array([0, 1, 2, 1]))
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "logits.npz").write_bytes(b"PK\3\4 and no more")
    for other, message in (("b", "other labels"), ("c", "not what this benchmark writes"), ("d", "no such file")):
        assert message in refused(tmp_path, ensemble, "--score", "a", "--against", other)


@pytest.mark.parametrize("parallel", [[], ["--parallel"]], ids=["in turn", "at once"])
def test_a_script_that_fails_leaves_no_output(tmp_path, monkeypatch, capfd, parallel):
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    (scripts / "dense.py").write_text("import sys; sys.exit('the disk is on fire')")
    for name in ("mobilenetv2.py", "resnext.py"):
        (scripts / name).write_text("import time; time.sleep(100)")
    monkeypatch.setattr(harness, "ROOT", scripts)
    error = refused(tmp_path, ensemble, *DIGITS, *parallel, "--work", "work", "--output", "out")
    assert "dense.py ended with status 1" in error
    assert "the disk is on fire" in capfd.readouterr().err
    assert files_in(tmp_path / "out") == []
    assert files_in(tmp_path / "work") == ["progress.json"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--time-limit", 60], "--work"),
        (["--score", "out"], "--against"),
        (["--", "--name", "mine"], "--name for dense.py"),
        (["--data", "nowhere"], "nowhere"),
    ],
    ids=["limit", "score", "name", "data"],
)
def test_flags_that_cannot_work_are_named_at_once(tmp_path, flags, message):
    assert message in refused(tmp_path, ensemble, *flags)
    assert list(tmp_path.iterdir()) == []


def test_the_cascade_is_measured_beside_the_whole(measured):
    paths = [f"checkpoints/{name}.pt" for name in MEMBERS]
    flags = ["--threshold", 0.2, "--images", 60, "--batch-size", 20, "--rounds", 1]
    result, printed = measured_by(measured.folder / "work", "deploy.py", "--cascade", *paths, *flags)
    assert (result["threshold"], result["num_images"], result["members"]) == (0.2, 60, list(MEMBERS))
    assert result["ratio"] == result["cascade"]["milliseconds"] / result["whole"]["milliseconds"]
    assert f"cascade: {100 * result['cascade']['accuracy']:.2f} %" in printed


def test_deploy(tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    flags = ["--networks", "mobilenetv2", "--rounds", 1, "--threads", 1]
    result, printed = measured_by(tmp_path, "deploy.py", *flags)
    assert result["versions"]["onnxruntime"]
    torchs, *files = (result["networks"]["mobilenetv2"][name] for name in ("torch", "onnx", "pt2"))
    for row in files:
        assert row["bytes"] > 4 * 2_236_682, "a file holds all parameters"
        assert row["latency_ms"] <= row["latency_ms_95"]
        assert row["latency_ratio"] == pytest.approx(torchs["latency_ms"] / row["latency_ms"])
        assert row["throughput_ratio"] == pytest.approx(row["images_per_second"] / torchs["images_per_second"])
        assert f"{row['images_per_second']:,.1f}" in printed
