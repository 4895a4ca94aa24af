"""Pictures of decisions: a router's scores and schedules as heat maps."""

import os
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, ListedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from harmonica_dit.adaptive import AdaptiveSchedule
from harmonica_dit.router import Router
from harmonica_dit.schedule import Schedule

from .style import FAINT, RULE, save

COMPUTED, REPEATED, FORECAST, FORECAST_SHADE = "#0b559f", "#f3efe6", "#e08214", "#efb97c"
PARTS = {"attn": "attention", "attn1": "self-attention", "attn2": "cross-attention", "mlp": "feed-forward",
         "ff": "feed-forward"}


def plot(made: Router | Schedule, path: str | os.PathLike, *, threshold: float | None = None,
         title: str | None = None) -> None:
    """Draws a router's scores, or a schedule's table, into a PNG. threshold: replaces a router's own."""
    if isinstance(made, Router):
        plot_router(made, path, made.threshold if threshold is None else threshold,
                    title or f"Router of {made.model or 'a model'}, {made.steps} steps")
    else:
        plot_schedule(made, path, title)


def plot_router(router: Router, path: str | os.PathLike, threshold: float, title: str) -> None:
    """Writes a heat map of a router's scores [T, K]: blues above the threshold (computed), sand below (reused). Arrows
    mark what is forecast."""
    scores, schedule = router.scores(), router.schedule(threshold)

    def draw() -> Figure:
        figure, axis = _heat_map(scores.shape, router.branches, title)
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
        entries = {f"computed: score > τ ({1 - schedule.cur:.0%})": Patch(color=COMPUTED),
                   f"reused ({schedule.cur:.0%})": Patch(facecolor=REPEATED, edgecolor=RULE)}
        _legend(axis, entries | _mark_forecasts(axis, schedule, REPEATED))
        return figure

    save(draw, path)


def plot_schedule(schedule: Schedule, path: str | os.PathLike, title: str | None = None) -> None:
    """Writes a heat map of a `Schedule`: computed, repeated and forecast entries. Arrows mark the forecast ones."""
    compute, forecast = _entries(schedule)
    forecasts = forecast != 0

    def draw() -> Figure:
        figure, axis = _heat_map(compute.shape, schedule.branches, title or f"Schedule: {schedule.origin}")
        axis.imshow(_pixels(compute, forecast), aspect="auto")
        entries = {f"computed ({compute.mean():.0%})": Patch(color=COMPUTED),
                   f"repeated ({(~compute & ~forecasts).mean():.0%})": Patch(facecolor=REPEATED, edgecolor=RULE)}
        _legend(axis, entries | _mark_forecasts(axis, schedule, FORECAST_SHADE))
        return figure

    save(draw, path)


def plot_schedules(schedules: Mapping[str, Schedule | AdaptiveSchedule], path: str | os.PathLike,
                   columns: int = 4) -> None:
    """Writes several schedules side by side, each under its title, all with steps from left to right."""

    def draw() -> Figure:
        rows = -(-len(schedules) // columns)
        figure = Figure((3.1 * min(columns, len(schedules)), 1.75 * rows + 0.4), layout="constrained")
        panels = figure.subplots(rows, min(columns, len(schedules)), squeeze=False).ravel()
        for axis, (title, schedule) in zip(panels, schedules.items()):
            axis.imshow(_pixels(*_entries(schedule)), aspect="auto", interpolation="nearest")
            axis.set_title(title, loc="left", size=8)
            axis.set_xticks([0, schedule.steps - 1], ["noise", "image"], size=7)
            axis.set_yticks([0, len(schedule.branches) - 1], ["first", "last branch"], size=7)
            axis.tick_params(length=0)
        for axis in panels[len(schedules) :]:
            axis.set_axis_off()
        shades = {"computed": COMPUTED, "repeated": REPEATED, "forecast": FORECAST_SHADE}
        figure.legend([Patch(facecolor=colour, edgecolor=RULE) for colour in shades.values()], shades.keys(),
                      loc="outside upper left", ncols=3, frameon=False)
        return figure

    save(draw, path)


def _entries(schedule: Schedule | AdaptiveSchedule) -> tuple[np.ndarray, np.ndarray]:
    """What is computed, bool [T, K], and how strongly the others are forecast [T, K]; 0 repeats."""
    compute = schedule.compute.cpu().numpy() > 0.5  # by an adaptive one in most forwards
    strengths = schedule.extrapolation.float().cpu().numpy() if schedule.forecaster is None else 1.0
    return compute, np.where(compute, 0, strengths)


def _mark_forecasts(axis: Axes, schedule: Schedule, shade: str) -> dict[str, tuple[Artist, ...]]:
    """Draws an arrow on each forecast entry, and returns the legend's entry, if there are any. shade: its colour."""
    _, forecast = _entries(schedule)
    forecasts = forecast != 0
    if not forecasts.any():
        return {}
    arrow = dict(marker=">", markersize=3, color="#7a3e00", linestyle="none")
    axis.plot(*forecasts.nonzero(), **arrow)
    low, high = f"{forecast[forecasts].min():.2g}", f"{forecast[forecasts].max():.2g}"
    weights = f"a = {low}" if low == high else f"a from {low} to {high}"
    weights = weights if schedule.forecaster is None else "the trunk"
    return {f"forecast, {weights} ({forecasts.mean():.0%})": (Patch(color=shade), Line2D([], [], **arrow))}


def _pixels(compute: np.ndarray, forecast: np.ndarray) -> np.ndarray:
    """Colours [K, T, 3]; the stronger a forecast, the fuller its orange."""
    pixels = np.where(compute[..., None], to_rgb(COMPUTED), to_rgb(REPEATED))
    strength = 0.25 + 0.5 * np.abs(forecast / max(np.abs(forecast).max(), 1e-9))[..., None]
    pixels = np.where((forecast != 0)[..., None], 1 - strength * (1 - np.array(to_rgb(FORECAST))), pixels)
    return pixels.transpose(1, 0, 2)


def _heat_map(shape: tuple[int, int], branches: Sequence[str], title: str) -> tuple[Figure, Axes]:
    """Axes for T steps (x, in sampling order) by K branches (y, in execution order, grouped by block)."""
    T, K = shape
    figure = Figure((max(4.5, 1.2 + min(0.3, 12 / T) * T), max(2, 0.8 + min(0.24, 14 / K) * K)))
    axis = figure.add_subplot()
    letters = int(figure.get_figwidth() / 0.095)  # as many of a title's letters are as wide as the figure
    axis.set_title(textwrap.fill(title, letters), loc="left", weight="bold", pad=26)
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
