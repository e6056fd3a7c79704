"""The plots of an ensemble: results of members and ensemble, calibration, mistakes, and accuracy against time."""

import math
import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from plotting.style import BLUE, GRAY, GREEN, PALE, VERMILLION, label_log_axis, line_style, saves_png, shorten

MIN_IMAGES_PER_BIN = 10  # bins with fewer images are drawn hollow
MAX_MISTAKES, MISTAKES_PER_LINE = 16, 4
MAX_TEXT_LINES = 9  # next to the image of a mistake
LETTERS = "ABCD"  # names of the members in subsets like "AC"; with more members, subsets are not labelled


@saves_png
def plot_ensemble(rows: list[dict], *, confusion_matrix: np.ndarray, classes: Sequence[str], title: str) -> Figure:
    """Plot the results of the members and the ensemble (the last row), and the ensemble's confusion matrix.

    A row is a dict of `name`, `loss` (nats), `accuracy` (a fraction), `intervals` (the two ends for loss and accuracy)
    and `per_image` (loss and accuracy of each of N test images in random order, (N,)). `confusion_matrix`, (C, C),
    counts the images by true class (row) and predicted class (column); `classes` are the C names.
    """
    figure = Figure(figsize=(12.8, 6.8))
    figure.suptitle(shorten(title, 104))
    left, right = figure.subfigures(1, 2, width_ratios=(1.15, 1))
    (accuracy_dots, loss_dots), (accuracy_lines, loss_lines) = left.subplots(2, 2)

    _draw_dots(accuracy_dots, rows, "accuracy", 100, "{:.2f}", "test accuracy (%)")
    _draw_dots(loss_dots, rows, "loss", 1, "{:.4f}", "test loss (nats)")
    accuracy_dots.set_yticks(range(len(rows)), [shorten(row["name"], 16) for row in rows])
    accuracy_dots.get_yticklabels()[-1].set_fontweight("bold")
    loss_dots.set_yticks([])

    left.supxlabel("pale bars: 95 % intervals over the test images", color=GRAY)
    _draw_lines(accuracy_lines, rows, "accuracy", 100, "running accuracy (%)")
    _draw_lines(loss_lines, rows, "loss", 1, "running loss (nats)")
    _draw_confusion(right.subplots(), confusion_matrix, classes)
    return figure


@saves_png
def plot_reliability(rows: list[dict], *, title: str) -> Figure:
    """Plot one reliability diagram per row; the last row is the ensemble.

    A row is a dict of `name`, `calibration_error` (a fraction) and `bins`: number of images, mean confidence and
    accuracy of each bin, three arrays as `metrics.reliability` returns them.
    """
    columns = min(len(rows), 5 if len(rows) > 8 else 4)
    lines = math.ceil(len(rows) / columns)
    figure = Figure(figsize=(12.8, 1.2 + lines * (0.65 + 11.4 / max(columns, 3))))
    figure.suptitle(shorten(title, 104))
    grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axes, row, style in zip(grid, rows, row_styles(len(rows)), strict=False):
        _draw_bins(axes, row, style["color"])
    for axes in grid[len(rows) :]:
        axes.remove()
    figure.supxlabel(
        "confidence, the probability of the predicted class (%)\n"
        f"gray: fraction of the images; hollow: a bin with fewer than {MIN_IMAGES_PER_BIN} images"
    )
    figure.supylabel("accuracy (%)")
    return figure


@saves_png
def plot_mistakes(
    *,
    images: np.ndarray,
    labels: np.ndarray,
    members: np.ndarray,
    ensemble: np.ndarray,
    names: Sequence[str],
    classes: Sequence[str],
    title: str,
) -> Figure:
    """Show the mistakes with the lowest probability of the true class, with the predictions of the members.

    `images` are uint8 (N, 3, H, W), `labels` (N,) the true classes as integers. `members` (M, N, C) and `ensemble`
    (N, C) are probabilities; `names` are the members' names, `classes` the class names.
    """
    wrong = np.flatnonzero(ensemble.argmax(axis=1) != labels)
    worst = wrong[np.argsort(ensemble[wrong, labels[wrong]], kind="stable")][:MAX_MISTAKES]
    lines = math.ceil(len(worst) / MISTAKES_PER_LINE)
    note = "the ensemble makes no mistakes"
    has_room = 2 * len(names) <= MAX_TEXT_LINES  # for the members' names next to each image
    if lines:
        note = (
            f"{len(worst)} of {len(wrong):,} mistakes, least probable labels first: label → prediction, confidence\n"
            "next to each image: the members' predictions, green if correct"
        )
        if not has_room:
            order = ", ".join(shorten(name, 24) for name in names[:MAX_TEXT_LINES])
            more = f" (and {len(names) - MAX_TEXT_LINES} more)" if len(names) > MAX_TEXT_LINES else ""
            note += "; from top to bottom:\n" + textwrap.fill(order + more, 130)
    figure = Figure(figsize=(12.8, 0.7 + 0.2 * note.count("\n") + 1.85 * lines))
    figure.suptitle(shorten(title, 104))
    figure.supxlabel(note, color=GRAY)
    grid = figure.add_gridspec(max(lines, 1), MISTAKES_PER_LINE)
    for number, image in enumerate(worst):
        label, predicted, confidence = labels[image], ensemble[image].argmax(), ensemble[image].max()
        texts = []
        for name, probs in zip(names[:MAX_TEXT_LINES], members[:, image], strict=False):
            texts += [(shorten(name, 15), GRAY)] if has_room else []
            prediction = f"{shorten(classes[probs.argmax()], 11)}, {100 * probs.max():.0f} %"
            texts.append((prediction, GREEN if probs.argmax() == label else "black"))
        heading = f"{shorten(classes[label], 12)} → {shorten(classes[predicted], 12)}, {100 * confidence:.1f} %"
        _draw_mistake(figure.add_subplot(grid[number], anchor="W"), images[image], heading, texts)
    return figure


@saves_png
def plot_cost(
    *, subsets: Sequence[dict], cascade: Sequence[dict], threshold: float | None, device: str, title: str
) -> Figure:
    """Plot test accuracy and loss against milliseconds per image, for subsets of the members and for the cascade.

    A subset is a dict of `members` (names), `accuracy` (a fraction), `loss` (nats) and `milliseconds`; the last subset
    is the whole ensemble. A row of `cascade` has `threshold` instead of `members`; `cascade` may be empty. The row with
    `threshold` is marked.
    """
    figure = Figure(figsize=(12.4, 5.4))
    figure.suptitle(shorten(title, 104))
    accuracy_axes, loss_axes = figure.subplots(1, 2)
    names = [row["members"][0] for row in subsets if len(row["members"]) == 1]
    letters = dict(zip(names, LETTERS, strict=False)) if len(names) <= len(LETTERS) else {}
    milliseconds = np.array([row["milliseconds"] for row in subsets])
    order = milliseconds.argsort()
    for axes, metric, scale, sign in ((accuracy_axes, "accuracy", 100, 1), (loss_axes, "loss", 1, -1)):
        scores = np.array([scale * row[metric] for row in subsets])
        best = np.maximum.accumulate(sign * scores[order])
        efficient = order[np.diff(best, prepend=-np.inf) > 0]
        axes.plot(milliseconds, scores, "o", color=BLUE, label="subsets of the members", zorder=4)
        axes.plot(milliseconds[efficient], scores[efficient], color=BLUE, label="better than all cheaper ones")
        for number, row in enumerate(subsets if letters else ()):
            text, point = "".join(letters[name] for name in row["members"]), (milliseconds[number], scores[number])
            axes.annotate(text, point, xytext=(7, (5, -14)[number % 2]), textcoords="offset points", fontsize=12)
        if cascade:
            x, y = [row["milliseconds"] for row in cascade], [scale * row[metric] for row in cascade]
            chosen = [row["threshold"] for row in cascade].index(threshold)
            axes.plot(x, y, ".-", color=VERMILLION, label="cascade, by threshold", zorder=3)
            label = f"cascade at {threshold:g}"
            axes.plot(x[chosen], y[chosen], "D", color=VERMILLION, markersize=10, label=label, zorder=5)
        axes.axhline(scores[-1], color="black", linestyle="--", label="the whole ensemble")
        axes.margins(y=0.1)
        axes.set_xscale("log")
        label_log_axis(axes.xaxis)
        axes.set_xlim(milliseconds.min() / 1.6, milliseconds.max() * 1.6)
        axes.set_xlabel(f"milliseconds per image, {device}")
    accuracy_axes.set_ylabel("test accuracy (%)")
    loss_axes.set_ylabel("test loss (nats)")
    handles, labels = accuracy_axes.get_legend_handles_labels()
    key = "   ".join(f"{letter} {shorten(name, 24)}" for name, letter in letters.items())
    figure.legend(handles, labels, loc="outside lower center", ncols=3, title=key or None)  # one line would be cut off
    return figure


def _draw_mistake(axes: Axes, image: np.ndarray, heading: str, texts: list[tuple[str, str]]) -> None:
    """Draw one image and, next to it, lines of text in their colors."""
    axes.imshow(image.transpose(1, 2, 0), interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(visible=True, color=PALE)  # a frame, for images with white background
    axes.set_title(heading, loc="left", fontsize=12, pad=4)
    for number, (text, color) in enumerate(texts):
        place = {"x": 1.05, "y": 1 - (number + 0.5) / MAX_TEXT_LINES, "transform": axes.transAxes, "va": "center"}
        axes.text(s=text, **place, fontsize=11, color=color, in_layout=False)  # does not change the image's size


def _draw_bins(axes: Axes, row: dict, color: str) -> None:
    """Draw one dot per non-empty bin, with a line to the diagonal (perfect calibration).

    In the background, pale: the fraction of the images in each bin.
    """
    counts, confidence, accuracy = row["bins"]
    filled = counts > 0
    confidence, accuracy = 100 * confidence[filled], 100 * accuracy[filled]
    axes.stairs(100 * counts / counts.sum(), np.linspace(0, 100, len(counts) + 1), fill=True, color=PALE, zorder=0)
    axes.plot([0, 100], [0, 100], color=GRAY, linewidth=1, linestyle="--", zorder=1)
    axes.vlines(confidence, confidence, accuracy, color=color, linewidth=2.5, alpha=0.5, zorder=2)
    faces = np.where(counts[filled] < MIN_IMAGES_PER_BIN, "white", color)
    axes.scatter(confidence, accuracy, s=36, c=faces, edgecolors=color, linewidths=1.5, zorder=3, clip_on=False)
    axes.set(xlim=(0, 100), ylim=(0, 102), xticks=(0, 50, 100), yticks=(0, 50, 100), aspect="equal")
    axes.set_title(f"{shorten(row['name'], 18)}\nECE {100 * row['calibration_error']:.2f} %")


def _draw_dots(axes: Axes, rows: list[dict], metric: str, scale: float, fmt: str, title: str) -> None:
    """Draw one dot per row with its 95 % interval, the ensemble at the bottom; the values are at the right edge.

    Dots instead of bars: the differences are small, so the axis does not start at 0, as bars would need.
    """
    last = len(rows) - 1
    axes.axhspan(last - 0.5, last + 0.5, color="black", alpha=0.07, linewidth=0)
    for number, (row, style) in enumerate(zip(rows, row_styles(len(rows)), strict=True)):
        value, interval = scale * row[metric], [scale * end for end in row["intervals"][metric]]
        marker, weight = ("D", "bold") if number == last else ("o", "normal")
        # This line is the legend of the curves below: it has the same color and the same dashes.
        axes.axhline(number, **style, alpha=0.4)
        axes.plot(interval, (number, number), color=style["color"], linewidth=5, alpha=0.4, solid_capstyle="butt")
        axes.plot(value, number, marker, color=style["color"], markersize=9, zorder=5)
        place = axes.get_yaxis_transform()
        axes.text(1.03, number, fmt.format(value), transform=place, va="center", fontweight=weight)
    axes.margins(x=0.12)
    axes.set_ylim(last + 0.5, -0.5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=2))
    axes.set_title(title)


def _draw_lines(axes: Axes, rows: list[dict], metric: str, scale: float, title: str) -> None:
    """Draw one line per row: the mean over the first 1, 2, … N images."""
    seen = np.arange(1, len(rows[0]["per_image"][metric]) + 1)
    curves = np.stack([scale * np.cumsum(row["per_image"][metric]) / seen for row in rows])
    for curve, style in zip(curves, row_styles(len(rows)), strict=True):
        axes.plot(seen, curve, **style)
    settled = curves[:, len(seen) // 20 :]  # the axis limits ignore the noisy first 5 %
    low, high = settled.min(), settled.max()
    margin = 0.05 * (high - low) or 0.01
    axes.set_ylim(low - margin, high + margin)
    axes.set_xlim(0, len(seen))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=3, integer=True))
    axes.set_xlabel("test images seen, shuffled")
    axes.set_title(title)


def row_styles(count: int) -> list[dict]:
    """The line styles of the members and, as the last of `count`, the ensemble."""
    members = [line_style(number) | {"linewidth": 1.5} for number in range(count - 1)]
    return [*members, {"color": "black", "linestyle": "-", "linewidth": 2.5, "zorder": 4}]


def _draw_confusion(axes: Axes, counts: np.ndarray, classes: Sequence[str]) -> None:
    """Draw percentages of each true class, up to 20 classes as numbers, else as colors with the worst confusions."""
    size = len(counts)
    percent = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    # On a square-root scale, a confusion of a few percent is visible next to a diagonal near 100.
    image = axes.imshow(percent, cmap="Blues", norm=PowerNorm(0.5, vmin=0, vmax=100))
    axes.set_title("confusion matrix of the ensemble (%)")
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class (each row: 100 %)")

    step = math.ceil(size / 25)
    ticks = range(0, size, step)
    names = [shorten(classes[tick], 14) for tick in ticks]
    axes.set_xticks(ticks, names, rotation=90)
    axes.set_yticks(ticks, names)
    if size <= 20:
        for row, column in np.argwhere(counts):
            value = percent[row, column]
            text = f"{value:.1f}" if size <= 10 and value < 99.95 else f"{value:.0f}"
            color = "white" if value > 40 else "black"
            axes.text(column, row, text, ha="center", va="center", fontsize=11, color=color)
        return
    axes.tick_params(labelsize=9)
    axes.figure.colorbar(image, ax=axes, shrink=0.7, ticks=(0, 1, 5, 10, 25, 50, 100))
    label = "predicted class" + (f" (one in {step} is named)" if step > 1 else "") + "\nmost often confused:"
    wrong = percent * (1 - np.eye(size))
    for cell in wrong.argsort(axis=None)[:-4:-1]:
        true, predicted = divmod(cell, size)
        label += f"\n{shorten(classes[true], 18)} → {shorten(classes[predicted], 18)}  {wrong[true, predicted]:.1f} %"
    axes.set_xlabel(label)
