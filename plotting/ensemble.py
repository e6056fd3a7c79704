"""The pictures of an ensemble: its results and its members', how well it is calibrated, and its mistakes."""

import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from plotting.style import DPI, GREEN, GREY, PALE, line_style, picture, short

MIN_IMAGES_PER_BIN = 10  # bins with fewer are hollow
MAX_MISTAKES, MISTAKES_PER_LINE = 16, 4
MAX_TEXT_LINES = 9  # next to the image of a mistake


@picture
def plot_ensemble(rows: list[dict], *, confusion_matrix: np.ndarray, classes: Sequence[str], title: str) -> Figure:
    """Draw the members and, as the last row, the ensemble: results, running results, the ensemble's confusion matrix.

    A row is a dict of `name`, `loss` (nats), `accuracy` (a fraction), `intervals`, which has the two ends of either,
    and `per_image`, which has both for each of N test images in random order, (N,). `confusion_matrix` (C, C) counts
    the images of each true class (row) by predicted class (column); `classes` are the C names.
    """
    figure = Figure(figsize=(12.8, 6.8), dpi=DPI, layout="constrained")
    figure.suptitle(short(title, 104), fontsize=15)
    left, right = figure.subfigures(1, 2, width_ratios=(1.15, 1))
    (accuracy_dots, loss_dots), (accuracy_lines, loss_lines) = left.subplots(2, 2)

    _draw_dots(accuracy_dots, rows, "accuracy", 100, "{:.2f}", "test accuracy (%)")
    _draw_dots(loss_dots, rows, "loss", 1, "{:.4f}", "test loss (nats)")
    accuracy_dots.set_yticks(range(len(rows)), [short(row["name"], 16) for row in rows])
    accuracy_dots.get_yticklabels()[-1].set_fontweight("bold")
    loss_dots.set_yticks([])

    left.supxlabel("broad lines: 95 % intervals over the test images", fontsize=12, color=GREY)
    _draw_lines(accuracy_lines, rows, "accuracy", 100, "running accuracy (%)")
    _draw_lines(loss_lines, rows, "loss", 1, "running loss (nats)")
    _draw_confusion(right.subplots(), confusion_matrix, classes)
    return figure


@picture
def plot_reliability(rows: list[dict], *, title: str) -> Figure:
    """Draw one reliability diagram for each row, the ensemble's last.

    A row is a dict of `name`, `calibration_error` (a fraction) and `bins`: number of images, mean confidence and
    accuracy, three arrays as `metrics.reliability` returns them.
    """
    columns = min(len(rows), 5 if len(rows) > 8 else 4)
    lines = -(-len(rows) // columns)
    figure = Figure(figsize=(12.8, 1.2 + lines * (0.65 + 11.4 / max(columns, 3))), dpi=DPI, layout="constrained")
    figure.suptitle(short(title, 104), fontsize=15)
    grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for number, axes in enumerate(grid.flat):
        if number < len(rows):
            _draw_bins(axes, rows[number], colour=row_style(number, len(rows) - 1)["color"])
        else:
            axes.remove()
    figure.supxlabel(
        "confidence, the probability of the predicted class (%)\n"
        f"grey: share of the images; hollow: a bin of fewer than {MIN_IMAGES_PER_BIN} images",
        fontsize=13,
    )
    figure.supylabel("accuracy (%)", fontsize=13)
    figure.get_layout_engine().set(wspace=0.04)
    return figure


@picture
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
    """Draw the mistakes with the lowest probability of the true class, with each member's prediction.

    `images` are uint8 (N, 3, H, W), `labels` (N,) their true classes as integers. `members` (M, N, C) and `ensemble`
    (N, C) are probabilities, `names` the members' and `classes` the classes'.
    """
    wrong = np.flatnonzero(ensemble.argmax(axis=1) != labels)
    label_probs = ensemble[wrong, labels[wrong]]
    worst = wrong[np.argsort(label_probs, kind="stable")][:MAX_MISTAKES]
    lines = -(-len(worst) // MISTAKES_PER_LINE)

    # In inches, so that the text next to the images changes neither their size nor their place.
    width, height, top, side, line = 12.8, 1.7 + 2.1 * lines, 0.8, 1.6, 2.1
    figure = Figure(figsize=(width, height), dpi=DPI)
    figure.suptitle(short(title, 104), fontsize=15, y=1 - 0.2 / height, va="top")
    summary = "no image was mistaken"
    if lines:
        summary = f"{len(worst)} of {len(wrong):,} mistakes, least probable label first: label → prediction, confidence"
    figure.text(0.5, 1 - 0.55 / height, summary, ha="center", va="top")
    for number, image in enumerate(worst):
        row, column = divmod(number, MISTAKES_PER_LINE)
        left, low = 0.15 + column * (width - 0.15) / MISTAKES_PER_LINE, height - top - line * row - side - 0.3
        axes = figure.add_axes((left / width, low / height, side / width, side / height))
        _draw_mistake(axes, images[image], labels[image], members[:, image], ensemble[image], names, classes)
    if lines:
        note = "next to each image: the members' predictions, green if correct"
        if not _has_room_for_names(names):
            order = ", ".join(short(name, 24) for name in names[:MAX_TEXT_LINES])
            more = f" (and {len(names) - MAX_TEXT_LINES} more)" if len(names) > MAX_TEXT_LINES else ""
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
    """One image and, next to it, each member's prediction, below the member's name if there is room."""
    axes.imshow(image.transpose(1, 2, 0), interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set(visible=True, color=PALE)  # a frame shows where a white background ends
    predicted = ensemble.argmax()
    axes.set_title(
        f"{short(classes[label], 12)} → {short(classes[predicted], 12)}, {100 * ensemble[predicted]:.1f} %",
        loc="left",
        fontsize=12,
        pad=4,
    )
    lines = []
    for name, probs in zip(names[:MAX_TEXT_LINES], members, strict=False):
        predicted = probs.argmax()
        if _has_room_for_names(names):
            lines.append((short(name, 15), GREY))
        text = f"{short(classes[predicted], 11)}, {100 * probs[predicted]:.0f} %"
        lines.append((text, GREEN if predicted == label else "black"))
    for number, (text, colour) in enumerate(lines):
        height = 1 - (number + 0.5) / MAX_TEXT_LINES
        axes.text(1.05, height, text, transform=axes.transAxes, va="center", fontsize=11, color=colour)


def _has_room_for_names(names: Sequence[str]) -> bool:
    return 2 * len(names) <= MAX_TEXT_LINES


def _draw_bins(axes: Axes, row: dict, colour: str) -> None:
    """One dot per non-empty bin, joined to the diagonal (perfect calibration).

    Behind them, pale, the share of the images in each bin.
    """
    counts, confidence, accuracy = row["bins"]
    edges = np.linspace(0, 100, len(counts) + 1)
    filled = counts > 0
    confidence, accuracy = 100 * confidence[filled], 100 * accuracy[filled]
    axes.stairs(100 * counts / max(counts.sum(), 1), edges, fill=True, color=PALE, zorder=0)
    axes.plot([0, 100], [0, 100], color=GREY, linewidth=1, linestyle=(0, (3, 2)), zorder=1)
    axes.vlines(confidence, confidence, accuracy, color=colour, linewidth=2.5, alpha=0.5, zorder=2)
    faces = np.where(counts[filled] < MIN_IMAGES_PER_BIN, "white", colour)
    axes.scatter(confidence, accuracy, s=36, c=faces, edgecolors=colour, linewidths=1.5, zorder=3, clip_on=False)
    axes.set_xlim(0, 100)
    axes.set_ylim(0, 102)
    axes.set_aspect("equal", adjustable="box")
    axes.set_xticks((0, 50, 100))
    axes.set_yticks((0, 50, 100))
    axes.set_title(f"{short(row['name'], 18)}\nECE {100 * row['calibration_error']:.2f} %")


def _draw_dots(axes: Axes, rows: list[dict], metric: str, scale: float, form: str, title: str) -> None:
    """One dot per row and its 95 % interval, the ensemble's below the members'; the values are at the right edge.

    Dots and not bars: the differences are small, so the axis does not begin at 0, where a bar would have to begin.
    """
    values = [scale * row[metric] for row in rows]
    intervals = [[scale * end for end in row["intervals"][metric]] for row in rows]
    last = len(values) - 1
    low, high = np.min(intervals), np.max(intervals)
    margin = 0.12 * (high - low) or 0.005 * abs(high) or 0.01
    axes.axhspan(last - 0.5, last + 0.5, color="black", alpha=0.07, linewidth=0)
    for row, value in enumerate(values):
        style = row_style(row, last)
        # The line across is the legend of the curves below: the same colour, the same dashes.
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


def _draw_lines(axes: Axes, rows: list[dict], metric: str, scale: float, title: str) -> None:
    """One line per row: the mean over the first 1, 2, … N images."""
    seen = np.arange(1, len(rows[0]["per_image"][metric]) + 1)
    curves = np.stack([scale * np.cumsum(row["per_image"][metric]) / seen for row in rows])
    for row, curve in enumerate(curves):
        axes.plot(seen, curve, **row_style(row, len(rows) - 1))
    settled = curves[:, len(seen) // 20 :]  # fit the axis without the noisy first 5 %
    low, high = settled.min(), settled.max()
    margin = 0.05 * (high - low) or 0.01
    axes.set_ylim(low - margin, high + margin)
    axes.set_xlim(0, len(seen))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=3, integer=True))
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.set_xlabel("test images seen, shuffled")
    axes.set_title(title)


def row_style(row: int, last: int) -> dict:
    """The line of a member, or of the ensemble, which is the last row."""
    if row == last:
        return {"color": "black", "linestyle": "-", "linewidth": 2.5, "zorder": 4}
    return line_style(row) | {"linewidth": 1.5}


def _draw_confusion(axes: Axes, counts: np.ndarray, classes: Sequence[str]) -> None:
    """Percentages of each true class: as numbers up to 20 × 20 cells, else as colours and a short list."""
    size = len(counts)
    percent = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    # A square root keeps a confusion of a few percent visible next to a diagonal near 100.
    image = axes.imshow(percent, cmap="Blues", norm=PowerNorm(0.5, vmin=0, vmax=100))
    axes.set_title("confusion matrix of the ensemble (%)")
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")

    step = -(-size // 25)
    ticks = range(0, size, step)
    names = [short(classes[tick], 14) for tick in ticks]
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
    """The three most frequent confusions, one per line."""
    wrong = percent * (1 - np.eye(len(percent)))
    cells = [divmod(int(cell), len(percent)) for cell in np.argsort(wrong, axis=None)[:-4:-1]]
    return "".join(
        f"\n{short(classes[true], 18)} → {short(classes[predicted], 18)}  {wrong[true, predicted]:.1f} %"
        for true, predicted in cells
    )
