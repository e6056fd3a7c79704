"""Test an ensemble of trained networks: average their softmax outputs, and compare it with its members.

Without arguments it takes the three checkpoints that dense.py, mobilenetv2.py and resnext.py write; otherwise any
number of checkpoints of any kind. The checkpoints also say which data to test on. The logits for the test images are
cached next to the checkpoints, so that a second run is fast.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import errors, files
from common.command_line import Parser
from common.device import pick_precision, set_up_device
from common.errors import UserError
from common.text import counted

import torch
from torch import Tensor

import dataset
from dataset import Dataset, Split
from evaluation import cost, members, metrics, report, text
from evaluation.logits import member_logits
from models.ensemble import average_probs
from plotting.cost import plot_cost
from plotting.ensemble import plot_ensemble, plot_mistakes, plot_reliability
from training.recipe import spelled

FIT = "fit"  # what --temperature takes beside numbers
MOST = 10**6  # images in a batch or subset
PLOTS = ("ensemble.png", "reliability.png", "mistakes.png", "cost.png")


def main() -> int:
    options = parse_flags()
    contents = members.read_all(members.paths_of(options))
    files.check_writable(options.plot_dir, "the results")
    if options.temperature == FIT and options.data is not None:
        raise UserError(
            f"--temperature {FIT} needs the validation images of the members' own data, and --data {options.data} "
            "replaces them; leave one of the two out, or give the temperature as a number"
        )
    if options.tta == "flip" and (unmirrored := [path for path, own in contents if own["recipe"].get("flip") == 0]):
        print(
            f"warning: --tta flip shows {unmirrored[0]} mirrored images, and it was trained without (--flip 0)",
            file=sys.stderr,
        )
    data = load_data(contents, options)
    if options.temperature == FIT and data.val is None:
        raise UserError(
            f"--temperature {FIT} needs validation images, and {contents[0][0]} was trained without; train all members "
            "with the same --val-size, or give the temperature as a number. The test images are not for fitting"
        )
    device = set_up_device(options.device)
    precision = pick_precision(options.precision, device)

    def compute_logits(split: Split) -> tuple[Tensor, list[float]]:
        return member_logits(
            contents,
            torch.from_numpy(split.images),
            device,
            precision=precision,
            flip=options.tta == "flip",
            batch_size=options.batch_size,
            cached=not options.no_cache,
        )

    labels = torch.from_numpy(data.test.labels)
    logits, milliseconds = compute_logits(data.test)
    temperature, fitted_on = options.temperature, None
    if temperature == FIT:
        held_out, _ = compute_logits(data.val)
        temperature = report.fit_temperature(held_out, torch.from_numpy(data.val.labels), options.average)
        fitted_on = len(data.val)

    probs = report.average(logits, options.average, temperature or 1.0)
    result = report.report(probs, labels, members.names([path for path, _ in contents]), data.classes)
    costs = [
        {"name": row["name"], "milliseconds": spent, "multiply_adds": logits.shape[1] * members.cost(*member)}
        for row, spent, member in zip(result["members"], milliseconds, contents, strict=True)
    ]
    for row, own, (path, _) in zip(result["members"], costs, contents, strict=True):
        row |= {"checkpoint": str(path)} | own
    result |= {
        "by_network": report.by_network(result["members"], [content["network"] for _, content in contents]),
        "average": options.average,
        "temperature": None,
        "tta": options.tta,
        "precision": precision,
        "data": data.source,
        "num_images": len(data.test),
    }
    if temperature is not None:
        before = average_probs(logits.double().flatten(0, 1), options.average)
        result["temperature"] = {
            "value": temperature,
            "fitted_on": fitted_on,
            "before": report.figures(before, labels),
            "after": report.figures(probs.ensemble, labels),
            "difference": report.paired(probs.ensemble, before, labels),
        }

    result["subsets"] = cost.subset_rows(logits, labels, costs, options.average, temperature or 1.0)
    result |= {"cascade": [], "cascade_threshold": None}
    if len(costs) > 1 and options.average == "softmax" and temperature is None:
        result["cascade_threshold"] = threshold = pick_threshold(contents, data, costs, compute_logits)
        thresholds = sorted({*cost.THRESHOLDS, threshold["value"]})
        result["cascade"] = cost.cascade_rows(probs.members, labels, costs, thresholds)
    result["doubtful_labels"] = cost.doubtful_labels(probs.ensemble, labels, data.classes)

    folder = Path(options.plot_dir)
    with files.replacing(folder / "ensemble.json", "the results") as file:
        file.write((json.dumps(result, indent=2, ensure_ascii=False) + "\n").encode())
    plot(folder, result, probs, data, device)
    print(text.table(result))
    print(text.comparison(result))
    print(f"plots and figures: {', '.join(str(folder / name) for name in (*PLOTS, 'ensemble.json'))}")
    return 0


def parse_flags() -> argparse.Namespace:
    parser = Parser(__doc__)
    members.add_flags(parser)
    parser.add_argument(
        "--temperature",
        type=temperature_flag,
        help="above 1: less confident ensemble, below 1: more; fit: fit it on the validation images (default: none)",
    )
    parser.add_argument("--tta", choices=("flip",), help="average over the mirror image of each image, too")
    parser.add_argument("--data", help="test on this instead of the data that the members were trained with")
    parser.add_argument("--data-url", help="where to look first for the CIFAR archive")
    parser.add_argument("--test-size", type=int, help="number of test images, balanced over the classes")
    parser.add_argument("--batch-size", type=int, help="images in one go (default: 512 of 32×32, more on a GPU)")
    parser.add_argument("--no-cache", action="store_true", help="compute the logits again and do not cache them")
    parser.add_argument("--plot-dir", default="plots", help="for the pictures and ensemble.json (default: plots)")
    options = parser.parse_args()
    for flag, value in (("--batch-size", options.batch_size), ("--test-size", options.test_size)):
        if value is not None and not 1 <= value <= MOST:
            raise UserError(f"{flag} is {value}; it must be 1 to {MOST:,}")
    if options.temperature not in (None, FIT):
        members.check_temperature(options.temperature)
    if options.data_url is not None and not (options.data or "cifar10").lower().startswith("cifar"):
        raise UserError(f"--data-url is for CIFAR, not for --data {options.data!r}; leave one out")
    return options


def temperature_flag(text: str) -> str | float:
    if text == FIT:
        return text
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"found {text}, expected {FIT} or a number") from None


def load_data(contents: members.Contents, options: argparse.Namespace) -> Dataset:
    """The data that the members were trained with, or what the flags put in its place.

    Raises UserError where the members were trained on other images, or have other test images.
    """
    if options.data is not None:
        return load_first(contents[0], options)
    members.check_same(contents, [("images of the data set (digest)", lambda own: own["data"]["digest"])])
    data = load_first(contents[0], options)
    # Only what decides the images that are used here has to be the same.
    flags = [] if options.test_size is not None else ["test_size"]
    if data.test_split is not None:
        flags.append("test_split")
    if options.temperature == FIT:
        flags.append("val_size")
    if any(content["data"]["split"].get(name) for _, content in contents for name in flags):
        flags.append("split_seed")
    members.check_same(
        contents, [(spelled(name), lambda own, name=name: own["data"]["split"].get(name)) for name in flags]
    )
    return data


def load_first(first: tuple[Path, dict[str, Any]], options: argparse.Namespace) -> Dataset:
    """The data of one member."""
    path, trained = first[0], first[1]["data"]
    # The members' subsets and hold-outs are of their own images.
    split = dict(trained["split"]) if options.data is None else {"split_seed": trained["split"]["split_seed"]}
    if options.test_size is not None:
        split["test_size"] = options.test_size
    source = options.data or trained["source"]
    try:
        data = dataset.load(source, image_size=trained["image_size"], data_url=options.data_url, **split)
    except UserError as error:
        if options.data is not None or Path(source).exists():
            raise
        raise UserError(
            f"{error}. {path} was trained on it, as seen from there; give --data where it lies now"
        ) from None
    if list(data.classes) != trained["classes"]:
        raise UserError(
            f"--data {source} has the classes {', '.join(data.classes)}; {path} was trained on "
            f"{', '.join(trained['classes'])}"
        )
    if options.data is None and data.digest != trained["digest"]:
        raise UserError(
            f"{source} no longer holds the images that {path} was trained with; restore them, or give --data to test "
            "on others"
        )
    return data


def pick_threshold(
    contents: members.Contents, data: Dataset, costs: list[cost.Cost], compute_logits: Callable[[Split], Any]
) -> dict[str, Any]:
    """The threshold of the cascade: by validation images that all members share, or else the constant.

    The test images never choose it.
    """
    kept_out = [(own["data"]["split"]["val_size"], own["data"]["split"]["split_seed"]) for _, own in contents]
    if data.val is None or len(set(kept_out)) > 1:
        return {"value": cost.DEFAULT_THRESHOLD, "chosen_by": "constant"}
    logits, _ = compute_logits(data.val)
    probs, labels = report.average(logits, "softmax"), torch.from_numpy(data.val.labels)
    value = cost.choose_threshold(probs.members, labels, costs, probs.ensemble)
    return {"value": value, "chosen_by": "validation", "num_images": len(data.val)}


def plot(folder: Path, result: dict[str, Any], probs: report.Probs, data: Dataset, device: torch.device) -> None:
    """Draw the pictures into `folder`."""
    labels = torch.from_numpy(data.test.labels)
    rows = [row | {"probs": own} for row, own in zip(result["members"], probs.members, strict=True)] + [
        result["ensemble"] | {"name": "ensemble", "probs": probs.ensemble}
    ]
    networks, images = counted(len(probs.members), "network"), counted(len(labels), "test image")
    title = f"{networks}, {text.method(result)}, on {images} of {Path(data.source).name}"

    # Images from folders come class by class: shuffled, the running figures show how the results settle instead.
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    *members, ensemble = [row | {"probs": row["probs"][order].numpy()} for row in rows]
    plot_ensemble(
        folder / "ensemble.png",
        members=members,
        ensemble=ensemble,
        labels=labels[order].numpy(),
        classes=data.classes,
        title=title,
    )
    plot_reliability(
        folder / "reliability.png",
        [row | {"bins": [part.numpy() for part in metrics.reliability(row["probs"], labels)]} for row in rows],
        title=title,
    )
    plot_mistakes(
        folder / "mistakes.png",
        images=data.test.images,
        labels=data.test.labels,
        members=probs.members.numpy(),
        ensemble=probs.ensemble.numpy(),
        names=[row["name"] for row in result["members"]],
        classes=data.classes,
        title=title,
    )
    threshold = result["cascade_threshold"]
    plot_cost(
        folder / "cost.png",
        subsets=result["subsets"],
        cascade=result["cascade"],
        threshold=threshold["value"] if threshold else None,
        device=device.type.upper(),
        title=title,
    )


if __name__ == "__main__":
    errors.run(main)
