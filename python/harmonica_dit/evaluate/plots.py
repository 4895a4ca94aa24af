"""Plots of a comparison: quality against speedup, and errors along the trajectory."""

import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from .style import FAINT, INK, RULE, save

# Okabe and Ito's palette: readable with every common colour vision. A method has the same colour in every picture.
COLOURS = {"uncached": INK, "accurate solution": INK, "learned forecast": "#cc79a7", "router": "#0072b2",
           "router + forecast": "#56b4e9", "FORA": "#d55e00", "FORA + forecast": "#e69f00", "fewer steps": "#009e73",
           "DPM-Solver++": "#8c6d1f", "Adams forecast": "#5b3a8c"}
REFERENCES = {"uncached": (0, (4, 3)), "accurate solution": (0, (1, 2))}  # lines, whatever they cost: their dashes
SPARE = ("#999999", "#a0522d", "#4b6b8a", "#7fa650", "#b5651d", "#c2a5cf", "#6b8e8e", "#d4a5a5")
MARKERS = {"learned forecast": "p", "router": "o", "router + forecast": "D", "FORA": "s", "FORA + forecast": "^",
           "fewer steps": "v", "DPM-Solver++": "<", "Adams forecast": "h"}
METRICS = (("error", "error against the uncached images\n(RMSE, images in [−1, 1])", "lower is better"),
           ("accurate_error", "error against the accurate solution\n(RMSE, images in [−1, 1])", "lower is better"),
           ("label_accuracy", "label accuracy", "higher is better"),
           ("frechet", "Fréchet distance\n(features of the bundled classifier)", "lower is better"))


COLUMNS = 8  # of the legend
LABELLED = 10  # families at most whose lines are named beside them; of more, the legend alone has the names
SPEEDUPS = {"flops_speedup": "FLOPs speedup", "wall_speedup": "measured speedup"}


def plot_tradeoff(groups: Mapping[str, Sequence[dict]], path: str | os.PathLike, title: str = "",
                  against: str = "flops_speedup") -> None:
    """Writes quality against speedup, one line a method, to a PNG.

    Args:
        groups: heading → rows of `compare`. Each group is a row of panels. Rows that have the same name become one
            point at their mean, with a bar from the least to the greatest if there are several seeds.
        title: of the whole picture. against: a key of SPEEDUPS; rows without it are left out.
    """
    groups = {heading: [row for row in rows if row.get(against) is not None] for heading, rows in groups.items()}
    every = [row for rows in groups.values() for row in rows]
    metrics = [metric for metric in METRICS if any(row.get(metric[0]) is not None for row in every)]
    found = {row["family"] for row in every}
    colours = _colours(row["family"] for row in every)
    families = [family for family in colours if family in found]

    def draw() -> Figure:
        figure = Figure((3.9 * len(metrics), 3.3 * len(groups) + 0.7), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.22, h_pad=0.08)
        panels = figure.subplots(len(groups), len(metrics), squeeze=False)
        for line, (heading, rows) in zip(panels, groups.items()):
            line[0].set_title(heading, loc="left", weight="bold", pad=14)
            for axis, (key, label, better) in zip(line, metrics):
                if all(row.get(key) is None for row in rows):
                    axis.set_axis_off()
                    why = "Fréchet distance: too few samples here" if key == "frechet" else "not measured here"
                    axis.text(0.5, 0.5, why, ha="center", va="center", color=FAINT)
                    continue
                _panel(axis, rows, key, colours, against)
                axis.set_ylabel(label)
                axis.annotate(better, (1, 1), (0, 3), xycoords="axes fraction", textcoords="offset points", ha="right",
                              size=7.5, color=FAINT)
        handles = [Line2D([], [], label=family, **_line(family, colours)) for family in families]
        figure.legend(handles=handles, loc="outside upper left", ncols=min(len(families), COLUMNS), frameon=False,
                      alignment="left",
                      title=title or None, title_fontproperties=dict(weight="bold", size=11))
        return figure

    save(draw, path)


def plot_along(groups: Mapping[str, Mapping[str, Sequence[float]]], families: Mapping[str, str],
               path: str | os.PathLike) -> None:
    """Writes errors along the trajectory to a PNG: a panel a group, a line a method.

    Args:
        groups: heading -> method's name -> its errors after each of T steps, see `errors_along`. families: of the
            methods, which decide the colours.
    """
    colours = _colours(families.values())

    def draw() -> Figure:
        figure = Figure((4.4 * len(groups), 3.4), layout="constrained")
        panels = figure.subplots(1, len(groups), squeeze=False, sharey=True)[0]
        for axis, (heading, lines) in zip(panels, groups.items()):
            axis.set_title(heading, loc="left", weight="bold")
            for name, errors in lines.items():
                look = _line(families[name], colours) | dict(markersize=3.5, linewidth=1.4)
                axis.plot(range(1, len(errors) + 1), errors, label=name, **look)
            axis.set_xlabel("step (noise → image)")
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.grid(axis="y", color=RULE, linewidth=0.6)
            axis.legend(fontsize=7.5, frameon=False)
        figure.axes[0].set_ylim(bottom=0)  # of all panels; not earlier, which would keep the others' lines out
        figure.axes[0].set_ylabel("error of $x_t$ against the uncached trajectory\n(RMSE, unclipped)")
        return figure

    save(draw, path)


def _colours(families: Iterable[str]) -> dict[str, str]:
    """Every family's colour: its own, or one of the spare ones in turn."""
    others = [family for family in dict.fromkeys(families) if family not in COLOURS]
    return COLOURS | dict(zip(others, itertools.cycle(SPARE)))


def _panel(axis: Axes, rows: Sequence[dict], key: str, colours: Mapping[str, str], against: str) -> None:
    settings: dict[str, dict[str, list[dict]]] = {}
    ends: dict[str, tuple[float, float]] = {}
    for row in rows:
        if row.get(key) is not None:
            settings.setdefault(row["family"], {}).setdefault(row["name"], []).append(row)
    for family, by_name in settings.items():
        points = sorted((fmean(row[against] for row in same), [row[key] for row in same]) for same in
                        by_name.values())
        x, y = [speedup for speedup, _ in points], [fmean(values) for _, values in points]
        if family in REFERENCES:
            axis.axhline(y[0], zorder=1, **_line(family, colours))
            continue
        ends[family] = x[-1], y[-1]
        spread = [[mean - min(values) for mean, (_, values) in zip(y, points)],
                  [max(values) - mean for mean, (_, values) in zip(y, points)]]
        axis.errorbar(x, y, spread if len({row["seed"] for row in rows}) > 1 else None, elinewidth=1, capsize=2,
                      zorder=4 if family.startswith("router") else 3, **_line(family, colours))
    axis.grid(axis="y", color=RULE, linewidth=0.6)
    axis.set_axisbelow(True)
    axis.tick_params(length=2)
    axis.set_xlabel(SPEEDUPS[against])
    axis.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}×")
    axis.margins(x=0.08)
    if key == "label_accuracy":
        digits = 0 if axis.viewLim.height > 0.05 else 1
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:.{digits}%}")
    if key.endswith("error") and len(settings) <= LABELLED:
        axis.set_ylim(bottom=0)
    if len(settings) <= LABELLED:
        _label_ends(axis, ends, colours)
    elif key != "label_accuracy":
        axis.set_yscale("log" if all(row[key] for row in rows if row.get(key) is not None and
                                     row["family"] not in REFERENCES) else "linear")


def _line(family: str, colours: Mapping[str, str]) -> dict:
    if family in REFERENCES:
        return {"color": INK, "linewidth": 0.9, "linestyle": REFERENCES[family]}
    return {"color": colours[family], "linewidth": 1.8, "marker": MARKERS.get(family, "P"), "markersize": 5.5,
            "markeredgecolor": "white", "markeredgewidth": 0.7}


def _label_ends(axis: Axes, ends: Mapping[str, tuple[float, float]], colours: Mapping[str, str]) -> None:
    """Writes each line's name beside its last point, or higher if it would cover the name below."""
    low, high = axis.get_ylim()
    points = (high - low) / 165  # units of y per typographic point; a panel is about 165 points high
    floor = -np.inf
    for family, (x, y) in sorted(ends.items(), key=lambda end: end[1][1]):
        at = max(y, floor)
        floor = at + 9.5 * points
        axis.annotate(family, (x, y), (8, (at - y) / points), textcoords="offset points", va="center", size=7.5,
                      color=colours[family], annotation_clip=False, zorder=5,
                      path_effects=[withStroke(linewidth=2.5, foreground="white")])
