"""Whole steps with forecasts of the trunk between them: TaylorSeer's idea with the trunk as its unit."""

from functools import partial

import torch

from harmonica_dit.costs import Costs
from harmonica_dit.flops import Flops, trunk_costs
from harmonica_dit.forecaster import taylor
from harmonica_dit.schedule import Schedule
from harmonica_dit.validate import check_costs

from .spacing import costs_of, space


def trunk_forecast(net, steps: int, *, every: int | None = None, speedup: float | None = None,
                   costs: Costs | None = None, order: int = 1, adams: bool = False) -> Schedule:
    """Computes some steps whole and forecasts the trunk at the others, by Lagrange extrapolation.

    Args:
        net: a denoiser, or a traced adapter.
        steps, every, speedup, costs, order, adams: as in `whole_steps`.

    Raises:
        ValueError: an argument is out of range, or the adapter has not been traced, or its trunk cannot be reused; the
            message says which.

    Source: TaylorSeer (Liu et al., 2025, arXiv 2503.06923), which forecasts branch by branch.
    """
    flops, size = trunk_costs(net)
    return whole_steps(steps, flops, size, every=every, speedup=speedup, costs=costs, order=order, adams=adams,
                       names=net.branch_names, model=net.name)


def whole_steps(steps: int, flops: Flops, size: int, *, every: int | None = None, speedup: float | None = None,
                costs: Costs | None = None, order: int = 1, adams: bool = False, names: tuple[str, ...],
                model: str = "") -> Schedule:
    """`trunk_forecast` without a model at hand.

    Args:
        steps: T.
        flops: of a forward of batch 1, branch by branch. size: values of one image's trunk state, N·D.
        every, speedup: exactly one. every: n ≥ 1, the steps 0, n, 2n, … are computed. speedup: as few steps as it takes
            for at least this speedup, as evenly spaced as they can be.
        costs: what the speedup is in: None is FLOPs; measured seconds, see `harmonica_dit.measure_costs`.
        order: of the forecast, 0 to 3; 0 repeats the last state. It is lower where too few steps have been computed.
        adams: forecasts the mean over a step and corrects computed steps likewise, for schedulers of first order; see
            `harmonica_dit.forecaster.taylor`.
        names: of the K branches. model: its name; "" is any.

    Raises:
        ValueError: an argument is out of range; the message names it. So few steps may have no such speedup.
    """
    check_costs("flops", flops, len(names), Flops)
    make = partial(forecast_between, flops=flops, size=size, order=order, adams=adams, names=names, model=model)
    return space(steps, costs_of(flops, costs), make, every=every, speedup=speedup)


def forecast_between(computed: list[bool], which: str, *, flops: Flops, size: int, order: int, adams: bool = False,
                     names: tuple[str, ...], model: str) -> Schedule:
    """The schedule that computes some of T steps whole and forecasts the trunk at the others.

    computed: [T], whether a step is computed. which: the same in words. The others as in `whole_steps`.
    """
    forecaster = taylor(computed, order, size, adams)
    return Schedule(torch.tensor(computed)[:, None].repeat(1, len(names)), names, flops, model=model,
                    origin=f"trunk, {forecaster.origin}, {which}", forecaster=forecaster)
