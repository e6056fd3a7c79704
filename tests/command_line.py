"""What the tests of main_ens.py, predict.py and export.py share: running scripts, changing checkpoints, NumPy."""

import contextlib
import io
import os
import subprocess
import sys
from types import SimpleNamespace
from unittest import mock

from common import errors

import numpy as np
import pytest
import torch

from evaluation import logits as logits_cache
from evaluation import members
from training import checkpoint
from utils import normalize

MEMBERS = ("densenet", "mobilenetv2", "resnext")
# Flags that make the networks small, by script.
SIZES = {"dense": ["--depth=37", "--growth-rate=4"], "mobilenetv2": ["--width=0.25"], "resnext": ["--base-width=2"]}


def run(folder, script, *flags, stdout=None):
    """Run a script's main in this process, with `folder` as the current folder."""
    out, err = stdout or io.TextIOWrapper(io.BytesIO(), encoding="utf-8"), io.StringIO()
    with (
        mock.patch.object(sys, "argv", [script.__name__, *map(str, flags)]),
        contextlib.chdir(folder),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as end,
    ):
        errors.run(script.main)
    out.flush()
    printed = "" if stdout else out.buffer.getvalue().decode("utf-8")
    return SimpleNamespace(returncode=end.value.code, stdout=printed, stderr=err.getvalue())


def in_subprocess(folder, *command):
    """Run Python in a subprocess, with `folder` as the current folder and a time limit of ten minutes."""
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"},
        capture_output=True,
        encoding="utf-8",
        timeout=600,
        check=False,
    )


def succeeded(folder, script, *flags):
    """Run a script that must exit with status 0."""
    done = run(folder, script, *flags)
    assert done.returncode == 0, done.stderr
    return done


def refused(folder, script, *flags):
    """Run a script that must exit with an error; return its stderr."""
    done = run(folder, script, *flags)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
    return done.stderr


def changed(path, change, to=None):
    """Change the content of a checkpoint, in place or in the copy `to`; return its path."""
    content = checkpoint.read(path)
    change(content)
    checkpoint.write(to or path, content)
    return to or path


def overflow(content):
    """Set weights that are finite, but whose sums overflow."""
    content["model"]["classifier.weight"].fill_(3e38)


def forbid_building(monkeypatch):
    """From now on, computing logits instead of reading them from the cache is an error."""

    def build(path, content):
        raise AssertionError(f"{path} is built")

    monkeypatch.setattr(logits_cache, "build_member", build)


@torch.no_grad()
def numpy_logits(folder, images, names=MEMBERS):
    """The logits of each member, (M, N, C), computed without evaluation/logits.py and models/ensemble.py."""
    logits = []
    for name in names:
        path = folder / "checkpoints" / f"{name}.pt"
        model = members.build_member(path, checkpoint.read(path)).network
        logits.append(model(normalize(torch.from_numpy(images))).double().numpy())
    return np.stack(logits)


def softmax(logits):
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)
