"""The history of a run, one row per epoch: as a CSV file, as a plot, and for TensorBoard."""

import csv
import io
from collections.abc import Callable
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
    """Write a run's history atomically, one row per epoch.

    The columns are `COLUMNS`, without the `OPTIONAL_COLUMNS` if there is no validation. Accuracies are fractions;
    `seconds` is the duration of the epoch with evaluation; `images_per_second` is the training speed without it.
    `read_csv` returns exactly the same numbers. Raises UserError if the file cannot be written.
    """
    columns = [name for name in COLUMNS if name not in OPTIONAL_COLUMNS or any(name in row for row in history)]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    with files.atomic_write(path, "the history") as file:
        file.write(text.getvalue().encode())


def read_csv(path: str | Path) -> list[dict]:
    """Read a history that `write_csv` wrote: one dict per epoch, `epoch` an int and everything else a float.

    Columns that are not in `COLUMNS` are ignored. Raises UserError for a file that is missing, unreadable or empty, and
    for a missing column or a cell that is not a number.
    """
    line = 1
    try:
        # utf-8-sig: a spreadsheet program may have added a byte order mark.
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            columns = [name for name in COLUMNS if name in (reader.fieldnames or [])]
            if missing := set(COLUMNS) - set(OPTIONAL_COLUMNS) - set(columns):
                raise ValueError(f"no column {', '.join(sorted(missing))}")
            history = []
            for row in reader:
                line = reader.line_num
                if None in row or None in row.values():
                    raise ValueError("the number of cells differs from the first line")
                history.append({name: int(row[name]) if name == "epoch" else float(row[name]) for name in columns})
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); expected the CSV file of a run") from None
    except (ValueError, csv.Error) as error:
        raise UserError(f"{path}, line {line}: {error}; expected a CSV file of the training scripts") from None
    if not history:
        raise UserError(f"{path}: has no epochs; expected one line per epoch after the first line")
    return history


def plot_history(history: list[dict], recipe: Recipe) -> None:
    """Plot a run, with the run of --reference in the background."""
    from plotting.training import plot_training  # not at the top: only the main process needs matplotlib

    reference = read_csv(recipe.reference) if recipe.reference else None
    plot_training(
        recipe.plot_path, history, title=recipe.name, averaged=recipe.ema_horizon > 0,
        reference=reference, reference_name=recipe.reference or "",
    )  # fmt: skip


def tensorboard(recipe: Recipe, epochs_done: int) -> Callable[[dict[str, Any]], None]:
    """A function that writes an epoch's row for TensorBoard; without --tensorboard it does nothing."""
    if not recipe.tensorboard or recipe.dry_run or not distributed.is_main_process():
        return lambda row: None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs the package tensorboard: pip install tensorboard") from None
    writer = SummaryWriter(Path(recipe.plot_dir, "tensorboard", recipe.name), purge_step=epochs_done + 1)

    def write(row: dict[str, Any]) -> None:
        for name, value in row.items():
            if name != "epoch":
                writer.add_scalar(name, value, row["epoch"])
        writer.flush()

    return write
