"""How a training meets its target: β steers the router there, and at the end a threshold is chosen that meets it."""

import warnings
from bisect import bisect_left
from itertools import pairwise

import torch
from torch import Tensor

from harmonica_dit.costs import Costs
from harmonica_dit.router import Router
from harmonica_dit.schedule import Schedule

WINDOW = 10  # the running mean of the values looks back on about so many trajectories
TOLERANCE = 0.02  # how far a frozen schedule may be from its target without a warning, as a share of it


class TargetMissed(UserWarning):
    """A router's frozen schedule is further than 2 % from its target."""


class Budget:
    """How much the rows s ≥ 1 of a schedule may compute, as Σ weight·computed, if it is to reach a target.

    Args:
        costs: what the speedup is in. steps: T.
        speedup: the speedup to reach. cur: the cache utilization ratio to reach. One of the two is None.
        forecasts: whether what is reused is forecast.

    Raises:
        ValueError: no schedule can reach the target; the message gives the limits.
    """

    def __init__(self, costs: Costs, steps: int, *, speedup: float | None = None, cur: float | None = None,
                 forecasts: bool = False):
        self.costs, self.speedup, self.cur = costs, speedup, cur
        K = len(costs.branches)
        linear = costs.of_router(forecasts)
        self.exact = cur is not None or linear is costs
        if speedup is not None:
            most = steps * costs.uncached / (costs.total + (steps - 1) * costs.fixed)
            if not 1 < speedup <= most:
                raise ValueError(f"target_speedup: got {speedup}, expected a number above 1 and up to {most:.4g}, "
                                 f"where everything after the first of {steps} steps is reused")
            self.weights = torch.tensor(linear.branches, dtype=torch.float64)
            allowed = steps * costs.uncached / speedup - steps * linear.fixed - sum(linear.branches)
        else:
            most = 1 - 1 / steps
            if not 0 < cur <= most:
                raise ValueError(f"target_cur: got {cur}, expected a number above 0 and up to {most:.4g}, "
                                 f"where everything after the first of {steps} steps is reused")
            self.weights = torch.ones(K, dtype=torch.float64)
            allowed = K * (steps * (1 - cur) - 1)
        self.allowed = allowed + 1e-9 * self.weights.sum().item()  # so that rounding does not cost an entry

    def cut(self, values: Tensor) -> float:
        """The number above which lie as many entries of values [T-1, K] as the budget allows, the greatest first."""
        values = values.detach().double().cpu()
        weights = self.weights.expand_as(values).flatten()
        ranked, order = values.flatten().sort(descending=True, stable=True)
        fitting = int((weights[order].cumsum(0) <= self.allowed).sum())
        if fitting == len(ranked):
            return ranked[-1].item() / 2  # below the least score, since scores are positive: everything is computed
        first_out = ranked[fitting].item()
        above = ranked[ranked > first_out]  # entries of equal value are reused together
        return (first_out + above[-1].item()) / 2 if len(above) else first_out

    def threshold(self, router: Router) -> float:
        """The threshold at which the router's schedule meets the target as nearly as its scores allow."""
        scores = router.scores()[1:]
        if self.exact:
            return self.cut(scores)
        values = scores.double().unique().tolist()
        cuts = [(a + b) / 2 for a, b in pairwise([0.0, *values, values[-1]])]
        return cuts[bisect_left(cuts, True, key=lambda cut: router.schedule(cut).speedup_by(
            self.costs) >= self.speedup * (1 - 1e-9))]

    def set_threshold(self, router: Router) -> None:
        router.threshold = self.threshold(router)

    def check(self, router: Router) -> None:
        """Warns if the frozen schedule is further than 2 % from the target."""
        missed = how_missed(router.schedule(), self.costs, self.speedup, self.cur)
        if missed:
            warnings.warn(missed, TargetMissed, stacklevel=4)


def how_missed(schedule: Schedule, costs: Costs, speedup: float | None, cur: float | None) -> str | None:
    """How a schedule misses its target, the speedup in these costs or the CUR, by more than 2 %; None if it does not.
    """
    name, got, target = (("target_speedup", schedule.speedup_by(costs), speedup) if cur is None
                         else ("target_cur", schedule.cur, cur))
    if target is None or abs(got - target) <= TOLERANCE * target:
        return None
    return f"{name}={target:g}: the nearest schedule above it that the scores allow has {got:.4g}"


class Steering:
    """Finds the β with which the router settles at the target, from the value of computing each entry.

    The value of an entry is q = -λ·∂mse/∂r / c; every gradient measures it. If the mean squared error falls as
    (1 - r)², the loss is least where q = β. So an entry ends with r > τ iff its value at r = τ, which is
    q·(1-τ)/(1-r), is above β. Therefore β is the cut of these values that keeps to the budget. This cut is a quantile.
    It needs no gain to tune, works for every lr and number of trajectories, and settles when the values do.
    """

    def __init__(self, budget: Budget, steps: int, branches: int, device: torch.device):
        self.budget = budget
        self.values = torch.zeros(steps - 1, branches, device=device)
        self.seen = 0

    def observe(self, values: Tensor) -> float:
        """Adds one trajectory's values at r = τ [T-1, K] to the running mean; returns β for the next trajectory."""
        self.seen += 1
        self.values.lerp_(values, 1 / min(self.seen, WINDOW))
        return max(self.budget.cut(self.values), 0.0)
