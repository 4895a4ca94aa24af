"""FORA: recompute everything at every n-th step."""

from harmonica_dit.costs import Costs
from harmonica_dit.schedule import Schedule

from .taylorseer import taylorseer


def fora(net, steps: int, every: int | None = None, *, speedup: float | None = None,
         costs: Costs | None = None) -> Schedule:
    """Computes every branch at the steps 0, n, 2n, … and repeats every branch's last output at the others.

    It is TaylorSeer of order 0: arguments and errors are those of `taylorseer`.

    Source: FORA (Selvaraju et al., 2024, arXiv 2407.01425).
    """
    return taylorseer(net, steps, every, 0, speedup=speedup, costs=costs)
