"""The logits of trained networks for a test set, computed once and then cached beside the checkpoint."""

import functools
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import files
from common.device import explain_out_of_memory
from common.errors import UserError

import numpy as np
import torch
from torch import Tensor

import models
from evaluation.members import build_member, check_finite
from utils import eval_batch_size, predict

CACHE = ".logits"  # the folder beside the checkpoints
CACHE_VERSION = 2  # goes up when the same checkpoint and images would give other logits than before


def member_logits(
    contents: Sequence[tuple[Path, dict[str, Any]]],
    images: Tensor,
    device: torch.device,
    *,
    precision: str = "float32",
    mirrored: bool = False,
    batch_size: int | None = None,
    cached: bool = True,
) -> tuple[Tensor, list[float]]:
    """Logits, float32 (M, V, N, C), of M checkpoints for V views of `images`, uint8 (N, 3, H, W).

    With them, each member's milliseconds for an image, all views together, when they were computed. `contents` are
    paths and what `checkpoint.read` gave for them. The views are the image and, where `mirrored`, its mirror image.
    With `cached`, logits come from the cache where it has them, and that network is not even built. Raises UserError
    where they are not finite.
    """
    images_digest = hashlib.sha256(repr(tuple(images.shape)).encode())
    images_digest.update(images.numpy())
    asked = images_digest.hexdigest(), device, precision
    members, milliseconds = [], []
    for path, content in contents:
        views = [
            view_logits(path, content, images, *asked, mirrored=view, batch_size=batch_size, cached=cached)
            for view in ((False, True) if mirrored else (False,))
        ]
        members.append(torch.stack([logits for logits, _ in views]))
        milliseconds.append(1000 * sum(seconds for _, seconds in views) / len(images))
    return torch.stack(members), milliseconds


def view_logits(
    path: Path,
    content: dict[str, Any],
    images: Tensor,
    images_digest: str,
    device: torch.device,
    precision: str,
    *,
    mirrored: bool,
    batch_size: int | None,
    cached: bool,
) -> tuple[Tensor, float]:
    """Logits, float32 (N, C), of one checkpoint for one view of images whose digest is `images_digest`.

    And how many seconds they took, a first batch to warm up left aside.
    """
    kept = cache_path(path.parent, content["digest"], images_digest, device, precision, mirrored)
    if cached and (found := read_cache(kept, len(images), len(content["data"]["classes"]))) is not None:
        return found
    member = build_member(path, content).to(device, memory_format=torch.channels_last)
    batch_size = batch_size or eval_batch_size(images, device)
    with explain_out_of_memory(batch_size):
        network = (lambda batch: member(batch.flip(3))) if mirrored else member
        predict(network, images[:batch_size], device, precision=precision)
        started = time.perf_counter()
        logits = predict(network, images, device, precision=precision, batch_size=batch_size, label=path.stem)
        seconds = time.perf_counter() - started
    check_finite(path, logits)
    if cached:
        write_cache(kept, logits, seconds)
    else:
        kept.unlink(missing_ok=True)  # --no-cache also removes the entry it distrusts
    return logits, seconds


def cache_path(
    folder: Path, digest: str, images_digest: str, device: torch.device, precision: str, mirrored: bool
) -> Path:
    """The cache file, named by a hash of everything that determines the logits."""
    decisive = {
        "version": CACHE_VERSION,
        "checkpoint": digest,
        "images": images_digest,
        "mirrored": mirrored,
        "device": device.type,
        "precision": precision,
        "sources": sources(),
        "torch": str(torch.__version__),
    }
    name = hashlib.sha256(json.dumps(decisive).encode()).hexdigest()
    return folder / CACHE / f"{name[:32]}.npz"


@functools.cache
def sources() -> str:
    """A digest of models/*.py, the code that turns a checkpoint and images into logits."""
    digest = hashlib.sha256()
    for path in sorted(Path(models.__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def read_cache(path: Path, images: int, classes: int) -> tuple[Tensor, float] | None:
    """The logits kept at `path` and the seconds they took, or None where there are none or they are damaged."""
    try:
        with np.load(path) as kept:
            logits, seconds = kept["logits"], float(kept["seconds"])
        if logits.dtype != np.float32 or logits.shape != (images, classes) or not np.isfinite(logits).all():
            raise ValueError(f"found {logits.dtype} {logits.shape}, expected finite float32 {(images, classes)}")
        return torch.from_numpy(logits), seconds
    except FileNotFoundError:
        return None
    except Exception as error:  # a damaged zip file fails in more ways than numpy and zipfile list
        print(f"warning: {path} is damaged ({error}) and is computed again", file=sys.stderr)
        return None


def write_cache(path: Path, logits: Tensor, seconds: float) -> None:
    try:
        with files.replacing(path, "the members' logits", shared=True) as file:
            np.savez(file, logits=logits.numpy(), seconds=seconds)
    except UserError as error:
        print(f"warning: {error}. Until then every analysis computes them again", file=sys.stderr)
