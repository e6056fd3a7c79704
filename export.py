"""Write the ensemble, or one network of it, as one file that is used without this project.

Input: RGB images, uint8 (batch, 3, S, S), any batch size. Output: probabilities, float32 (batch, classes). Weights and
normalisation are included. The caller must resize images of other sizes, as predict.py does: Pillow's exif_transpose,
then ImageOps.fit to S×S, bilinear. Metadata, all strings, with the same keys in both formats: classes and members (JSON
lists), image_size (S), input (this paragraph in short), average, temperature, format, version.

    python export.py --output ensemble.onnx                     # for onnxruntime
    session = onnxruntime.InferenceSession("ensemble.onnx")
    classes = json.loads(session.get_modelmeta().custom_metadata_map["classes"])
    (probs,) = session.run(None, {"images": images})            # NumPy arrays

    python export.py --output ensemble.pt2                      # for PyTorch
    metadata = {"classes": ""}                                  # names what to read
    network = torch.export.load("ensemble.pt2", extra_files=metadata).module()
    classes, probs = json.loads(metadata["classes"]), network(images)

It takes the checkpoints that dense.py, mobilenetv2.py and resnext.py have written, or those that are given.
The file is written only if it agrees with PyTorch on test images; it then replaces an existing file in one step.
"""

import argparse
import importlib.util
import io
import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import errors, files
from common.command_line import Parser
from common.device import set_up_device
from common.errors import UserError

import numpy as np
import torch
from torch import Tensor

import dataset
from evaluation import members
from models.ensemble import Ensemble

NAME = "cifar10-ensemble export"
VERSION = 1

TOLERANCE = 1e-4  # of a probability: float32 sums in another order differ by about 1e-6
BATCH_SIZE = 64
MAX_IMAGES = 100_000  # compared; random ones are made all at once

Predict = Callable[[Tensor], Tensor]  # images to probabilities, as Ensemble


@dataclass(frozen=True)
class Format:
    packages: tuple[str, ...]  # needed in addition to PyTorch
    write: Callable[[Ensemble, dict[str, str]], bytes]  # an ensemble and its metadata, to a file's content
    read: Callable[[bytes], Predict]


def main() -> int:
    options = parse_flags()
    file_format = FORMATS[options.format]
    require(options.format)
    paths = members.paths_of(options)
    contents = members.read_all(paths)
    set_up_device("cpu")  # PyTorch's fast CPU settings
    ensemble = members.build(contents, average=options.average, temperature=options.temperature)
    files.check_writable(options.output.parent, "the file")
    images, source = pick_images(contents[0][1]["data"], options)
    names = members.names(paths)
    with torch.inference_mode():
        for path, logits in zip(paths, ensemble.logits(images[:BATCH_SIZE]), strict=True):
            members.check_finite(path, logits)

    try:
        written = file_format.write(ensemble, metadata(ensemble, names))
    except ImportError as error:  # too old for this PyTorch
        upgrade = f"pip install --upgrade {' '.join(file_format.packages)}"
        raise UserError(f"the format {options.format} does not work here ({error}): {upgrade}") from None
    difference = largest_difference(ensemble, file_format.read(written), images)
    if not difference <= TOLERANCE:
        raise UserError(
            f"{options.output} is not written: on {source} its probabilities differ from PyTorch's by up to "
            f"{difference:.1e}, more than {TOLERANCE:.0e}; take the other format, or other versions of the packages of "
            f"{options.format}"
        )
    with files.atomic_write(options.output, "the file") as file:
        file.write(written)

    averaged = f" ({options.average} averaged)" if len(paths) > 1 else ""
    print(f"{options.output}: {', '.join(names)}{averaged}, {len(written) / 1e6:.1f} MB")
    print(f"largest difference from PyTorch: {difference:.1e}, on {len(images):,} {source}")
    return 0


def parse_flags() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--output", type=Path, required=True, help="the file to write")
    parser.add_argument("--format", choices=FORMATS, help="(default: by the ending of --output)")
    members.add_flags(parser, device=False)
    tested = parser.add_mutually_exclusive_group()
    tested.add_argument("--data", help="compare on its test images (default: the first member's data set)")
    tested.add_argument("--random", action="store_true", help="compare on random images, no data needed")
    parser.add_argument("--images", type=int, default=256, help="how many are compared (default: 256)")
    options = parser.parse_args()
    endings = tuple(f".{name}" for name in FORMATS)
    options.format = options.format or options.output.suffix.lower().removeprefix(".")
    if options.format not in FORMATS:
        raise UserError(
            f"--output {options.output}: its ending names no format; expected one of {', '.join(endings)}, or --format"
        )
    files.check_output(options.output, endings)
    members.check_range("--images", options.images, 1, MAX_IMAGES)
    return options


def require(name: str) -> None:
    """Raise UserError if packages that a format needs are missing."""
    if missing := [package for package in FORMATS[name].packages if importlib.util.find_spec(package) is None]:
        plural = "s" if len(missing) > 1 else ""
        raise UserError(
            f"the format {name} needs the package{plural} {', '.join(missing)}: pip install {' '.join(missing)}"
        )


def pick_images(data: dict[str, Any], options: argparse.Namespace) -> tuple[Tensor, str]:
    """Images to compare on, uint8 (N, 3, S, S), and what they are; `data` is that of a checkpoint.

    Random images are used if the first member's data is not available. Raises UserError if that of --data is not.
    """
    size, rng = data["image_size"], np.random.default_rng(0)
    if not options.random:
        source, seed = options.data or data["source"], data["split"]["split_seed"]
        try:
            test = dataset.load(source, image_size=size, split_seed=seed, download=bool(options.data)).test
            rows = rng.permutation(len(test))[: options.images]  # folders list images class by class
            return torch.from_numpy(test.images[rows]), f"test images of {source}"
        except UserError as error:
            if options.data:
                raise
            print(
                f"warning: the file is compared on random images, since the test images are not available: {error}",
                file=sys.stderr,
            )
    return torch.from_numpy(rng.integers(0, 256, (options.images, 3, size, size), np.uint8)), "random images"


def metadata(ensemble: Ensemble, names: list[str]) -> dict[str, str]:
    """What a file says of itself: strings."""
    return {
        "format": NAME,
        "version": str(VERSION),
        "classes": json.dumps(ensemble.classes),
        "image_size": str(ensemble.image_size),
        "input": "uint8 RGB (batch, 3, S, S); resized by ImageOps.fit, bilinear, after exif_transpose",
        "average": ensemble.average,
        "temperature": str(ensemble.temperature),
        "members": json.dumps(names),
    }


def traced(ensemble: Ensemble) -> torch.export.ExportedProgram:
    """The graph for a batch of any size; from a batch of 1, PyTorch would make one for 1 only."""
    example = torch.zeros(2, 3, ensemble.image_size, ensemble.image_size, dtype=torch.uint8)
    return torch.export.export(ensemble, (example,), dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1)}})


def write_onnx(ensemble: Ensemble, about: dict[str, str]) -> bytes:
    with warnings.catch_warnings(action="ignore"):
        program = torch.onnx.export(traced(ensemble), input_names=["images"], output_names=["probs"], verbose=False)
    program.model.metadata_props.update(about)
    return program.model_proto.SerializeToString()


def read_onnx(content: bytes) -> Predict:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(content, settings, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def write_pt2(ensemble: Ensemble, about: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):
        torch.export.save(traced(ensemble), buffer, extra_files=about)
    return buffer.getvalue()


def read_pt2(content: bytes) -> Predict:
    with warnings.catch_warnings(action="ignore"):
        return torch.export.load(io.BytesIO(content)).module()


FORMATS = {
    "onnx": Format(("onnx", "onnxscript", "onnxruntime"), write_onnx, read_onnx),
    "pt2": Format((), write_pt2, read_pt2),
}


@torch.inference_mode()
def largest_difference(ensemble: Ensemble, predict: Predict, images: Tensor) -> float:
    """The largest difference of any probability, on one image and on batches of all; NaN if a probability is NaN."""
    batches = images[:1], *images.split(BATCH_SIZE)
    return torch.stack([(predict(batch) - ensemble(batch)).abs().max() for batch in batches]).max().item()


if __name__ == "__main__":
    errors.run(main)
