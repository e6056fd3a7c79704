"""Classify images with an ensemble of trained networks: python predict.py cat.jpg photos/

Without --checkpoints it takes those that dense.py, mobilenetv2.py and resnext.py have written. Folders are
searched recursively. Images of any size are resized as the training images were. An image that cannot be decoded is
reported and skipped, and the exit status is then 1.
"""

import argparse
import contextlib
import csv
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from common import errors, files
from common.command_line import Parser
from common.device import autocast, explain_out_of_memory, pick_precision, set_up_device
from common.errors import UserError
from common.text import counted

import numpy as np
import torch

import dataset
from dataset.image_folder import decode_all, pictures_in
from evaluation import members
from evaluation.cost import DEFAULT_THRESHOLD
from models.ensemble import Ensemble

TOP = 3
# Pixels per batch, on the CPU 32 images of 32×32: more would not be faster, and the first line would come later.
BATCH_PIXELS = {"cpu": 2**15, "cuda": 2**19, "mps": 2**18}
MAX_COLUMN = 60  # a longer file name shifts its line out of the columns instead of widening them for all lines
MAX_LISTED = 3  # of the images far from the training size

ClassProb = tuple[str, float]  # a class and its probability
Writer = Callable[["Prediction"], Any]


@dataclass(frozen=True)
class Prediction:
    """Predictions for one image file, or its error."""

    path: str
    size: tuple[int, int] | None = None  # width and height in the file
    top: Sequence[ClassProb] = ()  # the ensemble's, the most likely class first
    members: dict[str, ClassProb] = field(default_factory=dict)  # each member's most likely class
    error: str | None = None


def main() -> int:
    options = parse_flags()
    paths = find_images(options.images)
    threshold = options.threshold if options.cascade else None
    contents = members.read_all(members.paths_of(options), threshold)
    checkpoints = [path for path, _ in contents]
    ensemble = members.build(contents, average=options.average, temperature=options.temperature, cascade=threshold)
    num_classes = len(ensemble.classes)
    top = min(TOP, num_classes) if options.top is None else options.top
    if top > num_classes:
        raise UserError(f"--top is {top}; the networks have {num_classes} classes, so it must be 1 to {num_classes}")
    device = set_up_device(options.device)
    ensemble.to(device, memory_format=torch.channels_last)
    precision = pick_precision(options.precision, device)
    batch_size = options.batch_size or max(1, BATCH_PIXELS[device.type] // ensemble.image_size**2)

    count, skipped, unusual = 0, 0, []
    seen = dict.fromkeys(members.names(checkpoints), 0)  # images
    with contextlib.ExitStack() as stack:
        writers = []
        if options.json:
            writers.append(stack.enter_context(json_writer(options.json)))
        if options.csv:
            writers.append(stack.enter_context(csv_writer(options.csv, top)))
        if "-" not in (options.json, options.csv):
            writers.append(text_writer(paths, ensemble, members.names(checkpoints), options.verbose))
        for prediction in predict(paths, ensemble, checkpoints, top, batch_size, precision):
            if prediction.error:
                skipped += 1
                print(f"skipped: {printable(prediction.error)}", file=sys.stderr)
            else:
                count += 1
                for name in prediction.members:
                    seen[name] += 1
                if is_unusual(prediction.size, ensemble.image_size):
                    unusual.append(f"{prediction.path} ({'×'.join(map(str, prediction.size))})")
            for write in writers:
                write(prediction)
            sys.stdout.flush()
    # Networks trained on folders had their images resized the same way.
    if unusual and str(contents[0][1]["data"]["source"]).lower() in dataset.NAMES:
        print(unusual_note(unusual, ensemble.image_size), file=sys.stderr)
    print(f"{counted(count, 'image')}, {skipped:,} skipped", file=sys.stderr)
    if options.cascade:
        print(f"seen by {', '.join(f'{name} {number:,}' for name, number in seen.items())}", file=sys.stderr)
    return 1 if skipped else 0


def parse_flags() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="image files, and folders of them")
    members.add_flags(parser, checkpoints="--checkpoints")
    parser.add_argument(
        "--cascade", action="store_true",
        help="run the cheapest network first, the others only on low confidence: faster",
    )  # fmt: skip
    parser.add_argument(
        "--threshold", type=float, default=DEFAULT_THRESHOLD, metavar="P",
        help="--cascade: stop at this top probability (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--top", type=int, metavar="K", help=f"number of classes per image (default: {TOP})")
    parser.add_argument("--json", metavar="FILE", help="write the predictions there as JSON; - is standard output")
    parser.add_argument("--csv", metavar="FILE", help="write the predictions there as CSV; - is standard output")
    parser.add_argument("--verbose", action="store_true", help="also print each member's most likely class")
    parser.add_argument("--batch-size", type=int, help="images per batch (default: 32 of 32×32, on a GPU 512)")
    options = parser.parse_intermixed_args()
    members.check_range("--batch-size", options.batch_size, 1)
    members.check_range("--top", options.top, 1)
    # Images may follow --checkpoints, and checkpoints stand among the images.
    given = [*options.images, *map(str, options.checkpoints)]
    options.images = [path for path in given if not is_checkpoint(Path(path))]
    options.checkpoints = [Path(path) for path in given if is_checkpoint(Path(path))]
    for path, ending in ((options.json, ".json"), (options.csv, ".csv")):
        if path and path != "-":
            files.check_output(path, (ending,))
    if not options.images:
        raise UserError("no images are given; name image files, or folders of them")
    if options.cascade and (options.average != "softmax" or options.temperature != 1.0):
        raise UserError("--cascade averages softmax outputs as they are; leave out --average logits and --temperature")
    if options.json and options.json == options.csv:
        raise UserError(f"--json and --csv both name {options.json}; give each its own file")
    return options


def is_checkpoint(path: Path) -> bool:
    return path.suffix == ".pt" or (path.is_dir() and any(path.glob("*.pt")))


def find_images(paths: Sequence[str]) -> list[str]:
    """The given files and, of folders, all images in or below them.

    Raises UserError if a path does not exist, and if a folder is unreadable or has no images.
    """
    found = []
    for path in paths:
        if not os.path.exists(path):
            raise UserError(f"{path}: there is no such file or folder; expected images, or folders of images")
        images = [str(image) for image in pictures_in(Path(path))] if os.path.isdir(path) else [path]
        if not images:
            raise UserError(f"{path}: there are no images in this folder; expected one or more, in it or below it")
        found += images
    return found


def predict(
    paths: Sequence[str],
    ensemble: Ensemble,
    checkpoints: Sequence[Path],  # of its members
    top: int,
    batch_size: int,
    precision: str,
) -> Iterator[Prediction]:
    """Predictions in the order of `paths`, with one batch of images in memory at a time.

    Raises UserError if memory runs out, and if a member's predictions are not finite.
    """
    names = members.names(checkpoints)
    for start in range(0, len(paths), batch_size):
        batch = paths[start : start + batch_size]
        decoded = list(decode_all(batch, ensemble.image_size))
        pixels = [image[0] for image in decoded if not isinstance(image, UserError)]
        if pixels:
            with explain_out_of_memory(batch_size):
                logits, seen = member_logits(ensemble, np.stack(pixels), precision)
            for checkpoint, of_member in zip(checkpoints, logits, strict=True):
                members.check_finite(checkpoint, of_member)
            top_classes = most_likely(ensemble.average_seen(logits, seen), ensemble.classes, top)
            member_classes = [most_likely(probs, ensemble.classes, 1) for probs in logits.softmax(2)]
            rows = iter(zip(top_classes, zip(*member_classes, strict=True), seen.tolist(), strict=True))
        for path, image in zip(batch, decoded, strict=True):
            if isinstance(image, UserError):
                yield Prediction(path, error=str(image))
                continue
            of_ensemble, of_members, count = next(rows)
            by_name = {name: top_1 for name, (top_1,) in zip(names[:count], of_members[:count], strict=True)}
            yield Prediction(path, image[1], of_ensemble, by_name)


@torch.inference_mode()
def member_logits(ensemble: Ensemble, pixels: np.ndarray, precision: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, float64 (M, B, classes), and how many members saw each image, on the CPU, from uint8 (B, 3, H, W)."""
    device = next(ensemble.parameters()).device
    images = torch.from_numpy(pixels).to(device, memory_format=torch.channels_last)
    with autocast(device, precision):
        logits, seen = ensemble.logits_and_seen(images)
    return logits.cpu().double(), seen.cpu()


def most_likely(probs: torch.Tensor, classes: Sequence[str], top: int) -> list[list[ClassProb]]:
    """The `top` most likely classes of each image, from probabilities (B, classes)."""
    probs, labels = probs.sort(dim=1, descending=True, stable=True)
    return [
        [(classes[label], prob) for label, prob in zip(*row, strict=True)]
        for row in zip(labels[:, :top].tolist(), probs[:, :top].tolist(), strict=True)
    ]


def is_unusual(size: tuple[int, int], image_size: int) -> bool:
    """Whether an image is much larger or smaller than the networks' input, or so long that half of it is cropped."""
    shorter, longer = sorted(size)
    return shorter > 4 * image_size or 2 * longer < image_size or longer > 2 * shorter


def unusual_note(unusual: Sequence[str], image_size: int) -> str:
    listed, more = ", ".join(unusual[:MAX_LISTED]), len(unusual) - MAX_LISTED
    return (
        f"note: {counted(len(unusual), 'image')} far from {image_size}×{image_size}, the networks' input, in size or "
        f"shape: {printable(listed)}{f' and {more:,} more' if more > 0 else ''}; these predictions are less reliable"
    )


# -------------------------------------------------------------------------------------------------------------- output


@contextlib.contextmanager
def opened(path: str) -> Iterator[TextIO]:
    """A file, which is replaced whole or not at all, or standard output."""
    if path == "-":
        yield sys.stdout
    else:
        with files.replacing(path, "the predictions") as file:
            # A file's name need not be Unicode: bytes that are not become escapes.
            text = io.TextIOWrapper(file, "utf-8", errors="backslashreplace", newline="")
            yield text
            text.flush()
            text.detach()  # `replacing` closes the file


@contextlib.contextmanager
def json_writer(path: str) -> Iterator[Writer]:
    """Writes a JSON list, one object per image, at the end."""
    objects = []
    with opened(path) as file:
        yield lambda prediction: objects.append(json.dumps(as_dict(prediction), ensure_ascii=False))
        file.write("[\n" + ",\n".join(objects) + "\n]\n")
        file.flush()  # a closed pipe ends the script here, before its summary


def as_dict(prediction: Prediction) -> dict[str, Any]:
    if prediction.error:
        return {"image": prediction.path, "error": prediction.error}
    return {
        "image": prediction.path,
        "top": [{"class": name, "prob": prob} for name, prob in prediction.top],
        "members": {member: {"class": name, "prob": prob} for member, (name, prob) in prediction.members.items()},
    }


@contextlib.contextmanager
def csv_writer(path: str, top: int) -> Iterator[Writer]:
    """Writes a table: image, class1, prob1, …, error."""
    columns = [f"{column}{rank}" for rank in range(1, top + 1) for column in ("class", "prob")]
    with opened(path) as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["image", *columns, "error"])

        def write(prediction: Prediction) -> None:
            cells = [cell for class_prob in prediction.top for cell in class_prob] or [""] * len(columns)
            table.writerow([prediction.path, *cells, prediction.error or ""])

        yield write


def text_writer(paths: Sequence[str], ensemble: Ensemble, names: Sequence[str], verbose: bool) -> Writer:
    """Prints one line per image, with `verbose` each member's most likely class below."""
    leads = [*paths, *(f"  {name}" for name in names if verbose)]
    width = max((len(lead) for lead in leads if len(lead) <= MAX_COLUMN), default=0)
    class_width = max(map(len, ensemble.classes))

    def line(lead: str, class_probs: Sequence[ClassProb]) -> str:
        cells = [f"{name:{class_width}} {100 * prob:5.1f} %" for name, prob in class_probs]
        return "  ".join([f"{lead:{width}}", *cells])

    def write(prediction: Prediction) -> None:
        if prediction.error:
            return
        lines = [line(prediction.path, prediction.top)]
        if verbose:
            lines += [line(f"  {member}", [class_prob]) for member, class_prob in prediction.members.items()]
        sys.stdout.write("".join(printable(text) + "\n" for text in lines))

    return write


def printable(text: str) -> str:
    """The text with escapes instead of characters that would control a terminal or cannot be encoded."""
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)


if __name__ == "__main__":
    errors.run(main)
