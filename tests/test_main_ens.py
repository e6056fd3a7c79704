"""main_ens.py as a user runs it, on the checkpoints of three small networks that their scripts have trained."""

import hashlib
import json
import math
import shutil
from pathlib import Path

import command_line
import numpy as np
import pytest
import torch
from command_line import MEMBERS, SIZES, changed, forbid_building, numpy_logits, run, softmax, succeeded
from conftest import ROOT
from test_dataset import random_png, write_folder

import dataset
import dense
import main_ens
import mobilenetv2
import resnext
from evaluation import members, metrics
from evaluation.logits import member_logits
from training import checkpoint, pretrained

DIGITS = ["--data", "digits", "--image-size", "16", "--train-size", "200", "--test-size", "100", "--device", "cpu"]


def train(folder, script, *flags):
    succeeded(folder, script, *DIGITS, *SIZES[script.__name__], "--epochs", "2", *flags)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    for script in (dense, mobilenetv2, resnext):
        train(folder, script)
    return folder


@pytest.fixture(scope="module")
def tested(folder):
    """The output of main_ens.py, and the content of ensemble.json."""
    done = command_line.in_subprocess(folder, ROOT / "main_ens.py")
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((folder / "plots" / "ensemble.json").read_text())


def analysed(folder, *flags):
    """Run main_ens.py with flags and its own --plot-dir: the result of the run, and ensemble.json."""
    done = succeeded(folder, main_ens, *flags, "--plot-dir", "analysed")
    return done, json.loads((folder / "analysed" / "ensemble.json").read_text())


def digits(test_size=100):
    return dataset.load("digits", image_size=16, train_size=200, test_size=test_size).test


def loss(probs, labels):
    return pytest.approx(-np.log(probs[np.arange(len(labels)), labels]).mean(), abs=1e-6)


def test_members_and_ensemble_equal_numpy(folder, tested):
    _, result = tested
    test = digits()
    probs = softmax(numpy_logits(folder, test.images))
    for row, expected in zip([*result["members"], result["ensemble"]], [*probs, probs.mean(0)], strict=True):
        assert row["loss"] == loss(expected, test.labels)
        assert row["accuracy"] == pytest.approx((expected.argmax(1) == test.labels).mean(), abs=1e-6)
    for row in result["members"]:
        last = checkpoint.read(folder / row["checkpoint"])["history"][-1]
        assert (row["loss"], row["accuracy"]) == (pytest.approx(last["test_loss"], abs=1e-6), last["test_accuracy"])


def test_averaged_logits_on_fewer_images_equal_numpy(folder):
    done, result = analysed(folder, "--average", "logits", "--test-size", "50", "--batch-size", "7")
    test = digits(test_size=50)
    assert (result["average"], result["num_images"]) == ("logits", 50)
    assert result["ensemble"]["loss"] == loss(softmax(numpy_logits(folder, test.images).mean(0)), test.labels)
    assert "ensemble (logits averaged)" in done.stdout


def test_what_is_stored_and_printed(folder, tested):
    printed, result = tested
    assert (result["temperature"], result["tta"], result["by_network"]) == (None, None, [])
    assert [(member["name"], Path(member["checkpoint"])) for member in result["members"]] == [
        (name, Path("checkpoints", f"{name}.pt")) for name in MEMBERS
    ]
    assert (result["average"], result["data"], result["num_images"]) == ("softmax", "digits", 100)
    for row in (*result["members"], result["ensemble"]):
        assert f"{row['loss']:.4f}" in printed
        assert f"{row['accuracy']:.2%}".rstrip("%") in printed
        assert f"{row['brier']:.4f}" in printed
        assert f"{100 * row['calibration_error']:.2f} %" in printed
        low, high = row["intervals"]["accuracy"]
        assert f"[{100 * low:.2f}, {100 * high:.2f}]" in printed
    assert f"ensemble minus its best member, {result['best_member']}: " in printed
    assert len(result["confusions"]) <= 10
    for row in result["confusions"][:3]:
        assert f"{row['true']} → {row['predicted']} ({row['images']})" in printed
    assert max(len(line) for line in printed.splitlines() if "plots and numbers" not in line) <= 100
    for name in ("ensemble", "reliability", "mistakes", "cost"):
        assert (folder / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_bfloat16_gives_nearly_the_same_result(folder, tested):
    done, result = analysed(folder, "--precision", "bfloat16")
    assert "on 100 test images of digits, in bfloat16" in done.stdout
    assert (result["precision"], tested[1]["precision"]) == ("bfloat16", "float32")
    assert 0 < abs(result["ensemble"]["loss"] - tested[1]["ensemble"]["loss"]) < 0.05


def test_tta_flip_equals_numpy(folder, tested):
    done, result = analysed(folder, "--tta", "flip")
    assert "with --tta flip" in done.stdout
    assert "ensemble (softmax averaged, --tta flip)" in done.stdout
    assert "warning" not in done.stderr
    assert result["tta"] == "flip"
    test = digits()
    views = [softmax(numpy_logits(folder, images)) for images in (test.images, test.images[..., ::-1].copy())]
    probs = np.mean(views, 0)
    for row, expected in zip([*result["members"], result["ensemble"]], [*probs, probs.mean(0)], strict=True):
        assert row["loss"] == loss(expected, test.labels)
    assert abs(result["ensemble"]["loss"] - tested[1]["ensemble"]["loss"]) > 1e-5, "flipping should change the result"


def test_a_second_run_uses_the_cached_logits(folder, tested, monkeypatch):
    forbid_building(monkeypatch)
    done, result = analysed(folder)
    assert result == tested[1]
    assert done.stdout.splitlines()[:-1] == tested[0].splitlines()[:-1]
    with pytest.raises(AssertionError, match="is built"):
        run(folder, main_ens, "--no-cache")


@pytest.fixture(scope="module")
def held_out(folder):
    """Two checkpoints of one network with validation images, trained long enough for a useful temperature."""
    easy = ["--recipe", "baseline", "--flip", "0", "--crop-padding", "1", "--randaugment-ops", "0"]
    easy += [word for name in ("brightness", "contrast", "saturation", "hue") for word in (f"--{name}", "0")]
    easy += ["--epochs", "12", "--batch-size", "16", "--base-lr", "0.05", "--val-size", "100"]
    names = ("held-out", "held-out-seed1")
    for seed, name in enumerate(names):
        train(folder, mobilenetv2, *easy, "--name", name, "--seed", str(seed))
    return [f"checkpoints/{name}.pt" for name in names]


def test_subsets_and_cascade_equal_the_module(folder, tested):
    printed, result = tested
    whole = result["subsets"][-1]
    assert (len(result["subsets"]), whole["members"]) == (7, list(MEMBERS))
    assert (whole["accuracy"], whole["loss"]) == (result["ensemble"]["accuracy"], result["ensemble"]["loss"])
    for name in ("milliseconds", "multiply_adds"):
        assert whole[name] == pytest.approx(sum(member[name] for member in result["members"]))
        assert whole[name] > 0
    assert result["cascade_threshold"] == {"value": 0.9, "chosen_by": "constant"}
    [row] = [row for row in result["cascade"] if row["threshold"] == 0.9]
    test, paths = digits(), [folder / "checkpoints" / f"{name}.pt" for name in MEMBERS]
    probs = members.load(paths, cascade=0.9)(torch.from_numpy(test.images)).numpy()
    assert row["loss"] == loss(probs, test.labels)
    assert f"cascade at 0.9 (default): {100 * row['accuracy']:.2f} %" in printed
    assert len(result["doubtful_labels"]) == 50


def test_validation_images_choose_the_threshold_of_the_cascade(folder, held_out):
    done, result = analysed(folder, *held_out)
    value = result["cascade_threshold"]["value"]
    assert result["cascade_threshold"] == {"value": value, "chosen_by": "validation", "num_images": 100}
    assert f"cascade at {value:g} (chosen on 100 validation images)" in done.stdout
    assert analysed(folder, *held_out, "--temperature", "fit")[1]["cascade"] == []


def test_two_seeds_of_one_network_with_a_temperature_fitted_on_validation_images(folder, held_out):
    done, result = analysed(folder, *held_out, "--temperature", "fit")
    temperature = result["temperature"]
    assert temperature["fitted_on"] == 100

    data = dataset.load("digits", image_size=16, train_size=200, test_size=100, val_size=100)
    contents = [(folder / path, checkpoint.read(folder / path)) for path in held_out]

    @torch.no_grad()
    def loss_with(factor, split):
        probs = members.build(contents, temperature=factor * temperature["value"])(torch.from_numpy(split.images))
        return metrics.negative_log_likelihood(probs, torch.from_numpy(split.labels))

    assert loss_with(1, data.val) < min(loss_with(0.97, data.val), loss_with(1.03, data.val))
    assert result["ensemble"]["loss"] == pytest.approx(loss_with(1, data.test), abs=1e-5)

    before, after = temperature["before"], temperature["after"]
    assert after == {name: result["ensemble"][name] for name in after}
    assert before["accuracy"] == after["accuracy"]
    assert f"the test loss from {before['loss']:.4f} to {after['loss']:.4f}" in done.stdout
    assert "fitted on 100 validation images" in done.stdout

    [group] = result["by_network"]
    accuracies = [100 * member["accuracy"] for member in result["members"]]
    assert (group["network"], group["members"]) == ("mobilenetv2", ["held-out", "held-out-seed1"])
    assert f"test accuracy {np.mean(accuracies):.2f} ± {np.std(accuracies, ddof=1):.2f} %" in done.stdout


def test_a_temperature_can_be_given(folder, tested):
    done, result = analysed(folder, "--temperature", "2")
    assert (result["temperature"]["value"], result["temperature"]["fitted_on"]) == (2, None)
    assert result["temperature"]["before"]["loss"] == tested[1]["ensemble"]["loss"]
    assert result["members"] == tested[1]["members"]
    assert "T = 2" in done.stdout


def test_fitting_without_common_validation_images_is_refused(folder, held_out):
    error = refused(folder, "--temperature", "fit")
    assert "checkpoints/densenet.pt has none" in error
    assert "--val-size" in error
    assert "--val-size: 0 in" in refused(folder, "checkpoints/densenet.pt", held_out[0], "--temperature", "fit")
    assert "--data digits replaces them" in refused(folder, *held_out, "--temperature", "fit", "--data", "digits")


def test_the_data_flag_tests_on_other_images(folder, tmp_path):
    names = [f"{split}/{label}/{n}.png" for split in ("train", "test") for label in range(10) for n in range(4)]
    write_folder(tmp_path, {name: random_png(seed, 16) for seed, name in enumerate(names)})
    _, result = analysed(folder, "--data", tmp_path)
    assert (result["data"], result["num_images"]) == (str(tmp_path), 40), "without the --test-size of the members"


def test_warnings_about_an_unfinished_member_and_one_trained_without_flips(folder, tmp_path):
    def change(content):
        content["finished"], content["recipe"]["flip"] = False, 0.0
        content["history"].pop()

    half = changed(folder / "checkpoints" / "resnext.pt", change, tmp_path / "half.pt")
    done, result = analysed(folder, half, "--tta", "flip")
    assert "half.pt is not finished, 1 of 2 epochs" in done.stderr
    assert f"warning: --tta flip: {half} was trained without flips (--flip 0)" in done.stderr
    assert result["ensemble"]["loss"] == pytest.approx(result["members"][0]["loss"], abs=1e-12)


def refused(folder, *flags):
    return command_line.refused(folder, main_ens, *flags)


def test_missing_checkpoint_names_its_script(folder, tmp_path):
    for name, script in (("densenet", "dense.py"), ("mobilenetv2", "mobilenetv2.py"), ("resnext", "resnext.py")):
        error = refused(folder, tmp_path / f"{name}.pt")
        assert str(tmp_path / f"{name}.pt") in error
        assert f"python {script}" in error
    assert "other.pt" in refused(folder, tmp_path / "other.pt")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data.update(digest="0" * 32), "images of the data set (digest): "),
        (lambda data: data.update(classes=["drei"]), "classes: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 in {}, drei in {}"),
        (lambda data: data.update(image_size=24), "image size: 16 in {}, 24 in {}"),
        (lambda data: data["split"].update(split_seed=1), "--split-seed: 0 in {}, 1 in {}"),
        (lambda data: data["split"].update(test_size=20), "--test-size: 100 in {}, 20 in {}"),
        (lambda data: data["split"].update(test_split=0.5), "--test-split: 0.2 in {}, 0.5 in {}"),
    ],
)
def test_members_with_different_test_data_are_refused(folder, tmp_path, change, words):
    first, second = (folder / "checkpoints" / f"{name}.pt" for name in ("densenet", "resnext"))
    other = changed(second, lambda content: change(content["data"]), tmp_path / "other.pt")
    error = refused(folder, first, other)
    assert words.format(first, other) in error
    assert str(other) in error


def test_members_with_different_training_images_are_allowed(folder, tmp_path):
    first, second = (folder / "checkpoints" / f"{name}.pt" for name in ("densenet", "resnext"))
    change = {"val_size": 20, "train_size": 30}
    other = changed(second, lambda content: content["data"]["split"].update(change), tmp_path / "other.pt")
    succeeded(folder, main_ens, first, other, "--plot-dir", tmp_path)
    assert f"--val-size: 20 in {other}, 0 in {first}" in refused(folder, other, first, "--temperature", "fit")


def test_a_folder_of_checkpoints_and_missing_default_checkpoints(folder, tmp_path):
    for name in ("mobilenetv2", "resnext"):
        shutil.copy(folder / "checkpoints" / f"{name}.pt", tmp_path)
    by_folder = run(folder, main_ens, tmp_path, "--plot-dir", tmp_path)
    by_default = run(folder, main_ens, "--checkpoint-dir", tmp_path, "--plot-dir", tmp_path)
    assert by_folder.stdout == by_default.stdout
    assert "without resnext:" in by_folder.stdout
    assert by_default.stderr == f"note: {tmp_path / 'densenet.pt'} is missing; python dense.py trains it\n"
    (tmp_path / "none").mkdir()
    assert "none: this folder has no checkpoints" in refused(folder, tmp_path / "none")
    assert f"{tmp_path / 'none'} has none of densenet.pt" in refused(folder, "--checkpoint-dir", tmp_path / "none")


def test_small_copies_work_like_their_checkpoints(folder, tmp_path):
    originals = [folder / "checkpoints" / f"{name}.pt" for name in MEMBERS]
    printed = succeeded(tmp_path, pretrained, *originals).stdout
    copies = [tmp_path / "pretrained" / path.name for path in originals]
    for path, copy in zip(originals, copies, strict=True):
        assert copy.stat().st_size < path.stat().st_size / 3
        assert hashlib.sha256(copy.read_bytes()).hexdigest() in printed
    images, cpu = torch.from_numpy(digits().images), torch.device("cpu")
    logits = {
        (which, precision): member_logits(members.read_all(paths), images, cpu, precision=precision, cached=False)[0]
        for which, paths in (("original", originals), ("copy", copies))
        for precision in ("float32", "bfloat16")
    }
    assert torch.equal(logits["copy", "bfloat16"], logits["original", "bfloat16"])
    assert 0 < (logits["copy", "float32"] - logits["original", "float32"]).abs().max() < 0.1
    assert "ensemble (softmax averaged)" in succeeded(tmp_path, main_ens, "pretrained").stdout

    init = ["--init", copies[2], "--epochs", "1", "--name", "tuned"]
    assert "starting from the weights of" in run(tmp_path, resnext, *DIGITS, *SIZES["resnext"], *init).stdout
    resumed = [*DIGITS, *SIZES["resnext"], "--checkpoint-dir", copies[2].parent, "--resume"]
    error = command_line.refused(tmp_path, resnext, *resumed)
    assert f"{copies[2]} has only the weights of a finished run" in error
    assert "already exists" in command_line.refused(tmp_path, pretrained, *originals)
    unfinished = changed(originals[0], lambda content: content.update(finished=False), tmp_path / "unfinished.pt")
    assert "is not finished" in command_line.refused(tmp_path, pretrained, unfinished)
    same_name = [originals[0], copies[0], "--output", "other"]
    assert "the same file name" in command_line.refused(tmp_path, pretrained, *same_name)
    (tmp_path / "checkpoints" / "tuned.pt").unlink()
    assert "(pretrained/ has trained ones)" in refused(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: content["data"].update(digest="0" * 32), "digits no longer holds the images that {} was"),
        (lambda content: content["data"].update(classes=["a"]), "--data digits has the classes 0, 1, 2, 3, "),
        (
            lambda content: content["data"].update(source="photos"),
            "{} was trained on this path, relative to the current folder of that run; give the",
        ),
        (lambda content: content["model"]["classifier.weight"].fill_(math.nan), "{}: its predictions are not finite"),
    ],
)
def test_changed_data_and_broken_weights_are_errors(folder, tmp_path, change, words):
    path = changed(folder / "checkpoints" / "resnext.pt", change, tmp_path / "changed.pt")
    assert words.format(path) in refused(folder, path)


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--batch-size", "0"], "--batch-size is 0; it must be 1 to 1,000,000"),
        (["--test-size", "7000"], "--test-size 7000"),
        (["checkpoints/resnext.pt", "checkpoints/../checkpoints/resnext.pt"], "resnext.pt: the checkpoint is given"),
        (["--temperature", "0"], "--temperature is 0; it must be 0.05 to 20"),
        (["--temperature", "warm"], "--temperature: found warm, expected fit or a number"),
        (["--data", "digits", "--data-url", "http://localhost"], "--data-url is for CIFAR, not for --data 'digits'"),
        (["--plot-dir", "/dev/null/plots"], "/dev/null/plots: the results could not be written"),
        (["--data", "nowhere"], "nowhere"),
    ],
)
def test_bad_flags(folder, flags, word):
    assert word in refused(folder, *flags)
