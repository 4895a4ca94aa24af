"""A compute table for other timesteps: each branch keeps its share of computed steps, along the trajectory.

The new steps begin at positions among the old ones: 2.5 lies halfway between the old steps 2 and 3. Up to a position a
branch has an accumulated count, which is j where it was computed for the j-th time (from 0) and linear between. So its
slope is the share of steps that are computed there. A new step adds the mean slope over what it spans; the branch is
computed where the sum passes the next whole number. So every n-th step stays every n-th, whatever their number, and
equal timesteps give equal rows. The nearest row of each step would not do: at every second of the old steps, the rows
of a table that computes every second one are all of one kind.
"""

import warnings
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from harmonica_dit.forecaster import TrunkForecaster, forecast_ratios, taylor
from harmonica_dit.validate import check_timesteps, shorten

# A sum that passes a whole number in the last quarter of a step is left to the next one. All that is said above holds
# for any part between 0 and 1, ends excluded. The smaller, the earlier and the more often branches are computed. At 1/2
# their number is kept best, but the first computed step after a long pause comes late, which costs quality
# (bench/resampling.py).
LAST = 0.25
MOVED = 0.05  # a CUR that moves by more is worth a warning


def resample(schedule, timesteps: Sequence[float]):
    """The schedule for other timesteps, see `Schedule.resampled`."""
    if schedule.timesteps is None:
        raise ValueError("schedule: does not say what timesteps it was made for, so its rows cannot be mapped to "
                         "others")
    timesteps = check_timesteps(timesteps, max(1, len(timesteps)))
    at = positions(schedule.timesteps, timesteps)
    compute, forecaster = resample_table(schedule.compute, at), schedule.forecaster
    if schedule.unit == "trunk":
        forecaster = resample_forecaster(forecaster, schedule.compute[:, 0].tolist(), compute[:, 0].tolist())
    made = replace(schedule, compute=compute, timesteps=timesteps, forecaster=forecaster,
                   extrapolation=resample_coefficients(schedule.extrapolation, schedule.compute, at),
                   origin=f"{schedule.origin}, resampled from {schedule.steps} steps")
    if abs(made.cur - schedule.cur) > MOVED:
        warnings.warn(f"schedule: made for {schedule.steps} steps with CUR {schedule.cur:.2f}, which becomes "
                      f"{made.cur:.2f} in the {made.steps} steps that it is resampled to", stacklevel=3)
    return made


def positions(made: Sequence[float], wanted: Sequence[float]) -> np.ndarray:
    """Where the steps with timesteps `wanted` begin among those with timesteps `made`, and where the last one ends.

    Steps of one timestep (Heun's scheduler has two each) share what lies before the next one.

    Returns:
        float64 [len(wanted) + 1], strictly rising. Old step s is at s; what lies before or beyond them goes on evenly.

    Raises:
        ValueError: the timesteps of either neither fall nor rise, or they move in opposite directions.
    """
    (a, old), (b, new) = (_direct(name, times) for name, times in (("schedule: its timesteps", made),
                                                                   ("timesteps", wanted)))
    if a * b < 0:
        raise ValueError(f"timesteps: got {shorten(tuple(wanted))}, which move against the schedule's own, "
                         f"{shorten(tuple(made))}")
    sign = a or b or -1
    times, first = np.unique(sign * old, return_index=True)
    if len(times) == 1:
        times, first = np.append(times, times + 1), np.append(first, first + 1)
    starts, at = np.unique(sign * new, return_index=True)
    begin = _interpolate(starts, times, first)
    end = max(len(made), begin[-1] + 1)
    return np.interp(np.arange(len(wanted) + 1), [*at, len(wanted)], [*begin, end])


def _direct(name: str, timesteps: Sequence[float]) -> tuple[int, np.ndarray]:
    """1 if the timesteps rise, -1 if they fall, 0 if all are equal; and the timesteps themselves."""
    times = np.array(timesteps, np.float64)
    signs = set(np.sign(np.diff(times)).tolist()) - {0.0}
    if len(signs) > 1:
        raise ValueError(f"{name}: got {shorten(tuple(timesteps))}, expected numbers that only fall or only rise")
    return int(sum(signs)), times


def _interpolate(at: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Piecewise linear through the points, at least two with rising x; beyond them with the outermost slopes."""
    before, after = (y[1] - y[0]) / (x[1] - x[0]), (y[-1] - y[-2]) / (x[-1] - x[-2])
    inside = np.interp(at, x, y)
    return inside + np.minimum(at - x[0], 0) * before + np.maximum(at - x[-1], 0) * after


def resample_branch(computed: Sequence[bool], at: np.ndarray) -> list[bool]:
    """Whether a branch is computed at each new step, the first of them in any case. at: see `positions`."""
    knots = np.flatnonzero(computed)
    # the end cuts the last pause short, so it counts as no shorter than the one before
    pause = max(len(computed) - knots[-1], np.diff(knots, prepend=0)[-1])
    count = _interpolate(at, np.append(knots, knots[-1] + pause), np.arange(len(knots) + 1.0))
    share = np.diff(count) / np.diff(at)  # per new step, at most 1
    passed = np.ceil(np.cumsum(share) - LAST * share)
    return [True, *(passed[1:] > passed[:-1]).tolist()]


def resample_table(compute: Tensor, at: np.ndarray) -> Tensor:
    """bool [T', K] of bool [T, K]; equal columns stay equal. at: see `positions`."""
    made: dict[tuple[bool, ...], list[bool]] = {}
    for column in map(tuple, compute.T.tolist()):
        if column not in made:
            made[column] = resample_branch(column, at)
    return torch.tensor([made[tuple(column)] for column in compute.T.tolist()]).T.contiguous()


def resample_coefficients(coefficients: Tensor, compute: Tensor, at: np.ndarray) -> Tensor:
    """Extrapolation coefficients a [T', K]: of each branch those of the nearest old step that forecasts it.

    Where no old step does, of the nearest that reuses it; of two equally near ones the noisier. compute: bool [T, K] of
    the old steps. at: see `positions`.
    """
    T, K = compute.shape
    forecast = torch.stack([forecast_ratios(compute[:s]) > 0 for s in range(T)]) & ~compute
    fit = torch.where(forecast.any(0), forecast, ~compute)
    distance = (torch.from_numpy(at[:-1])[:, None] - torch.arange(T)).abs()  # [T', T]
    rows = torch.where(fit, distance[:, :, None], torch.inf).argmin(1)  # [T', K]
    return coefficients.gather(0, rows) * fit.any(0)


def resample_forecaster(forecaster: TrunkForecaster, compute: Sequence[bool],
                        wanted: Sequence[bool]) -> TrunkForecaster:
    """Taylor's or Adams's weights for other steps. compute, wanted: whether a step is computed, old and new.

    Raises:
        ValueError: the weights are not those that `taylor` makes: they were learned for their own timesteps.
    """
    rule = forecaster.rule
    if rule is not None:
        made = taylor(compute, rule.order, forecaster.size, rule.adams)
        others = (forecaster.tokens, forecaster.own, forecaster.condition)
        if torch.equal(made.states, forecaster.states) and all(table is None for table in others):
            return taylor(wanted, rule.order, forecaster.size, rule.adams)
    raise ValueError("schedule: its forecaster's weights belong to its own timesteps and cannot be mapped to others")
