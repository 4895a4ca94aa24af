"""Plots of a comparison: quality against speedup, and errors along the trajectory."""

import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from .style import FAINT, INK, RULE, save

# Okabe and Ito's palette: readable with every common colour vision. A method has the same colour in every picture.
COLOURS = {"uncached": INK, "accurate solution": INK, "learned forecast": "#cc79a7",
           "learned forecast, to uncached": "#7b2d5f", "router": "#0072b2", "router + forecast": "#56b4e9",
           "FORA": "#d55e00", "FORA + forecast": "#e69f00", "fewer steps": "#009e73", "DPM-Solver++": "#8c6d1f",
           "Adams forecast": "#5b3a8c"}
REFERENCES = {"uncached": (0, (4, 3)), "accurate solution": (0, (1, 2))}  # lines, whatever they cost: their dashes
SPARE = ("#999999", "#a0522d", "#4b6b8a", "#7fa650", "#b5651d", "#c2a5cf", "#6b8e8e", "#d4a5a5")
MARKERS = {"learned forecast": "p", "learned forecast, to uncached": "X", "router": "o", "router + forecast": "D",
           "FORA": "s", "FORA + forecast": "^", "fewer steps": "v", "DPM-Solver++": "<", "Adams forecast": "h"}
SPARE_MARKERS = ("P", "d", ">", "8", "H")
METRICS = (("error", "error against the uncached images\n(RMSE, images in [−1, 1])", "lower is better"),
           ("accurate_error", "error against the accurate solution\n(RMSE, images in [−1, 1])", "lower is better"),
           ("label_accuracy", "label accuracy", "higher is better"),
           ("frechet", "Fréchet distance\n(features of the bundled classifier)", "lower is better"))
UNDECODED = (("latent_error", "error of latents against the uncached ones\n(RMSE, unclipped)", "lower is better"),
             ("accurate_latent_error", "error of latents against the accurate solution\n(RMSE, unclipped)",
              "lower is better"))
COLUMNS = 8  # of the legend
MANY = 10  # families: of more, bars and small differences are lost, and errors go on a logarithmic axis
ALIKE = 1.02  # settings of a family whose speedups differ by less are one point
SPEEDUPS = {"flops_speedup": "FLOPs speedup", "wall_speedup": "measured speedup"}


class Point(NamedTuple):
    """A setting of a method, with the range of its seeds; of one seed the interval of 95 %, where there is one."""

    x: float
    y: float
    low: float
    high: float


def plot_tradeoff(rows: Sequence[dict], path: str | os.PathLike, title: str = "") -> None:
    """Writes quality against speedup, one line a method, to a PNG: a panel a metric, and if time was measured a second
    row of panels against it.

    Args:
        rows: of `compare`. title: of the whole picture.
    """
    timed = any(row.get("wall_speedup") is not None for row in rows if row["family"] not in REFERENCES)
    axes = [against for against in SPEEDUPS if against == "flops_speedup" or timed]
    metrics = metrics_of(rows)
    looks = _looks(row["family"] for row in rows)

    def draw() -> Figure:
        figure = Figure((3.6 * len(metrics), 3.3 * len(axes) + 0.7), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
        panels = figure.subplots(len(axes), len(metrics), squeeze=False)
        for line, against in zip(panels, axes):
            measured = [row for row in rows if row.get(against) is not None]
            for axis, (key, label, better) in zip(line, metrics):
                _panel(axis, measured, key, looks, against)
                axis.set_ylabel(label)
                axis.annotate(better, (1, 1), (0, 3), xycoords="axes fraction", textcoords="offset points", ha="right",
                              size=7.5, color=FAINT)
        handles = [Line2D([], [], label=family, **look) for family, look in looks.items()]
        figure.legend(handles=handles, loc="outside upper left", ncols=min(len(looks), COLUMNS), frameon=False,
                      alignment="left",
                      title=title or None, title_fontproperties=dict(weight="bold", size=11))
        return figure

    save(draw, path)


def metrics_of(rows: Sequence[dict]) -> list[tuple[str, str, str]]:
    """What the rows can be drawn by: figures of images, or of latents where nothing decodes them."""
    known = METRICS if any(row.get("error") is not None for row in rows) else UNDECODED
    return [metric for metric in known if any(row.get(metric[0]) is not None for row in rows)]


def plot_along(groups: Mapping[str, Mapping[str, Sequence[float]]], families: Mapping[str, str],
               path: str | os.PathLike) -> None:
    """Writes errors along the trajectory to a PNG: a panel a group, a line a method.

    Args:
        groups: heading -> method's name -> its errors after each of T steps, see `errors_along`. families: of the
            methods, which decide the colours.
    """
    looks = _looks(families.values())

    def draw() -> Figure:
        figure = Figure((5.8 * len(groups), 3.6), layout="constrained")
        panels = figure.subplots(1, len(groups), squeeze=False, sharey=True)[0]
        for axis, (heading, lines) in zip(panels, groups.items()):
            axis.set_title(heading, loc="left", weight="bold")
            for name, errors in lines.items():
                look = looks[families[name]] | dict(markersize=3.5, linewidth=1.4)
                axis.plot(range(1, len(errors) + 1), errors, label=name, **look)
            axis.set_xlabel("step (noise → image)")
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.grid(axis="y", color=RULE, linewidth=0.6)
            axis.legend(fontsize=7.5, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))  # beside the lines
        figure.axes[0].set_ylim(bottom=0)  # of all panels; not earlier, which would keep the others' lines out
        figure.axes[0].set_ylabel("error of $x_t$ against the uncached trajectory\n(RMSE, unclipped)")
        return figure

    save(draw, path)


def _looks(families: Iterable[str]) -> dict[str, dict]:
    """How the lines of these families are drawn: in colours and markers of their own, or in spare ones in turn."""
    wanted = dict.fromkeys(families)
    spare = zip(itertools.cycle(SPARE), itertools.cycle(SPARE_MARKERS))
    others = {family: next(spare) for family in wanted if family not in COLOURS}
    looks = {}
    for family in [family for family in COLOURS if family in wanted] + list(others):
        if family in REFERENCES:
            looks[family] = {"color": INK, "linewidth": 0.9, "linestyle": REFERENCES[family]}
            continue
        colour, marker = others[family] if family in others else (COLOURS[family], MARKERS[family])
        looks[family] = {"color": colour, "linewidth": 1.8, "marker": marker, "markersize": 5.5,
                         "markeredgecolor": "white", "markeredgewidth": 0.7}
    return looks


def _points(rows: Sequence[dict], key: str, against: str) -> list[Point]:
    """A family's rows by speedup; seeds of sampling and of training, whose speedups are alike, together."""
    together: list[list[dict]] = []
    for row in sorted(rows, key=lambda row: row[against]):
        if together and row[against] <= ALIKE * together[-1][0][against]:
            together[-1].append(row)
        else:
            together.append([row])
    points = []
    for same in together:
        values = [row[key] for row in same]
        low, high = min(values), max(values)
        if len(same) == 1:
            low, high = _interval(same[0], key)
        points.append(Point(fmean(row[against] for row in same), fmean(values), low, high))
    return points


def _interval(row: dict, key: str) -> tuple[float, float]:
    """Of 95 %; of a Fréchet distance that of its difference to the uncached one."""
    value, about, named = row[key], row[key], key
    if key == "frechet":
        about, named = row.get("frechet_above"), "frechet_above"
    low, high = row.get(f"{named}_low"), row.get(f"{named}_high")
    return (value, value) if low is None or high is None else (value + low - about, value + high - about)


def _panel(axis: Axes, rows: Sequence[dict], key: str, looks: Mapping[str, dict], against: str) -> None:
    families: dict[str, list[dict]] = {}
    for row in rows:
        if row.get(key) is not None:
            families.setdefault(row["family"], []).append(row)
    few = len(families) <= MANY
    for family, found in families.items():
        points = _points(found, key, against)
        if family in REFERENCES:
            axis.axhline(points[0].y, zorder=1, **looks[family])
            continue
        x, y = [point.x for point in points], [point.y for point in points]
        bars = [[max(p.y - p.low, 0) for p in points], [max(p.high - p.y, 0) for p in points]]
        axis.errorbar(x, y, bars if few and any(map(any, bars)) else None, elinewidth=1, capsize=2,
                      zorder=4 if family.startswith("router") else 3, **looks[family])
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
    elif few and key.endswith("error"):
        axis.set_ylim(bottom=0)
    elif not few and all(row[key] for family, found in families.items() if family not in REFERENCES for row in found):
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.yaxis.set_minor_formatter(NullFormatter())
