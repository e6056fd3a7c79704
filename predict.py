"""Classify images with an ensemble of trained networks: python predict.py cat.jpg photos/

Without --checkpoints it uses those of dense.py, mobilenetv2.py and resnext.py. Folders are searched recursively. Images
of any size are resized like the training images. An image that cannot be decoded is reported and skipped; the exit
status is then 1.
"""

import argparse
import contextlib
import csv
import io
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from common import errors, files
from common.command_line import Parser
from common.device import autocast, explain_out_of_memory, pick_precision, set_up_device
from common.errors import UserError
from common.text import pluralize

import numpy as np
import torch

import dataset
from dataset.image_folder import decode_all, image_files_in
from evaluation import members
from evaluation.cost import DEFAULT_THRESHOLD
from models.ensemble import Ensemble

DEFAULT_TOP = 3
# Pixels per batch. On the CPU, 32 images of 32×32: larger batches are not faster and delay the first output.
BATCH_PIXELS = {"cpu": 2**15, "cuda": 2**19, "mps": 2**18}
MAX_NAME_WIDTH = 60  # the column's width; longer file names shift the rest of their line
MAX_LISTED = 3  # unusual images named in the note

Prediction = dict[str, Any]  # for one image, as in --json: "image", and either "top" and "members" or "error"


def main() -> int:
    options = parse_flags()
    paths = find_images(options.images)
    contents = members.read_all(members.paths_of(options), options.threshold)
    averaging = {"average": options.average, "temperature": options.temperature, "cascade": options.threshold}
    ensemble = members.build(contents, **averaging)
    num_classes = len(ensemble.classes)
    top = min(DEFAULT_TOP, num_classes) if options.top is None else options.top
    if top > num_classes:
        raise UserError(f"--top is {top}; the networks have {num_classes} classes, so it must be 1 to {num_classes}")
    device = set_up_device(options.device)
    ensemble.to(device, memory_format=torch.channels_last)
    precision = pick_precision(options.precision, device)
    batch_size = options.batch_size or max(1, BATCH_PIXELS[device.type] // ensemble.image_size**2)

    checkpoints = [path for path, _ in contents]
    seen = dict.fromkeys(members.names(checkpoints), 0)  # number of images, by member
    first_cells = [*paths, *(f"  {name}" for name in seen if options.verbose)]
    widths = min(max(map(len, first_cells)), MAX_NAME_WIDTH), max(map(len, ensemble.classes))
    skipped, unusual, json_rows = 0, [], []
    with open_output(options.json) as json_file, open_output(options.csv) as csv_file:
        if csv_file:
            columns = ["image", *(f"{key}{rank}" for rank in range(1, top + 1) for key in ("class", "prob")), "error"]
            table = csv.DictWriter(csv_file, columns, extrasaction="ignore", lineterminator="\n")
            table.writeheader()
        for prediction, size in predict(paths, ensemble, checkpoints, top, batch_size, precision):
            if "error" in prediction:
                skipped += 1
                print(f"skipped: {printable(prediction['error'])}", file=sys.stderr)
            else:
                for name in prediction["members"]:
                    seen[name] += 1
                if is_unusual(size, ensemble.image_size):
                    unusual.append(f"{prediction['image']} ({'×'.join(map(str, size))})")
                if "-" not in (options.json, options.csv):
                    print_prediction(prediction, *widths, options.verbose)
            if json_file:
                json_rows.append(json.dumps(prediction, ensure_ascii=False))
            if csv_file:
                entries = enumerate(prediction.get("top", ()), 1)
                table.writerow(prediction | {f"{key}{rank}": entry[key] for rank, entry in entries for key in entry})
            sys.stdout.flush()
        if json_file:
            json_file.write("[\n" + ",\n".join(json_rows) + "\n]\n")
        sys.stdout.flush()  # if stdout is closed, the script ends here, before the summary
    # Members trained on a folder were trained on resized images; the built-in data sets have small images.
    if unusual and str(contents[0][1]["data"]["source"]).lower() in dataset.NAMES:
        print(unusual_note(unusual, ensemble.image_size), file=sys.stderr)
    print(f"{pluralize(len(paths) - skipped, 'image')}, {skipped:,} skipped", file=sys.stderr)
    if options.cascade:
        print(f"images seen by {', '.join(f'{name} {number:,}' for name, number in seen.items())}", file=sys.stderr)
    return 1 if skipped else 0


def parse_flags() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="image files, and folders of them")
    members.add_flags(parser, checkpoints="--checkpoints")
    parser.add_argument("--cascade", action="store_true", help="cheapest network first, others only on low confidence")
    parser.add_argument(
        "--threshold", type=float, metavar="P",
        help=f"--cascade: stop at this top probability (default: {DEFAULT_THRESHOLD})",
    )  # fmt: skip
    parser.add_argument("--top", type=int, metavar="K", help=f"number of classes per image (default: {DEFAULT_TOP})")
    parser.add_argument("--json", metavar="FILE", help="write the predictions there as JSON; - is standard output")
    parser.add_argument("--csv", metavar="FILE", help="write the predictions there as CSV; - is standard output")
    parser.add_argument("--verbose", action="store_true", help="also print each member's most likely class")
    parser.add_argument("--batch-size", type=int, help="images per batch (default: 32 of 32×32; 512 on CUDA)")
    options = parser.parse_intermixed_args()
    members.check_range("--batch-size", options.batch_size, 1)
    members.check_range("--top", options.top, 1)
    # Separate the arguments: images may follow --checkpoints, and checkpoints may be among the images.
    given = [*options.images, *map(str, options.checkpoints)]
    options.images = [path for path in given if not is_checkpoint(Path(path))]
    options.checkpoints = [Path(path) for path in given if is_checkpoint(Path(path))]
    for path, ending in ((options.json, ".json"), (options.csv, ".csv")):
        if path and path != "-":
            files.check_output(path, (ending,))
    if not options.images:
        raise UserError("no images are given; name image files, or folders of them")
    if options.threshold is not None and not options.cascade:
        raise UserError("--threshold is for --cascade; add --cascade, or remove it")
    if options.cascade and options.threshold is None:
        options.threshold = DEFAULT_THRESHOLD
    if options.cascade and (options.average != "softmax" or options.temperature != 1.0):
        raise UserError("--cascade averages unscaled softmax outputs; remove --average logits and --temperature")
    if options.json and options.json == options.csv:
        raise UserError(f"--json and --csv both name {options.json}; give each its own file")
    return options


def is_checkpoint(path: Path) -> bool:
    return path.suffix == ".pt" or (os.path.isdir(path) and any(path.glob("*.pt")))


def find_images(paths: Sequence[str]) -> list[str]:
    """The given files, and all images in the given folders and their subfolders.

    Raises UserError if a path does not exist, or if a folder is unreadable or has no images.
    """
    found = []
    for path in paths:
        if not os.path.exists(path):
            raise UserError(f"{path}: there is no such file or folder; expected images, or folders of images")
        images = [str(image) for image in image_files_in(Path(path))] if os.path.isdir(path) else [path]
        if not images:
            raise UserError(f"{path}: there are no images in this folder or its subfolders; expected at least one")
        found += images
    return found


def predict(
    paths: Sequence[str], ensemble: Ensemble, checkpoints: Sequence[Path], top: int, batch_size: int, precision: str
) -> Iterator[tuple[Prediction, tuple[int, int] | None]]:
    """Predictions in the order of `paths`, each with the original width and height (None for a broken file).

    `checkpoints` are the paths of the members. Only one batch of images is in memory at a time. Raises UserError if
    memory runs out, and if the predictions of a member are not finite.
    """
    for start in range(0, len(paths), batch_size):
        batch = paths[start : start + batch_size]
        decoded = list(decode_all(batch, ensemble.image_size))
        pixels = [image[0] for image in decoded if not isinstance(image, UserError)]
        with explain_out_of_memory(batch_size):
            classified = iter(classify(np.stack(pixels), ensemble, checkpoints, top, precision) if pixels else ())
        for path, image in zip(batch, decoded, strict=True):
            if isinstance(image, UserError):
                yield {"image": path, "error": str(image)}, None
            else:
                yield {"image": path} | next(classified), image[1]


@torch.inference_mode()
def classify(
    pixels: np.ndarray, ensemble: Ensemble, checkpoints: Sequence[Path], top: int, precision: str
) -> list[Prediction]:
    """The most likely classes of each image, uint8 (B, 3, S, S), and the most likely class of each member that ran."""
    device = next(ensemble.parameters()).device
    with autocast(device, precision):
        images = torch.from_numpy(pixels).to(device, memory_format=torch.channels_last)
        logits, seen = (tensor.cpu() for tensor in ensemble.logits_and_seen(images))
    for checkpoint, member_logits in zip(checkpoints, logits, strict=True):
        members.check_finite(checkpoint, member_logits)
    logits = logits.double()
    best = most_likely(ensemble.average_seen(logits, seen), ensemble.classes, top)
    best_of = [most_likely(probs, ensemble.classes, 1) for probs in logits.softmax(2)]
    names = members.names(checkpoints)
    return [
        {"top": best[row], "members": {names[member]: best_of[member][row][0] for member in range(count)}}
        for row, count in enumerate(seen.tolist())
    ]


def most_likely(probs: torch.Tensor, classes: Sequence[str], top: int) -> list[list[dict[str, Any]]]:
    """The `top` most likely classes of each image, from probabilities (B, classes)."""
    probs, labels = probs.sort(dim=1, descending=True, stable=True)
    return [
        [{"class": classes[label], "prob": prob} for label, prob in zip(*row, strict=True)]
        for row in zip(labels[:, :top].tolist(), probs[:, :top].tolist(), strict=True)
    ]


def is_unusual(size: tuple[int, int], image_size: int) -> bool:
    """Whether an image is much larger or smaller than the networks' input, or more than half of it is cropped away."""
    shorter, longer = sorted(size)
    return shorter > 4 * image_size or 2 * longer < image_size or longer > 2 * shorter


def unusual_note(unusual: Sequence[str], image_size: int) -> str:
    listed, more = ", ".join(unusual[:MAX_LISTED]), len(unusual) - MAX_LISTED
    return (
        f"note: {pluralize(len(unusual), 'image')} far from {image_size}×{image_size}, the networks' input, in size or "
        f"shape: {printable(listed)}{f' and {more:,} more' if more > 0 else ''}; these predictions are less reliable"
    )


@contextlib.contextmanager
def open_output(path: str | None) -> Iterator[TextIO | None]:
    """Open a file to be replaced atomically; "-" is standard output; without a path, None."""
    if not path or path == "-":
        yield sys.stdout if path else None
        return
    with files.atomic_write(path, "the predictions") as file:
        # File names need not be valid Unicode: invalid bytes are escaped.
        text = io.TextIOWrapper(file, "utf-8", errors="backslashreplace", newline="")
        yield text
        text.flush()
        text.detach()  # `atomic_write` closes the file


def print_prediction(prediction: Prediction, width: int, class_width: int, verbose: bool) -> None:
    """Print one line and, with `verbose`, one more line per member with its most likely class."""
    lines = [(prediction["image"], prediction["top"])]
    if verbose:
        lines += [(f"  {name}", [entry]) for name, entry in prediction["members"].items()]
    for first_cell, entries in lines:
        cells = [f"{entry['class']:{class_width}} {100 * entry['prob']:5.1f} %" for entry in entries]
        print(printable("  ".join([f"{first_cell:{width}}", *cells])))


def printable(text: str) -> str:
    """Escape characters that would control the terminal or cannot be encoded."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


if __name__ == "__main__":
    errors.run(main)
