"""The ensemble as a user runs it: three small networks trained by their scripts, then main_ens.py on their files."""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from common import errors

import numpy as np
import pytest
import torch

import dataset
import dense
import main_ens
import mobilenetv2
import resnext
from evaluation import logits as logits_cache
from evaluation import members, metrics
from training import checkpoint
from utils import normalize

ROOT = Path(__file__).parents[1]
DIGITS = ["--data", "digits", "--image-size", "16", "--train-size", "200", "--test-size", "100", "--device", "cpu"]
SIZES = {
    dense: ["--depth", "37", "--growth-rate", "4"],
    mobilenetv2: ["--width", "0.25"],
    resnext: ["--base-width", "2"],
}


def run(folder, script, *flags):
    """Call a script's main as its last lines do, with `folder` as the current one."""
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = [script.__name__, *map(str, flags)]
    try:
        with contextlib.chdir(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            errors.run(script.main)
    except SystemExit as end:
        return SimpleNamespace(returncode=end.code, stdout=out.getvalue(), stderr=err.getvalue())
    finally:
        sys.argv = argv


def trained(folder, script, *flags):
    done = run(folder, script, *DIGITS, *SIZES[script], "--epochs", "2", *flags)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    for script in SIZES:
        trained(folder, script)
    return folder


@pytest.fixture(scope="module")
def tested(folder):
    """What the command line prints, and what it stores."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "main_ens.py")],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"},
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((folder / "plots" / "ensemble.json").read_text())


def numpy_softmax(logits):
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def member_logits(folder, names=("densenet", "mobilenetv2", "resnext")):
    """Logits (M, N, C) and labels, with nothing of the engine in between."""
    data = dataset.load("digits", image_size=16, train_size=200, test_size=100)
    logits = []
    for name in names:
        path = folder / "checkpoints" / f"{name}.pt"
        model = members.build_member(path, checkpoint.read(path)).network
        with torch.no_grad():
            logits.append(model(normalize(torch.from_numpy(data.test.images))).double().numpy())
    return np.stack(logits), data.test.labels


def test_members_and_ensemble_equal_numpy(folder, tested):
    _, result = tested
    logits, labels = member_logits(folder)
    probs = numpy_softmax(logits)
    rows = np.arange(len(labels))
    for member, own in zip(result["members"], probs, strict=True):
        assert member["loss"] == pytest.approx(-np.log(own[rows, labels]).mean(), abs=1e-6)
        assert member["accuracy"] == pytest.approx((own.argmax(1) == labels).mean(), abs=1e-6)
    mean = probs.mean(0)
    assert result["ensemble"]["loss"] == pytest.approx(-np.log(mean[rows, labels]).mean(), abs=1e-6)
    assert result["ensemble"]["accuracy"] == pytest.approx((mean.argmax(1) == labels).mean(), abs=1e-6)
    assert result["ensemble"]["loss"] < np.mean([member["loss"] for member in result["members"]])


def test_logit_average_equals_numpy(folder):
    done = run(folder, main_ens, "--average", "logits", "--plot-dir", "by-logits")
    assert done.returncode == 0, done.stderr
    result = json.loads((folder / "by-logits" / "ensemble.json").read_text())
    logits, labels = member_logits(folder)
    probs = numpy_softmax(logits.mean(0))
    assert result["average"] == "logits"
    assert result["ensemble"]["loss"] == pytest.approx(-np.log(probs[np.arange(100), labels]).mean(), abs=1e-6)
    assert "ensemble (logits averaged)" in done.stdout


def test_what_is_stored_and_printed(folder, tested):
    printed, result = tested
    assert set(result) == {
        "members", "ensemble", "best_member", "versus_members", "leave_one_out", "disagreement", "confusions",
        "by_network", "average", "temperature", "tta", "precision", "data", "num_images",
    }  # fmt: skip
    assert (result["temperature"], result["tta"], result["by_network"]) == (None, None, [])
    assert [member["name"] for member in result["members"]] == ["densenet", "mobilenetv2", "resnext"]
    assert [Path(member["checkpoint"]) for member in result["members"]] == [
        Path("checkpoints", f"{name}.pt") for name in ("densenet", "mobilenetv2", "resnext")
    ]
    assert (result["average"], result["data"], result["num_images"]) == ("softmax", "digits", 100)
    for row in (*result["members"], result["ensemble"]):
        assert f"{row['loss']:.4f}" in printed
        assert f"{row['accuracy']:.2%}".rstrip("%") in printed
        assert f"{row['brier']:.4f}" in printed
        assert f"{100 * row['calibration_error']:.2f} %" in printed
        low, high = row["intervals"]["accuracy"]
        assert f"[{100 * low:.2f}, {100 * high:.2f}]" in printed
    assert f"ensemble against its best member, {result['best_member']}: " in printed
    assert len(result["confusions"]) <= 10
    for row in result["confusions"][:3]:
        assert f"{row['true']} for {row['predicted']} ({row['images']})" in printed
    assert max(len(line) for line in printed.splitlines() if "plots and figures" not in line) <= 100
    for name in ("ensemble", "reliability", "mistakes"):
        assert (folder / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_in_bfloat16_it_is_another_computation_and_nearly_the_same_result(folder, tested):
    done = run(folder, main_ens, "--precision", "bfloat16", "--plot-dir", "bfloat16")
    assert done.returncode == 0, done.stderr
    assert "on 100 test images of digits, in bfloat16" in done.stdout
    result = json.loads((folder / "bfloat16" / "ensemble.json").read_text())
    assert (result["precision"], tested[1]["precision"]) == ("bfloat16", "float32")
    assert 0 < abs(result["ensemble"]["loss"] - tested[1]["ensemble"]["loss"]) < 0.05


def test_member_equals_the_last_row_of_its_own_curve(folder, tested):
    for member in tested[1]["members"]:
        last = checkpoint.read(folder / member["checkpoint"])["history"][-1]
        assert member["loss"] == pytest.approx(last["test_loss"], abs=1e-6)
        assert member["accuracy"] == last["test_accuracy"]


def test_leaving_one_out_equals_the_ensemble_of_the_others(folder, tested):
    done = run(folder, main_ens, "checkpoints/densenet.pt", "checkpoints/resnext.pt", "--plot-dir", "two")
    assert done.returncode == 0, done.stderr
    others = json.loads((folder / "two" / "ensemble.json").read_text())["ensemble"]
    without = tested[1]["leave_one_out"][1]
    assert without["without"] == "mobilenetv2"
    assert {name: without[name] for name in others if name != "intervals"} == pytest.approx(
        {name: others[name] for name in others if name != "intervals"}
    )


def test_mirror_images_equal_doing_it_by_hand(folder, tested):
    done = run(folder, main_ens, "--tta", "flip", "--plot-dir", "mirrored")
    assert done.returncode == 0, done.stderr
    assert "with --tta flip" in done.stdout
    assert "ensemble (softmax averaged, --tta flip)" in done.stdout
    result = json.loads((folder / "mirrored" / "ensemble.json").read_text())
    assert result["tta"] == "flip"
    data = dataset.load("digits", image_size=16, train_size=200, test_size=100)
    views = []
    for name in ("densenet", "mobilenetv2", "resnext"):
        path = folder / "checkpoints" / f"{name}.pt"
        model = members.build_member(path, checkpoint.read(path)).network
        with torch.no_grad():
            for images in (data.test.images, data.test.images[..., ::-1].copy()):
                views.append(numpy_softmax(model(normalize(torch.from_numpy(images))).double().numpy()))
    rows, labels = np.arange(100), data.test.labels
    for number, member in enumerate(result["members"]):
        own = (views[2 * number] + views[2 * number + 1]) / 2
        assert member["loss"] == pytest.approx(-np.log(own[rows, labels]).mean(), abs=1e-6)
    mean = np.mean(views, 0)
    assert result["ensemble"]["loss"] == pytest.approx(-np.log(mean[rows, labels]).mean(), abs=1e-6)
    assert abs(result["ensemble"]["loss"] - tested[1]["ensemble"]["loss"]) > 1e-5, "mirror images ought to differ"


def test_a_second_analysis_builds_no_network_and_says_the_same(folder, tested, monkeypatch):
    def build(path, content):
        raise AssertionError(f"{path} is built")

    monkeypatch.setattr(logits_cache, "build_member", build)
    done = run(folder, main_ens, "--plot-dir", "again")
    assert done.returncode == 0, done.stderr
    assert (folder / "again" / "ensemble.json").read_text() == (folder / "plots" / "ensemble.json").read_text()
    assert done.stdout.splitlines()[:-1] == tested[0].splitlines()[:-1]
    with pytest.raises(AssertionError, match="is built"):
        run(folder, main_ens, "--no-cache")


@pytest.fixture(scope="module")
def held_out(folder):
    """Two checkpoints of one network, with validation images, trained for long enough to have a temperature."""
    easy = ["--recipe", "original", "--flip", "0", "--crop-padding", "1", "--randaugment-ops", "0"]
    easy += [word for name in ("brightness", "contrast", "saturation", "hue") for word in (f"--{name}", "0")]
    easy += ["--epochs", "12", "--batch-size", "16", "--base-lr", "0.05", "--val-size", "100"]
    names = ("held-out", "held-out-seed1")
    for seed, name in enumerate(names):
        trained(folder, mobilenetv2, *easy, "--name", name, "--seed", str(seed))
    return [f"checkpoints/{name}.pt" for name in names]


def test_a_temperature_is_fitted_on_the_validation_images_alone(folder, held_out):
    done = run(folder, main_ens, *held_out, "--temperature", "fit", "--plot-dir", "fitted")
    assert done.returncode == 0, done.stderr
    result = json.loads((folder / "fitted" / "ensemble.json").read_text())
    temperature = result["temperature"]
    assert temperature["fitted_on"] == 100

    data = dataset.load("digits", image_size=16, train_size=200, test_size=100, val_size=100)
    contents = [(folder / path, checkpoint.read(folder / path)) for path in held_out]
    losses = {}
    for factor in (0.97, 1, 1.03):
        ensemble = members.build(contents, temperature=factor * temperature["value"])
        with torch.no_grad():
            probs = ensemble(torch.from_numpy(data.val.images))
            tested = ensemble(torch.from_numpy(data.test.images))
        losses[factor] = metrics.negative_log_likelihood(probs, torch.from_numpy(data.val.labels))
        if factor == 1:
            assert result["ensemble"]["loss"] == pytest.approx(
                metrics.negative_log_likelihood(tested, torch.from_numpy(data.test.labels)), abs=1e-5
            )
    assert losses[1] < min(losses[0.97], losses[1.03])

    before, after = temperature["before"], temperature["after"]
    assert after == {name: result["ensemble"][name] for name in after}
    assert before["accuracy"] == after["accuracy"]
    assert f"test loss from {before['loss']:.4f} to {after['loss']:.4f}" in done.stdout
    assert "fitted on 100 validation images" in done.stdout


def test_a_temperature_can_be_given(folder, tested):
    done = run(folder, main_ens, "--temperature", "2", "--plot-dir", "two-degrees")
    assert done.returncode == 0, done.stderr
    result = json.loads((folder / "two-degrees" / "ensemble.json").read_text())
    assert (result["temperature"]["value"], result["temperature"]["fitted_on"]) == (2, None)
    assert result["temperature"]["before"]["loss"] == tested[1]["ensemble"]["loss"]
    assert result["members"] == tested[1]["members"]
    assert "T = 2" in done.stdout


def test_members_of_one_network_have_a_mean_and_a_spread(folder, held_out):
    done = run(folder, main_ens, *held_out, "--plot-dir", "seeds")
    assert done.returncode == 0, done.stderr
    result = json.loads((folder / "seeds" / "ensemble.json").read_text())
    [group] = result["by_network"]
    accuracies = [100 * member["accuracy"] for member in result["members"]]
    assert (group["network"], group["members"]) == ("mobilenetv2", ["held-out", "held-out-seed1"])
    assert f"test accuracy {np.mean(accuracies):.2f} ± {np.std(accuracies, ddof=1):.2f} %" in done.stdout


def test_a_fit_without_common_validation_images_is_refused(folder, held_out):
    error = refused(folder, "--temperature", "fit")
    assert "checkpoints/densenet.pt was trained without" in error
    assert "--val-size" in error
    assert "--val-size: 0 in" in refused(folder, "checkpoints/densenet.pt", held_out[0], "--temperature", "fit")
    assert "--data digits replaces them" in refused(folder, *held_out, "--temperature", "fit", "--data", "digits")


def test_any_number_of_any_kind(folder):
    done = run(folder, main_ens, "checkpoints/resnext.pt", "--plot-dir", "one")
    assert done.returncode == 0, done.stderr
    result = json.loads((folder / "one" / "ensemble.json").read_text())
    assert result["ensemble"]["loss"] == pytest.approx(result["members"][0]["loss"], abs=1e-12)


def test_flags_change_the_test_set_and_the_batch(folder):
    done = run(folder, main_ens, "--test-size", "50", "--batch-size", "7", "--plot-dir", "fifty")
    assert done.returncode == 0, done.stderr
    assert json.loads((folder / "fifty" / "ensemble.json").read_text())["num_images"] == 50


def test_data_flag_tests_on_other_images(folder, tmp_path):
    from PIL import Image

    digits = dataset.load("digits", image_size=16)
    for split, images in (("train", digits.train), ("test", digits.test)):
        for label in range(10):
            (tmp_path / "own" / split / str(label)).mkdir(parents=True)
            for row in np.flatnonzero(images.labels == label)[:4]:
                picture = Image.fromarray(images.images[row].transpose(1, 2, 0))
                picture.save(tmp_path / "own" / split / str(label) / f"{row}.png")
    done = run(folder, main_ens, "--data", tmp_path / "own", "--plot-dir", "own")
    assert done.returncode == 0, done.stderr
    result = json.loads((folder / "own" / "ensemble.json").read_text())
    assert (result["data"], result["num_images"]) == (str(tmp_path / "own"), 40), "whatever subset the members had"
    done = run(folder, main_ens, "--data", tmp_path / "own", "--test-size", "20", "--plot-dir", "own")
    assert json.loads((folder / "own" / "ensemble.json").read_text())["num_images"] == 20, done.stderr


def test_data_that_is_no_longer_there_is_said_to_be_the_checkpoints(folder, tmp_path):
    path = folder / "checkpoints" / "resnext.pt"
    content = checkpoint.read(path)
    content["data"]["source"] = "photos"
    checkpoint.write(tmp_path / "moved.pt", content)
    error = refused(folder, tmp_path / "moved.pt")
    assert f"{tmp_path / 'moved.pt'} was trained on it, as seen from there; give --data where it lies now" in error


def test_mirrored_images_that_a_member_never_saw_are_warned_of(folder, tmp_path):
    path = folder / "checkpoints" / "resnext.pt"
    content = checkpoint.read(path)
    for flip, warned in ((0.0, True), (0.5, False)):
        content["recipe"]["flip"] = flip
        checkpoint.write(tmp_path / "member.pt", content)
        done = run(folder, main_ens, tmp_path / "member.pt", "--tta", "flip", "--plot-dir", tmp_path)
        assert done.returncode == 0, done.stderr
        assert ("was trained without (--flip 0)" in done.stderr) == warned


def refused(folder, *flags):
    done = run(folder, main_ens, *flags)
    assert done.returncode == 2, done.stdout
    assert "Traceback" not in done.stderr
    return done.stderr


def test_missing_checkpoint_names_its_script(folder, tmp_path):
    for name, script in (("densenet", "dense.py"), ("mobilenetv2", "mobilenetv2.py"), ("resnext", "resnext.py")):
        error = refused(folder, tmp_path / f"{name}.pt")
        assert str(tmp_path / f"{name}.pt") in error
        assert f"python {script}" in error
    assert "other.pt" in refused(folder, tmp_path / "other.pt")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--split-seed", "1"], ["--split-seed: 0 in", "1 in"]),
        (["--val-size", "20"], ["--val-size: 0 in", "20 in"]),
        (["--image-size", "24"], ["image size: 16 in", "24 in"]),
    ],
)
def test_members_of_other_splits_or_sizes_are_refused(folder, flags, words):
    trained(folder, mobilenetv2, "--name", "other", "--overwrite", *flags)
    error = refused(folder, "checkpoints/densenet.pt", "checkpoints/other.pt")
    for word in [*words, "checkpoints/densenet.pt", "checkpoints/other.pt"]:
        assert word in error


def test_members_of_other_classes_are_refused(folder):
    content = checkpoint.read(folder / "checkpoints" / "resnext.pt")
    content["data"]["classes"][3] = "drei"
    checkpoint.write(folder / "checkpoints" / "german.pt", content)
    error = refused(folder, "checkpoints/densenet.pt", "checkpoints/german.pt")
    assert "classes" in error
    assert "drei" in error
    assert "has the classes" in refused(folder, "checkpoints/german.pt")


def test_data_that_changed_since_training_is_refused(folder):
    content = checkpoint.read(folder / "checkpoints" / "resnext.pt")
    content["data"]["digest"] = "0" * 32
    checkpoint.write(folder / "checkpoints" / "moved.pt", content)
    assert "no longer holds the images" in refused(folder, "checkpoints/moved.pt")
    assert "digest" in refused(folder, "checkpoints/densenet.pt", "checkpoints/moved.pt")


def test_one_file_twice_is_refused(folder):
    assert "twice" in refused(folder, "checkpoints/densenet.pt", "checkpoints/../checkpoints/densenet.pt")


@pytest.mark.parametrize(
    ("value", "words"), [("nan", "predictions are not finite"), ("3e38", "predictions are not finite")]
)
def test_broken_weights_are_refused(folder, value, words):
    content = checkpoint.read(folder / "checkpoints" / "resnext.pt")
    content["model"]["classifier.weight"].fill_(float(value))
    checkpoint.write(folder / "checkpoints" / "broken.pt", content)
    assert f"broken.pt: its {words}" in refused(folder, "checkpoints/broken.pt")


def test_unfinished_member_is_used_with_a_warning(folder):
    content = checkpoint.read(folder / "checkpoints" / "resnext.pt")
    content["finished"] = False
    content["training"]["epoch"] = 1
    del content["history"][1:]
    checkpoint.write(folder / "checkpoints" / "half.pt", content)
    done = run(folder, main_ens, "checkpoints/half.pt", "--plot-dir", "half")
    assert done.returncode == 0, done.stderr
    assert "half.pt is not finished, 1 of 2 epochs" in done.stderr


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--batch-size", "0"], "--batch-size is 0"),
        (["--test-size", "7000"], "--test-size 7000"),
        (["--average", "median"], "--average"),
        (["--averag", "logits"], "--averag"),
        (["--temperature", "0"], "--temperature is 0; it must be 0.05 to 20"),
        (["--temperature", "1e-320"], "it must be 0.05 to 20"),
        (["--temperature", "nan"], "--temperature is nan"),
        (["--temperature", "warm"], "--temperature: found warm, expected fit or a number"),
        (["--batch-size", "100000000000000000000"], "it must be 1 to 1,000,000"),
        (["--data", "digits", "--data-url", "http://localhost"], "--data-url is for CIFAR, not for --data 'digits'"),
        (["--plot-dir", "/dev/null/plots"], "/dev/null/plots: the results could not be written"),
        (["--tta", "crop"], "--tta"),
        (["--data", "nowhere"], "nowhere"),
    ],
)
def test_bad_flags(folder, flags, word):
    assert word in refused(folder, *flags)
