"""Imports: common comes before torch, because it would have no effect later; and imports run one way."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = ("dense", "mobilenetv2", "resnext", "main_ens", "predict", "export")
# The search for torch ends the process, which prints the environment at that moment.
UNTIL_TORCH = """
import os, sys
class Finder:
    def find_spec(self, name, *_):
        if name == "torch":
            sys.exit(os.environ.get("GOMP_SPINCOUNT", "not set"))
sys.meta_path.insert(0, Finder())
import """


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    ("settings", "expected"),
    [({}, "4000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "not set")],
    ids=["default", "user's count", "user's policy"],
)
def test_the_spin_count_is_set_before_torch_is_loaded(script, settings, expected):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("GOMP", "OMP"))}
    done = subprocess.run(
        [sys.executable, "-c", UNTIL_TORCH + script], env=environment | settings, cwd=Path(__file__).parents[1],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stderr.strip() == expected


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("dataset", ("torch", "torchvision", "training")),
        ("models", ("common", "dataset", "training", "evaluation", "plotting", "utils")),
        ("utils", ("training", "evaluation", "plotting")),
        ("training.loop", ("evaluation", "plotting", "matplotlib")),
        ("predict", ("plotting", "matplotlib")),
        ("dense", ("evaluation", "plotting", "matplotlib")),  # only the main process draws, and imports it then
    ],
)
def test_imports_run_one_way(module, absent):
    code = f"import sys, {module}; print(sorted({{name.split('.')[0] for name in sys.modules}} & set({absent})))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
