"""The history of a run, one row for each epoch: as a CSV file, as a plot, and for TensorBoard."""

import contextlib
import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import distributed, files
from common.errors import UserError

from training.recipe import Recipe

COLUMNS = (
    "epoch", "learning_rate", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "val_loss", "val_accuracy",
    "seconds", "images_per_second",
)  # fmt: skip
OPTIONAL_COLUMNS = ("val_loss", "val_accuracy")


def write_csv(history: list[dict], path: str | Path) -> None:
    """Write a run's history atomically, one row an epoch.

    The columns are `COLUMNS`, without the validation's if the history has none. Accuracies are fractions; `seconds` is
    the epoch's duration, evaluation included; `images_per_second` is the training speed, evaluation excluded.
    `read_csv` gives back exactly the same numbers. Raises UserError if the file cannot be written.
    """
    columns = [name for name in COLUMNS if name not in OPTIONAL_COLUMNS or any(name in row for row in history)]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    with files.atomic_write(path, "the history") as file:
        file.write(text.getvalue().encode())


def read_csv(path: str | Path) -> list[dict]:
    """Read a history that `write_csv` wrote: one dict an epoch, `epoch` an int and everything else a float.

    Columns that are not in `COLUMNS` are ignored. Raises UserError for a file that is missing, unreadable, without
    epochs or without a column, and for a cell that is not a number.
    """
    line = 1
    try:
        # utf-8-sig: a spreadsheet may have put a byte order mark before the first column's name.
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            columns = [name for name in COLUMNS if name in (reader.fieldnames or [])]
            if missing := set(COLUMNS) - set(OPTIONAL_COLUMNS) - set(columns):
                raise ValueError(f"no column {', '.join(sorted(missing))}")
            history = []
            for row in reader:
                line = reader.line_num
                if None in row or None in row.values():
                    raise ValueError("not as many cells as in the first line")
                history.append({name: int(row[name]) if name == "epoch" else float(row[name]) for name in columns})
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); expected the CSV file of a run") from None
    except (ValueError, csv.Error) as error:
        raise UserError(f"{path}, line {line}: {error}; expected a history as the training scripts write it") from None
    if not history:
        raise UserError(f"{path}: has no epochs; expected one line for each below the first")
    return history


def plot_history(history: list[dict], recipe: Recipe) -> None:
    """Draw a run, and behind it that of --reference."""
    from plotting.training import plot_training  # it loads matplotlib, which only the main process needs

    reference = read_csv(recipe.reference) if recipe.reference else None
    plot_training(
        recipe.plot_path, history, title=recipe.name, averaged=recipe.ema_horizon > 0,
        reference=reference, reference_name=recipe.reference or "",
    )  # fmt: skip


@contextlib.contextmanager
def tensorboard(recipe: Recipe, epochs_done: int) -> Iterator:
    """A function that writes an epoch's row for TensorBoard; without --tensorboard it does nothing."""
    if not recipe.tensorboard or recipe.dry_run or not distributed.is_main_process():
        yield lambda row: None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs the package tensorboard: pip install tensorboard") from None
    with SummaryWriter(Path(recipe.plot_dir, "tensorboard", recipe.name), purge_step=epochs_done + 1) as writer:

        def write(row: dict[str, Any]) -> None:
            for name, value in row.items():
                if name != "epoch":
                    writer.add_scalar(name, value, row["epoch"])
            writer.flush()

        yield write
