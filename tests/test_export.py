"""export.py: the exported file has PyTorch's probabilities and the right metadata."""

import dataclasses
import json
import sys

import numpy as np
import pytest
import torch
from command_line import changed, overflow, refused, succeeded

import dataset
import export
from dataset import cifar10
from evaluation import members

CLASSES = ["red", "grün", "blue"]


@pytest.fixture
def paths(train, tiny_data, tmp_path):
    """Checkpoints of two different members with confident predictions."""

    def change(content):
        content["model"]["classifier.weight"] *= 20
        content["data"]["classes"] = CLASSES

    for seed in range(2):
        train(tiny_data(seed=seed), name=f"tiny{seed}", epochs=1, seed=seed)
    return [changed(path, change) for path in sorted((tmp_path / "checkpoints").glob("*.pt"))]


def some_images(count):
    """Noise with a different tint in each image."""
    rng = np.random.default_rng(count)
    return (rng.integers(0, 256, (count, 3, 8, 8)) * rng.random((count, 3, 1, 1))).astype(np.uint8)


def opened(path):
    """The prediction function and the metadata of a file, read as the docstring of export.py shows it."""
    if path.suffix == ".onnx":
        session = pytest.importorskip("onnxruntime").InferenceSession(str(path))
        return lambda images: session.run(None, {"images": images})[0], session.get_modelmeta().custom_metadata_map
    metadata = dict.fromkeys(("format", "version", "classes", "image_size", "average", "temperature", "members"), "")
    network = torch.export.load(str(path), extra_files=metadata).module()
    return lambda images: network(torch.from_numpy(images)).numpy(), metadata


@pytest.mark.parametrize(
    ("file", "average", "temperature"),
    [("a.onnx", "softmax", 1.0), ("b.onnx", "logits", 2.5), ("c.pt2", "softmax", 0.5), ("d.pt2", "logits", 1.0)],
)
def test_an_exported_file_has_the_ensembles_probabilities_and_metadata(paths, tmp_path, file, average, temperature):
    for package in export.FORMATS[file.partition(".")[2]].packages:
        pytest.importorskip(package)
    chosen = ["--average", average, "--temperature", temperature, "--data", "digits", "--images", 70]
    printed = succeeded(tmp_path, export, *paths, "--output", f"new/{file}", *chosen).stdout
    folder = tmp_path / "new"
    assert [path.name for path in folder.iterdir()] == [file], "only one file"

    predict, metadata = opened(folder / file)
    ensemble = members.load(paths, average=average, temperature=temperature).requires_grad_(False)
    for count in (1, 2, 7):
        probs = predict(some_images(count))
        expected = ensemble(torch.from_numpy(some_images(count))).numpy()
        assert (probs.dtype, probs.shape) == (np.float32, (count, 3))
        np.testing.assert_allclose(probs, expected, rtol=0, atol=1e-6)
    assert probs.std(0).max() > 0.05, "the output should depend on the image"

    assert json.loads(metadata["classes"]) == CLASSES
    assert json.loads(metadata["members"]) == ["tiny0", "tiny1"]
    assert (metadata["image_size"], metadata["average"], float(metadata["temperature"])) == ("8", average, temperature)
    assert (metadata["format"], metadata["version"]) == (export.NAME, "1")

    size = (folder / file).stat().st_size / 1e6
    assert f"new/{file}: tiny0, tiny1 ({average} averaged), {size:.1f} MB" in printed
    assert "on 70 test images of digits" in printed


def test_a_single_network(paths, tmp_path):
    done = succeeded(tmp_path, export, paths[0], "--output", "a.model", "--format", "pt2", "--random", "--images", 1)
    assert "a.model: tiny0, " in done.stdout
    assert "on 1 random images" in done.stdout
    with open(tmp_path / "a.model", "rb") as file:
        network = torch.export.load(file).module()
    images = torch.from_numpy(some_images(5))
    torch.testing.assert_close(network(images), members.load(paths[:1])(images), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("source", "reason"), [("made up", "made up"), ("cifar10", "cifar-10-python.tar.gz: there is no such file")]
)
def test_without_the_data_set_random_images_are_used_with_a_warning(paths, tmp_path, monkeypatch, source, reason):
    monkeypatch.setattr(cifar10, "download_archive", lambda *_: pytest.fail("it downloads"))
    changed(paths[0], lambda content: content["data"].update(source=source))
    done = succeeded(tmp_path, export, paths[0], "--output", "a.pt2", "--images", 3)
    assert "warning: comparing on random images" in done.stderr
    assert reason in done.stderr
    assert "on 3 random images" in done.stdout


def test_a_source_without_test_images_is_split_as_the_member_was(paths, tmp_path):
    split = {"split_seed": 3, "test_split": 0.4}
    changed(paths[0], lambda content: content["data"].update(source="digits", split=content["data"]["split"] | split))
    done = succeeded(tmp_path, export, paths[0], "--output", "a.pt2", "--images", 2000)
    expected = len(dataset.load("digits", image_size=8, **split).test)
    assert f"on {expected} test images of digits" in done.stdout


@pytest.mark.parametrize(
    ("error", "words"),
    [(5e-5, ""), (2e-4, "by up to 2.0e-04, more than 1e-04"), (np.nan, "by up to nan, more than 1e-04")],
)
def test_a_file_with_different_probabilities_is_not_written(paths, tmp_path, monkeypatch, error, words):
    pt2 = export.FORMATS["pt2"]
    wrong = dataclasses.replace(pt2, read=lambda content: lambda images: pt2.read(content)(images) + error)
    monkeypatch.setitem(export.FORMATS, "pt2", wrong)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.pt2").write_bytes(b"old")
    flags = [paths[0], "--output", "out/a.pt2", "--random", "--images", 2]
    if words:
        assert words in refused(tmp_path, export, *flags)
    else:
        succeeded(tmp_path, export, *flags)
    assert [path.read_bytes() == b"old" for path in (tmp_path / "out").iterdir()] == [words != ""]


def test_missing_packages_are_an_error(tmp_path, monkeypatch):
    for package, found in (("onnx", None), ("onnxscript", None), ("onnxruntime", sys)):
        monkeypatch.setitem(sys.modules, package, found)
    error = refused(tmp_path, export, "--output", "a.onnx")
    assert error == "error: the format onnx needs the packages onnx, onnxscript: pip install onnx onnxscript\n"


def test_packages_that_are_too_old_are_an_error(paths, tmp_path, monkeypatch):
    def write(*_):
        raise ModuleNotFoundError("No module named 'onnxscript.torch_2_11'")

    monkeypatch.setitem(export.FORMATS, "onnx", dataclasses.replace(export.FORMATS["onnx"], write=write))
    error = refused(tmp_path, export, paths[0], "--output", "a.onnx", "--random")
    assert "No module named 'onnxscript.torch_2_11'" in error
    assert error.endswith(": pip install --upgrade onnx onnxscript onnxruntime\n")
    assert not (tmp_path / "a.onnx").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--random"], "--output is missing"),
        (["--outptu", "a.pt2"], "there is no flag --outptu; did you mean --output?"),
        (["--output", "a.bin"], "--output a.bin: unknown extension; expected one of .onnx, .pt2"),
        (["--output", "a.pt2", "--images", "0"], "--images is 0"),
        (["--output", "a.pt2", "--data", "nowhere"], "nowhere"),
        (["--output", "file/a.pt2", "--random"], "file: the file could not be written"),
        (
            ["--output", "checkpoints/tiny0.pt", "--format", "pt2"],
            "tiny0.pt exists and is no .onnx or .pt2 file",
        ),
        (["checkpoints/broken.pt", "--output", "a.pt2", "--random"], "broken.pt: its predictions are not finite"),
    ],
)
def test_mistakes_are_errors_before_the_export(paths, tmp_path, monkeypatch, flags, words):
    (tmp_path / "file").write_bytes(b"")
    changed(paths[1], overflow, tmp_path / "checkpoints" / "broken.pt")
    monkeypatch.setattr(torch.export, "export", None)
    assert words in refused(tmp_path, export, paths[0], *flags)
