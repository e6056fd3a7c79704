"""One file that describes itself: written whole or not at all, read without trusting it.

The file is what `torch.save` writes, a zip archive, with the SHA-256 of all its bytes as the archive's comment. So
`torch.load(path, weights_only=True)` reads it too, while `read` also notices a cut or a flipped byte.
"""

import hashlib
import io
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import files
from errors import UserError, first_line
from models import NETWORKS

FORMAT = "cifar10-ensemble checkpoint"
VERSION = 3  # 1 and 2 had other recipes: their weights are good, but no run can go on from them
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

    Of what it returns, `EXPECTED` holds, and `RESUMABLE` too unless it is of an earlier version. It has the SHA-256 of
    what was read as "digest".

    Raises UserError for a file that is missing, unreadable, truncated, damaged, foreign, or of a later format, and for
    content that lacks something, has something of another kind, or contradicts itself.
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
        raise UserError(f"{foreign} ({first_line(error)})") from None
    if not is_dict(content) or content.get("format") != FORMAT or not is_count(content.get("version"), least=1):
        raise UserError(foreign)
    if content["version"] > VERSION:
        raise UserError(
            f"{path}: written by a later version of this project (format {content['version']}, this one reads up to "
            f"{VERSION}); update the project"
        )
    if problem := next(problems(content), None):
        raise unusable(path, problem)
    return content | {"digest": comment.removeprefix(MARK).decode()}


def unusable(path: str | Path, problem: str) -> UserError:
    return UserError(f"{path}: not usable, {problem}; train again, or take another copy")


def truncated(path: str | Path, raw: bytes) -> str | None:
    """A sentence where `raw` begins as a zip archive but does not end as a whole one."""
    if not raw.startswith(b"PK\3\4"):
        return None
    # The archive's last record: its mark, 16 bytes, the length of its comment in two bytes, the comment.
    end = raw.rfind(b"PK\5\6")
    if end >= 0 and len(raw) >= end + 22 + int.from_bytes(raw[end + 20 : end + 22], "little"):
        return None
    return f"{path}: truncated, the end of the file is missing; train again, or take another copy"


# ---------------------------------------------------------------------------------------- what a checkpoint must hold


@dataclass(frozen=True)
class Kind:
    """What a value must be: in words, and as a test."""

    words: str
    test: Callable[[Any], bool]

    def or_none(self) -> "Kind":
        return Kind(f"{self.words} or None", lambda value: value is None or self.test(value))


def is_dict(value: Any) -> bool:
    """A dict, or what `state_dict` returns, an OrderedDict, none of whose methods the file has put a value over."""
    return type(value) is dict or (type(value) is OrderedDict and vars(value).keys() <= {"_metadata"})


def is_dict_of(value: Any, name_test: Callable[[Any], bool], test: Callable[[Any], bool]) -> bool:
    return is_dict(value) and all(name_test(name) and test(part) for name, part in value.items())


def is_list_of(value: Any, test: Callable[[Any], bool]) -> bool:
    return type(value) is list and all(map(test, value))


def is_text(value: Any) -> bool:
    return type(value) is str and "\0" not in value


def is_count(value: Any, least: int = 0) -> bool:
    return type(value) is int and value >= least


def is_number(value: Any) -> bool:
    return type(value) is float and math.isfinite(value)


def is_setting(value: Any) -> bool:
    return value is None or type(value) in (bool, int) or is_number(value) or is_text(value)


def is_row(value: Any) -> bool:
    """Of a history: the epoch's number and what was measured."""
    return is_dict(value) and all(
        is_count(part) if name == "epoch" else is_text(name) and is_number(part) for name, part in value.items()
    )


def is_tensor(value: Any) -> bool:
    """A plain tensor as large as it says: one stretched out of a single number takes memory only when it is copied."""
    return (
        type(value) is Tensor
        and not vars(value)
        and (value.layout, value.device.type, value.is_nested) == (torch.strided, "cpu", False)
        and value.untyped_storage().nbytes() >= value.numel() * value.element_size()
    )


def is_weights(value: Any) -> bool:
    return is_dict_of(value, is_text, is_tensor)


TEXT = Kind("a text", is_text)
TEXTS = Kind("a list of texts", lambda value: is_list_of(value, is_text) and len(value) > 0)
FLAG = Kind("True or False", lambda value: type(value) is bool)
COUNT = Kind("a whole number, 0 or more", is_count)
SIZE = Kind("a whole number, 1 or more", lambda value: is_count(value, least=1))
SECONDS = Kind("a number, 0 or more", lambda value: is_number(value) and value >= 0)
PART = Kind("a number from 0 to 1", lambda value: is_number(value) and 0 <= value <= 1)
THREE = Kind("three numbers", lambda value: is_list_of(value, is_number) and len(value) == 3)
THREE_ABOVE_0 = Kind("three numbers above 0", lambda value: THREE.test(value) and min(value) > 0)
DICT = Kind("a dict", is_dict)
SETTINGS = Kind("a dict of plain values", lambda value: is_dict_of(value, is_text, is_setting))
ARGUMENTS = Kind(
    "a dict of numbers", lambda value: is_dict_of(value, is_text, lambda part: is_count(part) or is_number(part))
)
ROWS = Kind("a list of dicts of numbers", lambda value: is_list_of(value, is_row))
WEIGHTS = Kind("a dict of tensors", is_weights)
BUFFERS = Kind("a dict of dicts of tensors", lambda value: is_dict_of(value, is_count, is_weights))

EXPECTED = {
    "network.name": TEXT,
    "network.arguments": ARGUMENTS,
    "network.arguments.num_classes": SIZE,
    "model": WEIGHTS,  # the chosen ones
    "chosen.epoch": COUNT,
    "chosen.by": TEXT,
    "finished": FLAG,
    "recipe": SETTINGS,
    "recipe.epochs": SIZE,
    "data.source": TEXT,
    "data.digest": TEXT,
    "data.classes": TEXTS,
    "data.image_size": SIZE,
    "data.mean": THREE,
    "data.std": THREE_ABOVE_0,
    "data.split.split_seed": COUNT,
    "data.split.train_size": SIZE.or_none(),
    "data.split.val_size": COUNT,
    "data.split.test_size": SIZE.or_none(),
    "history": ROWS,  # one for each whole epoch
    "versions": SETTINGS,
    "training.epoch": COUNT,  # whole epochs done
}
# What a run needs to go on; engine.restore sees that it fits the network.
RESUMABLE = {
    "recipe.precision": Kind("float32 or bfloat16", lambda value: value in ("float32", "bfloat16")),
    "data.split.test_split": PART,
    "training.model": WEIGHTS.or_none(),
    "training.average": WEIGHTS.or_none(),
    "training.best": DICT.or_none(),
    "training.optimizer": BUFFERS,
    "training.step": COUNT,  # steps done of the epoch under way
    "training.totals": THREE.or_none(),  # of these steps: summed loss, hits, and how many they are
    "training.seconds": SECONDS,
}
BEST = {"training.best.epoch": SIZE, "training.best.accuracy": PART}


def problems(content: dict[str, Any]) -> Iterator[str]:
    """What is wrong with a checkpoint's content, in words; only the first can be told, the rest builds on it."""
    yield from missing(content, EXPECTED)
    network, data, recipe, training = (content[name] for name in ("network", "data", "recipe", "training"))
    if network["arguments"]["num_classes"] != len(data["classes"]):
        yield "network.arguments.num_classes is not the number of data.classes"
    if data["image_size"] != recipe.get("image_size"):
        yield "data.image_size is not that of recipe"
    for name, value in data["split"].items():
        if name not in recipe or recipe[name] != value:
            yield f"data.split.{name} is not that of recipe"
    epochs = [row.get("epoch") for row in content["history"]]
    if len(epochs) != training["epoch"] or epochs != list(range(1, len(epochs) + 1)):
        yield "history has not one row for each of the epochs that training.epoch counts"
    if training["epoch"] > recipe["epochs"] or content["finished"] != (training["epoch"] == recipe["epochs"]):
        yield "training.epoch, recipe.epochs and finished contradict one another"
    if content["version"] < VERSION:
        return
    yield from missing(content, RESUMABLE)
    if training["best"] is not None:
        yield from missing(content, BEST)
        if training["best"]["epoch"] > training["epoch"]:
            yield "training.best.epoch is above training.epoch"
    if (training["totals"] or [0.0, 0.0, 0.0])[2] != training["step"]:
        yield "training.totals is not that of training.step steps"


def missing(content: dict[str, Any], expected: dict[str, Kind]) -> Iterator[str]:
    """The dotted keys that are not there, or not of their kind."""
    for key, kind in expected.items():
        value = content
        for name in key.split("."):
            if not is_dict(value) or name not in value:
                yield f"{key} is missing"
            value = value[name]
        if not kind.test(value):
            yield f"{key} is not {kind.words}"


# ---------------------------------------------------------------------------------------------------------- its network


def build_model(path: str | Path, content: dict[str, Any]) -> nn.Module:
    """The network of a checkpoint that `read` returned, with its weights (not copies of them), in evaluation mode.

    Raises UserError where the weights are not those of the network that the file names, or not finite.
    """
    network = content["network"]
    if network["name"] not in NETWORKS:
        raise UserError(f"{path}: holds a network named {network['name']!r}; known are {', '.join(NETWORKS)}")
    foreign = f"{path}: its weights do not fit its {network['name']}: "
    try:
        with torch.device("meta"):  # takes no memory, however large the arguments say that it is
            model = NETWORKS[network["name"]](**network["arguments"])
    except (RuntimeError, TypeError, ValueError, ArithmeticError) as error:
        raise UserError(f"{foreign}{first_line(error)}") from None
    if difference := misfit(content["model"], model.state_dict()):
        raise UserError(f"{foreign}{difference}")
    if name := not_finite(content["model"]):
        raise UserError(f"{path}: its weights are not finite ({name}); train it again with a lower --base-lr")
    model.load_state_dict(dict(content["model"]), strict=True, assign=True)
    return model.eval()


def misfit(tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> str | None:
    """A sentence on the first difference in names, shapes and types."""
    for name, value in expected.items():
        if name not in tensors:
            return f"{name} is missing"
        if (tensors[name].dtype, tensors[name].shape) != (value.dtype, value.shape):
            found, wanted = (f"{tensor.dtype} of shape {tuple(tensor.shape)}" for tensor in (tensors[name], value))
            return f"{name} is {found} instead of {wanted}"
    return next((f"{name} is unknown to it" for name in tensors if name not in expected), None)


def not_finite(tensors: dict[str, Tensor]) -> str | None:
    """The name of the first tensor with a value that is not finite."""
    return next((name for name, value in tensors.items() if not value.isfinite().all()), None)
