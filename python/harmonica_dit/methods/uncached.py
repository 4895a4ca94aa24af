"""No caching: the baseline that every method is compared with."""

import torch

from harmonica_dit.flops import count_flops
from harmonica_dit.schedule import Schedule


def uncached(net, steps: int) -> Schedule:
    """Computes every branch of `net` at each of T = `steps` steps."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps: got {steps!r}, expected a whole number from 1 on")
    compute = torch.ones(steps, len(net.branch_names), dtype=torch.bool)
    return Schedule(compute, net.branch_names, count_flops(net), origin="uncached", model=net.name)
