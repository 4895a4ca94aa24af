"""The style of all pictures: sizes, colours, and how a picture is written."""

import os
from collections.abc import Callable

import matplotlib
from matplotlib.figure import Figure

from harmonica_dit.files import replacement

INK, FAINT, RULE = "#222222", "#767676", "#d9d9d9"
STYLE = {"font.size": 9, "font.family": "DejaVu Sans", "text.color": INK, "axes.edgecolor": FAINT,
         "axes.labelcolor": INK, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False,
         "xtick.color": FAINT, "ytick.color": FAINT, "xtick.labelcolor": INK, "ytick.labelcolor": INK}


def save(draw: Callable[[], Figure], path: str | os.PathLike) -> None:
    """Draws in this style and writes `path`, at 150 dots an inch."""
    with matplotlib.rc_context(STYLE), replacement(path) as temporary:
        draw().savefig(temporary, dpi=150, bbox_inches="tight", pad_inches=0.15, facecolor="white", format="png")
