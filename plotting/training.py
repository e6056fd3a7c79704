"""The plot of a training run: loss, accuracy and learning rate against the epoch.

python -m plotting.training plots/densenet.csv    # draws plots/densenet.png again
python -m plotting.training plots/*.csv --output runs.png    # draws the test results of several runs in one plot
With --reference, other runs are drawn dashed and pale: one for each CSV, in the same order.
"""

import textwrap
from collections.abc import Sequence
from pathlib import Path

from common import errors, files
from common.command_line import Parser
from common.errors import UserError
from common.text import duration, pluralize

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from plotting.style import BLUE, GRAY, GREEN, VERMILLION, label_log_axis, line_style, saves_png, shorten

SPLITS = {"train": ("train", BLUE), "val": ("validation", GREEN), "test": ("test", VERMILLION)}


@saves_png
def plot_training(
    history: list[dict],
    *,
    title: str,
    averaged: bool = False,
    reference: list[dict] | None = None,
    reference_name: str | Path = "",
) -> Figure:
    """Plot one run: loss, accuracy and learning rate against the epoch.

    `history` has one dict per epoch, at least one (see training/history.py). `averaged`: the test results are those of
    the EMA. With validation images, the best epoch is marked, and the legend has its results instead of the last
    epoch's. `reference` is the history of another run, drawn dashed and pale; `reference_name` is its file.
    """
    history, reference = _in_percent(history), _in_percent(reference or [])
    figure = Figure(figsize=(12.4, 4.9))
    figure.suptitle(f"{shorten(title, 60)} · {_summary(history)}")
    loss_axes, accuracy_axes, rate_axes = figure.subplots(1, 3)

    kept = max(history, key=lambda row: row.get("val_accuracy", row["epoch"]))  # of equally accurate epochs, the first
    for axes, quantity, fmt in ((loss_axes, "loss", "{:.3f}"), (accuracy_axes, "accuracy", "{:.2f} %")):
        for split, (name, color) in SPLITS.items():
            key = f"{split}_{quantity}"
            if key not in history[0]:
                continue
            shown = f"{name} (EMA)" if averaged and split != "train" else name
            label = f"{shown} {fmt.format(kept[key])}"
            if reference and split != "val":
                label += f" (reference {fmt.format(reference[-1][key])})"
                _draw_reference(axes, reference, history, key, color=color)
            _draw(axes, history, key, color=color, label=label)
        if kept is not history[-1]:
            axes.axvline(kept["epoch"], color=GRAY, linestyle="-.", label=f"epoch {kept['epoch']} is kept")
    _draw(rate_axes, history, "learning_rate", color=GRAY, label="this run")
    if reference:
        _draw_reference(rate_axes, reference, history, "learning_rate", color=GRAY, label="reference")
        figure.supxlabel(_reference_note([reference], [history], [reference_name]), color=GRAY)

    _label(figure)
    for axes in figure.axes if reference else (loss_axes, accuracy_axes):
        # Above the axes, so that it hides no curve.
        axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1), borderaxespad=0.2)
    return figure


@saves_png
def plot_runs(
    histories: Sequence[list[dict]],
    *,
    names: Sequence[str],
    references: Sequence[list[dict]] = (),
    reference_names: Sequence[str | Path] = (),
) -> Figure:
    """Plot several runs together: test loss, test accuracy and learning rate against the epoch.

    `references`, if given, are the histories of other runs, one for each run; `reference_names` are their files.
    """
    histories, references = ([_in_percent(history) for history in runs] for runs in (histories, references))
    figure = Figure(figsize=(12.4, 4.9 + 0.28 * len(names)))
    axes_of = dict(zip(("test_loss", "test_accuracy", "learning_rate"), figure.subplots(1, 3), strict=True))
    for number, (history, name) in enumerate(zip(histories, names, strict=True)):
        last = history[-1]
        result = f"test accuracy {last['test_accuracy']:.2f} %, loss {last['test_loss']:.3f} in the last epoch"
        label = f"{shorten(name, 40)}: {result} · {_summary(history)}"
        for key, axes in axes_of.items():
            _draw(axes, history, key, label=label, **line_style(number))
    figure.legend(handles=figure.axes[0].lines, loc="outside upper center")
    for number, (reference, history) in enumerate(zip(references, histories, strict=bool(references))):
        for key, axes in axes_of.items():
            _draw_reference(axes, reference, history, key, color=line_style(number)["color"])
    if references:
        figure.supxlabel(_reference_note(references, histories, reference_names), color=GRAY)
    _label(figure, prefix="test ")
    return figure


def _label(figure: Figure, *, prefix: str = "") -> None:
    """Set labels, scales and ticks of the three axes."""
    loss_axes, accuracy_axes, rate_axes = figure.axes
    losses = loss_axes.dataLim
    is_log = losses.y1 >= 10 * losses.minposy  # below a factor of 10, a linear axis is easier to read
    if is_log:
        loss_axes.set_yscale("log")
        label_log_axis(loss_axes.yaxis)
    loss_axes.set_ylabel(f"{prefix}loss (nats{', log scale' if is_log else ''})")
    accuracy_axes.set_ylabel(f"{prefix}accuracy (%)")
    rate_axes.set_ylabel("learning rate")
    rate_axes.set_ylim(bottom=0)
    for axes in figure.axes:
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=(1, 2, 5, 10), integer=True, min_n_ticks=1))


def _in_percent(history: list[dict]) -> list[dict]:
    """The same history, with accuracies in percent."""
    return [row | {key: 100 * row[key] for key in row if key.endswith("accuracy")} for row in history]


def _draw(axes: Axes, history: list[dict], key: str, **line: str | float | None) -> None:
    """Draw one line. With 20 epochs or fewer, each epoch has a marker."""
    epochs, values = [row["epoch"] for row in history], [row[key] for row in history]
    axes.plot(epochs, values, **{"marker": "o" if len(history) <= 20 else None, "linewidth": 2, "zorder": 3} | line)


def _draw_reference(axes: Axes, reference: list[dict], history: list[dict], key: str, **line: str) -> None:
    """Draw the reference dashed up to the run's last epoch; if it is longer, its final test result as a dotted line."""
    rows = [row for row in reference if row["epoch"] <= history[-1]["epoch"]]
    pale = line | {"alpha": 0.6, "linewidth": 1.5, "zorder": 2}
    _draw(axes, rows, key, linestyle="--", **pale)
    if len(rows) < len(reference) and key.startswith("test"):
        axes.axhline(reference[-1][key], linestyle=":", **pale)


def _reference_note(
    references: Sequence[list[dict]], histories: Sequence[list[dict]], names: Sequence[str | Path]
) -> str:
    """The meaning of dashed and dotted lines. Two folders and the file name identify a reference."""
    paths = [Path(*Path(name).parts[-3:]).as_posix() for name in names]
    named = [f"{shorten(path, 60)} · {_summary(rows)}" for path, rows in zip(paths, references, strict=True)]
    is_longer = any(len(rows) > len(history) for rows, history in zip(references, histories, strict=True))
    note = "dashed: reference" + is_longer * "; dotted: its test result after the last epoch"
    return textwrap.fill(f"{note} ({', '.join(named)})", 130)


def _summary(history: list[dict]) -> str:
    """The length of a run: "200 epochs, 13.4 h"."""
    return f"{pluralize(len(history), 'epoch')}, {duration(sum(row['seconds'] for row in history))}"


def main() -> int:
    from training.history import read_csv  # only here: as a library, plotting/ does not import training/

    parser = Parser(__doc__)
    parser.add_argument("histories", nargs="+", type=Path, metavar="CSV", help="written by a training script")
    parser.add_argument("--reference", nargs="+", type=Path, metavar="CSV", default=[], help="one for each CSV")
    parser.add_argument("--output", type=Path, help="the plot (default: next to the CSV, with its name, or runs.png)")
    options = parser.parse_args()
    first = options.histories[0]
    default = first.with_suffix(".png") if len(options.histories) == 1 else first.with_name("runs.png")
    output = options.output or default
    files.check_output(output, (".png",))
    histories, references = ([read_csv(path) for path in paths] for paths in (options.histories, options.reference))
    if references and len(references) != len(histories):
        raise UserError(f"--reference has {len(references)} files for {len(histories)} runs; give one for each run")
    if len(histories) == 1:
        reference, name = [*references, None][0], [*options.reference, ""][0]
        plot_training(output, histories[0], title=output.stem, reference=reference, reference_name=name)
    else:
        names = [path.stem for path in options.histories]
        plot_runs(output, histories, names=names, references=references, reference_names=options.reference)
    print(output)
    return 0


if __name__ == "__main__":
    errors.run(main)
