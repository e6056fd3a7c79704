"""What all plots share: colors, fonts, shortened names, and the PNG file.

Plots use matplotlib's `Figure` objects without pyplot, so they need no window and no display.
"""

import functools
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import files

import matplotlib
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

DPI = 125
# The palette of Okabe and Ito, which is safe for color-blind readers. Black is for the ensemble.
BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
COLORS, DASHES = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY), ("-", "--", ":", "-.")
GRAY = "#595959"
PALE = "#D9D9D9"

# Fallback fonts for Chinese, Japanese and Korean, if installed.
CJK_FONTS = (
    "Noto Sans CJK JP", "Noto Sans CJK SC", "WenQuanYi Zen Hei", "Hiragino Sans", "PingFang SC", "Apple SD Gothic Neo",
    "Microsoft YaHei", "Yu Gothic", "Malgun Gothic",
)  # fmt: skip
# Font sizes are readable at half size. Names are drawn literally, without math.
STYLE = {
    "figure.dpi": DPI,
    "figure.autolayout": False,  # of a user's matplotlibrc
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.wspace": 0.04,
    "figure.titlesize": 15,
    "figure.labelsize": 12,
    "font.family": ["DejaVu Sans", *(font for font in CJK_FONTS if font in fontManager.get_font_names())],
    "font.size": 13,
    "legend.fontsize": 12,
    "legend.frameon": False,
    "xtick.labelsize": 12,
    "ytick.labelsize": 12,
    "axes.titlesize": 13,
    "axes.formatter.useoffset": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.parse_math": False,  # a class may be named "$1 coin"
}
# Ignored: warnings about characters that no font has (drawn as boxes) and about scripts whose letters matplotlib before
# 3.11 does not join, and log messages about fallback fonts without a bold weight.
IGNORED_WARNINGS = "Glyph .* missing from|Matplotlib currently does not support"
logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)


def saves_png(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Decorator: adds a path as first argument to a function that returns a figure, and saves the figure there as PNG.

    Raises UserError if the file cannot be written.
    """

    @functools.wraps(draw)
    def draw_and_save(path: str | Path, *arguments: Any, **settings: Any) -> Figure:
        # The style must also apply while saving: only then does matplotlib make the tick labels.
        with matplotlib.rc_context(STYLE), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=IGNORED_WARNINGS, category=UserWarning)
            figure = draw(*arguments, **settings)
            with files.atomic_write(path, "the plot") as file:
                figure.savefig(file, format="png")
        return figure

    return draw_and_save


def line_style(number: int) -> dict[str, str]:
    """Color and dashes of line `number`, counted from 0. The first 24 lines are all different."""
    dashes, color = divmod(number, len(COLORS))
    return {"color": COLORS[color], "linestyle": DASHES[dashes % len(DASHES)]}


def label_log_axis(axis: Axis) -> None:
    """Label a log axis with plain numbers, at 1, 2 and 5 times the powers of ten."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FormatStrFormatter("%g"))
    axis.set_minor_formatter(NullFormatter())


def shorten(text: str, length: int) -> str:
    """Shorten a text to one line of at most `length` characters. It cuts the middle: names often differ at the ends."""
    text = " ".join(str(text).split())
    if len(text) <= length:
        return text
    tail = (length - 1) // 2
    return f"{text[: length - 1 - tail]}…{text[-tail:]}"
