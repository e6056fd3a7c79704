"""The members of an ensemble: checkpoints read, checked to go together, and built.

>>> from evaluation import members
>>> ensemble = members.load(["checkpoints/densenet.pt", "checkpoints/resnext.pt"])
>>> probs = ensemble(images)  # uint8 (B, 3, H, W) in, float32 (B, classes) out
>>> names = [ensemble.classes[number] for number in probs.argmax(1)]
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.device import DEVICES, PRECISIONS
from common.errors import UserError

import torch
from torch import Tensor, nn

from models import NETWORKS
from models.ensemble import AVERAGES, Ensemble, Member
from training import checkpoint
from training.recipe import PRECISION_HELP
from utils import multiply_adds

TEMPERATURES = (0.05, 20.0)  # outside, the softmax is practically one-hot or uniform
# The default members, and the scripts that make them.
SCRIPTS = {"densenet.pt": "dense.py", "mobilenetv2.pt": "mobilenetv2.py", "resnext.pt": "resnext.py"}

Contents = Sequence[tuple[Path, dict[str, Any]]]  # of checkpoints, each with its path


def load(
    paths: Sequence[str | Path], *, average: str = "softmax", temperature: float = 1.0, cascade: float | None = None
) -> Ensemble:
    """The ensemble of one or more checkpoints, on the CPU, in evaluation mode.

    With `cascade`, a threshold, its members come from the cheapest on, and only unsure images go on to the next.

    Raises UserError for a checkpoint that is missing, unusable or given twice, for members of other classes or another
    image size than the first, and for a threshold outside 0 to 1 or a cascade of one member.
    """
    contents = read_all(paths)
    if cascade is not None:
        contents = in_cascade(contents, cascade)
    return build(contents, average=average, temperature=temperature, cascade=cascade)


def read_all(paths: Sequence[str | Path]) -> Contents:
    """Read checkpoints that can be averaged; one whose training is not finished gets a warning on stderr.

    Raises UserError for none, for one that is missing, unusable or given twice, and for other classes or another image
    size than the first's.
    """
    if not paths:
        raise UserError("an ensemble needs one checkpoint or more; none is given")
    paths = [Path(path) for path in paths]
    if len({path.resolve() for path in paths}) < len(paths):
        raise UserError("a checkpoint is given twice; it would count twice in the average")
    contents = []
    for path in paths:
        if not os.path.exists(path):
            script = f"python {SCRIPTS[path.name]} makes it" if path.name in SCRIPTS else "give one that is there"
            raise UserError(f"{path}: there is no such checkpoint; {script}")
        content = checkpoint.read(path)
        if not content["finished"]:
            done, epochs = content["training"]["epoch"], content["recipe"]["epochs"]
            print(
                f"warning: {path} is not finished, {done} of {epochs} epochs; it is used as it stands", file=sys.stderr
            )
        contents.append((path, content))
    data = {"classes": "classes", "image size": "image_size"}
    check_same(contents, [(name, lambda own, key=key: own["data"][key]) for name, key in data.items()])
    return contents


def check_same(contents: Contents, properties: Sequence[tuple[str, Any]]) -> None:
    """Raise UserError if a checkpoint differs from the first in a property, given as (name, function of content)."""
    (first_path, first), *others = contents
    for path, content in others:
        if differences := [
            f"{name}: {shown(of(first))} in {first_path}, {shown(of(content))} in {path}"
            for name, of in properties
            if of(first) != of(content)
        ]:
            raise UserError("these checkpoints cannot be averaged:\n  " + "\n  ".join(differences))


def shown(value: Any) -> str:
    return ", ".join(value) if isinstance(value, list) else str(value)


def names(paths: Sequence[Path]) -> list[str]:
    """The members' names: file names without their ending, or whole paths where two would be the same."""
    stems = [path.stem for path in paths]
    return stems if len(set(stems)) == len(stems) else [str(path) for path in paths]


def in_cascade(contents: Contents, threshold: float) -> Contents:
    """The members of a cascade, from the cheapest on. Raises UserError where they, or its threshold, make none."""
    if not 0 <= threshold <= 1:
        raise UserError(f"the threshold of the cascade is {threshold:g}; it must be 0 to 1")
    if len(contents) < 2:
        raise UserError(f"a cascade needs two members or more; there is {contents[0][0]} alone")
    return sorted(contents, key=lambda pair: cost(*pair))


def cost(path: Path, content: dict[str, Any]) -> int:
    """Multiply-adds of one image."""
    return multiply_adds(build_member(path, content).network, content["data"]["image_size"])


def build(
    contents: Contents, *, average: str = "softmax", temperature: float = 1.0, cascade: float | None = None
) -> Ensemble:
    """The ensemble of checkpoints that `read_all` has read. Raises UserError where weights do not fit their network."""
    members = [build_member(path, content) for path, content in contents]
    data = contents[0][1]["data"]
    ensemble = Ensemble(
        members, data["classes"], data["image_size"], average=average, temperature=temperature, cascade=cascade
    )
    return ensemble.to(memory_format=torch.channels_last).eval().requires_grad_(False)


def build_member(path: Path, content: dict[str, Any]) -> Member:
    """The network of one checkpoint, in evaluation mode. Raises UserError where its weights do not fit."""
    network, data = content["network"], content["data"]
    with checkpoint.usable(path):
        if network["name"] not in NETWORKS:
            raise UserError(f"{path}: holds a network named {network['name']!r}; known are {', '.join(NETWORKS)}")
        model: nn.Module = NETWORKS[network["name"]](**network["arguments"])
        model.load_state_dict(dict(content["model"]))
        return Member(model, data["mean"], data["std"]).eval()


# ----------------------------------------------------------------------- the flags that main_ens, predict, export share


def add_flags(parser: argparse.ArgumentParser, *, checkpoints: str = "checkpoints", device: bool = True) -> None:
    parser.add_argument(
        checkpoints, nargs="*", type=Path, metavar="CHECKPOINT", default=[],
        help="the ensemble's members, or a folder of them (default: those of the three scripts in --checkpoint-dir)",
    )  # fmt: skip
    parser.add_argument("--checkpoint-dir", default="checkpoints", help="(default: checkpoints)")
    parser.add_argument("--average", choices=AVERAGES, default="softmax", help="what is averaged (default: softmax)")
    if device:
        parser.add_argument("--device", choices=DEVICES, default="auto", help="(default: auto)")
        parser.add_argument("--precision", choices=PRECISIONS, default="auto", help=f"{PRECISION_HELP} (default: auto)")


def paths_of(options: argparse.Namespace) -> list[Path]:
    """The checkpoints that are given, or those of the three scripts that --checkpoint-dir holds.

    A folder that is given stands for the checkpoints in it. Raises UserError where there is no checkpoint.
    """
    if options.checkpoints:
        return [path for given in options.checkpoints for path in in_folder(given)]
    folder = Path(options.checkpoint_dir)
    there = [folder / name for name in SCRIPTS if (folder / name).exists()]
    if not there:
        raise UserError(
            f"{folder.absolute()} has none of {', '.join(SCRIPTS)}; train one, for instance by python dense.py, or "
            "name checkpoints or another --checkpoint-dir"
        )
    for name, script in SCRIPTS.items():
        if folder / name not in there:
            print(f"note: without {folder / name}, which python {script} makes", file=sys.stderr)
    return there


def in_folder(path: Path) -> list[Path]:
    """The checkpoints in a folder; what is no folder stays as it is."""
    if not path.is_dir():
        return [path]
    if found := sorted(path.glob("*.pt")):
        return found
    raise UserError(f"{path}: this folder has no checkpoints (*.pt)")


def check_finite(path: Path, logits: Tensor) -> None:
    """Raise UserError, naming the checkpoint, where its logits are not finite."""
    if not logits.isfinite().all():
        raise UserError(f"{path}: its predictions are not finite; train it again with a lower --base-lr")


def check_temperature(value: float) -> None:
    """Raises UserError for a --temperature outside `TEMPERATURES`."""
    low, high = TEMPERATURES
    if not low <= value <= high:
        raise UserError(f"--temperature is {value:g}; it must be {low:g} to {high:g}")
