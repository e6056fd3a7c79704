"""The checkpoint of a run: one file that describes itself, written atomically and checked when it is read.

`torch.save` writes a zip archive. The SHA-256 of its bytes is stored as the comment of the archive. So plain
`torch.load(path, weights_only=True)` can read the file, and `read` also detects truncated files and flipped bits.
"""

import contextlib
import hashlib
import importlib.metadata
import io
import platform
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import distributed, files
from common.errors import UserError, first_line

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from dataset import Dataset
from training.history import read_csv, write_csv
from training.messages import describe_network
from training.recipe import Recipe
from utils import MEAN, STD

if TYPE_CHECKING:
    from training.loop import Run

FORMAT = "cifar10-ensemble checkpoint"
VERSION = 6  # versions 1 to 5 had other recipes: their weights can be used, but their runs cannot be resumed
DIGEST_PREFIX = b"sha256:"
COMMENT_LENGTH = len(DIGEST_PREFIX) + 64
ADVICE = "train again, or use another copy"
REQUIRED_KEYS = ("network", "model", "chosen", "finished", "recipe", "data", "history", "training")


def write(path: str | Path, content: dict[str, Any]) -> None:
    """Write tensors and plain values to `path`, atomically. Raises UserError if the file cannot be written."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, "version": VERSION, **content}, buffer)
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.comment = bytes(COMMENT_LENGTH)  # the place of the digest
    body = buffer.getbuffer()[:-COMMENT_LENGTH]
    with files.atomic_write(path, "the checkpoint") as file:
        file.write(body)
        file.write(DIGEST_PREFIX + hashlib.sha256(body).hexdigest().encode())


def read(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU: only tensors and plain values. No code in the file is executed.

    Returns the dict of `make_content` (with at least the `REQUIRED_KEYS`), and the stored SHA-256 as "digest".

    Raises UserError for a file that is missing, unreadable, truncated, damaged, no checkpoint, or of a later version.
    """
    try:
        raw = Path(path).read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such checkpoint") from None
    except OSError as error:
        raise UserError(f"{path}: not readable ({error.strerror})") from None
    foreign = f"{path}: not a checkpoint of this project; train one with a training script"
    if not raw:
        raise UserError(f"{path}: the file is empty; {ADVICE}")
    body, comment = raw[:-COMMENT_LENGTH], raw[-COMMENT_LENGTH:]
    if not comment.startswith(DIGEST_PREFIX):
        raise UserError(f"{path}: truncated, its end is missing; {ADVICE}" if is_truncated(raw) else foreign)
    if hashlib.sha256(body).hexdigest().encode() != comment.removeprefix(DIGEST_PREFIX):
        raise UserError(f"{path}: damaged, its bytes do not match their SHA-256; {ADVICE}")
    try:
        content = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many exception types for malformed files
        raise UserError(f"{foreign} ({first_line(error)})") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT or type(content.get("version")) is not int:
        raise UserError(foreign)
    if (found := content["version"]) > VERSION:
        raise UserError(f"{path}: from a later version (format {found}, here {VERSION}); update this project")
    if missing := [name for name in REQUIRED_KEYS if name not in content]:
        raise UserError(f"{path}: not usable, {missing[0]} is missing; {ADVICE}")
    return content | {"digest": comment.removeprefix(DIGEST_PREFIX).decode()}


@contextlib.contextmanager
def explain_unusable(path: str | Path) -> Iterator[None]:
    """Turn an error in the use of a checkpoint's content, such as weights of the wrong shape, into a UserError."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(line.strip() for line in str(error).splitlines()[:2]) or type(error).__name__
        if isinstance(error, KeyError):
            reason += " is missing"
        raise UserError(f"{path}: not usable ({reason}); {ADVICE}") from None


def is_truncated(raw: bytes) -> bool:
    """Whether a file begins like a zip archive but lacks its end."""
    # The last record of an archive: a signature, 16 bytes, the length of the comment in two bytes, the comment.
    end = raw.rfind(b"PK\5\6")
    is_whole = end >= 0 and len(raw) >= end + 22 + int.from_bytes(raw[end + 20 : end + 22], "little")
    return raw.startswith(b"PK\3\4") and not is_whole


def make_content(run: "Run", data: Dataset, recipe: Recipe) -> dict[str, Any]:
    """The content of the checkpoint: the network, its training, and everything that a resumed run needs."""
    last, tested = run.model.state_dict(), run.eval_model.state_dict()
    arguments = {"num_classes": len(data.classes), **recipe.network_arguments()}
    return {
        "network": {"name": recipe.network, "arguments": arguments},
        "model": run.best["model"] if run.best else tested,
        "chosen": {"epoch": run.best["epoch"] if run.best else run.epoch, "by": "val_accuracy" if run.best else "last"},
        "finished": run.epoch == recipe.epochs,
        "recipe": recipe.as_dict(),
        "data": {
            "source": data.source,
            "digest": data.digest,
            "classes": list(data.classes),
            "image_size": recipe.image_size,
            "mean": list(MEAN),
            "std": list(STD),
            "split": recipe.split_arguments(),
        },
        "history": run.history,
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "torchvision": importlib.metadata.version("torchvision"),  # importing torchvision would take a second
            "numpy": np.__version__,
        },
        "training": {
            # The last weights and their moving average; None if "model" is the same.
            "model": last if run.best or run.ema else None,
            "average": tested if run.best and run.ema else None,
            "best": {"epoch": run.best["epoch"], "accuracy": run.best["accuracy"]} if run.best else None,
            "optimizer": run.optimizer.state_dict()["state"],  # the recipe has the hyperparameters
            "epoch": run.epoch,
            "step": run.step,
            "totals": run.sums,
            "seconds": run.seconds,
        },
    }


def load_init_weights(model: nn.Module, recipe: Recipe, classes: Sequence[str]) -> str:
    """Load the weights of --init into a new model. If the classes differ, the classifier keeps its random weights.

    Returns a line for the user. Raises UserError for a checkpoint of another network.
    """
    content = read(recipe.init)
    with explain_unusable(recipe.init):
        name, sizes = content["network"]["name"], dict(content["network"]["arguments"])
        num_classes = sizes.pop("num_classes")
        if (name, sizes) != (recipe.network, recipe.network_arguments()):
            expected = describe_network(recipe.network, recipe.network_arguments())
            raise UserError(f"--init {recipe.init} holds {describe_network(name, sizes)}, not {expected}")
        weights, message = dict(content["model"]), f"starting from the weights of {recipe.init}"
        if content["data"]["classes"] != list(classes):
            weights |= {name: value for name, value in model.state_dict().items() if name.startswith("classifier.")}
            message += f", with a new classifier for {len(classes)} classes: they differ from its {num_classes}"
        model.load_state_dict(weights)
    return message


def copy_to_host(value: Any) -> Any:
    """Copy nested dicts and lists, with every tensor copied to the CPU."""
    copies = tree_map_only(Tensor, lambda x: x.detach().to("cpu", copy=True, non_blocking=x.is_cuda), value)
    if torch.cuda.is_initialized():
        torch.cuda.current_stream().synchronize()  # one wait for hundreds of copies
    return copies


@contextlib.contextmanager
def previous_run(recipe: Recipe) -> Iterator[dict[str, Any] | None]:
    """The checkpoint to resume from, or None for a new run. Within the block it is locked against other runs.

    Raises UserError if a checkpoint exists but neither --resume nor --overwrite is given, if it has another recipe or
    an earlier version, if another run uses it, and as `check_files` does.
    """
    with contextlib.ExitStack() as locks:

        def lock_and_read() -> dict[str, Any] | None:
            if not recipe.dry_run:
                locks.enter_context(files.locked(recipe.checkpoint_path, "the checkpoint", wait=False))
            previous = read_previous_run(recipe) if recipe.resume else None
            check_files(recipe, previous)
            return previous

        yield distributed.from_main_process(lock_and_read)


def read_previous_run(recipe: Recipe) -> dict[str, Any] | None:
    path = recipe.checkpoint_path
    if not path.exists():
        print(f"{path}: there is no checkpoint to resume from; starting a new run", flush=True)
        return None
    content = read(path)
    if (found := content["version"]) < VERSION:
        raise UserError(
            f"{path} is from an earlier version (format {found}, here {VERSION}); train again with another --name"
        )
    if content["network"]["name"] != recipe.network:
        raise UserError(f"{path} holds a {content['network']['name']}, not a {recipe.network}; use another --name")
    if content["training"] is None:
        raise UserError(f"{path} has only the weights of a finished run; use --init {path} and another --name")
    trained, epochs = content["training"]["epoch"] + bool(content["training"]["step"]), content["recipe"]["epochs"]
    if recipe.is_given("epochs") and recipe.epochs != epochs:
        if recipe.epochs < trained:
            raise UserError(f"--epochs {recipe.epochs}: {path} is already in epoch {trained}; give at least that many")
        print(f"{recipe.epochs} epochs instead of {epochs}: the learning rate follows the new schedule")
    if differences := recipe.differences(content["recipe"]):
        lines = "\n  ".join([f"--resume: {path} was trained with another recipe:", *differences])
        raise UserError(f"{lines}\nRemove these flags, or start another run with --name or --overwrite")
    return content


def check_files(recipe: Recipe, previous: dict[str, Any] | None) -> None:
    """Raise UserError before the training, not after an epoch, if a file cannot be read or written."""
    if recipe.reference:
        read_csv(recipe.reference)
    if recipe.dry_run:
        return
    path = recipe.checkpoint_path
    if path.exists() and not (previous or recipe.overwrite):
        raise UserError(
            f"{path} already exists; --resume continues from it, --overwrite replaces it, another --name keeps it"
        )
    files.check_writable(recipe.checkpoint_dir, "the checkpoint")
    files.check_writable(recipe.plot_dir, "the plots")


class Saver:
    """Writes the checkpoint and the CSV, from the main process only.

    With `thread`, `save` copies the state, and the thread writes the copy while the next epoch is trained. Its error is
    raised by the next `save` or `wait`. An error says what was saved before.
    """

    def __init__(self, recipe: Recipe, thread: ThreadPoolExecutor | None):
        self.recipe, self.thread = recipe, thread
        self.pending: Future | None = None
        self.saved = "nothing of this run is saved"

    def restore(self, run: "Run", content: dict[str, Any]) -> None:
        """Restore a run's state from a checkpoint. Raises UserError if the content does not fit the run."""
        training = content["training"]
        with explain_unusable(self.recipe.checkpoint_path):
            run.model.load_state_dict(dict(training["model"] or content["model"]))
            if run.ema:
                run.ema.model.load_state_dict(dict(training["average"] or content["model"]))
            for number, state in run.optimizer.state_dict()["state"].items():
                for name, tensor in state.items():
                    tensor.copy_(training["optimizer"][number][name])
            run.history = content["history"]
            run.epoch, run.step = training["epoch"], training["step"]
            run.sums, run.seconds = training["totals"], training["seconds"]
            if training["best"]:
                run.best = training["best"] | {"model": content["model"]}
        self.saved = self.resume_hint(training)
        if run.history and distributed.is_main_process():  # the run may have been killed before it wrote the CSV
            write_csv(run.history, self.recipe.csv_path)

    def save(self, run: "Run", data: Dataset) -> None:
        self.wait()
        if not distributed.is_main_process():
            return
        content = make_content(run, data, self.recipe)
        if self.thread:
            self.pending = self.thread.submit(self.write_files, copy_to_host(content))
        else:
            self.write_files(content)

    def write_files(self, content: dict[str, Any]) -> None:
        recipe = self.recipe
        try:
            for folder in (recipe.checkpoint_dir, recipe.plot_dir):  # they existed at the start of the run
                if not Path(folder).is_dir():
                    raise UserError(f"{folder}: this folder was deleted during the run; create it again")
            write(recipe.checkpoint_path, content)
            self.saved = self.resume_hint(content["training"])
            if content["history"]:
                write_csv(content["history"], recipe.csv_path)
        except UserError as error:
            raise UserError(f"{error}; {self.saved}") from None

    def wait(self) -> None:
        if self.pending:
            self.pending.result()
            self.pending = None

    def resume_hint(self, training: dict[str, Any]) -> str:
        step = f" and step {training['step']} of the next" if training["step"] else ""
        return f"{self.recipe.checkpoint_path} holds epoch {training['epoch']}{step}; --resume continues from there"
