"""What docs/python.md says, done: its code runs, its network joins the ensemble, its optimizer trains."""

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from conftest import assert_same

from training import checkpoint

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^( *)```python(?: title=(\S+))?\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
FLAGS = ["--data", "digits", "--image-size", "16", "--train-size", "200", "--epochs", "2", "--device", "cpu"]

pytestmark = pytest.mark.slow
STOPPED_AFTER_AN_EPOCH = """
import signal
from training import loop
finish = loop.finish_epoch

def finish_and_stop(*arguments):
    finish(*arguments)
    signal.raise_signal(signal.SIGTERM)

loop.finish_epoch = finish_and_stop
import mobilenetv2
assert mobilenetv2.main() == 143
raise SystemExit(0)
"""


def blocks():
    """The code blocks, each with the file that it is for, or ""."""
    return [(title, textwrap.dedent(code)) for _, title, code in BLOCK.findall(TEXT)]


def python(folder, *arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1", "PYTHONPATH": str(folder)}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def copied(tmp_path):
    """A copy of the project, without what is not its own."""
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
    assert float(accuracy) > 0.5, "the example ought to learn"
    assert printed[-1].startswith("['")
    assert checkpoint.read(copied / "checkpoints" / "mobilenetv2.pt")["finished"]
    assert (copied / "plots" / "mobilenetv2.png").read_bytes().startswith(b"\x89PNG")


def test_a_network_of_ones_own_joins_the_ensemble_in_three_steps(copied):
    steps = [(title, code) for title, code in blocks() if title and title != "training/loop.py"]
    assert [title for title, _ in steps] == ["models/smallnet.py", "models/__init__.py", "smallnet.py"]
    for title, code in steps:
        before = (copied / title).read_text(encoding="utf-8") if title.endswith("__init__.py") else ""
        (copied / title).write_text(before + "\n" + code, encoding="utf-8")
    assert "smallnet (channels 16)" in python(copied, "smallnet.py", *FLAGS, "--channels", "16")
    python(copied, "mobilenetv2.py", *FLAGS, "--width", "0.25")
    said = python(copied, "main_ens.py", "checkpoints")
    assert "without smallnet:" in said


def test_another_optimizer_is_one_line(copied):
    ((_, code),) = [block for block in blocks() if block[0] == "training/loop.py"]
    path = copied / "training" / "loop.py"
    text = path.read_text(encoding="utf-8")
    line = re.compile(r"^ +optimizer = torch\.optim\..*\n", re.MULTILINE)
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
