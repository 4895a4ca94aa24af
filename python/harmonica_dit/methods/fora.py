"""FORA: recompute everything at every n-th step."""

import torch

from harmonica_dit.flops import count_flops
from harmonica_dit.forecaster import BranchForecaster, check_order
from harmonica_dit.schedule import Schedule
from harmonica_dit.validate import check_whole


def fora(net, steps: int, every: int, order: int = 0) -> Schedule:
    """Computes every branch at the steps 0, n, 2n, … and reuses every branch at the others.

    Args:
        net: a denoiser.
        steps: T.
        every: n ≥ 1; 1 caches nothing.
        order: of the forecast of each branch, 0 to 3; 0 repeats (FORA), the others are TaylorSeer's.

    Raises:
        ValueError: an argument is out of range; the message names it.

    Source: FORA (Selvaraju et al., 2024, arXiv 2407.01425); TaylorSeer (Liu et al., 2025, arXiv 2503.06923).
    """
    for name, value in (("steps", steps), ("every", every)):
        check_whole(name, value, 1)
    check_order(order)
    K = len(net.branch_names)
    compute = (torch.arange(steps) % every == 0)[:, None].repeat(1, K)
    coefficients = torch.full((steps, K), float(order == 1))  # which every executor knows; they are the first order
    return Schedule(compute, net.branch_names, count_flops(net), coefficients, model=net.name,
                    origin=f"FORA, every {every}" + (f", forecast of order {order}" if order else ""),
                    forecaster=BranchForecaster(order) if order > 1 else None)
