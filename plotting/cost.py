"""The picture of what accuracy costs: subsets of the members, the cascade, and the whole ensemble as a line."""

from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

from plotting.style import BLUE, DPI, VERMILLION, picture, short

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
    figure = Figure(figsize=(12.4, 5.4), dpi=DPI, layout="constrained")
    figure.suptitle(short(title, 104), fontsize=15)
    accuracy_axes, loss_axes = figure.subplots(1, 2)
    for axes, metric, scale, best in ((accuracy_axes, "accuracy", 100, max), (loss_axes, "loss", 1, min)):
        _draw_subsets(axes, subsets, metric, scale, best)
        if cascade:
            x, y = [row["milliseconds"] for row in cascade], [scale * row[metric] for row in cascade]
            axes.plot(x, y, ".-", color=VERMILLION, linewidth=2, label="cascade, by threshold", zorder=3)
            chosen = next(row for row in cascade if row["threshold"] == threshold)
            axes.plot(chosen["milliseconds"], scale * chosen[metric], "D", color=VERMILLION, markersize=10,
                      label=f"cascade at {threshold:g}", zorder=5)  # fmt: skip
        axes.axhline(scale * subsets[-1][metric], color="black", linestyle=(0, (3, 2)), label="the whole ensemble")
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
        low, high = (limit(row["milliseconds"] for row in [*subsets, *cascade]) for limit in (min, max))
        ticks = [number * 10**power for power in range(-4, 6) for number in (1, 2, 5)]
        axes.set_xticks([tick for tick in ticks if low / 1.6 <= tick <= high * 1.6])
        axes.set_xlim(low / 1.6, high * 1.6)
        axes.ticklabel_format(axis="y", useOffset=False)
        axes.set_xlabel(f"milliseconds an image, {device}")
    accuracy_axes.set_ylabel("test accuracy (%)")
    loss_axes.set_ylabel("test loss (nats)")
    names = [row["members"][0] for row in subsets if len(row["members"]) == 1]
    letters = "   ".join(f"{letter} {short(name, 24)}" for letter, name in zip(LETTERS, names, strict=False))
    handles, labels = accuracy_axes.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=3,  # two lines: in one, the ends would be cut off
        frameon=False,
        title=letters if len(names) <= len(LETTERS) else None,
    )
    return figure


def _draw_subsets(axes: Axes, subsets: Sequence[dict], metric: str, scale: float, best: Callable) -> None:
    """One point per subset; a line joins the subsets that are better than all cheaper ones."""
    x, y = [row["milliseconds"] for row in subsets], [scale * row[metric] for row in subsets]
    axes.plot(x, y, "o", color=BLUE, label="subsets of the members", zorder=4)
    efficient = []
    for row in sorted(subsets, key=lambda row: row["milliseconds"]):
        if not efficient or best(row[metric], efficient[-1][metric]) != efficient[-1][metric]:
            efficient.append(row)
    axes.plot(
        [row["milliseconds"] for row in efficient], [scale * row[metric] for row in efficient], color=BLUE, linewidth=1,
        label="better than all cheaper ones",
    )  # fmt: skip
    names = [row["members"][0] for row in subsets if len(row["members"]) == 1]
    if len(names) <= len(LETTERS):
        for number, (row, point) in enumerate(zip(subsets, zip(x, y, strict=True), strict=True)):
            letters = "".join(LETTERS[names.index(member)] for member in row["members"])
            axes.annotate(letters, point, xytext=(7, (5, -14)[number % 2]), textcoords="offset points", fontsize=12)
    axes.margins(y=0.1)
