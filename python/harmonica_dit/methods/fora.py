"""FORA: recompute everything at every n-th step."""

from harmonica_dit.costs import Costs
from harmonica_dit.schedule import Schedule

from .taylorseer import taylorseer


def fora(net, steps: int, every: int | None = None, order: int = 0, *, speedup: float | None = None,
         costs: Costs | None = None) -> Schedule:
    """Computes every branch at the steps 0, n, 2n, … and repeats every branch's last output at the others.

    Args:
        net, steps, every, speedup, costs: as in `taylorseer`.
        order: 0 repeats; above it is `taylorseer`, of which this is the order 0.

    Raises:
        TypeError, ValueError: as in `taylorseer`.

    Source: FORA (Selvaraju et al., 2024, arXiv 2407.01425).
    """
    return taylorseer(net, steps, every, order, speedup=speedup, costs=costs)
