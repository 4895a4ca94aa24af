"""FORA: recompute everything at every n-th step."""

import torch

from harmonica_dit.flops import count_flops
from harmonica_dit.schedule import Schedule
from harmonica_dit.validate import check_whole, is_number


def fora(net, steps: int, every: int, extrapolation: float = 0.0) -> Schedule:
    """Computes every branch at the steps 0, n, 2n, … and reuses every branch at the others.

    Args:
        net: a denoiser.
        steps: T.
        every: n ≥ 1; 1 caches nothing.
        extrapolation: the coefficient a of the forecasts; 0 repeats (FORA), 1 is TaylorSeer's first order.

    Raises:
        ValueError: an argument is out of range; the message names it.

    Source: FORA (Selvaraju et al., 2024, arXiv 2407.01425); TaylorSeer (Liu et al., 2025, arXiv 2503.06923).
    """
    for name, value in (("steps", steps), ("every", every)):
        check_whole(name, value, 1)
    if not is_number(extrapolation):
        raise ValueError(f"extrapolation: got {extrapolation!r}, expected a finite number")
    K = len(net.branch_names)
    compute = (torch.arange(steps) % every == 0)[:, None].repeat(1, K)
    return Schedule(compute, net.branch_names, count_flops(net), torch.full((steps, K), float(extrapolation)),
                    origin=f"FORA, every {every}, extrapolation {extrapolation:g}", model=net.name)
