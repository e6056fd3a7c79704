"""Train the tiny network in float64, in one or several processes: tiny_run.py FOLDER CHANGES [FAULT].

CHANGES are fields of the recipe, as JSON. FAULT is "RANK:STEP": at this step, the process with this rank kills itself,
once.
"""

import contextlib
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from multiprocessing.context import BaseContext
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import distributed, errors

from conftest import Tiny, at_call, tiny_images, tiny_network, tiny_recipe_in

from models import NETWORKS
from training import checkpoint, loop


class Double(Tiny):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(images.double())


def main(argv: list[str] | None = None) -> int:
    folder, changes, *fault = argv or sys.argv[1:]
    folder = Path(folder)
    recipe = tiny_recipe_in(folder, **json.loads(changes))
    NETWORKS["tiny"] = Double
    torch.set_num_threads(1)
    rank = os.environ.get("RANK", "0")
    with distributed.processes(recipe.device), checkpoint.previous_run(recipe) as previous:
        model = tiny_network().double()
        model.__class__ = Double
        if fault and fault[0].split(":")[0] == rank:
            model.on_forward = at_call(int(fault[0].split(":")[1]) - 1, lambda _: kill_once(folder / "killed"))
        run = loop.fit(model, tiny_images(), recipe, previous)
        if run.stopped_by is None:
            torch.save({"model": run.eval_model.state_dict(), "history": run.history}, folder / f"rank{rank}.pt")
    return run.exit_status


def kill_once(marker: Path) -> None:
    if not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)


def as_one_of(environment: dict[str, str], argv: list[str], log: str) -> None:
    """Run `main` in a process that was started without torchrun, with its output in a file."""
    os.environ.update(environment)
    sys.stdout = sys.stderr = open(log, "w", encoding="utf-8", buffering=1)  # noqa: SIM115 (catches tracebacks too)
    errors.run(lambda: main(argv))


@contextlib.contextmanager
def forkserver(*modules: str) -> Iterator[BaseContext]:
    """Start processes that have already imported these modules, because importing PyTorch takes seconds."""
    context = multiprocessing.get_context("forkserver")
    folders = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    context.set_forkserver_preload([*modules])
    with mock.patch.dict(os.environ, PYTHONPATH=folders):
        yield context


if __name__ == "__main__":
    errors.run(main)
