"""The members of an ensemble: read their checkpoints, check that they fit together, build the networks.

>>> from evaluation import members
>>> ensemble = members.load(["checkpoints/densenet.pt", "checkpoints/resnext.pt"])
>>> probs = ensemble(images)  # uint8 (B, 3, H, W) in, float32 (B, classes) out
>>> names = [ensemble.classes[number] for number in probs.argmax(1)]
"""

import argparse
import functools
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common.device import DEVICES, PRECISIONS
from common.errors import UserError

import torch
from torch import Tensor

from models import NETWORKS
from models.ensemble import AVERAGES, Ensemble, Member
from training import checkpoint
from training.recipe import PRECISION_HELP
from utils import multiply_adds

TEMPERATURES = (0.05, 20)  # outside this range, the softmax is practically one-hot or uniform
FIT = "fit"  # a value of main_ens.py's --temperature
# The default members, and the scripts that train them.
SCRIPTS = {"densenet.pt": "dense.py", "mobilenetv2.pt": "mobilenetv2.py", "resnext.pt": "resnext.py"}

Contents = Sequence[tuple[Path, dict[str, Any]]]  # the path of each checkpoint, and what `checkpoint.read` returned


def load(
    paths: Sequence[str | Path], *, average: str = "softmax", temperature: float = 1.0, cascade: float | None = None
) -> Ensemble:
    """Build the ensemble of one or more checkpoints, on the CPU, in evaluation mode.

    With `cascade`, a threshold, the members are sorted, the cheapest first, and run as a cascade (see `Ensemble`).

    Raises UserError if a checkpoint is missing, unusable or given twice, if the members differ in classes or image
    size, and for a cascade with fewer than two members or a threshold outside 0 to 1.
    """
    return build(read_all(paths, cascade), average=average, temperature=temperature, cascade=cascade)


def read_all(paths: Sequence[str | Path], cascade: float | None = None) -> Contents:
    """Read the checkpoints of an ensemble, sorted by cost for a cascade. Raises UserError as `load` does.

    Prints a warning on stderr if the training of a member is not finished.
    """
    if isinstance(paths, str | Path):
        paths = [paths]
    if not paths:
        raise UserError("an ensemble needs at least one checkpoint; none is given")
    paths = [Path(path) for path in paths]
    resolved = [path.resolve() for path in paths]
    if twice := [str(path) for path, file in zip(paths, resolved, strict=True) if resolved.count(file) > 1]:
        raise UserError(f"{twice[-1]}: the checkpoint is given twice; it would count twice in the average")
    contents = []
    for path in paths:
        if path.name in SCRIPTS and not path.exists():
            raise UserError(f"{path}: there is no such checkpoint; python {SCRIPTS[path.name]} trains it")
        content = checkpoint.read(path)
        if not content["finished"]:
            done = f"{len(content['history'])} of {content['recipe']['epochs']} epochs"
            print(f"warning: {path} is not finished, {done}; it is used anyway", file=sys.stderr)
        contents.append((path, content))
    check_same(contents, lambda data: {"classes": ", ".join(data["classes"]), "image size": data["image_size"]})
    if cascade is None:
        return contents
    check_range("the threshold of the cascade", cascade, 0, 1)
    if len(contents) < 2:
        raise UserError(f"a cascade needs at least two members; there is only {paths[0]}")
    return sorted(contents, key=lambda pair: count_multiply_adds(*pair))


def check_same(contents: Contents, properties: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Raise UserError if checkpoints differ in `properties`: a function from "data" to a dict of what must agree."""
    (first_path, first), *others = contents
    expected = properties(first["data"])
    for path, content in others:
        found = properties(content["data"])
        if different := [name for name in expected if expected[name] != found[name]]:
            lines = [f"\n  {name}: {expected[name]} in {first_path}, {found[name]} in {path}" for name in different]
            raise UserError(f"these checkpoints do not fit together:{''.join(lines)}")


def names(paths: Sequence[Path]) -> list[str]:
    """The names of the members: file names without extension, or the paths if two names would be equal."""
    stems = [path.stem for path in paths]
    return stems if len(set(stems)) == len(stems) else [str(path) for path in paths]


def count_multiply_adds(path: Path, content: dict[str, Any]) -> int:
    """Multiply-adds of a checkpoint's network for one image."""
    return multiply_adds(build_member(path, content).network, content["data"]["image_size"])


def build(contents: Contents, **averaging: Any) -> Ensemble:
    """Build the ensemble from what `read_all` returned; `averaging` are keyword arguments of `Ensemble`.

    Raises UserError if weights do not fit their network.
    """
    members = [build_member(path, content) for path, content in contents]
    data = contents[0][1]["data"]
    ensemble = Ensemble(members, data["classes"], data["image_size"], **averaging)
    return ensemble.to(memory_format=torch.channels_last).eval().requires_grad_(False)


def build_member(path: Path, content: dict[str, Any]) -> Member:
    """Build the network of one checkpoint, in evaluation mode.

    Raises UserError if its name is unknown or its weights do not fit.
    """
    with checkpoint.explain_unusable(path):
        name = content["network"]["name"]
        if name not in NETWORKS:
            raise UserError(f"{path} holds an unknown network, {name!r}; expected one of {', '.join(NETWORKS)}")
        network = NETWORKS[name](**content["network"]["arguments"])
        network.load_state_dict(dict(content["model"]))
        return Member(network, content["data"]["mean"], content["data"]["std"]).eval()


# ----------------------------------------------------------------------- the flags that main_ens, predict, export share


def add_flags(
    parser: argparse.ArgumentParser, *, checkpoints: str = "checkpoints", fit: bool = False, device: bool = True
) -> None:
    """Add the shared flags. `fit`: --temperature also takes `FIT`. `device`: with --device and --precision."""
    parser.add_argument(
        checkpoints, nargs="*", type=Path, metavar="CHECKPOINT", default=[],
        help="checkpoints of the members, or a folder of them (default: of the three scripts, in --checkpoint-dir)",
    )  # fmt: skip
    parser.add_argument("--checkpoint-dir", default="checkpoints", help="(default: checkpoints)")
    parser.add_argument("--average", choices=AVERAGES, default="softmax", help="what is averaged (default: softmax)")
    parser.add_argument(
        "--temperature", type=functools.partial(temperature_flag, fit=fit), default=1.0, metavar="T",
        help="above 1: less confident probabilities, below 1: more confident"
        f"{'; fit: fitted on the validation images' if fit else ''} (default: 1)",
    )  # fmt: skip
    if device:
        parser.add_argument("--device", choices=DEVICES, default="auto", help="(default: auto)")
        parser.add_argument("--precision", choices=PRECISIONS, default="auto", help=f"{PRECISION_HELP} (default: auto)")


def temperature_flag(text: str, *, fit: bool) -> float | str:
    """Parse the value of --temperature. Raises UserError for a number outside `TEMPERATURES`."""
    if fit and text == FIT:
        return FIT
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"found {text}, expected {'fit or ' if fit else ''}a number") from None
    check_range("--temperature", value, *TEMPERATURES)
    return value


def check_range(flag: str, value: float | None, low: float, high: float = math.inf) -> None:
    """Raise UserError if a flag's value is outside `low` to `high`. None: the flag was not given."""
    if value is not None and not low <= value <= high:
        found = f"{value:g}" if isinstance(value, float) else value
        expected = f"{low:,} or more" if high == math.inf else f"{low:,} to {high:,}"
        raise UserError(f"{flag} is {found}; it must be {expected}")


def paths_of(options: argparse.Namespace) -> list[Path]:
    """The paths of the given checkpoints; by default, those of the three scripts in --checkpoint-dir.

    A folder means all checkpoints in it. Raises UserError if there is no checkpoint.
    """
    paths = []
    for path in options.checkpoints:
        found = sorted(path.glob("*.pt")) if os.path.isdir(path) else [path]
        if not found:
            raise UserError(f"{path}: this folder has no checkpoints (*.pt)")
        paths += found
    if paths:
        return paths
    defaults = [Path(options.checkpoint_dir, name) for name in SCRIPTS]
    missing = [path for path in defaults if not path.exists()]
    if missing == defaults:
        problem = f"{Path(options.checkpoint_dir).absolute()} has none of {', '.join(SCRIPTS)}"
        trained = " (pretrained/ has trained ones)" if any(Path("pretrained").glob("*.pt")) else ""
        raise UserError(f"{problem}; train one (python dense.py), or name checkpoints{trained} or a --checkpoint-dir")
    for path in missing:
        print(f"note: {path} is missing; python {SCRIPTS[path.name]} trains it", file=sys.stderr)
    return [path for path in defaults if path not in missing]


def check_finite(path: Path, logits: Tensor) -> None:
    """Raise UserError, which names the checkpoint, if its logits are not finite."""
    if not logits.isfinite().all():
        raise UserError(f"{path}: its predictions are not finite; train it again with a lower --base-lr")
