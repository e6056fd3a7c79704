"""The logits of trained networks for test images, computed once and then cached next to the checkpoint."""

import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any

from common import files
from common.device import explain_out_of_memory
from common.errors import UserError

import numpy as np
import torch
from torch import Tensor

import models
from evaluation.members import Contents, build_member, check_finite
from utils import eval_batch_size, predict

CACHE = ".logits"  # the folder next to the checkpoints
CACHE_VERSION = 3  # increase it when the same checkpoint and images would give other logits than before
WARM_UP_IMAGES = 32


def member_logits(
    contents: Contents,
    images: Tensor,
    device: torch.device,
    *,
    precision: str = "float32",
    flip: bool = False,
    batch_size: int | None = None,
    cached: bool = True,
) -> tuple[Tensor, list[float]]:
    """Logits, float32 (M, V, N, C), of M checkpoints for V views of `images`, uint8 (N, 3, H, W).

    Also returns the milliseconds per image, for all views together, that each member took. The views are the image and,
    with `flip`, its horizontal flip. With `cached`, logits are read from the cache if they are there; without, they are
    computed again and deleted from the cache. Raises UserError if logits are not finite.
    """
    batch_size = batch_size or eval_batch_size(images, device)
    sources = b"".join(path.read_bytes() for path in sorted(Path(models.__file__).parent.glob("*.py")))
    # Everything that determines the logits or their time, except for the checkpoint and the view. Changes outside
    # models/ need a new CACHE_VERSION.
    setting = {
        "version": CACHE_VERSION,
        "images": (tuple(images.shape), hashlib.sha256(images.numpy()).hexdigest()),
        "hardware": torch.cuda.get_device_name() if device.type == "cuda" else (device.type, torch.get_num_threads()),
        "precision": precision,
        "batch_size": batch_size,
        "sources": hashlib.sha256(sources).hexdigest(),
        "torch": str(torch.__version__),
    }
    members, milliseconds = [], []
    for path, content in contents:
        views = []
        for flipped in (False, True) if flip else (False,):
            key = json.dumps(setting | {"checkpoint": content["digest"], "flipped": flipped})
            cache = path.parent / CACHE / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npz"
            view = read_cache(cache) if cached else None
            if view is None:
                pixels = images.flip(3) if flipped else images
                view = compute(path, content, pixels, device, precision=precision, batch_size=batch_size)
                if cached:
                    write_cache(cache, *view)
                else:
                    cache.unlink(missing_ok=True)
            views.append(view)
        members.append(torch.stack([logits for logits, _ in views]))
        milliseconds.append(1000 * sum(seconds for _, seconds in views) / len(images))
    return torch.stack(members), milliseconds


def compute(
    path: Path, content: dict[str, Any], images: Tensor, device: torch.device, *, precision: str, batch_size: int
) -> tuple[Tensor, float]:
    """Logits of one checkpoint, float32 (N, C), and the seconds they took, without the warm-up batch."""
    member = build_member(path, content).to(device, memory_format=torch.channels_last)
    with explain_out_of_memory(batch_size):
        # On a GPU, the first batch also loads the kernels and allocates the memory.
        warm_up = images[: batch_size if device.type == "cuda" else WARM_UP_IMAGES]
        predict(member, warm_up, device, precision=precision, batch_size=batch_size)
        started = time.perf_counter()
        logits = predict(member, images, device, precision=precision, batch_size=batch_size, label=path.stem)
        seconds = time.perf_counter() - started
    check_finite(path, logits)
    return logits, seconds


def read_cache(path: Path) -> tuple[Tensor, float] | None:
    """Logits and the seconds they took, or None if `path` does not exist or is damaged."""
    try:
        with np.load(path) as stored:  # a zip file, with a checksum of each array
            return torch.from_numpy(stored["logits"]), float(stored["seconds"])
    except FileNotFoundError:
        return None
    except Exception as error:  # numpy and zipfile raise many exception types for a damaged file
        print(f"warning: {path} is damaged ({error}); its logits are computed again", file=sys.stderr)
        return None


def write_cache(path: Path, logits: Tensor, seconds: float) -> None:
    try:
        with files.atomic_write(path, "the members' logits", shared=True) as file:
            np.savez(file, logits=logits.numpy(), seconds=seconds)
    except UserError as error:
        print(f"warning: {error}. Until then they are computed again each time", file=sys.stderr)
