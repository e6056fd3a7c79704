"""The ensemble as a user runs it: three small networks trained by their scripts, then main_ens.py on their files."""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import checkpoint
import dataset
import dense
import errors
import main_ens
import mobilenetv2
import resnext
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
        model = checkpoint.build_model(path, checkpoint.read(path))
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
    assert set(result) == {"members", "ensemble", "average", "data", "num_images"}
    assert [member["name"] for member in result["members"]] == ["densenet", "mobilenetv2", "resnext"]
    assert [Path(member["checkpoint"]) for member in result["members"]] == [
        Path("checkpoints", f"{name}.pt") for name in ("densenet", "mobilenetv2", "resnext")
    ]
    assert (result["average"], result["data"], result["num_images"]) == ("softmax", "digits", 100)
    for row in (*result["members"], result["ensemble"]):
        assert f"{row['loss']:.4f}" in printed
        assert f"{row['accuracy']:.2%}".rstrip("%") in printed
    assert (folder / "plots" / "ensemble.png").read_bytes().startswith(b"\x89PNG")


def test_member_equals_the_last_row_of_its_own_curve(folder, tested):
    for member in tested[1]["members"]:
        last = checkpoint.read(folder / member["checkpoint"])["history"][-1]
        assert member["loss"] == pytest.approx(last["test_loss"], abs=1e-6)
        assert member["accuracy"] == last["test_accuracy"]


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
    done = run(folder, main_ens, "--data", tmp_path / "own", "--test-size", "40", "--plot-dir", "own")
    assert done.returncode == 0, done.stderr
    result = json.loads((folder / "own" / "ensemble.json").read_text())
    assert (result["data"], result["num_images"]) == (str(tmp_path / "own"), 40)


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


def test_broken_weights_are_refused(folder):
    content = checkpoint.read(folder / "checkpoints" / "resnext.pt")
    content["model"]["classifier.bias"][0] = float("nan")
    checkpoint.write(folder / "checkpoints" / "nan.pt", content)
    assert "nan.pt: its predictions are not finite" in refused(folder, "checkpoints/nan.pt")


def test_unfinished_member_is_used_with_a_warning(folder):
    content = checkpoint.read(folder / "checkpoints" / "resnext.pt")
    content["finished"] = False
    content["training"]["epoch"] = 1
    checkpoint.write(folder / "checkpoints" / "half.pt", content)
    done = run(folder, main_ens, "checkpoints/half.pt", "--plot-dir", "half")
    assert done.returncode == 0, done.stderr
    assert "half.pt is not finished, 1 of 2 epochs" in done.stdout


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--batch-size", "0"], "--batch-size is 0"),
        (["--test-size", "7000"], "--test-size 7000"),
        (["--average", "median"], "--average"),
        (["--averag", "logits"], "--averag"),
        (["--data", "nowhere"], "nowhere"),
    ],
)
def test_bad_flags(folder, flags, word):
    assert word in refused(folder, *flags)
