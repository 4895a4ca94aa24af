"""Whole steps with forecasts of the trunk between them: TaylorSeer's idea with the trunk as its unit."""

import torch

from harmonica_dit.flops import count_flops
from harmonica_dit.forecaster import taylor
from harmonica_dit.schedule import Schedule
from harmonica_dit.validate import check_whole, is_number


def trunk_forecast(net, steps: int, *, every: int | None = None, speedup: float | None = None,
                   order: int = 1, adams: bool = False) -> Schedule:
    """Computes some steps whole and forecasts the trunk at the others, by Lagrange extrapolation.

    Args:
        net: a denoiser.
        steps: T.
        every, speedup: exactly one. every: n ≥ 1, the steps 0, n, 2n, … are computed. speedup: as few steps as it takes
            for at least this speedup in FLOPs, as evenly spaced as they can be.
        order: of the forecast, 0 to 3; 0 repeats the last state.
        adams: forecasts the mean over a step and corrects computed steps likewise, for schedulers of first order; see
            `harmonica_dit.forecaster.taylor`.

    Raises:
        ValueError: an argument is out of range; the message names it.

    Source: TaylorSeer (Liu et al., 2025, arXiv 2503.06923), which forecasts branch by branch.
    """
    for name, value in (("steps", steps), ("every", every)):
        if value is not None:
            check_whole(name, value, 1)
    if (every is None) == (speedup is None):
        raise ValueError(f"every, speedup: give exactly one of them, got {every!r} and {speedup!r}")
    if every is not None:
        return _whole_steps(net, [s % every == 0 for s in range(steps)], order, adams, f"every {every}")
    if not is_number(speedup) or speedup < 1:
        raise ValueError(f"speedup: got {speedup!r}, expected a number from 1 on")
    for computed in range(steps, 0, -1):
        made = _whole_steps(net, spread(steps, computed), order, adams, f"{computed} of {steps} steps")
        if made.speedup >= speedup:
            return made
    raise ValueError(f"speedup: got {speedup}, expected at most {made.speedup:.4g}, where all but the first of {steps} "
                     "steps are forecast")


def spread(steps: int, computed: int) -> list[bool]:
    """Which of T steps are computed, the first of them and others as evenly spaced as they can be."""
    chosen = {i * steps // computed for i in range(computed)}
    return [s in chosen for s in range(steps)]


def _whole_steps(net, computed: list[bool], order: int, adams: bool, which: str) -> Schedule:
    K = len(net.branch_names)
    compute = torch.tensor(computed)[:, None].repeat(1, K)
    size = net.tokens * net.width
    forecaster = taylor(computed, order, size, adams)
    return Schedule(compute, net.branch_names, count_flops(net), origin=f"trunk, {forecaster.origin}, {which}",
                    model=net.name, timesteps=None, forecaster=forecaster)
