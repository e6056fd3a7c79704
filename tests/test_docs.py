"""README.md and docs/python.md: their code runs, and their commands train, test and export an ensemble."""

import json
import re
import shlex
import shutil
import textwrap

import numpy as np
import pytest
from command_line import SIZES, in_subprocess
from conftest import ROOT, assert_same
from PIL import Image

from dataset.image_folder import decode
from training import checkpoint

pytestmark = pytest.mark.slow

TEXT = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^( *)```python(?: title=(\S+))?\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
FLAGS = ["--data", "digits", "--image-size", "16", "--train-size", "200", "--epochs", "2", "--device", "cpu"]
STOPPED_AFTER_AN_EPOCH = """
import signal
from training import loop
run_epoch = loop.run_epoch

def run_and_stop(*arguments):
    is_finished = run_epoch(*arguments)
    signal.raise_signal(signal.SIGTERM)
    return is_finished

loop.run_epoch = run_and_stop
import mobilenetv2
assert mobilenetv2.main() == 143
raise SystemExit(0)
"""


def blocks():
    """The code blocks, each with the file to which it belongs, or ""."""
    return [(title, textwrap.dedent(code)) for _, title, code in BLOCK.findall(TEXT)]


def python(folder, *arguments):
    done = in_subprocess(folder, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def copied(tmp_path):
    """A copy of the project's Python files."""
    names = ["models", "common", "dataset", "training", "evaluation", "plotting", *(p.name for p in ROOT.glob("*.py"))]
    for name in names:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    return tmp_path


def test_the_code_runs(copied):
    code = "\n".join(code for title, code in blocks() if not title)
    printed = python(copied, "-c", code).splitlines()
    accuracy = next(line for line in printed if re.fullmatch(r"[01]\.\d+", line))
    assert float(accuracy) == checkpoint.read(copied / "checkpoints" / "mobilenetv2.pt")["history"][3]["test_accuracy"]
    assert float(accuracy) > 0.5, "the example should learn"
    assert printed[-1].startswith("['")
    assert checkpoint.read(copied / "checkpoints" / "mobilenetv2.pt")["finished"]
    assert (copied / "plots" / "mobilenetv2.png").read_bytes().startswith(b"\x89PNG")


def test_your_own_network_joins_the_ensemble_in_three_steps(copied):
    steps = [(title, code) for title, code in blocks() if title and title != "training/loop.py"]
    assert [title for title, _ in steps] == ["models/smallnet.py", "models/__init__.py", "smallnet.py"]
    for title, code in steps:
        before = (copied / title).read_text(encoding="utf-8") if title.endswith("__init__.py") else ""
        (copied / title).write_text(before + "\n" + code, encoding="utf-8")
    assert "smallnet (channels 16)" in python(copied, "smallnet.py", *FLAGS, "--channels", "16")
    python(copied, "mobilenetv2.py", *FLAGS, "--width", "0.25")
    said = python(copied, "main_ens.py", "checkpoints")
    assert "without smallnet:" in said


def test_another_optimizer_needs_one_line(copied):
    ((_, code),) = [block for block in blocks() if block[0] == "training/loop.py"]
    path = copied / "training" / "loop.py"
    text = path.read_text(encoding="utf-8")
    line = re.compile(r"^ +optimizer = .*\n", re.MULTILINE)
    assert len(line.findall(text)) == 1
    path.write_text(line.sub("    " + code.strip() + "\n", text), encoding="utf-8")
    flags = [*FLAGS, "--width", "0.25", "--base-lr", "0.002"]
    python(copied, "mobilenetv2.py", *flags)
    python(copied, "-c", STOPPED_AFTER_AN_EPOCH, *flags, "--name", "half")
    python(copied, "mobilenetv2.py", "--name", "half", "--resume")
    whole, half = (checkpoint.read(copied / "checkpoints" / f"{name}.pt") for name in ("mobilenetv2", "half"))
    assert set(whole["training"]["optimizer"][0]) == {"exp_avg", "exp_avg_sq", "step"}
    assert half["finished"]
    assert_same(half["model"], whole["model"])


# Number of training and test images by class: unbalanced, with names in several scripts.
CLASSES = {"café crème": (24, 6), "Äpfel": (15, 5), "猫": (9, 4)}


@pytest.fixture
def photos(tmp_path):
    """Images of about 48×48 pixels; each class has its own tint."""
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
    """The commands in the README's section about your own images."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## Your own images")[1]
    block = re.search(r"```\n(.*?)```", section, re.DOTALL)[1]
    return [shlex.split(line) for line in block.splitlines()]


def test_the_readmes_five_commands_export_an_ensemble(photos):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    lines = commands()
    assert len(lines) == 5
    for _, script, *flags in lines:
        if size := SIZES.get(script.removesuffix(".py")):
            flags += [*size, "--epochs", "15", "--base-lr", "0.05", "--image-size", "24", "--batch-size", "8"]
            flags += ["--device", "cpu"]
        python(photos, ROOT / script, *flags)

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
