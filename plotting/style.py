"""What all pictures share: colours, fonts, shortened names, and the PNG file.

Everything goes through matplotlib's `Figure` object straight to a file: no window, no display, no global state.
"""

import functools
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common import files

import matplotlib
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager

DPI = 125
# The palette of Okabe and Ito, which colour-blind readers can tell apart; black is for the ensemble.
BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
COLOURS, DASHES = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY), ("-", "--", ":", "-.")
GREY = "#595959"
PALE = "#D9D9D9"

# Fallbacks for Chinese, Japanese and Korean, if installed.
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


@contextmanager
def style() -> Iterator[None]:
    """Fonts that can still be read at half size, and names drawn as they are written.

    It must stay active until the picture is saved: matplotlib makes its tick labels only then.
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
        # No warning for each character that no installed font has, which is drawn as a box, for a script whose letters
        # matplotlib before 3.11 does not join, or for a fallback font that lacks a weight.
        for message in ("Glyph .* missing from", "Matplotlib currently does not support"):
            warnings.filterwarnings("ignore", message=message, category=UserWarning)
        font_log.setLevel(logging.ERROR)
        try:
            yield
        finally:
            font_log.setLevel(level)


def picture(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Decorator: a function that returns a figure gets a path as its first argument, and saves the figure there as PNG.

    Raises UserError if the file cannot be written.
    """

    @functools.wraps(draw)
    def draw_and_save(path: str | Path, *arguments: Any, **settings: Any) -> Figure:
        with style():
            figure = draw(*arguments, **settings)
            with files.replacing(path, "the picture") as file:
                figure.savefig(file, format="png")
        return figure

    return draw_and_save


def line_style(number: int) -> dict[str, str]:
    """Colour and dashes of line `number`, from 0: different for the first 24 lines."""
    dashes, colour = divmod(number, len(COLOURS))
    return {"color": COLOURS[colour], "linestyle": DASHES[dashes % len(DASHES)]}


def short(text: str, length: int) -> str:
    """The text on one line of at most `length` characters. The middle is left out: names often differ at the ends."""
    text = " ".join(str(text).split())
    if len(text) <= length:
        return text
    tail = (length - 1) // 2
    return f"{text[: length - 1 - tail]}…{text[-tail:]}"
