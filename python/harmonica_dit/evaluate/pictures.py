"""Pictures: samples side by side, routers and schedules as heat maps, quality against speedup."""

import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, ListedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor

from harmonica_dit.files import replacement
from harmonica_dit.router import Router
from harmonica_dit.schedule import Schedule

INK, FAINT, RULE = "#222222", "#767676", "#d9d9d9"
COMPUTED, REPEATED, FORECAST = "#0b559f", "#f3efe6", "#e08214"
# Okabe and Ito's palette: readable with every common colour vision. A method has the same colour in every picture.
COLOURS = {"uncached": INK, "accurate solution": INK, "learned forecast": "#cc79a7", "router": "#0072b2",
           "router + forecast": "#56b4e9", "FORA": "#d55e00", "FORA + forecast": "#e69f00", "fewer steps": "#009e73",
           "DPM-Solver++": "#8c6d1f", "Adams forecast": "#5b3a8c"}
REFERENCES = {"uncached": (0, (4, 3)), "accurate solution": (0, (1, 2))}  # lines, whatever they cost: their dashes
SPARE = ("#999999", "#a0522d", "#4b6b8a")
MARKERS = {"learned forecast": "p", "router": "o", "router + forecast": "D", "FORA": "s", "FORA + forecast": "^",
           "fewer steps": "v", "DPM-Solver++": "<", "Adams forecast": "h"}
STYLE = {"font.size": 9, "font.family": "DejaVu Sans", "text.color": INK, "axes.edgecolor": FAINT,
         "axes.labelcolor": INK, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False,
         "xtick.color": FAINT, "ytick.color": FAINT, "xtick.labelcolor": INK, "ytick.labelcolor": INK}
PARTS = {"attn": "attention", "attn1": "self-attention", "attn2": "cross-attention", "mlp": "feed-forward",
         "ff": "feed-forward"}


def _save(draw: Callable[[], Figure], path: str | os.PathLike) -> None:
    """Draws in this module's style and writes `path`, at 150 dots an inch."""
    with matplotlib.rc_context(STYLE), replacement(path) as temporary:
        draw().savefig(temporary, dpi=150, bbox_inches="tight", pad_inches=0.15, facecolor="white", format="png")


def image_grid(rows: Sequence[Tensor], titles: Sequence[str], path: str | os.PathLike,
               columns: Sequence[str] | None = None) -> None:
    """Writes rows of images to a PNG, so that images from the same noise stand in one column.

    Args:
        rows: each [n, 1 or 3, H, W] in [-1, 1], all of one shape.
        titles: one per row; the text after the first line break is smaller.
        columns: n headings, such as class names.

    Raises:
        ValueError: the rows differ in shape, are not grey or RGB images, or the titles or columns do not match.
    """
    shapes = {tuple(row.shape) for row in rows}
    if len(shapes) != 1 or len(next(iter(shapes))) != 4 or next(iter(shapes))[1] not in (1, 3):
        raise ValueError(f"rows: got shapes {sorted(shapes)}, expected one shape [n, 1 or 3, H, W]")
    n = len(rows[0])
    if len(titles) != len(rows) or (columns is not None and len(columns) != n):
        raise ValueError(f"got {len(titles)} titles and {columns and len(columns)} columns for {len(rows)} rows of {n}")

    def draw() -> Figure:
        cell = min(0.8, 14 / n)
        figure = Figure((n * cell + 1.5, len(rows) * cell * 1.03))
        axes = figure.subplots(len(rows), n, squeeze=False,
                               gridspec_kw=dict(left=1.5 / (n * cell + 1.5), right=1, top=1, bottom=0, wspace=0.06,
                                                hspace=0.06))
        for line, row, title in zip(axes, rows, titles):
            for axis, image in zip(line, row.float().cpu()):
                pixels = (image.clamp(-1, 1) / 2 + 0.5).permute(1, 2, 0).numpy()
                axis.imshow(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels, cmap="gray", vmin=0, vmax=1)
                axis.set_axis_off()
            head, _, rest = title.partition("\n")
            at = dict(xycoords="axes fraction", textcoords="offset points", ha="right", annotation_clip=False)
            line[0].annotate(head, (0, 0.5), (-8, 1 if rest else -3), weight="bold", **at)
            line[0].annotate(rest, (0, 0.5), (-8, -4), va="top", size=7.5, color=FAINT, linespacing=1.3, **at)
        for axis, heading in zip(axes[0], columns or ()):
            axis.annotate(heading, (0.5, 1), (0, 4), xycoords="axes fraction", textcoords="offset points", ha="center",
                          size=7.5, color=FAINT)
        return figure

    _save(draw, path)


def plot(made: Router | Schedule, path: str | os.PathLike, *, threshold: float | None = None,
         title: str | None = None) -> None:
    """Draws a router's scores, or a schedule's table, into a PNG. threshold: replaces a router's own."""
    if isinstance(made, Router):
        plot_router(made.scores(), made.threshold if threshold is None else threshold, path, made.branches,
                    title or f"Router of {made.model or 'a model'}, {made.steps} steps")
    else:
        plot_schedule(made, path, title)


def plot_router(scores: Tensor, threshold: float, path: str | os.PathLike, branches: Sequence[str],
                title: str = "Router") -> None:
    """Writes a heat map of a router's scores [T, K]: blues above the threshold (computed), sand below (reused)."""

    def draw() -> Figure:
        figure, axis = _heat_map(scores.shape, branches, title)
        sand = LinearSegmentedColormap.from_list("", ["#fbf9f4", "#e6dcc6"])
        blue = LinearSegmentedColormap.from_list("", ["#a6cbe6", COMPUTED, "#08264d"])
        levels = np.linspace(0, 1, 500)
        colours = np.where((levels > threshold)[:, None], blue((levels - threshold) / max(1 - threshold, 1e-9)),
                           sand(levels / max(threshold, 1e-9)))
        shown = axis.imshow(scores.detach().float().cpu().numpy().T, aspect="auto", vmin=0, vmax=1,
                            cmap=ListedColormap(colours))
        bar = figure.colorbar(shown, ax=axis, fraction=0.05, pad=0.02, aspect=25)
        bar.outline.set_visible(False)
        ticks = [tick for tick in (0, 0.5, 1) if abs(tick - threshold) > 0.04]
        bar.set_ticks([threshold, *ticks], labels=[f"τ = {threshold:.3g}", *map("{:g}".format, ticks)])
        bar.ax.tick_params(length=2)
        bar.ax.set_ylabel("score")
        computed = (scores.double() > threshold).float().mean().item()
        _legend(axis, {f"computed: score > τ ({computed:.0%})": Patch(color=COMPUTED),
                       f"reused ({1 - computed:.0%})": Patch(facecolor=REPEATED, edgecolor=RULE)})
        return figure

    _save(draw, path)


def plot_schedule(schedule: Schedule, path: str | os.PathLike, title: str | None = None) -> None:
    """Writes a heat map of a `Schedule`: computed, repeated and forecast entries. Arrows mark the forecast ones."""
    compute = schedule.compute.cpu().numpy().astype(bool)
    strengths = schedule.extrapolation.float().cpu().numpy() if schedule.forecaster is None else 1.0
    forecast = np.where(compute, 0, strengths)
    forecasts = forecast != 0

    def draw() -> Figure:
        figure, axis = _heat_map(compute.shape, schedule.branches, title or f"Schedule: {schedule.origin}")
        pixels = np.where(compute[..., None], to_rgb(COMPUTED), to_rgb(REPEATED))
        strength = 0.25 + 0.5 * np.abs(forecast / max(np.abs(forecast).max(), 1e-9))[..., None]
        pixels = np.where(forecasts[..., None], 1 - strength * (1 - np.array(to_rgb(FORECAST))), pixels)
        axis.imshow(pixels.transpose(1, 0, 2), aspect="auto")
        arrow = dict(marker=">", markersize=3, color="#7a3e00", linestyle="none")
        axis.plot(*forecasts.nonzero(), **arrow)
        entries = {f"computed ({compute.mean():.0%})": Patch(color=COMPUTED),
                   f"repeated ({(~compute & ~forecasts).mean():.0%})": Patch(facecolor=REPEATED, edgecolor=RULE)}
        if forecasts.any():
            low, high = f"{forecast[forecasts].min():.2g}", f"{forecast[forecasts].max():.2g}"
            weights = f"a = {low}" if low == high else f"a from {low} to {high}"
            weights = weights if schedule.forecaster is None else "the trunk"
            entries[f"forecast, {weights} ({forecasts.mean():.0%})"] = (Patch(color="#efb97c"), Line2D([], [], **arrow))
        _legend(axis, entries)
        return figure

    _save(draw, path)


def _heat_map(shape: tuple[int, int], branches: Sequence[str], title: str) -> tuple[Figure, Axes]:
    """Axes for T steps (x, in sampling order) by K branches (y, in execution order, grouped by block)."""
    T, K = shape
    figure = Figure((max(4.5, 1.2 + min(0.3, 12 / T) * T), max(2, 0.8 + min(0.24, 14 / K) * K)))
    axis = figure.add_subplot()
    axis.set_title(title, loc="left", weight="bold", pad=26)
    axis.set_xticks(range(0, T, 1 if T <= 20 else 5))
    axis.set_xlabel("step (noise → image)")
    names = [name.rsplit(".", 1) for name in branches]
    parts = [PARTS.get(name[-1], name[-1]) for name in names]
    axis.set_yticks(range(K), parts, size=7.5)
    axis.tick_params(length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)
    axis.set_xticks(np.arange(T - 1) + 0.5, minor=True)
    axis.set_yticks(np.arange(K - 1) + 0.5, minor=True)
    axis.grid(which="minor", color="white", linewidth=0.8)
    axis.tick_params(which="minor", length=0)
    first, aside = 0, -16 - 4.2 * max(map(len, parts))  # in points; a letter of these labels is about 4.2 wide
    for k in range(1, K + 1):
        if k < K and names[k][0] == names[first][0]:
            continue
        number = names[first][0].rsplit(".", 1)[-1]
        axis.annotate(f"block {number}", (0, (first + k - 1) / 2), (aside, 0), xycoords=("axes fraction", "data"),
                      textcoords="offset points", va="center", ha="right", size=7.5, color=FAINT)
        if k < K:
            axis.axhline(k - 0.5, -0.02, 1, color="white", linewidth=3.5, clip_on=False)
        first = k
    return figure, axis


def _legend(axis: Axes, entries: Mapping[str, Artist | tuple[Artist, ...]]) -> None:
    axis.legend(entries.values(), entries.keys(), loc="lower left", bbox_to_anchor=(0, 1), ncols=len(entries),
                frameon=False, borderaxespad=0.3, borderpad=0, handlelength=1.2, handleheight=1, columnspacing=1.5,
                fontsize=8)


def image_sheet(images: Tensor, path: str | os.PathLike, columns: int = 10, enlarge: int = 3) -> None:
    """Writes images [n, 1 or 3, H, W] in [-1, 1] to a PNG, `columns` in a row, each pixel `enlarge` times as large.

    Raises:
        ValueError: the images are not grey or RGB.
    """
    n, channels, height, width = images.shape
    if channels not in (1, 3):
        raise ValueError(f"images: got {channels} channels, expected 1 or 3")
    pixels = ((images.float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    pixels = pixels.repeat(enlarge, 1).repeat(enlarge, 2)
    columns, gap = min(columns, n), 2 * enlarge
    high, wide = height * enlarge + gap, width * enlarge + gap
    sheet = np.full((-(-n // columns) * high + gap, columns * wide + gap, channels), 255, np.uint8)
    for i, image in enumerate(pixels):
        top, left = i // columns * high + gap, i % columns * wide + gap
        sheet[top : top + high - gap, left : left + wide - gap] = image
    with replacement(path) as temporary:
        Image.fromarray(sheet.squeeze(2) if channels == 1 else sheet).save(temporary, "PNG")


METRICS = (("error", "error against the uncached images\n(RMSE, images in [−1, 1])", "lower is better"),
           ("accurate_error", "error against the accurate solution\n(RMSE, images in [−1, 1])", "lower is better"),
           ("label_accuracy", "label accuracy", "higher is better"),
           ("frechet", "Fréchet distance\n(features of the bundled classifier)", "lower is better"))


def plot_tradeoff(groups: Mapping[str, Sequence[dict]], path: str | os.PathLike, title: str = "") -> None:
    """Writes quality against FLOPs speedup, one line a method, to a PNG.

    Args:
        groups: heading → rows of `compare`. Each group is a row of panels. Rows that have the same name become one
            point at their mean, with a bar from the least to the greatest if there are several seeds.
        title: of the whole picture.
    """
    every = [row for rows in groups.values() for row in rows]
    metrics = [metric for metric in METRICS if any(row.get(metric[0]) is not None for row in every)]
    found = dict.fromkeys(row["family"] for rows in groups.values() for row in rows)
    colours = COLOURS | dict(zip((family for family in found if family not in COLOURS), itertools.cycle(SPARE)))
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
                _panel(axis, rows, key, colours)
                axis.set_ylabel(label)
                axis.annotate(better, (1, 1), (0, 3), xycoords="axes fraction", textcoords="offset points", ha="right",
                              size=7.5, color=FAINT)
        handles = [Line2D([], [], label=family, **_line(family, colours)) for family in families]
        figure.legend(handles=handles, loc="outside upper left", ncols=len(families), frameon=False, alignment="left",
                      title=title or None, title_fontproperties=dict(weight="bold", size=11))
        return figure

    _save(draw, path)


def _panel(axis: Axes, rows: Sequence[dict], key: str, colours: Mapping[str, str]) -> None:
    settings: dict[str, dict[str, list[dict]]] = {}
    ends: dict[str, tuple[float, float]] = {}
    for row in rows:
        if row.get(key) is not None:
            settings.setdefault(row["family"], {}).setdefault(row["name"], []).append(row)
    for family, by_name in settings.items():
        points = sorted((fmean(row["flops_speedup"] for row in same), [row[key] for row in same]) for same in
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
    axis.set_xlabel("FLOPs speedup")
    axis.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}×")
    axis.margins(x=0.08)
    if key == "label_accuracy":
        digits = 0 if axis.viewLim.height > 0.05 else 1
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:.{digits}%}")
    if key.endswith("error"):
        axis.set_ylim(bottom=0)
    _label_ends(axis, ends, colours)


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
