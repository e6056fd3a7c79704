"""The pictures of an ensemble: its results beside its members', how well it is calibrated, and its mistakes."""

import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from plotting.style import BLUE, DPI, GREEN, GREY, ORANGE, PALE, PURPLE, SKY, VERMILLION, picture, short

MEMBER_COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY)
MEMBER_DASHES = ("-", "--", ":")
FEW = 10  # images, too few to say how accurate a bin is
MISTAKES_SHOWN, MISTAKES_PER_LINE = 16, 4
LINES_BESIDE = 9  # of text, as many as there is room for beside an image


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


@picture
def plot_ensemble(
    *, members: list[dict], ensemble: dict, labels: np.ndarray, classes: Sequence[str], title: str
) -> Figure:
    """Draw an ensemble beside its members: results, how they settle over the test set, confusions.

    Each member, and the ensemble, is a dict of `name`, `loss` (nats), `accuracy` (a fraction), `intervals`, which has
    the two ends of either, and `probs` (N, C), the predicted probabilities of the N test images. `labels` (N,) are the
    true classes as integers, `classes` their C names.
    """
    rows = [*members, ensemble]
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
    _draw_lines(accuracy_lines, [100 * running_accuracy(row["probs"], labels) for row in rows], "running accuracy (%)")
    _draw_lines(loss_lines, [running_loss(row["probs"], labels) for row in rows], "running loss (nats)")
    _draw_confusion(right.subplots(), confusion_matrix(ensemble["probs"], labels), classes)
    return figure


@picture
def plot_reliability(rows: list[dict], *, title: str) -> Figure:
    """Draw one reliability diagram for each row, the ensemble's last.

    A row is a dict of `name`, `calibration_error` (a fraction) and `bins`: how many images, their mean confidence and
    their accuracy, three arrays as `metrics.reliability` gives them.
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
        f"grey: share of the images; hollow: a bin of fewer than {FEW} images",
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
    """Draw the mistakes whose true class the ensemble finds least probable, with each member's prediction.

    `images` are uint8 (N, 3, H, W), `labels` (N,) their true classes as integers. `members` (M, N, C) and `ensemble`
    (N, C) are probabilities, `names` the members' and `classes` the classes'.
    """
    wrong = np.flatnonzero(ensemble.argmax(axis=1) != labels)
    of_label = ensemble[wrong, labels[wrong]]
    surest = wrong[np.argsort(of_label, kind="stable")][:MISTAKES_SHOWN]
    lines = -(-len(surest) // MISTAKES_PER_LINE)

    # In inches, so that the text beside the images changes neither their size nor their place.
    width, height, top, side, line = 12.8, 1.7 + 2.1 * lines, 0.8, 1.6, 2.1
    figure = Figure(figsize=(width, height), dpi=DPI)
    figure.suptitle(short(title, 104), fontsize=15, y=1 - 0.2 / height, va="top")
    said = "no image was mistaken"
    if lines:
        which = f"{len(surest)} whose given" if len(surest) < len(wrong) else "first those whose given"
        said = f"{len(wrong):,} mistakes, {which} label is least probable: label → predicted class, and its probability"
    figure.text(0.5, 1 - 0.55 / height, said, ha="center", va="top")
    for number, image in enumerate(surest):
        row, column = divmod(number, MISTAKES_PER_LINE)
        left, low = 0.15 + column * (width - 0.15) / MISTAKES_PER_LINE, height - top - line * row - side - 0.3
        axes = figure.add_axes((left / width, low / height, side / width, side / height))
        _draw_mistake(axes, images[image], labels[image], members[:, image], ensemble[image], names, classes)
    if lines:
        note = "beside each image the members' predictions, green where correct"
        if not _named_beside(names):
            order = ", ".join(short(name, 24) for name in names[:LINES_BESIDE])
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
    """One image, its pixels as they are, and beside it each member's prediction, below its name where there is room."""
    axes.imshow(image.transpose(1, 2, 0), interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set(visible=True, color=PALE)  # a frame shows where a white background ends
    said = ensemble.argmax()
    axes.set_title(
        f"{short(classes[label], 12)} → {short(classes[said], 12)}, {100 * ensemble[said]:.1f} %",
        loc="left",
        fontsize=12,
        pad=4,
    )
    lines = []
    for name, probs in zip(names[:LINES_BESIDE], members, strict=False):
        said = probs.argmax()
        if _named_beside(names):
            lines.append((short(name, 15), GREY))
        text = f"{short(classes[said], 11)}, {100 * probs[said]:.0f} %"
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
    axes.set_title(f"{short(row['name'], 18)}\nECE {100 * row['calibration_error']:.2f} %")


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
        style = row_style(row, last)
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
        axes.plot(seen, curve, **row_style(row, last))
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


def row_style(row: int, last: int) -> dict:
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
    """The three most frequent confusions, a line each."""
    wrong = percent * (1 - np.eye(len(percent)))
    cells = [divmod(int(cell), len(percent)) for cell in np.argsort(wrong, axis=None)[:-4:-1]]
    return "".join(
        f"\n{short(classes[true], 18)} → {short(classes[predicted], 18)}  {wrong[true, predicted]:.1f} %"
        for true, predicted in cells
    )


def _running_mean(values: np.ndarray) -> np.ndarray:
    return np.cumsum(values, dtype=np.float64) / np.arange(1, len(values) + 1)
