"""One file that describes itself: written whole or not at all, read without trusting it.

The file is what `torch.save` writes, a zip archive, with the SHA-256 of all its bytes as the archive's comment. So
`torch.load(path, weights_only=True)` reads it too, while `read` also notices a cut or a flipped byte.
"""

import hashlib
import io
from pathlib import Path
from typing import Any

import torch
from torch import nn

import files
from errors import UserError
from models import NETWORKS

FORMAT = "cifar10-ensemble checkpoint"
VERSION = 1
MARK = b"sha256:"
COMMENT_LENGTH = len(MARK) + 64
# The last two bytes of a zip archive without a comment say that the comment's length is nought.
NO_COMMENT = b"\0\0"


def write(path: str | Path, content: dict[str, Any]) -> None:
    """Write tensors and plain values to `path`, replacing what was there in one step.

    Raises UserError where the file cannot be written; what was there before is then as it was.
    """
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, "version": VERSION, **content}, buffer)
    # Not getbuffer(): after an error its view and the buffer are one cycle, and Python 3.12.1 crashes collecting it.
    archive = memoryview(buffer.getvalue())
    if archive[-2:] != NO_COMMENT:
        raise RuntimeError("torch.save no longer ends its file as a zip archive without a comment")
    body = [archive[:-2], COMMENT_LENGTH.to_bytes(2, "little")]
    digest = hashlib.sha256()
    for part in body:
        digest.update(part)
    with files.replacing(path, "the checkpoint") as file:
        for part in body:
            file.write(part)
        file.write(MARK + digest.hexdigest().encode())


def read(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU: tensors and plain values only, nothing in the file is executed.

    Raises UserError for a file that is missing, unreadable, truncated, damaged, foreign, or of a later format.
    """
    try:
        raw = Path(path).read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such checkpoint") from None
    except OSError as error:
        raise UserError(f"{path}: not readable ({error.strerror})") from None
    foreign = f"{path}: not a checkpoint of this project; the training scripts write one"
    if not raw:
        raise UserError(f"{path}: the file is empty; train again, or take another copy")
    body, comment = raw[:-COMMENT_LENGTH], raw[-COMMENT_LENGTH:]
    if not comment.startswith(MARK):
        raise UserError(truncated(path, raw) or foreign)
    if hashlib.sha256(body).hexdigest().encode() != comment.removeprefix(MARK):
        raise UserError(f"{path}: damaged, its bytes do not match their digest; train again, or take another copy")
    try:
        content = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    except Exception as error:  # torch's reader trips over a made-up file in many ways
        raise UserError(f"{foreign} ({(str(error).splitlines() or [type(error).__name__])[0]})") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT or type(content.get("version")) is not int:
        raise UserError(foreign)
    if content["version"] > VERSION:
        raise UserError(
            f"{path}: written by a later version of this project (format {content['version']}, this one reads up to "
            f"{VERSION}); update the project"
        )
    return content


def truncated(path: str | Path, raw: bytes) -> str | None:
    """A sentence where `raw` begins as a zip archive but does not end as a whole one."""
    if not raw.startswith(b"PK\3\4"):
        return None
    # The archive's last record: its mark, 16 bytes, the length of its comment in two bytes, the comment.
    end = raw.rfind(b"PK\5\6")
    if end >= 0 and len(raw) >= end + 22 + int.from_bytes(raw[end + 20 : end + 22], "little"):
        return None
    return f"{path}: truncated, the end of the file is missing; train again, or take another copy"


def build_model(path: str | Path, content: dict[str, Any]) -> nn.Module:
    """The network of a checkpoint that `read` returned, with its weights, in evaluation mode.

    Raises UserError where the weights are not those of the network that the file names.
    """
    network = content["network"]
    if network["name"] not in NETWORKS:
        raise UserError(f"{path}: holds a network named {network['name']!r}; known are {', '.join(NETWORKS)}")
    try:
        model = NETWORKS[network["name"]](**network["arguments"])
        model.load_state_dict(content["model"], strict=True)
    except (RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{path}: its weights do not fit its {network['name']}: {error}") from None
    return model.eval()
