"""TaylorSeer: every n-th step is computed, and at the others each branch is forecast from its last outputs."""

import torch

from harmonica_dit.costs import Costs
from harmonica_dit.flops import count_flops
from harmonica_dit.forecaster import BranchForecaster, check_order, describe_order
from harmonica_dit.schedule import Schedule

from .spacing import costs_of, space


def taylorseer(net, steps: int, every: int | None = None, order: int = 1, *, speedup: float | None = None,
               costs: Costs | None = None) -> Schedule:
    """Computes every branch at the steps 0, n, 2n, … and forecasts every branch at the others.

    A forecast is the polynomial through the branch's last order + 1 computed outputs, continued.

    Args:
        net: a denoiser, or a traced adapter.
        steps: T.
        every, speedup: exactly one. every: n ≥ 1; 1 caches nothing. speedup: in place of every n-th step as few as it
            takes for at least this speedup, as evenly spaced as they can be.
        costs: what the speedup is in: None is FLOPs; measured seconds, see `harmonica_dit.measure_costs`.
        order: 0 to 3; 0 repeats, which is FORA. It is lower where too few steps have been computed.

    Raises:
        TypeError: net is neither. ValueError: an argument is out of range, or the adapter has not been traced; the
            message names it.

    Source: TaylorSeer (Liu et al., 2025, arXiv 2503.06923). What differs, from the second order on: u pauses after the
    newest output the paper weighs the i-th difference of the outputs by uⁱ/i!; here it is u(u + 1)…(u + i - 1)/i!
    (Lagrange, Newton), with which the polynomial goes through the outputs. That is the better one on the bundled model
    (`python -m bench.taylor_weights`).
    """
    check_order(order)
    flops, K = count_flops(net), len(net.branch_names)

    def make(computed: list[bool], which: str) -> Schedule:
        coefficients = torch.full((steps, K), float(order == 1))  # which every executor knows; they are the first order
        name = f"TaylorSeer of {describe_order(computed, order)}" if order else "FORA"
        return Schedule(torch.tensor(computed)[:, None].repeat(1, K), net.branch_names, flops, coefficients,
                        model=net.name, origin=f"{name}, {which}",
                        forecaster=BranchForecaster(order) if order > 1 else None)

    return space(steps, costs_of(flops, costs), make, every=every, speedup=speedup)
