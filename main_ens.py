"""Test an ensemble of trained networks: average their softmax outputs, and compare the ensemble with its members.

Without arguments it uses the checkpoints of dense.py, mobilenetv2.py and resnext.py; otherwise the given checkpoints,
any number and of any network, or all in a folder. The test images come from the data set that the checkpoints name. The
logits of the test images are cached next to the checkpoints, so that a second run is fast.
"""

import argparse
import functools
import json
import sys
from pathlib import Path
from typing import Any

from common import errors, files
from common.command_line import Parser
from common.device import pick_precision, set_up_device
from common.errors import UserError
from common.text import pluralize

import torch

import dataset
from dataset import Dataset
from evaluation import cost, members, metrics, report, text
from evaluation.logits import member_logits
from evaluation.members import FIT
from evaluation.metrics import PER_IMAGE
from plotting.ensemble import plot_cost, plot_ensemble, plot_mistakes, plot_reliability
from training.recipe import flag_name

MAX_IMAGES = 10**6  # in a batch or a subset
PLOTS = ("ensemble.png", "reliability.png", "mistakes.png", "cost.png")


def main() -> int:
    options = parse_flags()
    contents = members.read_all(members.paths_of(options))
    files.check_writable(options.plot_dir, "the results")
    no_flips = [path for path, content in contents if content["recipe"].get("flip") == 0]
    if options.tta == "flip" and no_flips:
        print(f"warning: --tta flip: {no_flips[0]} was trained without flips (--flip 0)", file=sys.stderr)
    data = load_data(contents, options)
    device = set_up_device(options.device)
    precision = pick_precision(options.precision, device)

    compute_logits = functools.partial(
        member_logits, contents, device=device, precision=precision, flip=options.tta == "flip",
        batch_size=options.batch_size, cached=not options.no_cache,
    )  # fmt: skip
    logits, milliseconds = compute_logits(torch.from_numpy(data.test.images))
    labels = torch.from_numpy(data.test.labels)
    temperature, is_fitted = options.temperature, options.temperature == FIT
    has_cascade = len(contents) > 1 and options.average == "softmax" and temperature == 1.0
    # The cascade's threshold is chosen on validation images only if they are the same for all members.
    splits = [content["data"]["split"] for _, content in contents]
    same_split = len({(split.get("val_size"), split.get("split_seed")) for split in splits}) == 1
    val_logits = val_labels = None
    if is_fitted or (has_cascade and data.val is not None and same_split):
        val_logits, _ = compute_logits(torch.from_numpy(data.val.images))
        val_labels = torch.from_numpy(data.val.labels)
    if is_fitted:
        temperature = report.fit_temperature(val_logits, val_labels, options.average)
    probs = report.ensemble_probs(logits, options.average, temperature)

    costs = cost.member_costs(contents, milliseconds, views=logits.shape[1])
    result = report.report(probs, labels, costs, data.classes, len(val_labels) if is_fitted else None)
    result |= {
        "by_network": report.by_network(result["members"], [content["network"] for _, content in contents]),
        "average": options.average,
        "tta": options.tta,
        "precision": precision,
        "data": data.source,
        "num_images": len(data.test),
        "subsets": cost.subset_rows(logits, labels, costs, options.average, temperature),
        "cascade": cost.cascade_rows(probs.members, labels, costs) if has_cascade else [],
        "cascade_threshold": cost.pick_threshold(val_logits, val_labels, costs) if has_cascade else None,
        "doubtful_labels": report.doubtful_labels(probs.ensemble, labels, data.classes),
    }

    folder = Path(options.plot_dir)
    with files.atomic_write(folder / "ensemble.json", "the results") as file:
        file.write((json.dumps(result, indent=2, ensure_ascii=False) + "\n").encode())
    plot(folder, result, probs, data, device)
    print(text.table(result))
    print(text.comparison(result))
    written = PLOTS if len(contents) > 1 else PLOTS[:-1]
    print(f"plots and numbers: {', '.join(str(folder / name) for name in (*written, 'ensemble.json'))}")
    return 0


def parse_flags() -> argparse.Namespace:
    parser = Parser(__doc__)
    members.add_flags(parser, fit=True)
    parser.add_argument("--tta", choices=("flip",), help="also average over the horizontal flip")
    parser.add_argument("--data", help="test on this data set instead of the members' own")
    parser.add_argument("--data-url", help="URL to try first for the CIFAR archive")
    parser.add_argument("--test-size", type=int, help="number of test images, balanced over the classes")
    parser.add_argument("--batch-size", type=int, help="images per batch (default: 512 of 32×32, more on a GPU)")
    parser.add_argument("--no-cache", action="store_true", help="compute the logits again, and delete cached ones")
    parser.add_argument("--plot-dir", default="plots", help="folder of the plots and ensemble.json (default: plots)")
    options = parser.parse_args()
    members.check_range("--batch-size", options.batch_size, 1, MAX_IMAGES)
    members.check_range("--test-size", options.test_size, 1, MAX_IMAGES)
    if options.temperature == FIT and options.data is not None:
        raise UserError(f"--temperature fit needs the members' images; --data {options.data} replaces them; remove one")
    return options


def load_data(contents: members.Contents, options: argparse.Namespace) -> Dataset:
    """Load the data set of the members, or the one of --data.

    Raises UserError if the members have different data sets or test images, and if --temperature fit has no validation
    images.
    """
    if options.data is not None:
        return load_data_of(contents[0], options.data, options.data_url, options.test_size)
    members.check_same(contents, lambda data: {"images of the data set (digest)": data["digest"]})
    data = load_data_of(contents[0], None, options.data_url, options.test_size)
    # Only the flags that affect the images used here must be the same for all members.
    flags = [] if options.test_size is not None else ["test_size"]
    if data.test_split is not None:
        flags.append("test_split")
    if options.temperature == FIT:
        flags.append("val_size")
    if any(content["data"]["split"].get(name) for _, content in contents for name in flags):
        flags.append("split_seed")
    members.check_same(contents, lambda data: {flag_name(name): data["split"].get(name) for name in flags})
    if options.temperature == FIT and data.val is None:
        raise UserError(f"--temperature fit needs validation images; {contents[0][0]} has none; train with --val-size")
    return data


def load_data_of(
    member: tuple[Path, dict], data: str | None = None, data_url: str | None = None, test_size: int | None = None
) -> Dataset:
    """Load the data set of one member, with its splits; or the whole data set `data` instead."""
    path, trained = member[0], member[1]["data"]
    split = dict(trained["split"]) if data is None else {"split_seed": trained["split"]["split_seed"]}
    if test_size is not None:
        split["test_size"] = test_size
    source = trained["source"] if data is None else data
    try:
        loaded = dataset.load(source, image_size=trained["image_size"], data_url=data_url, **split)
    except UserError as error:
        if data is not None or source.lower() in dataset.NAMES or Path(source).exists():
            raise
        hint = "was trained on this path, relative to the current folder of that run; give the new path as --data"
        raise UserError(f"{error}\n{path} {hint}") from None
    if list(loaded.classes) != trained["classes"]:
        found, expected = ", ".join(loaded.classes), ", ".join(trained["classes"])
        raise UserError(f"--data {source} has the classes {found}, but {path} was trained on {expected}")
    if data is None and loaded.digest != trained["digest"]:
        raise UserError(f"{source} no longer holds the images that {path} was trained with; give others as --data")
    return loaded


def plot(folder: Path, result: dict[str, Any], probs: report.Probs, data: Dataset, device: torch.device) -> None:
    """Save all plots in `folder`."""
    labels = torch.from_numpy(data.test.labels)
    networks, images = pluralize(len(probs.members), "network"), pluralize(len(labels), "test image")
    title = f"{networks}, {text.averaging_method(result)}, on {images} of {Path(data.source).name}"

    # The images of folders are sorted by class: shuffle them for the running metrics.
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    rows = []
    scores = [*result["members"], {"name": "ensemble"} | result["ensemble"]]
    for row, row_probs in zip(scores, [*probs.members, probs.ensemble], strict=True):
        per_image = dict(zip(PER_IMAGE, metrics.per_image(row_probs, labels)[order].T.numpy(), strict=True))
        bins = [part.numpy() for part in metrics.reliability(row_probs, labels)]
        rows.append(row | {"per_image": per_image, "bins": bins})
    matrix = metrics.confusion_matrix(probs.ensemble, labels).numpy()
    plot_ensemble(folder / "ensemble.png", rows, confusion_matrix=matrix, classes=data.classes, title=title)
    plot_reliability(folder / "reliability.png", rows, title=title)
    names = [row["name"] for row in result["members"]]
    plot_mistakes(
        folder / "mistakes.png", images=data.test.images, labels=data.test.labels, members=probs.members.numpy(),
        ensemble=probs.ensemble.numpy(), names=names, classes=data.classes, title=title,
    )  # fmt: skip
    if len(probs.members) > 1:
        threshold = result["cascade_threshold"]["value"] if result["cascade"] else None
        plot_cost(
            folder / "cost.png", subsets=result["subsets"], cascade=result["cascade"], threshold=threshold,
            device=device.type.upper(), title=title,
        )  # fmt: skip


if __name__ == "__main__":
    errors.run(main)
