"""export.py: one file that gives PyTorch's probabilities and says what they mean."""

import dataclasses
import json
import sys

from common.errors import UserError

import numpy as np
import pytest
import torch

import export
import models.ensemble
from dataset import cifar10
from evaluation import members
from models.mobilenetv2 import mobilenetv2
from training import checkpoint, loop
from utils import MEAN, STD

CLASSES = ["red", "grün", "blue"]


@pytest.fixture
def paths(tiny, tiny_recipe, tiny_data):
    """Checkpoints of two members that are sure of themselves, each in its own way."""
    for seed in range(2):
        recipe = tiny_recipe(name=f"tiny{seed}", epochs=1, seed=seed)
        loop.fit(tiny(), tiny_data(seed=seed), recipe)
        content = checkpoint.read(recipe.checkpoint_path)
        content["model"]["classifier.weight"] *= 20
        content["data"]["classes"] = CLASSES
        checkpoint.write(recipe.checkpoint_path, content)
    return [tiny_recipe(name=f"tiny{seed}").checkpoint_path for seed in range(2)]


@pytest.fixture
@torch.no_grad()
def mobilenet():
    """An ensemble of one small MobileNetV2, untrained, but with norms that know their inputs and with clear answers."""
    torch.manual_seed(0)
    network = mobilenetv2(10, width=0.25)
    ensemble = models.ensemble.Ensemble([models.ensemble.Member(network, MEAN, STD)], list("0123456789"), 16)
    images = torch.from_numpy(some_images(32, 16))
    for _ in range(30):
        ensemble(images)
    ensemble.eval()
    network.classifier.weight *= 100
    network.classifier.bias -= ensemble.logits(images)[0].mean(0)
    return ensemble


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Call export.py's main in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def main(*flags):
        monkeypatch.setattr(sys, "argv", ["export.py", *map(str, flags)])
        return export.main()

    return main


@pytest.fixture
def broken(monkeypatch):
    """Make what the pt2 file gives wrong by a number."""

    def add(error):
        read = export.FORMATS["pt2"].read
        wrong = dataclasses.replace(
            export.FORMATS["pt2"], read=lambda content: lambda images: read(content)(images) + error
        )
        monkeypatch.setitem(export.FORMATS, "pt2", wrong)

    return add


def some_images(count, size=8):
    """Noise, of another tint in each image."""
    rng = np.random.default_rng(count)
    return (rng.integers(0, 256, (count, 3, size, size)) * rng.random((count, 3, 1, 1))).astype(np.uint8)


def opened(path):
    """What a file gives for images and says of itself, in the ways that export.py's first lines tell."""
    if path.suffix == ".onnx":
        session = pytest.importorskip("onnxruntime").InferenceSession(str(path))
        return lambda images: session.run(None, {"images": images})[0], session.get_modelmeta().custom_metadata_map
    metadata = dict.fromkeys(("format", "version", "classes", "image_size", "average", "temperature", "members"), "")
    network = torch.export.load(str(path), extra_files=metadata).module()
    return lambda images: network(torch.from_numpy(images)).numpy(), metadata


def skip_without_packages(file_format):
    for package in export.FORMATS[file_format].packages:
        pytest.importorskip(package)


@pytest.mark.parametrize(
    ("file", "average", "temperature"),
    [("a.onnx", "softmax", 1.0), ("b.onnx", "logits", 2.5), ("c.pt2", "softmax", 0.5), ("d.pt2", "logits", 1.0)],
)
def test_a_file_gives_the_ensembles_probabilities_and_says_what_it_is(paths, run, capsys, file, average, temperature):
    skip_without_packages(file.partition(".")[2])
    chosen = ["--average", average, "--temperature", temperature, "--data", "digits", "--images", 70]
    assert run(*paths, "--output", f"new/{file}", *chosen) == 0
    folder = paths[0].parents[1] / "new"
    assert [path.name for path in folder.iterdir()] == [file], "one file, nothing beside it"

    predict, metadata = opened(folder / file)
    ensemble = members.load(paths, average=average, temperature=temperature).requires_grad_(False)
    for count in (1, 2, 7):
        probs = predict(some_images(count))
        expected = ensemble(torch.from_numpy(some_images(count))).numpy()
        assert (probs.dtype, probs.shape) == (np.float32, (count, 3))
        np.testing.assert_allclose(probs, expected, rtol=0, atol=1e-6)
    assert probs.std(0).max() > 0.05, "the output ought to depend on the image"

    assert json.loads(metadata["classes"]) == CLASSES
    assert json.loads(metadata["members"]) == ["tiny0", "tiny1"]
    assert (metadata["image_size"], metadata["average"], float(metadata["temperature"])) == ("8", average, temperature)
    assert (metadata["format"], metadata["version"]) == (export.NAME, "1")

    printed = capsys.readouterr().out
    size = (folder / file).stat().st_size / 1e6
    assert f"new/{file}: tiny0, tiny1 ({average} averaged), {size:.1f} MB" in printed
    assert "on 70 test images of digits" in printed
    assert printed.count("images/s") == 2


@pytest.mark.parametrize("file_format", export.FORMATS)
def test_a_real_network(mobilenet, file_format):
    skip_without_packages(file_format)
    predict = export.FORMATS[file_format].read(export.FORMATS[file_format].write(mobilenet, {}))
    with torch.inference_mode():
        for count in (1, 2, 7):
            images = torch.from_numpy(some_images(count, 16))
            expected = mobilenet(images)
            torch.testing.assert_close(predict(images), expected, rtol=0, atol=1e-5)
    assert expected.std(0).max() > 0.05, "the output ought to depend on the image"


def test_to_compare_a_file_it_downloads_nothing(paths, run, capsys, monkeypatch):
    content = checkpoint.read(paths[0])
    content["data"]["source"] = "cifar10"
    checkpoint.write(paths[0], content)
    monkeypatch.setattr(cifar10, "download_archive", lambda *_: pytest.fail("it downloads"))
    assert run(paths[0], "--output", "a.pt2", "--images", 3) == 0
    assert "cifar-10-python.tar.gz: there is no such file" in capsys.readouterr().err


def test_the_default_checkpoints_and_one_alone(paths, run, capsys):
    with pytest.raises(UserError, match=r"densenet\.pt: there is no such checkpoint; python dense\.py makes it"):
        run("--output", "a.pt2")
    paths[0].rename(paths[0].with_name("densenet.pt"))
    with pytest.raises(UserError, match=r"python mobilenetv2\.py makes it"):
        run("--output", "a.pt2")
    assert run("checkpoints/densenet.pt", "--output", "a.model", "--format", "pt2", "--random", "--images", 1) == 0
    printed = capsys.readouterr().out
    assert "a.model: densenet, " in printed
    assert "on 1 random images" in printed
    with open("a.model", "rb") as file:
        network = torch.export.load(file).module()
    ensemble = members.load(["checkpoints/densenet.pt"])
    images = torch.from_numpy(some_images(5))
    torch.testing.assert_close(network(images), ensemble(images), rtol=0, atol=1e-6)


def test_without_the_training_images_it_takes_random_ones_and_says_so(paths, run, capsys):
    assert run(paths[0], "--output", "a.pt2", "--images", 3) == 0
    printed = capsys.readouterr()
    assert "warning: the file is compared on random images" in printed.err
    assert "made up" in printed.err, "the data that is not there"
    assert "on 3 random images" in printed.out
    with pytest.raises(UserError, match="nowhere"):
        run(paths[0], "--output", "b.pt2", "--data", "nowhere")


@pytest.mark.parametrize(("error", "words"), [(2e-4, r"by up to 2\.0e-04, more than 1e-04"), (np.nan, "by up to nan")])
def test_a_file_that_differs_is_refused_and_the_old_one_kept(paths, run, broken, tmp_path, error, words):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.pt2").write_bytes(b"old")
    broken(error)
    with pytest.raises(UserError, match=words):
        run(paths[0], "--output", "out/a.pt2", "--random", "--images", 2)
    assert [path.read_bytes() for path in (tmp_path / "out").iterdir()] == [b"old"]


def test_a_difference_within_the_tolerance_replaces_the_old_file(paths, run, broken, tmp_path):
    (tmp_path / "a.pt2").write_bytes(b"old")
    broken(5e-5)
    assert run(paths[0], "--output", "a.pt2", "--random", "--images", 2) == 0
    assert (tmp_path / "a.pt2").read_bytes() != b"old"


def test_broken_weights_are_named(paths, run):
    content = checkpoint.read(paths[1])
    content["model"]["classifier.weight"].fill_(3e38)  # finite, but too much for a sum
    checkpoint.write(paths[1], content)
    with pytest.raises(UserError, match=r"tiny1\.pt: its predictions are not finite"):
        run(*paths, "--output", "a.pt2", "--random")


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        (["onnxruntime"], "the format onnx needs the package onnxruntime: pip install onnxruntime"),
        (["onnx", "onnxscript"], "the format onnx needs the packages onnx, onnxscript: pip install onnx onnxscript"),
    ],
)
def test_missing_packages_are_named(run, monkeypatch, missing, words):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        monkeypatch.setitem(sys.modules, package, None if package in missing else sys)
    with pytest.raises(UserError) as error:
        run("--output", "a.onnx")
    assert str(error.value) == words


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--output", "a.bin"], r"--output a\.bin: its ending names no format; expected one of \.onnx, \.pt2"),
        (["--output", "a"], "its ending names no format"),
        (["--output", "a.pt2", "--temperature", "0"], "--temperature is 0"),
        (["--output", "a.pt2", "--temperature", "nan"], "--temperature is nan"),
        (["--output", "a.pt2", "--images", "0"], "--images is 0"),
    ],
)
def test_bad_flags(run, flags, words):
    with pytest.raises(UserError, match=words):
        run(*flags)


def test_a_folder_that_cannot_be_written_is_named_before_the_work(paths, run, monkeypatch, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setattr(torch.export, "export", None)
    with pytest.raises(UserError, match=r"file.*could not be written"):
        run(paths[0], "--output", "file/a.pt2", "--random")
