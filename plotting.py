"""The pictures: what a training run did, epoch by epoch; what an ensemble adds to its members, and where it errs.

A run's history is also kept as a CSV file, so that a picture can be drawn again, or drawn over another run. Everything
here goes through matplotlib's `Figure` object straight to a PNG file: no window, no display, no global state.
"""

import csv
import io
import logging
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator, NullFormatter

import files
from errors import UserError

COLUMNS = (
    "epoch",
    "learning_rate",
    "train_loss",
    "train_accuracy",
    "test_loss",
    "test_accuracy",
    "val_loss",
    "val_accuracy",
    "seconds",
    "images_per_second",
)
OPTIONAL_COLUMNS = ("val_loss", "val_accuracy")

DPI = 125
# The colours of Okabe and Ito, which stay apart for colour-blind eyes; black is kept for the ensemble.
BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
SPLITS = {"train": ("train", BLUE), "val": ("validation", GREEN), "test": ("test", VERMILLION)}
MEMBER_COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY)
MEMBER_DASHES = ("-", "--", ":")
GREY = "#595959"
PALE = "#D9D9D9"
FEW = 10  # images, too few to say how accurate a bin is
MISTAKES_SHOWN, MISTAKES_ABREAST = 16, 4
LINES_BESIDE = 9  # of text, as many as there is room for beside an image

# The default font has no Chinese, Japanese or Korean; those of these that the machine has stand in for it.
CJK_FONTS = (
    "Noto Sans CJK JP",
    "Noto Sans CJK SC",
    "WenQuanYi Zen Hei",
    "Hiragino Sans",
    "PingFang SC",
    "Apple SD Gothic Neo",
    "Microsoft YaHei",
    "Yu Gothic",
    "Malgun Gothic",
)


def write_csv(history: list[dict], path: str | Path) -> None:
    """Write a run's history, one row an epoch; an older file at `path` is replaced whole or left as it was.

    The columns are `COLUMNS`, the validation's only where the history has them. Accuracies are fractions; `seconds` is
    the epoch's duration, evaluation included; `images_per_second` is the rate of its training alone. Numbers are
    written so that `read_csv` gives back exactly the same ones. Raises `UserError` if the file cannot be written.
    """
    columns = [name for name in COLUMNS if name not in OPTIONAL_COLUMNS or any(name in row for row in history)]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in history:
        writer.writerow(int(row[name]) if name == "epoch" else repr(float(row[name])) for name in columns)
    with files.replacing(path, "the history") as file:
        file.write(text.getvalue().encode())


def read_csv(path: str | Path) -> list[dict]:
    """Read a history that `write_csv` wrote: one dict an epoch, `epoch` an int and everything else a float.

    Columns that are not in `COLUMNS` are passed over. Raises `UserError` for a file that is missing or unreadable, has
    no epochs or lacks a column, and for a cell that is not a number.
    """
    try:
        # utf-8-sig: a spreadsheet may have put a byte order mark before the first column's name.
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or []
            missing = [name for name in COLUMNS if name not in columns and name not in OPTIONAL_COLUMNS]
            if missing:
                raise UserError(
                    f"{path}: no column {', '.join(missing)} in its first line; "
                    "expected a history as the training scripts write it"
                )
            wanted = [name for name in COLUMNS if name in columns]
            history = [_parse(row, wanted, where=f"{path}, line {reader.line_num}") for row in reader]
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror or error}); expected the CSV file of a run"
        ) from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a CSV file ({error})") from error
    if not history:
        raise UserError(f"{path}: has no epochs; expected one line for each below the first")
    return history


def plot_training(history: list[dict], path: str | Path, *, title: str, reference: str | Path | None = None) -> None:
    """Draw a run as one PNG file: loss, accuracy and learning rate against the epoch.

    `history` has one dict an epoch, with the keys of `COLUMNS` (the validation's are optional) and at least one epoch.
    `reference` is another run's CSV file, drawn dashed and pale behind. Raises `UserError` if the reference cannot be
    read or the picture cannot be written.
    """
    behind = None if reference is None else read_csv(reference)
    with _style():
        _save(draw_training(history, title=title, reference=behind, reference_name=reference or ""), path)


def plot_ensemble(
    path: str | Path,
    *,
    members: list[dict],
    ensemble: dict,
    labels: np.ndarray,
    classes: Sequence[str],
    title: str,
) -> None:
    """Draw an ensemble beside its members as one PNG file: results, how they settle over the test set, confusions.

    Each member, and the ensemble, is a dict of `name`, `loss` (nats), `accuracy` (a fraction), `intervals`, which has
    the two ends of either, and `probs` (N, C), the predicted probabilities of the N test images. `labels` (N,) are the
    true classes as integers, `classes` their C names. Raises `UserError` if the picture cannot be written.
    """
    with _style():
        _save(draw_ensemble(members=members, ensemble=ensemble, labels=labels, classes=classes, title=title), path)


def plot_reliability(path: str | Path, rows: list[dict], *, title: str) -> None:
    """Draw one reliability diagram for each row, the ensemble's last, into one PNG file.

    A row is a dict of `name`, `calibration_error` (a fraction) and `bins`: how many images, their mean confidence and
    their accuracy, three arrays as `metrics.reliability` gives them. Raises `UserError` if it cannot be written.
    """
    with _style():
        _save(draw_reliability(rows, title=title), path)


def plot_mistakes(
    path: str | Path,
    *,
    images: np.ndarray,
    labels: np.ndarray,
    members: np.ndarray,
    ensemble: np.ndarray,
    names: Sequence[str],
    classes: Sequence[str],
    title: str,
) -> None:
    """Draw the images that the ensemble is surest of and wrong about, with what each member said, as one PNG file.

    `images` are uint8 (N, 3, H, W), `labels` (N,) their true classes as integers. `members` (M, N, C) and `ensemble`
    (N, C) are probabilities, `names` the members' and `classes` the classes'. Raises `UserError` if the picture cannot
    be written.
    """
    with _style():
        figure = draw_mistakes(
            images=images, labels=labels, members=members, ensemble=ensemble, names=names, classes=classes, title=title
        )
        _save(figure, path)


def running_accuracy(probs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The accuracy (N,), a fraction, over the first 1, 2, … N images of `probs` (N, C) and `labels` (N,)."""
    return _running_mean(probs.argmax(axis=1) == labels)


def running_loss(probs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The mean negative log likelihood (N,), in nats, over the first 1, 2, … N images of `probs` (N, C)."""
    likelihood = probs[np.arange(len(labels)), labels].astype(np.float64)
    # As metrics.per_image has it: the curve ends where the dot is.
    return _running_mean(-np.log(np.maximum(likelihood, np.finfo(np.float64).tiny)))


def confusion_matrix(probs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """How many images of each true class (row) were given each class (column), as integers (C, C)."""
    counts = np.zeros((probs.shape[1], probs.shape[1]), dtype=np.int64)
    np.add.at(counts, (labels, probs.argmax(axis=1)), 1)
    return counts


def draw_training(
    history: list[dict], *, title: str, reference: list[dict] | None = None, reference_name: str | Path = ""
) -> Figure:
    """The figure that `plot_training` saves; `reference` is a history here, and `reference_name` its file."""
    if not history:
        raise ValueError("a run without epochs has nothing to draw")
    figure = Figure(figsize=(12.4, 4.9), dpi=DPI, layout="constrained")
    figure.suptitle(f"{_short(title, 60)} · {_summary(history)}", fontsize=15)
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


def draw_ensemble(
    *, members: list[dict], ensemble: dict, labels: np.ndarray, classes: Sequence[str], title: str
) -> Figure:
    """The figure that `plot_ensemble` saves."""
    rows = [*members, ensemble]
    figure = Figure(figsize=(12.8, 6.8), dpi=DPI, layout="constrained")
    figure.suptitle(_short(title, 104), fontsize=15)
    left, right = figure.subfigures(1, 2, width_ratios=(1.15, 1))
    (accuracy_dots, loss_dots), (accuracy_lines, loss_lines) = left.subplots(2, 2)

    _draw_dots(accuracy_dots, rows, "accuracy", 100, "{:.2f}", "test accuracy (%)")
    _draw_dots(loss_dots, rows, "loss", 1, "{:.4f}", "test loss (nats)")
    accuracy_dots.set_yticks(range(len(rows)), [_short(row["name"], 16) for row in rows])
    accuracy_dots.get_yticklabels()[-1].set_fontweight("bold")
    loss_dots.set_yticks([])

    left.supxlabel("broad lines: 95 % intervals over the test images", fontsize=12, color=GREY)
    _draw_lines(accuracy_lines, [100 * running_accuracy(row["probs"], labels) for row in rows], "running accuracy (%)")
    _draw_lines(loss_lines, [running_loss(row["probs"], labels) for row in rows], "running loss (nats)")
    _draw_confusion(right.subplots(), confusion_matrix(ensemble["probs"], labels), classes)
    return figure


def draw_reliability(rows: list[dict], *, title: str) -> Figure:
    """The figure that `plot_reliability` saves."""
    columns = min(len(rows), 5 if len(rows) > 8 else 4)
    lines = -(-len(rows) // columns)
    figure = Figure(figsize=(12.8, 1.2 + lines * (0.65 + 11.4 / max(columns, 3))), dpi=DPI, layout="constrained")
    figure.suptitle(_short(title, 104), fontsize=15)
    grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for number, axes in enumerate(grid.flat):
        if number < len(rows):
            _draw_bins(axes, rows[number], colour=_row_style(number, len(rows) - 1)["color"])
        else:
            axes.remove()
    figure.supxlabel(
        "confidence, the probability of the predicted class (%)\n"
        f"grey: share of the images; hollow: a bin of fewer than {FEW} images",
        fontsize=13,
    )
    figure.supylabel("accuracy (%)", fontsize=13)
    figure.get_layout_engine().set(wspace=0.04)
    return figure


def draw_mistakes(
    *,
    images: np.ndarray,
    labels: np.ndarray,
    members: np.ndarray,
    ensemble: np.ndarray,
    names: Sequence[str],
    classes: Sequence[str],
    title: str,
) -> Figure:
    """The figure that `plot_mistakes` saves."""
    predicted, confidence = ensemble.argmax(axis=1), ensemble.max(axis=1)
    wrong = np.flatnonzero(predicted != labels)
    surest = wrong[np.argsort(-confidence[wrong], kind="stable")][:MISTAKES_SHOWN]
    lines = -(-len(surest) // MISTAKES_ABREAST)

    # In inches, so that the text beside the images changes neither their size nor their place.
    width, height, top, side, line = 12.8, 1.7 + 2.1 * lines, 0.8, 1.6, 2.1
    figure = Figure(figsize=(width, height), dpi=DPI)
    figure.suptitle(_short(title, 104), fontsize=15, y=1 - 0.2 / height, va="top")
    said = "no image was mistaken"
    if lines:
        which = f"the {len(surest)} surest" if len(surest) < len(wrong) else "the surest first"
        said = f"{len(wrong):,} mistakes, {which}: true class → what the ensemble says, and how sure it is"
    figure.text(0.5, 1 - 0.55 / height, said, ha="center", va="top")
    for number, image in enumerate(surest):
        row, column = divmod(number, MISTAKES_ABREAST)
        left, low = 0.15 + column * (width - 0.15) / MISTAKES_ABREAST, height - top - line * row - side - 0.3
        axes = figure.add_axes((left / width, low / height, side / width, side / height))
        _draw_mistake(axes, images[image], labels[image], members[:, image], ensemble[image], names, classes)
    if lines:
        note = "beside each image, what the members say, in green where they are right"
        if not _named_beside(names):
            order = ", ".join(_short(name, 24) for name in names[:LINES_BESIDE])
            more = f" (and {len(names) - LINES_BESIDE} more)" if len(names) > LINES_BESIDE else ""
            note += "; from top to bottom:\n" + textwrap.fill(order + more, 130)
        figure.text(0.5, 0.1 / height, note, ha="center", va="bottom", fontsize=12, color=GREY)
    return figure


def _draw_mistake(
    axes: Axes,
    image: np.ndarray,
    label: int,
    members: np.ndarray,
    ensemble: np.ndarray,
    names: Sequence[str],
    classes: Sequence[str],
) -> None:
    """One image, its pixels as they are, and beside it what each member says, below its name where there is room."""
    axes.imshow(image.transpose(1, 2, 0), interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set(visible=True, color=PALE)  # or a white sky would have no end
    said = ensemble.argmax()
    axes.set_title(
        f"{_short(classes[label], 12)} → {_short(classes[said], 12)}, {100 * ensemble[said]:.1f} %",
        loc="left",
        fontsize=12,
        pad=4,
    )
    lines = []
    for name, probs in zip(names[:LINES_BESIDE], members, strict=False):
        said = probs.argmax()
        if _named_beside(names):
            lines.append((_short(name, 15), GREY))
        text = f"{_short(classes[said], 11)}, {100 * probs[said]:.0f} %"
        lines.append((text, GREEN if said == label else "black"))
    for number, (text, colour) in enumerate(lines):
        height = 1 - (number + 0.5) / LINES_BESIDE
        axes.text(1.05, height, text, transform=axes.transAxes, va="center", fontsize=11, color=colour)


def _named_beside(names: Sequence[str]) -> bool:
    return 2 * len(names) <= LINES_BESIDE


def _draw_bins(axes: Axes, row: dict, colour: str) -> None:
    """A dot for each bin of confidence that has images, tied to the diagonal, where it would be if it were calibrated.

    Behind them, pale, what share of the images each bin holds. A dot far off may well stand for two images: those of
    fewer than `FEW` are hollow.
    """
    counts, confidence, accuracy = row["bins"]
    edges = np.linspace(0, 100, len(counts) + 1)
    some = counts > 0
    confidence, accuracy = 100 * confidence[some], 100 * accuracy[some]
    axes.stairs(100 * counts / max(counts.sum(), 1), edges, fill=True, color=PALE, zorder=0)
    axes.plot([0, 100], [0, 100], color=GREY, linewidth=1, linestyle=(0, (3, 2)), zorder=1)
    axes.vlines(confidence, confidence, accuracy, color=colour, linewidth=2.5, alpha=0.5, zorder=2)
    faces = np.where(counts[some] < FEW, "white", colour)
    axes.scatter(confidence, accuracy, s=36, c=faces, edgecolors=colour, linewidths=1.5, zorder=3, clip_on=False)
    axes.set_xlim(0, 100)
    axes.set_ylim(0, 102)
    axes.set_aspect("equal", adjustable="box")
    axes.set_xticks((0, 50, 100))
    axes.set_yticks((0, 50, 100))
    axes.set_title(f"{_short(row['name'], 18)}\nECE {100 * row['calibration_error']:.2f} %")


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
    arrived in the end is what a short run wants to be measured by, so that is a dotted line across.
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


def _draw_dots(axes: Axes, rows: list[dict], key: str, scale: float, form: str, title: str) -> None:
    """One dot a row and its 95 % interval, the ensemble's below the members', each value spelled out at the right edge.

    Dots and not bars: the differences are small, so the axis cannot begin at 0, and a bar that does not misleads.
    """
    values = [scale * row[key] for row in rows]
    intervals = [[scale * end for end in row["intervals"][key]] for row in rows]
    last = len(values) - 1
    low, high = np.min(intervals), np.max(intervals)
    margin = 0.12 * (high - low) or 0.005 * abs(high) or 0.01
    axes.axhspan(last - 0.5, last + 0.5, color="black", alpha=0.07, linewidth=0)
    for row, value in enumerate(values):
        style = _row_style(row, last)
        # The line across is the key to the curves below: the same colour, the same dashes.
        axes.axhline(row, **style, alpha=0.4)
        axes.plot(intervals[row], (row, row), color=style["color"], linewidth=5, alpha=0.4, solid_capstyle="butt")
        axes.plot(value, row, "D" if row == last else "o", color=style["color"], markersize=9, zorder=5)
        weight = "bold" if row == last else "normal"
        axes.text(1.03, row, form.format(value), transform=axes.get_yaxis_transform(), va="center", fontweight=weight)
    axes.set_xlim(low - margin, high + margin)
    axes.set_ylim(last + 0.5, -0.5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=2))
    axes.ticklabel_format(axis="x", useOffset=False)
    axes.set_title(title)


def _draw_lines(axes: Axes, curves: list[np.ndarray], title: str) -> None:
    """One line a row against the images seen."""
    seen = np.arange(1, len(curves[0]) + 1)
    last = len(curves) - 1
    for row, curve in enumerate(curves):
        axes.plot(seen, curve, **_row_style(row, last))
    # The first images swing from one extreme to the other: the axis is fitted to what follows.
    settled = np.stack(curves)[:, len(seen) // 20 :]
    low, high = settled.min(), settled.max()
    margin = 0.05 * (high - low) or 0.01
    axes.set_ylim(low - margin, high + margin)
    axes.set_xlim(0, len(seen))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=3, integer=True))
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.set_xlabel("test images seen, shuffled")
    axes.set_title(title)


def _row_style(row: int, last: int) -> dict:
    """The line of a member, or of the ensemble, which is the last row."""
    if row == last:
        return {"color": "black", "linestyle": "-", "linewidth": 2.5, "zorder": 4}
    dashes, colour = divmod(row, len(MEMBER_COLOURS))
    return {
        "color": MEMBER_COLOURS[colour],
        "linestyle": MEMBER_DASHES[dashes % len(MEMBER_DASHES)],
        "linewidth": 1.5,
    }


def _draw_confusion(axes: Axes, counts: np.ndarray, classes: Sequence[str]) -> None:
    """Each row as percentages of its true class: written into up to 20 × 20 cells, else as colours and a short list."""
    size = len(counts)
    percent = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    # A square root lets a confusion of a few percent be seen beside a diagonal near 100.
    image = axes.imshow(percent, cmap="Blues", norm=PowerNorm(0.5, vmin=0, vmax=100))
    axes.set_title("confusion matrix of the ensemble (%)")
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")

    step = -(-size // 25)
    ticks = range(0, size, step)
    names = [_short(classes[tick], 14) for tick in ticks]
    axes.set_xticks(ticks, names, rotation=90)
    axes.set_yticks(ticks, names)
    if size <= 20:
        for row, column in np.argwhere(counts):
            value = percent[row, column]
            text = f"{value:.1f}" if size <= 10 and value < 99.95 else f"{value:.0f}"
            colour = "white" if value > 40 else "black"
            axes.text(column, row, text, ha="center", va="center", fontsize=11, color=colour)
    else:
        axes.tick_params(labelsize=9)
        axes.figure.colorbar(image, ax=axes, shrink=0.7, ticks=(0, 1, 5, 10, 25, 50, 100))
        named = f" (one in {step} is named)" if step > 1 else ""
        axes.set_xlabel(f"predicted class{named}\nmost often confused: {_worst(percent, classes)}")


def _worst(percent: np.ndarray, classes: Sequence[str]) -> str:
    """The three most frequent confusions, a line each."""
    wrong = percent * (1 - np.eye(len(percent)))
    cells = [divmod(int(cell), len(percent)) for cell in np.argsort(wrong, axis=None)[:-4:-1]]
    return "".join(
        f"\n{_short(classes[true], 18)} → {_short(classes[predicted], 18)}  {wrong[true, predicted]:.1f} %"
        for true, predicted in cells
    )


def _running_mean(values: np.ndarray) -> np.ndarray:
    return np.cumsum(values, dtype=np.float64) / np.arange(1, len(values) + 1)


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
    return _short(Path(*Path(path).parts[-3:]).as_posix(), 60)


def _short(text: str, length: int) -> str:
    """The text on one line, its middle left out beyond `length` characters: names often differ only at their ends."""
    text = " ".join(str(text).split())
    if len(text) <= length:
        return text
    tail = (length - 1) // 2
    return f"{text[: length - 1 - tail]}…{text[-tail:]}"


def _parse(row: dict, columns: list[str], *, where: str) -> dict:
    """One line of a history as numbers."""
    if None in row:
        raise UserError(f"{where}: more cells than the first line has columns")
    numbers = {}
    for name in columns:
        try:
            numbers[name] = int(row[name]) if name == "epoch" else float(row[name])
        except (TypeError, ValueError):
            kind = "a whole number" if name == "epoch" else "a number"
            raise UserError(f"{where}, column {name}: found {row[name]!r}, expected {kind}") from None
    return numbers


@contextmanager
def _style() -> Iterator[None]:
    """Fonts that can still be read at half size, and names drawn as they are written.

    It has to hold until the picture is saved, because matplotlib makes its tick labels only then.
    """
    installed = fontManager.get_font_names()
    settings = {
        "font.family": ["DejaVu Sans", *(font for font in CJK_FONTS if font in installed)],
        "font.size": 13,
        "legend.fontsize": 12,
        "xtick.labelsize": 12,
        "ytick.labelsize": 12,
        "axes.titlesize": 13,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "text.parse_math": False,  # a class may be named "$1 coin"
    }
    font_log = logging.getLogger("matplotlib.font_manager")
    level = font_log.level
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # A name in a script that no font here covers is drawn as boxes, and a stand-in font may lack a weight: a line
        # in the terminal for every character helps nobody.
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        font_log.setLevel(logging.ERROR)
        try:
            yield
        finally:
            font_log.setLevel(level)


def _save(figure: Figure, path: str | Path) -> None:
    with files.replacing(path, "the picture") as file:
        figure.savefig(file, format="png")
