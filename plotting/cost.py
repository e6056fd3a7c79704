"""The picture of what accuracy costs: subsets of the members, the cascade, and the whole ensemble as a line."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from plotting.style import BLUE, VERMILLION, label_log_axis, picture, short

LETTERS = "ABCD"  # of the members; the subsets of more members are not labelled


@picture
def plot_cost(
    *, subsets: Sequence[dict], cascade: Sequence[dict], threshold: float | None, device: str, title: str
) -> Figure:
    """Draw test accuracy and loss against milliseconds per image.

    A subset is a dict of `members` (names), `accuracy` (a fraction), `loss` (nats) and `milliseconds`; the last one is
    the whole ensemble. A row of `cascade`, which may be empty, has `threshold` instead of `members`; the row of
    `threshold` is marked.
    """
    figure = Figure(figsize=(12.4, 5.4))
    figure.suptitle(short(title, 104))
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
        axes.set_xlabel(f"milliseconds an image, {device}")
    accuracy_axes.set_ylabel("test accuracy (%)")
    loss_axes.set_ylabel("test loss (nats)")
    figure.legend(
        *accuracy_axes.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=3,  # two lines: in one, the ends would be cut off
        title="   ".join(f"{letter} {short(name, 24)}" for name, letter in letters.items()) or None,
    )
    return figure
