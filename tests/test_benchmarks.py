"""The measuring scripts run, at a size that measures nothing, and write what they promise."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run(folder, script, *flags):
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / script), *map(str, flags)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"},
        capture_output=True,
        encoding="utf-8",
        timeout=300,
        check=False,
    )


def test_augment(tmp_path):
    small = ["--data", "digits", "--image-size", 16, "--images", 64, "--rounds", 1]
    done = run(tmp_path, "augment.py", *small, "--output", "a.json")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "a.json").read_text())
    assert {"device", "versions", "commit", "command", "images_per_second", "ratio"} <= result.keys()
    rates = result["images_per_second"]
    assert result["ratio"] == rates["ours"] / rates["torchvision"]
    assert 0 < result["mobilenetv2_share"] < 1
    assert f"{rates['ours']:,.0f}" in done.stdout


def test_augment_names_data_that_is_not_there(tmp_path):
    done = run(tmp_path, "augment.py", "--data", "nowhere", "--output", "a.json")
    assert done.returncode == 2
    assert "nowhere" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_memory(tmp_path):
    done = run(tmp_path, "memory.py", "--rounds", 1, "--steps", 1, "--networks", "mobilenetv2", "--output", "m.json")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "m.json").read_text())
    network = result["networks"]["mobilenetv2"]
    assert network["ratio"] == network["images_per_second"]["kept"] / network["images_per_second"]["given_back"]
