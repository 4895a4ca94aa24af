"""No caching: the baseline that every method is compared with."""

import torch

from harmonica_dit.flops import count_flops
from harmonica_dit.schedule import Schedule
from harmonica_dit.validate import check_whole


def uncached(net, steps: int) -> Schedule:
    """Computes every branch at each of T = `steps` steps. net: a denoiser, or a traced adapter.

    Raises:
        TypeError: net is neither. ValueError: steps is out of range, or the adapter has not been traced; the message
            names it.
    """
    check_whole("steps", steps, 1)
    flops = count_flops(net)
    compute = torch.ones(steps, len(net.branch_names), dtype=torch.bool)
    return Schedule(compute, net.branch_names, flops, origin="uncached", model=net.name)
