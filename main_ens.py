"""Test an ensemble of trained networks: average their softmax outputs, and compare it with its members.

Without arguments it takes the three checkpoints that dense.py, mobilenetv2.py and resnext.py write; otherwise any
number of checkpoints of any kind. All it needs to know, the data included, stands in the checkpoints. What they say of
the test images is kept beside them, so that looking again takes a moment.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import openmp  # noqa: F401

import torch

import analysis
import dataset
import errors
import files
import metrics
import models.ensemble
import plotting
from dataset import Dataset
from engine import SPLIT_FLAGS
from errors import UserError
from models.ensemble import AVERAGES, SCRIPTS, Contents, average_probs, names, read_all
from predictions import member_logits
from recipe import DEVICES, PRECISION_HELP, PRECISIONS
from utils import pick_device, pick_precision

FIT = "fit"  # what --temperature takes beside numbers
MOST = 10**6  # images in a batch or subset
PLOTS = ("ensemble.png", "reliability.png", "mistakes.png")


def main() -> int:
    options = parse_flags()
    files.check_writable(options.plot_dir, "the results")
    contents = read_members(options)
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
    data = load_data(contents[0], options)
    if options.temperature == FIT and data.val is None:
        raise UserError(
            f"--temperature {FIT} needs validation images, and {contents[0][0]} was trained without; train all members "
            "with the same --val-size, or give the temperature as a number. The test images are not for fitting"
        )
    device = pick_device(options.device)
    precision = pick_precision(options.precision, device)
    asked = {
        "precision": precision, "mirrored": options.tta == "flip", "batch_size": options.batch_size,
        "cached": not options.no_cache,
    }  # fmt: skip

    labels = torch.from_numpy(data.test.labels)
    logits = member_logits(contents, torch.from_numpy(data.test.images), device, **asked)
    temperature, fitted_on = options.temperature, None
    if temperature == FIT:
        held_out = member_logits(contents, torch.from_numpy(data.val.images), device, **asked)
        temperature = analysis.fit_temperature(held_out, torch.from_numpy(data.val.labels), options.average)
        fitted_on = len(data.val)

    probs = analysis.average(logits, options.average, temperature or 1.0)
    result = analysis.report(probs, labels, names([path for path, _ in contents]), data.classes)
    for row, (path, _) in zip(result["members"], contents, strict=True):
        row["checkpoint"] = str(path)
    result |= {
        "by_network": analysis.by_network(result["members"], [content["network"] for _, content in contents]),
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
            "before": analysis.figures(before, labels),
            "after": analysis.figures(probs.ensemble, labels),
            "difference": analysis.paired(probs.ensemble, before, labels),
        }

    folder = Path(options.plot_dir)
    with files.replacing(folder / "ensemble.json", "the results") as file:
        file.write((json.dumps(result, indent=2, ensure_ascii=False) + "\n").encode())
    plot(folder, result, probs, data)
    print(table(result))
    print(comparison(result))
    print(f"plots and figures: {', '.join(str(folder / name) for name in (*PLOTS, 'ensemble.json'))}")
    return 0


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoints", nargs="*", type=Path, help="default: the three networks' in --checkpoint-dir")
    parser.add_argument("--average", choices=AVERAGES, default="softmax", help="what is averaged (default: softmax)")
    parser.add_argument(
        "--temperature",
        type=temperature_flag,
        help="soften (above 1) or sharpen (below) the average; fit: by the validation images (default: neither)",
    )
    parser.add_argument("--tta", choices=("flip",), help="average over the mirror image of each image, too")
    parser.add_argument("--data", help="test on this instead of the data that the members were trained with")
    parser.add_argument("--data-url", help="where to look first for the CIFAR archive")
    parser.add_argument("--test-size", type=int, help="test on so many images, equal shares of the classes")
    parser.add_argument("--batch-size", type=int, help="images in one go (default: 512 of 32×32, more on a GPU)")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="(default: auto)")
    parser.add_argument("--precision", choices=PRECISIONS, default="auto", help=f"{PRECISION_HELP} (default: auto)")
    parser.add_argument("--no-cache", action="store_true", help="ask the networks again, and keep nothing")
    parser.add_argument("--checkpoint-dir", default="checkpoints", help="(default: checkpoints)")
    parser.add_argument("--plot-dir", default="plots", help="for the pictures and ensemble.json (default: plots)")
    options = parser.parse_args()
    for flag, value in (("--batch-size", options.batch_size), ("--test-size", options.test_size)):
        if value is not None and not 1 <= value <= MOST:
            raise UserError(f"{flag} is {value}; it must be 1 to {MOST:,}")
    if options.temperature not in (None, FIT):
        models.ensemble.check_temperature(options.temperature)
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


def read_members(options: argparse.Namespace) -> Contents:
    """Read the checkpoints and see that they go together.

    Raises UserError for one that is missing, unusable or given twice, and for members of other classes, image size,
    data or splits than the first.
    """
    contents = read_all(options.checkpoints or [Path(options.checkpoint_dir) / name for name in SCRIPTS])
    models.ensemble.check(contents)
    (first_path, first), *others = contents
    for path, content in others:
        if differences := [
            f"{what}: {theirs} in {first_path}, {ours} in {path}"
            for (what, theirs), (_, ours) in zip(
                common_ground(first, options), common_ground(content, options), strict=True
            )
            if theirs != ours
        ]:
            raise UserError("these members do not go together:\n  " + "\n  ".join(differences))
    return contents


def common_ground(content: dict[str, Any], options: argparse.Namespace) -> list[tuple[str, Any]]:
    """What all members must share beside what any ensemble must; what a flag overrides need not be."""
    if options.data is not None:
        return []
    data = content["data"]
    splits = [name for name in SPLIT_FLAGS if name != "test_size" or options.test_size is None]
    return [
        ("images of the data set (digest)", data["digest"]),
        *((f"--{name.replace('_', '-')}", data["split"].get(name)) for name in splits),
    ]


def load_data(first: tuple[Path, dict[str, Any]], options: argparse.Namespace) -> Dataset:
    """The data that the first member, and so all, were trained with, or what the flags put in its place."""
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


def plot(folder: Path, result: dict[str, Any], probs: analysis.Probs, data: Dataset) -> None:
    """Draw the three pictures into `folder`."""
    labels = torch.from_numpy(data.test.labels)
    rows = [row | {"probs": own} for row, own in zip(result["members"], probs.members, strict=True)] + [
        result["ensemble"] | {"name": "ensemble", "probs": probs.ensemble}
    ]
    networks = f"{len(probs.members)} network{'s' if len(probs.members) > 1 else ''}"
    title = f"{networks}, {method(result)}, on {len(labels):,} test images of {Path(data.source).name}"

    # Images from folders come class by class: shuffled, the running figures show how the results settle instead.
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    *members, ensemble = [row | {"probs": row["probs"][order].numpy()} for row in rows]
    plotting.plot_ensemble(
        folder / "ensemble.png",
        members=members,
        ensemble=ensemble,
        labels=labels[order].numpy(),
        classes=data.classes,
        title=title,
    )
    plotting.plot_reliability(
        folder / "reliability.png",
        [row | {"bins": [part.numpy() for part in metrics.reliability(row["probs"], labels)]} for row in rows],
        title=title,
    )
    plotting.plot_mistakes(
        folder / "mistakes.png",
        images=data.test.images,
        labels=data.test.labels,
        members=probs.members.numpy(),
        ensemble=probs.ensemble.numpy(),
        names=[row["name"] for row in result["members"]],
        classes=data.classes,
        title=title,
    )


def method(result: dict[str, Any]) -> str:
    """How the members became one, as all that is printed and drawn names it."""
    parts = [f"{result['average']} averaged"]
    if result["tta"]:
        parts.append(f"--tta {result['tta']}")
    if result["temperature"]:
        parts.append(f"T = {result['temperature']['value']:.3g}")
    return ", ".join(parts)


def table(result: dict[str, Any]) -> str:
    """Members and ensemble, a row each."""
    rows = [(row["name"], row) for row in result["members"]]
    rows.append((f"ensemble ({method(result)})", result["ensemble"]))
    corner = f"with --tta {result['tta']}" if result["tta"] else ""
    width = max(len(name) for name in (corner, *dict(rows)))
    lines = [f"{corner:{width}}  test loss  accuracy [95 % interval]   Brier      ECE"]
    for name, row in rows:
        low, high = (f"{100 * end:.2f}" for end in row["intervals"]["accuracy"])
        lines.append(
            f"{name:{width}}  {row['loss']:9.4f}  {100 * row['accuracy']:6.2f} % {f'[{low}, {high}]':>15}"
            f"{row['brier']:8.4f}  {100 * row['calibration_error']:5.2f} %"
        )
    lines.append(f"on {result['num_images']:,} test images of {result['data']}, in {result['precision']}")
    return "\n".join(lines)


def comparison(result: dict[str, Any]) -> str:
    """How the ensemble compares, a line each; what does not apply is left out."""
    lines = []
    if calibrated := result["temperature"]:
        before, after = calibrated["before"], calibrated["after"]
        fitted = f", fitted on {calibrated['fitted_on']:,} validation images" if calibrated["fitted_on"] else ""
        if fitted and any(math.isclose(calibrated["value"], limit, rel_tol=1e-5) for limit in analysis.TEMPERATURES):
            fitted += ", an end of its range"
        lines.append(f"temperature {calibrated['value']:.4g}{fitted}")
        low, high = calibrated["difference"]["intervals"]["loss"]
        lines.append(
            f"with it, test loss from {before['loss']:.4f} to {after['loss']:.4f}, "
            f"{calibrated['difference']['loss']:+.4f} [{low:+.4f}, {high:+.4f}]{chance(low, high)}; "
            f"ECE from {100 * before['calibration_error']:.2f} to {100 * after['calibration_error']:.2f} %"
        )
    if result["leave_one_out"]:
        best = next(row for row in result["versus_members"] if row["name"] == result["best_member"])
        lines.append(f"ensemble against its best member, {best['name']}: {points(best)}")
    for row in result["leave_one_out"]:
        lines.append(f"without {row['without']}: {100 * row['accuracy']:.2f} %, {points(row['versus_ensemble'])}")
    if pairs := [value for number, row in enumerate(result["disagreement"]) for value in row[:number]]:
        spread = f", {100 * min(pairs):.2f} to {100 * max(pairs):.2f} %" if len(pairs) > 1 else ""
        lines.append(f"two members disagree on {100 * sum(pairs) / len(pairs):.2f} % of the images{spread}")
    if worst := result["confusions"][:3]:
        named = (f"{row['true']} for {row['predicted']} ({row['images']:,})" for row in worst)
        lines.append(f"most often mistaken: {', '.join(named)}")
    for group in result["by_network"]:
        loss, accuracy = group["loss"], group["accuracy"]
        lines.append(
            f"{group['network']}, {len(group['members'])} members: test loss {loss['mean']:.4f} ± {loss['std']:.4f}, "
            f"test accuracy {100 * accuracy['mean']:.2f} ± {100 * accuracy['std']:.2f} %"
        )
    return "\n".join(lines)


def points(difference: dict[str, Any]) -> str:
    """A difference of accuracies and its interval, in percentage points."""
    low, high = difference["intervals"]["accuracy"]
    return f"{100 * difference['accuracy']:+.2f} points [{100 * low:+.2f}, {100 * high:+.2f}]{chance(low, high)}"


def chance(low: float, high: float) -> str:
    """What to add to a difference whose interval has these ends."""
    return "" if low > 0 or high < 0 or low == high == 0 else ", which may be chance"


if __name__ == "__main__":
    errors.run(main)
