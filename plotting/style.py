"""What all pictures share: colours, fonts, shortened names, and the PNG file.

Everything goes through matplotlib's `Figure` object straight to a file: no window, no display.
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
# The palette of Okabe and Ito, which colour-blind readers can tell apart; black is for the ensemble.
BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
COLOURS, DASHES = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY), ("-", "--", ":", "-.")
GREY = "#595959"
PALE = "#D9D9D9"

# Fallbacks for Chinese, Japanese and Korean, if installed.
CJK_FONTS = (
    "Noto Sans CJK JP", "Noto Sans CJK SC", "WenQuanYi Zen Hei", "Hiragino Sans", "PingFang SC", "Apple SD Gothic Neo",
    "Microsoft YaHei", "Yu Gothic", "Malgun Gothic",
)  # fmt: skip
# Fonts that can still be read at half size, and names drawn as they are written.
STYLE = {
    "figure.dpi": DPI,
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
# No warning for a character that no installed font has, which is drawn as a box, for a script whose letters matplotlib
# before 3.11 does not join, or (in the log) for a fallback font that lacks a weight.
UNDRAWN = "Glyph .* missing from|Matplotlib currently does not support"
logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)


def saves_png(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Decorator: a function that returns a figure gets a path as its first argument, and saves the figure there as PNG.

    Raises UserError if the file cannot be written.
    """

    @functools.wraps(draw)
    def draw_and_save(path: str | Path, *arguments: Any, **settings: Any) -> Figure:
        # Until the figure is saved: matplotlib makes its tick labels only then.
        with matplotlib.rc_context(STYLE), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=UNDRAWN, category=UserWarning)
            figure = draw(*arguments, **settings)
            with files.atomic_write(path, "the picture") as file:
                figure.savefig(file, format="png")
        return figure

    return draw_and_save


def line_style(number: int) -> dict[str, str]:
    """Colour and dashes of line `number`, from 0: different for the first 24 lines."""
    dashes, colour = divmod(number, len(COLOURS))
    return {"color": COLOURS[colour], "linestyle": DASHES[dashes % len(DASHES)]}


def label_log_axis(axis: Axis) -> None:
    """Plain numbers at 1, 2 and 5 times the powers of ten."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FormatStrFormatter("%g"))
    axis.set_minor_formatter(NullFormatter())


def shorten(text: str, length: int) -> str:
    """The text on one line of at most `length` characters. The middle is left out: names often differ at the ends."""
    text = " ".join(str(text).split())
    if len(text) <= length:
        return text
    tail = (length - 1) // 2
    return f"{text[: length - 1 - tail]}…{text[-tail:]}"
