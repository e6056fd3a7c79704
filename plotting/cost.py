"""The picture of what accuracy costs: subsets of the members, the cascade, and the whole ensemble as a line."""

from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

from plotting.style import BLUE, DPI, VERMILLION, picture, short

LETTERED = 4  # members, whose subsets there is room to name


@picture
def plot_cost(
    *, subsets: Sequence[dict], cascade: Sequence[dict], threshold: float | None, device: str, title: str
) -> Figure:
    """Draw test accuracy and loss against the milliseconds that an image takes.

    A subset is a dict of `members` (names), `accuracy` (a fraction), `loss` (nats) and `milliseconds`; the last one is
    the whole ensemble. A row of `cascade`, which may be empty, has `threshold` in place of `members`; that of
    `threshold` is marked.
    """
    figure = Figure(figsize=(12.4, 5.4), dpi=DPI, layout="constrained")
    figure.suptitle(short(title, 104), fontsize=15)
    accuracy_axes, loss_axes = figure.subplots(1, 2)
    for axes, key, scale, best in ((accuracy_axes, "accuracy", 100, max), (loss_axes, "loss", 1, min)):
        _draw_subsets(axes, subsets, key, scale, best)
        if cascade:
            x, y = [row["milliseconds"] for row in cascade], [scale * row[key] for row in cascade]
            axes.plot(x, y, ".-", color=VERMILLION, linewidth=2, label="cascade, by threshold", zorder=3)
            chosen = next(row for row in cascade if row["threshold"] == threshold)
            axes.plot(chosen["milliseconds"], scale * chosen[key], "D", color=VERMILLION, markersize=10,
                      label=f"cascade at {threshold:g}", zorder=5)  # fmt: skip
        axes.axhline(scale * subsets[-1][key], color="black", linestyle=(0, (3, 2)), label="the whole ensemble")
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
    key = "   ".join(f"{chr(ord('A') + number)} {short(name, 24)}" for number, name in enumerate(names[:LETTERED]))
    handles, labels = accuracy_axes.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=len(labels),
        frameon=False,
        title=key if len(names) <= LETTERED else None,
    )
    return figure


def _draw_subsets(axes: Axes, subsets: Sequence[dict], key: str, scale: float, best: Callable) -> None:
    """A point for each subset; those that no cheaper one equals are joined."""
    x, y = [row["milliseconds"] for row in subsets], [scale * row[key] for row in subsets]
    axes.plot(x, y, "o", color=BLUE, label="subsets of the members", zorder=4)
    efficient = []
    for row in sorted(subsets, key=lambda row: row["milliseconds"]):
        if not efficient or best(row[key], efficient[-1][key]) != efficient[-1][key]:
            efficient.append(row)
    axes.plot(
        [row["milliseconds"] for row in efficient], [scale * row[key] for row in efficient], color=BLUE, linewidth=1
    )
    names = [row["members"][0] for row in subsets if len(row["members"]) == 1]
    if len(names) <= LETTERED:
        for row in subsets[:-1]:
            letters = "".join(chr(ord("A") + names.index(member)) for member in row["members"])
            axes.annotate(
                letters, (row["milliseconds"], scale * row[key]), xytext=(7, 5), textcoords="offset points", fontsize=12
            )
    axes.margins(y=0.1)
