"""The benchmarks run, too small to measure anything, and write their results."""

import json
import math
import os
import re
import shutil
import signal
import statistics
import sys
import time
from types import SimpleNamespace

from common.errors import UserError

import command_line
import numpy as np
import pytest
import torch
from command_line import MEMBERS, refused, softmax, succeeded
from conftest import ROOT

from benchmarks import ensemble, harness, train
from dataset.image_folder import num_cores

pytestmark = pytest.mark.slow


SMALL = ["--data", "digits", "--image-size", 16]


def run(folder, script, *flags):
    return command_line.in_subprocess(folder, ROOT / "benchmarks" / script, *flags)


def measured_by(folder, script, *flags):
    """The JSON file and the output of a benchmark."""
    done = run(folder, script, "--output", "out.json", *flags)
    assert done.returncode == 0, done.stderr
    result = json.loads((folder / "out.json").read_text())
    assert {"device", "versions", "command"} <= result.keys()
    assert harness.processor() in result["device"]
    return result, done.stdout


def test_augment(tmp_path):
    result, printed = measured_by(tmp_path, "augment.py", *SMALL, "--images", 64, "--rounds", 1)
    rates = result["images_per_second"]
    assert result["ratio"] == rates["ours"] / rates["torchvision"]
    assert f"{rates['ours']:,.0f}" in printed


@pytest.mark.parametrize("script", ["augment.py", "train.py", "race.py"])
def test_missing_data_is_an_error(tmp_path, script):
    done = run(tmp_path, script, "--data", "nowhere", "--output", "out.json")
    assert done.returncode == 2
    assert "error: --data nowhere" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_memory(tmp_path):
    flags = ["--rounds", 1, "--seconds", 0.01, "--networks", "mobilenetv2"]
    result, printed = measured_by(tmp_path, "memory.py", *flags)
    network = result["networks"]["mobilenetv2"]
    assert network["ratio"] == network["images_per_second"]["kept"] / network["images_per_second"]["given_back"]
    assert f"| {network['ratio']:.2f} |" in printed


def test_train(tmp_path):
    flags = [*SMALL, "--images", 32, "--networks", "mobilenetv2", "--device", "cpu", "--rounds", 1, "--windows", 3]
    flags += ["--seconds", 0.01, "--batch-size", 24, "--tuned-batch-size", 16]
    kinds = ("ours", "ours_float32", "ours_graph", "baseline", "tuned_bfloat16")
    result, printed = measured_by(tmp_path, "train.py", *flags, "--kinds", *kinds)
    network = result["networks"]["mobilenetv2"]
    assert list(network) == list(kinds)
    rate = network["ours"]["images_per_second"]
    assert network["ours"]["num_images"] == network["ours"]["batch_size"] == 24
    assert network["ours_graph"]["compile"] == "none", "on the CPU there are no graphs"
    assert "ratio" not in network["ours"]
    # The baseline's batches of 64 are batches of 32, since there are only 32 images.
    for kind, batch_size in (("ours_float32", 24), ("ours_graph", 24), ("baseline", 32), ("tuned_bfloat16", 16)):
        figures = network[kind]
        assert figures["batch_size"] == batch_size
        assert figures["images_per_second"] == statistics.median(figures["windows"])
        assert figures["ratio"] == rate / figures["images_per_second"]
        assert math.isclose(result["geometric_mean_ratios"][kind], figures["ratio"])
        assert f"| ours / {kind} | {figures['ratio']:.2f} | {figures['ratio']:.2f} |" in printed
        assert f"| {kind}, start-up | {figures['start_up_seconds']:.1f} s |" in printed
        if sys.platform == "linux":
            assert f"| {kind}, peak memory | {figures['peak_memory_bytes'] / 2**30:.2f} GiB |" in printed
    assert [network[kind]["precision"] for kind in kinds[1:]] == [
        "float32", network["ours"]["precision"], "float32", "bfloat16"
    ]  # fmt: skip
    assert [network[kind]["workers"] for kind in kinds[3:]] == [2, num_cores()]
    assert f"| ours, images/s | {rate:,.1f} |" in printed


def test_layers(tmp_path):
    result, _ = measured_by(tmp_path, "layers.py", "--networks", "resnext29", "--batch-size", 2, "--rounds", 1)
    network = result["networks"]["resnext29"]
    convolutions, norms = network["convolutions"]["rows"], network["norms"]["rows"]
    assert [sum(row["count"] for row in rows) for rows in (convolutions, norms)] == 2 * [1 + 9 * 3 + 3]
    grouped = [row for row in convolutions if row["shape"][4] == 2]
    assert sum(row["count"] for row in grouped) == 9
    assert all(row["channels_last dense"] > 0 for row in grouped)
    assert network["convolutions"]["milliseconds"]["contiguous dense"] == pytest.approx(
        sum(row["count"] * row.get("contiguous dense", row["contiguous grouped"]) for row in convolutions)
    )
    for way in ("eager", "compiled"):
        assert network["norms"]["milliseconds"][way] == pytest.approx(sum(row["count"] * row[way] for row in norms))


def test_gpu_prints_what_is_there_and_names_what_is_missing(tmp_path):
    row = {"accuracy": 0.5, "loss": 1.0, "seconds": 60}
    result = {"members": 3 * [row], "ensemble": row, "total_seconds": 190, "parallel": True}
    result |= {"training_together_seconds": 80, "seconds": {"main_ens.py": 10}}
    measured = {"ours_graph": {"images_per_second": 1000.0, "start_up_seconds": 10.0, "num_images": 50_000}}
    for name, content in {
        "layers.json": {"networks": {"densenet": {"norms": {"milliseconds": {"eager": 1.5}}}}},
        "compile-resnext29.json": {"networks": {"resnext29": measured}},
        "plain-mobilenetv2.json": {"networks": {"mobilenetv2": {"ours": {}, "tuned": {"ratio": 2.5}}}},
        "baseline/result.json": result,
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(content))
    done = run(tmp_path, "gpu.py", ".")
    minutes = (10 + 50 * train.RECIPES["resnext29"].epochs) / 60
    for label, text in {
        "norms eager, ms": "1.50",
        "ours_graph, start-up and default epochs at full size": f"{minutes:.1f} min",
        "ours / tuned": "2.50",
        "baseline: accuracy, loss": "50.00%, 1.0000",
        "baseline: time": "1.0 min | 1.0 min | 1.0 min | 1.5 min",
    }.items():
        [line] = [line for line in done.stdout.splitlines() if line.startswith(f"| {label} |")]
        assert text in line
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
    assert f"| usual (mobilenetv2.py {first['flags']}) | 2 | {mean:.2f} ± {spread:.2f} |" in printed
    flags[flags.index(30)] = 40
    error = run(tmp_path, "search.py", "--output", "out.json", *flags, *fixed).stderr
    assert "out.json has runs with val_size 30, not 40; give another --output" in error


def test_race(tmp_path):
    flags = [*SMALL, "--epochs", 1, "--train-size", 100, "--picture", "r.png"]
    result, printed = measured_by(tmp_path, "race.py", *flags)
    for name in ("ours", "baseline"):
        last = result[name][-1]
        assert f"{100 * last['test_accuracy']:.2f} % after" in printed
        assert [point["seconds"] for point in result[name]] == sorted(point["seconds"] for point in result[name])
    assert result["ours"][-1]["epochs"] == 1
    # The baseline stops at the first step after the time of ours, and then tests its network.
    assert result["baseline"][-1]["seconds"] > result["ours"][-1]["seconds"]
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(not shutil.which("taskset"), reason="needs taskset")
def test_busy(tmp_path):
    flags = ["--rounds", 1, "--spins", 4000, "--seconds", 0.1, "--batch-size", 2]
    figures = measured_by(tmp_path, "busy.py", *flags)[0]["figures"]
    assert [row["beside"] for row in figures] == ["nothing", "same session", "another session"]
    assert all(row["spins"] == "4000" and row["images_per_second"] > 0 for row in figures)


def test_roofline(tmp_path):
    result, printed = measured_by(tmp_path, "roofline.py", "--flops", 1e12)
    network = result["networks"]["mobilenetv2"]
    assert network["images_per_second"]["operations"] == 1e12 / network["flops"]
    assert network["images_per_second"]["fused"] == 3e12 / network["bytes_fused"]
    assert f"| {network['bytes_eager'] / 1e6:.1f} |" in printed


def test_a_bandwidth_must_be_above_zero(tmp_path):
    done = run(tmp_path, "roofline.py", "--bandwidth=nan")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "--bandwidth" in done.stderr


def test_alternatives_take_turns(capsys):
    calls, ways = [], {}
    for name in ("one", "two"):
        ways[name] = lambda name=name: calls.append(name) or len(calls)
    found = harness.in_turn(ways, 2, warm_up=True, show="{} calls".format)
    assert calls == ["one", "two"] * 3
    assert found == {"one": [3, 5], "two": [4, 6]}, "the first round does not count"
    assert capsys.readouterr().out.splitlines()[1:3] == ["round 0, two: 2 calls", "round 1, one: 3 calls"]


def test_a_killed_subprocess_is_an_error_that_names_the_signal(monkeypatch, tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    monkeypatch.setattr(sys, "argv", [str(script)])
    with pytest.raises(UserError, match="ours 7: the process was killed by signal 9; if memory ran out"):
        harness.in_subprocess("ours", 7)


def test_a_compile_mode_may_fail_but_no_other_kind(monkeypatch, capsys):
    def fail(*_, **__):
        raise UserError("no compiler")

    monkeypatch.setattr(harness, "in_subprocess", fail)
    cpu = torch.device("cpu")
    assert train.try_out("densenet", "ours_inductor", cpu) is None
    assert "densenet, ours_inductor is left out. no compiler" in capsys.readouterr().err
    with pytest.raises(UserError, match="no compiler"):
        train.try_out("densenet", "ours", cpu)


DIGITS = ["--data", "digits", "--dense", "--depth 37 --growth-rate 4", "--mobilenetv2", "--width 0.25", "--resnext"]
OTHER_DIGITS, DIGITS = [*DIGITS, "--base-width 4"], [*DIGITS, "--base-width 2"]
SHORT = ["--image-size", 16, "--epochs", 1, "--batch-size", 64, "--train-size", 200, "--test-size", 100]
SHORT += ["--base-lr", 0.1, "--device", "cpu"]


def send_sigterm_once(sleep):
    """Wrap `sleep`: its first call also sends SIGTERM to this process twice, as timeout and make do."""
    sent = []

    def sleep_and_send(seconds):
        sleep(seconds)
        while len(sent) < 2:
            sent.append(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)

    return sleep_and_send


def files_in(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A folder with the output of a run in `out`. The run was first stopped by a time limit, then by a signal."""
    folder = tmp_path_factory.mktemp("measured")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONUTF8", "1")
        flags = [*DIGITS, "--work", "work", "--output", "out"]
        late = command_line.run(folder, ensemble, *OTHER_DIGITS, *flags[-4:], "--time-limit", 1, "--", *SHORT)
        assert late.returncode == 128 + signal.SIGTERM, late.stderr
        with pytest.MonkeyPatch.context() as stopping:
            stopping.setattr(ensemble.time, "sleep", send_sigterm_once(time.sleep))
            stopped = command_line.run(folder, ensemble, *flags, "--", *SHORT)
        assert stopped.returncode == 128 + signal.SIGTERM, stopped.stderr
        assert "the same command continues" in stopped.stdout
        assert files_in(folder / "out") == []
        before = json.loads((folder / "work" / "progress.json").read_text())
        assert before["finished"] == []
        patch.setattr(harness, "processor", lambda: "another processor")
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
    assert result["flags"]["resnext.py"].endswith("--base-width 2"), "the last value before resnext.py started"
    seconds = result["seconds"]
    assert list(seconds) == ["mobilenetv2.py", "dense.py", "resnext.py", "main_ens.py"]
    assert result["total_seconds"] == sum(seconds.values())
    assert seconds["mobilenetv2.py"] > measured.seconds_before["mobilenetv2.py"] > 0
    first, *others = result["starts"].values()
    assert (first, others) == (3, [1, 1, 1]), "mobilenetv2.py was stopped twice"
    devices = [row["devices"] for row in result["members"]]
    assert list(map(len, devices)) == [1, 2, 1], "only mobilenetv2.py was stopped, and continued on another processor"
    assert result["device"] == " and ".join(devices[1])
    assert 0 < result["not_training"] < 1
    assert 0 < result["cpu_seconds"] < os.cpu_count() * result["total_seconds"]
    assert f"| total |  |  | {result['total_seconds']:.1f} |" in measured.stdout
    tested = json.loads((output / "ensemble.json").read_text())
    assert result["ensemble"] == tested["ensemble"]
    for row, member in zip(result["members"], tested["members"], strict=True):
        assert row["epochs"] == 1
        assert row["images_per_second"] > 0
        assert {name: row[name] for name in ("name", "loss", "accuracy")} == {
            name: member[name] for name in ("name", "loss", "accuracy")
        }


def test_the_stored_logits_have_the_scores_of_the_ensemble(measured):
    result = json.loads((measured.folder / "out" / "result.json").read_text())
    with np.load(measured.folder / "out" / "logits.npz") as arrays:
        assert arrays.files == [*MEMBERS, "labels", "classes"]
        assert [arrays[name].dtype for name in MEMBERS] == [np.float16] * 3
        assert arrays["classes"].tolist() == [str(digit) for digit in range(10)]
        labels = arrays["labels"]
        probs = np.mean([softmax(arrays[name].astype(float)) for name in MEMBERS], axis=0)
    assert labels.dtype == np.int16
    assert len(labels) == result["num_images"]["test"] == 100
    # Half precision can change the prediction of a near tie.
    assert np.mean(probs.argmax(1) == labels) == pytest.approx(result["ensemble"]["accuracy"], abs=0.011)
    loss = -np.log(probs[np.arange(100), labels]).mean()
    assert loss == pytest.approx(result["ensemble"]["loss"], abs=0.002)


def test_a_finished_run_is_not_run_again_and_can_be_compared(measured):
    flags = [*DIGITS, "--work", "work", "--output", "again"]
    succeeded(measured.folder, ensemble, *flags, "--", *SHORT)
    first, again = (json.loads((measured.folder / name / "result.json").read_text()) for name in ("out", "again"))
    assert again == first | {"command": again["command"]}

    compared = succeeded(measured.folder, ensemble, "--output", "again", "--against", "out")
    against = json.loads((measured.folder / "again" / "against.json").read_text())
    assert against["against"] == "out"
    assert [row["name"] for row in against["rows"]] == [*MEMBERS, "ensemble"]
    for row in against["rows"]:
        for quantity in ("accuracy", "loss"):
            assert row[quantity] == 0
            assert row["intervals"][quantity] == [0, 0]
    assert "| ensemble | +0.00 points [+0.00, +0.00] | +0.0000 [+0.0000, +0.0000] |" in compared.stdout


def test_a_copied_work_folder_links_to_the_images_of_this_machine(tmp_path):
    images, link = tmp_path / "photos", tmp_path / "work" / "images" / "photos"
    images.mkdir()
    link.parent.mkdir(parents=True)
    link.symlink_to(tmp_path / "not on this machine")
    assert ensemble.link_data(str(images), None, tmp_path / "work") == "images/photos"
    assert link.resolve() == images.resolve()


def test_a_run_continues_only_with_the_same_setting(measured):
    flags = [*DIGITS, "--work", "work", "--output", "other", "--", *SHORT, "--seed", 1]
    error = refused(measured.folder, ensemble, *flags)
    assert "another setting" in error
    assert "--seed 1" in error
    assert files_in(measured.folder / "other") == []


def write_logits(folder, logits, labels):
    folder.mkdir()
    np.savez(folder / "logits.npz", **logits, labels=labels.astype(np.uint8), classes=np.array(["a", "b", "c"]))


def test_intervals_equal_a_plain_bootstrap(tmp_path):
    rng = np.random.default_rng(7)
    labels = rng.integers(3, size=80)
    runs = [
        {name: (rng.normal(0, 1, (80, 3)) + sharp * np.eye(3)[labels]).astype(np.float16) for name in ("one", "two")}
        for sharp in (1.5, 1.0)
    ]
    for name, logits in zip(("a", "b"), runs, strict=True):
        write_logits(tmp_path / name, logits, labels)
    done = succeeded(tmp_path, ensemble, "--output", "a", "--against", "b")

    def scores(probs):
        return np.stack([probs.argmax(1) == labels, -np.log(probs[np.arange(80), labels])])

    def probs_of(logits):
        own = {name: softmax(values.astype(float)) for name, values in logits.items()}
        return own | {"ensemble": (own["one"] + own["two"]) / 2}

    ours, theirs = map(probs_of, runs)
    draws = np.random.default_rng(0)
    resamples = [draws.integers(80, size=80) for _ in range(10_000)]
    for name in ("one", "two", "ensemble"):
        differences = scores(ours[name]) - scores(theirs[name])
        means = np.array([differences[:, rows].mean(axis=1) for rows in resamples])
        low, high = np.percentile(means, [2.5, 97.5], axis=0)
        line = next(line for line in done.stdout.splitlines() if line.startswith(f"| {name} |"))
        printed = [float(number) for number in re.findall(r"[+-][0-9.]+", line)]
        points, loss = ([differences[row].mean(), low[row], high[row]] for row in (0, 1))
        assert printed[:3] == pytest.approx([100 * value for value in points], abs=0.0051)
        assert printed[3:] == pytest.approx(loss, abs=0.000051)


def test_runs_with_different_test_images_are_not_compared(tmp_path):
    logits = {"one": np.zeros((4, 3), np.float16)}
    write_logits(tmp_path / "a", logits, np.array([0, 1, 2, 0]))
    write_logits(tmp_path / "b", logits, np.array([0, 1, 2, 1]))
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "logits.npz").write_bytes(b"PK\3\4 and no more")
    for other, message in (("b", "different labels"), ("c", "not a file of this benchmark"), ("d", "No such file")):
        assert message in refused(tmp_path, ensemble, "--output", "a", "--against", other)


@pytest.mark.parametrize("parallel", [[], ["--parallel"]], ids=["in turn", "at once"])
def test_a_failed_script_leaves_no_output(tmp_path, monkeypatch, capfd, parallel):
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    (scripts / "mobilenetv2.py").write_text("import sys; sys.exit('the disk is on fire')")
    for name in ("dense.py", "resnext.py"):
        (scripts / name).write_text("import time; time.sleep(100)")
    monkeypatch.setattr(harness, "ROOT", scripts)
    error = refused(tmp_path, ensemble, *DIGITS, *parallel, "--work", "work", "--output", "out")
    assert "mobilenetv2.py ended with status 1" in error
    assert "the disk is on fire" in capfd.readouterr().err
    assert files_in(tmp_path / "out") == []
    assert files_in(tmp_path / "work") == ["progress.json"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--against", "elsewhere"], "logits.npz"),
        (["--", "--name", "mine"], "--name for dense.py"),
        (["--data", "nowhere"], "nowhere"),
    ],
    ids=["against", "name", "data"],
)
def test_invalid_flags_are_an_error_before_the_run(tmp_path, flags, message):
    assert message in refused(tmp_path, ensemble, *flags)
    assert list(tmp_path.iterdir()) == []


def test_the_cascade_is_compared_with_the_whole_ensemble(measured):
    flags = ["--threshold", 0.2, "--images", 60, "--batch-size", 20, "--rounds", 1]
    flags += ["--cascade", *(f"checkpoints/{name}.pt" for name in MEMBERS)]
    result, printed = measured_by(measured.folder / "work", "deploy.py", *flags)
    assert (result["threshold"], result["num_images"], result["members"]) == (0.2, 60, list(MEMBERS))
    whole, cascade = result["figures"]["whole"], result["figures"]["cascade"]
    assert result["ratio"] == cascade["milliseconds"] / whole["milliseconds"]
    assert f"{cascade['accuracy']:.2%}" in printed


def test_deploy(tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    result, printed = measured_by(tmp_path, "deploy.py", "--networks", "mobilenetv2", "--rounds", 1)
    assert {"device", "versions", "commit", "command", "rounds"} <= result.keys()
    assert result["packages"]["onnxruntime"]
    torchs, *files = (result["networks"]["mobilenetv2"][name] for name in ("torch", "onnx", "pt2"))
    for row in files:
        assert row["bytes"] > 4 * 2_236_682, "a file holds all parameters"
        assert row["latency_ms"] <= row["latency_ms_95"]
        assert row["latency_ratio"] == pytest.approx(torchs["latency_ms"] / row["latency_ms"])
        assert row["throughput_ratio"] == pytest.approx(row["images_per_second"] / torchs["images_per_second"])
        assert f"{row['images_per_second']:,.1f}" in printed
