"""No caching: the baseline that every method is compared with."""

import torch

from harmonica_dit.flops import count_flops
from harmonica_dit.schedule import Schedule
from harmonica_dit.validate import check_whole


def uncached(net, steps: int) -> Schedule:
    """Computes every branch of `net` at each of T = `steps` steps."""
    check_whole("steps", steps, 1)
    compute = torch.ones(steps, len(net.branch_names), dtype=torch.bool)
    return Schedule(compute, net.branch_names, count_flops(net), origin="uncached", model=net.name)
