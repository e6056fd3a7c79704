"""The README's five commands, from a folder of photos to a tested, exported ensemble."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset.image_folder import decode

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
# Images of each class in train and test: unbalanced, with names in several alphabets.
CLASSES = {"café crème": (24, 6), "Äpfel": (15, 5), "猫": (9, 4)}
SIZES = {
    "dense.py": ["--depth", "37", "--growth-rate", "4"],
    "mobilenetv2.py": ["--width", "0.25"],
    "resnext.py": ["--base-width", "2"],
}


@pytest.fixture
def photos(tmp_path):
    """Pictures of about 48×48 pixels; each class has a tint."""
    rng = np.random.default_rng(0)
    for number, (name, sizes) in enumerate(CLASSES.items()):
        for split, count in zip(("train", "test"), sizes, strict=True):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for image in range(count):
                pixels = rng.integers(0, 120, (48, 48 + image % 3, 3), np.uint8)
                pixels[:, :, number] += 130
                Image.fromarray(pixels).save(folder / f"{image}.{('jpg', 'png')[image % 2]}")
    return tmp_path


def commands():
    """The commands of the README's section."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## Your own images")[1]
    block = re.search(r"```\n(.*?)```", section, re.DOTALL)[1]
    return [shlex.split(line) for line in block.splitlines()]


def test_the_readmes_five_commands_lead_to_an_exported_ensemble(photos, start):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    lines = commands()
    assert len(lines) == 5
    for _, script, *flags in lines:
        if script in SIZES:
            flags += [*SIZES[script], "--epochs", "15", "--base-lr", "0.05", "--image-size", "24", "--batch-size", "8"]
            flags += ["--device", "cpu"]
        process = start(photos, script, *flags)
        _, errors = process.communicate()
        assert process.returncode == 0, errors

    result = json.loads((photos / "plots" / "ensemble.json").read_text(encoding="utf-8"))
    assert result["num_images"] == 15
    assert result["ensemble"]["accuracy"] > 0.8, "a class's tint is easily learned"
    for name in ("ensemble", "reliability", "mistakes", "densenet", "mobilenetv2", "resnext"):
        assert (photos / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")

    session = onnxruntime.InferenceSession(photos / "photos.onnx")
    classes = json.loads(session.get_modelmeta().custom_metadata_map["classes"])
    assert sorted(classes) == sorted(CLASSES)
    paths = sorted((photos / "photos" / "test").rglob("*.*"))
    images = np.stack([decode(path, 24)[0] for path in paths])
    (probs,) = session.run(None, {"images": images})
    right = [classes[label] == path.parent.name for label, path in zip(probs.argmax(1), paths, strict=True)]
    assert np.mean(right) > 0.8
