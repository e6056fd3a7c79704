"""Export the ensemble, or a single network, as one file that is used without this project.

Input: RGB images, uint8 (batch, 3, S, S), any batch size. Output: probabilities, float32 (batch, classes). Weights and
normalization are included. Images of other sizes must be resized first, as predict.py does it: Pillow's exif_transpose,
then ImageOps.fit to S×S, bilinear. The metadata are strings, with the same keys in both formats: classes and members
(JSON lists), image_size (S), input (a short form of this paragraph), average, temperature, format, version.

    python export.py --output ensemble.onnx                     # for onnxruntime
    session = onnxruntime.InferenceSession("ensemble.onnx")
    classes = json.loads(session.get_modelmeta().custom_metadata_map["classes"])
    (probs,) = session.run(None, {"images": images})            # NumPy arrays

    python export.py --output ensemble.pt2                      # for PyTorch
    metadata = {"classes": ""}                                  # the keys to read
    network = torch.export.load("ensemble.pt2", extra_files=metadata).module()
    classes, probs = json.loads(metadata["classes"]), network(images)

By default it exports the checkpoints of dense.py, mobilenetv2.py and resnext.py. The file is written (atomically)
only if its probabilities agree with PyTorch's on test images.
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

TOLERANCE = 1e-4  # for probabilities; a different order of float32 sums changes them by about 1e-6
BATCH_SIZE = 64
MAX_IMAGES = 100_000  # limit of --images: random images are made all at once

Predict = Callable[[Tensor], Tensor]  # images to probabilities, like Ensemble


@dataclass(frozen=True)
class Format:
    packages: tuple[str, ...]  # required besides PyTorch
    write: Callable[[Ensemble, dict[str, str]], bytes]  # from an ensemble and its metadata to the content of a file
    read: Callable[[bytes], Predict]


def main() -> int:
    options = parse_flags()
    file_format = require(options.format)
    paths = members.paths_of(options)
    contents = members.read_all(paths)
    set_up_device("cpu")
    ensemble = members.build(contents, average=options.average, temperature=options.temperature)
    files.check_writable(options.output.parent, "the file")
    images, source = pick_images(contents[0][1]["data"], options)
    names = members.names(paths)
    with torch.inference_mode():
        for path, logits in zip(paths, ensemble.logits(images[:BATCH_SIZE]), strict=True):
            members.check_finite(path, logits)

    try:
        written = file_format.write(ensemble, metadata(ensemble, names))
    except ImportError as error:  # a package is too old for this PyTorch
        upgrade = f"pip install --upgrade {' '.join(file_format.packages)}"
        raise UserError(f"the format {options.format} needs newer packages ({error}): {upgrade}") from None
    difference = largest_difference(ensemble, file_format.read(written), images)
    if not difference <= TOLERANCE:
        found = f"its probabilities differ from PyTorch's by up to {difference:.1e}, more than {TOLERANCE:.0e}"
        raise UserError(f"{options.output} is not written: on {source} {found}; use the other --format")
    with files.atomic_write(options.output, "the file") as file:
        file.write(written)

    averaged = f" ({options.average} averaged)" if len(paths) > 1 else ""
    print(f"{options.output}: {', '.join(names)}{averaged}, {len(written) / 1e6:.1f} MB")
    print(f"largest difference from PyTorch: {difference:.1e}, on {len(images):,} {source}")
    return 0


def parse_flags() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--output", type=Path, help="the file to write (required)")
    parser.add_argument("--format", choices=FORMATS, help="(default: the extension of --output)")
    members.add_flags(parser, device=False)
    tested = parser.add_mutually_exclusive_group()
    tested.add_argument("--data", help="compare on its test images (default: the first member's data set)")
    tested.add_argument("--random", action="store_true", help="compare on random images instead")
    parser.add_argument("--images", type=int, default=256, help="number of images to compare on (default: 256)")
    options = parser.parse_args()
    if not options.output:  # argparse's "required" would hide an unknown flag
        parser.error("--output is missing; give the file to write, such as ensemble.onnx")
    extensions = tuple(f".{name}" for name in FORMATS)
    options.format = options.format or options.output.suffix.lower().removeprefix(".")
    if options.format not in FORMATS:
        expected = f"expected one of {', '.join(extensions)}, or give --format"
        raise UserError(f"--output {options.output}: unknown extension; {expected}")
    files.check_output(options.output, extensions)
    members.check_range("--images", options.images, 1, MAX_IMAGES)
    return options


def require(name: str) -> Format:
    """The format of this name. Raises UserError if a package that it needs is missing."""
    if missing := [package for package in FORMATS[name].packages if importlib.util.find_spec(package) is None]:
        packages = f"package{'s' if len(missing) > 1 else ''} {', '.join(missing)}"
        raise UserError(f"the format {name} needs the {packages}: pip install {' '.join(missing)}")
    return FORMATS[name]


def pick_images(data: dict[str, Any], options: argparse.Namespace) -> tuple[Tensor, str]:
    """Images to compare on, uint8 (N, 3, S, S), and a name for them. `data`: "data" of the first member's checkpoint.

    They are random if the data set of the first member is not available. Raises UserError if that of --data is not.
    """
    size, rng = data["image_size"], np.random.default_rng(0)
    if not options.random:
        source = options.data or data["source"]
        split = {name: data["split"][name] for name in ("split_seed", "test_split") if name in data["split"]}
        try:
            test = dataset.load(source, image_size=size, **split, download=bool(options.data)).test
            rows = rng.permutation(len(test))[: options.images]  # the images of folders are sorted by class
            return torch.from_numpy(test.images[rows]), f"test images of {source}"
        except UserError as error:
            if options.data:
                raise
            print(f"warning: comparing on random images; the test images are not available: {error}", file=sys.stderr)
    return torch.from_numpy(rng.integers(0, 256, (options.images, 3, size, size), np.uint8)), "random images"


def metadata(ensemble: Ensemble, names: list[str]) -> dict[str, str]:
    """The metadata of a file."""
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


def exported_program(ensemble: Ensemble) -> torch.export.ExportedProgram:
    """The exported graph, for any batch size. From an example batch of 1, PyTorch would fix the batch size to 1."""
    example = torch.zeros(2, 3, ensemble.image_size, ensemble.image_size, dtype=torch.uint8)
    return torch.export.export(ensemble, (example,), dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1)}})


def write_onnx(ensemble: Ensemble, about: dict[str, str]) -> bytes:
    with warnings.catch_warnings(action="ignore"):
        program = torch.onnx.export(
            exported_program(ensemble), input_names=["images"], output_names=["probs"], verbose=False
        )
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
        torch.export.save(exported_program(ensemble), buffer, extra_files=about)
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
    """The largest difference between two probabilities, on one image and on all in batches; NaN if one is NaN."""
    batches = images[:1], *images.split(BATCH_SIZE)
    return torch.stack([(predict(batch) - ensemble(batch)).abs().max() for batch in batches]).max().item()


if __name__ == "__main__":
    errors.run(main)
