"""The picture of a training run: loss, accuracy and learning rate against the epoch."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator, NullFormatter

from plotting.style import BLUE, DPI, GREEN, GREY, VERMILLION, picture, short

SPLITS = {"train": ("train", BLUE), "val": ("validation", GREEN), "test": ("test", VERMILLION)}


@picture
def plot_training(
    history: list[dict], *, title: str, reference: list[dict] | None = None, reference_name: str | Path = ""
) -> Figure:
    """Draw a run: loss, accuracy and learning rate against the epoch.

    `history` has a dict for each epoch, at least one, as training/history.py describes it. `reference` is another
    run's, drawn dashed and pale behind, and `reference_name` its file.
    """
    if not history:
        raise ValueError("a run without epochs has nothing to draw")
    figure = Figure(figsize=(12.4, 4.9), dpi=DPI, layout="constrained")
    figure.suptitle(f"{short(title, 60)} · {_summary(history)}", fontsize=15)
    loss_axes, accuracy_axes, rate_axes = figure.subplots(1, 3)

    for axes, quantity, form, scale in ((loss_axes, "loss", "{:.3f}", 1), (accuracy_axes, "accuracy", "{:.2f} %", 100)):
        for split, (name, colour) in SPLITS.items():
            key = f"{split}_{quantity}"
            if key not in history[0]:
                continue
            label = f"{name} {form.format(scale * history[-1][key])}"
            if reference and split != "val":
                label += f" (reference {form.format(scale * reference[-1][key])})"
                _draw_reference(axes, reference, history, key, scale, colour)
            _draw_run(axes, history, key, scale, colour, label)
    _draw_run(rate_axes, history, "learning_rate", 1, GREY, "this run")
    if reference:
        _draw_reference(rate_axes, reference, history, "learning_rate", 1, GREY, "reference")
        note = f"dashed: reference {_tail(reference_name)} · {_summary(reference)}"
        if reference[-1]["epoch"] > history[-1]["epoch"]:
            note += f"; dotted: its test result after epoch {reference[-1]['epoch']}"
        figure.supxlabel(note, fontsize=12, color=GREY)

    loss_axes.set_ylabel("loss (nats, log scale)" if _scale_loss(loss_axes) else "loss (nats)")
    accuracy_axes.set_ylabel("accuracy (%)")
    rate_axes.set_ylabel("learning rate")
    highest = max(max(line.get_ydata()) for line in rate_axes.lines) or 1.0  # a schedule may end at 0, in one epoch
    rate_axes.set_ylim(-0.03 * highest, 1.05 * highest)
    last = history[-1]["epoch"]
    margin = max(0.5, 0.02 * last)
    for axes in (loss_axes, accuracy_axes, rate_axes):
        axes.set_xlabel("epoch")
        axes.set_xlim(history[0]["epoch"] - margin, last + margin)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=(1, 2, 5, 10), integer=True, min_n_ticks=1))
        if axes is not rate_axes or reference:
            # Above the axes, where no curve can run behind it.
            axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1), frameon=False, borderaxespad=0.2)
    return figure


def _draw_run(axes: Axes, history: list[dict], key: str, scale: float, colour: str, label: str) -> None:
    """One line of the run, its epochs marked while they are few."""
    values = [scale * row[key] for row in history]
    marker = "o" if len(history) <= 20 else None
    axes.plot(
        [row["epoch"] for row in history], values, color=colour, marker=marker, linewidth=2, label=label, zorder=3
    )


def _draw_reference(
    axes: Axes,
    reference: list[dict],
    history: list[dict],
    key: str,
    scale: float,
    colour: str,
    label: str | None = None,
) -> None:
    """The reference's line, dashed, over the epochs of the run.

    A reference of more epochs is cut where the run ends, or a short run would be squeezed to the left edge. Where it
    ended is what a short run is compared with: a dotted horizontal line.
    """
    last = history[-1]["epoch"]
    shown = [row for row in reference if row["epoch"] <= last]
    axes.plot(
        [row["epoch"] for row in shown],
        [scale * row[key] for row in shown],
        color=colour,
        alpha=0.6,
        linestyle=(0, (3, 1.5)),
        linewidth=1.5,
        marker="s" if len(shown) == 1 else None,
        label=label,
    )
    if len(shown) < len(reference) and key.startswith("test"):
        axes.axhline(scale * reference[-1][key], color=colour, alpha=0.6, linestyle=":", linewidth=1.5)


def _scale_loss(axes: Axes) -> bool:
    """Make the loss axis logarithmic where the losses span a decade: below it, a linear axis is easier to read."""
    values = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in axes.lines])
    values = values[np.isfinite(values) & (values > 0)]
    if not values.size or values.max() < 10 * values.min():
        return False
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    return True


def _summary(history: list[dict]) -> str:
    """How long a run was: "200 epochs, 13.4 h"."""
    seconds = sum(row["seconds"] for row in history)
    duration = f"{seconds:.0f} s"
    if seconds >= 3600:
        duration = f"{seconds / 3600:.1f} h"
    elif seconds >= 60:
        duration = f"{seconds / 60:.1f} min"
    return f"{len(history)} epoch{'s' if len(history) > 1 else ''}, {duration}"


def _tail(path: str | Path) -> str:
    """The end of a path, enough to tell which file it is."""
    return short(Path(*Path(path).parts[-3:]).as_posix(), 60)
