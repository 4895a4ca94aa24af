"""Meeting a target: the β that steers a router to it, and the threshold that freezes one at it."""

import warnings

import torch
from torch import Tensor

from harmonica_dit.flops import Flops
from harmonica_dit.router import Router

WINDOW = 10  # trajectories that the running mean of the values looks back on
TOLERANCE = 0.02


class Budget:
    """How much the rows s ≥ 1 of a schedule may compute, Σ weight·computed, for it to reach a target.

    Args:
        flops: what a row costs. steps: T.
        speedup: the FLOPs speedup to reach, or None. cur: the cache utilization ratio to reach, or None; one of both.

    Raises:
        ValueError: no schedule can reach it; the message says what the limits are.
    """

    def __init__(self, flops: Flops, steps: int, *, speedup: float | None = None, cur: float | None = None):
        self.speedup, self.cur = speedup, cur
        K = len(flops.branches)
        if speedup is not None:
            most = steps * flops.total / (flops.total + (steps - 1) * flops.fixed)
            if not 1 < speedup <= most:
                raise ValueError(f"target_speedup: got {speedup}, expected a number above 1 and up to {most:.4g}, "
                                 f"where everything after the first of {steps} steps is reused")
            self.weights = torch.tensor(flops.branches, dtype=torch.float64)
            allowed = steps * flops.total / speedup - steps * flops.fixed - sum(flops.branches)
        else:
            most = 1 - 1 / steps
            if not 0 < cur <= most:
                raise ValueError(f"target_cur: got {cur}, expected a number above 0 and up to {most:.4g}, "
                                 f"where everything after the first of {steps} steps is reused")
            self.weights = torch.ones(K, dtype=torch.float64)
            allowed = K * (steps * (1 - cur) - 1)
        self.allowed = allowed + 1e-9 * self.weights.sum().item()  # rounding must not cost an entry

    def cut(self, values: Tensor) -> float:
        """The smallest number such that the entries of values [T-1, K] above it stay in the budget."""
        values = values.detach().double().cpu()
        weights = self.weights.expand_as(values).flatten()
        ranked, order = values.flatten().sort(descending=True, stable=True)
        fitting = int((weights[order].cumsum(0) <= self.allowed).sum())
        if fitting == len(ranked):
            return ranked[-1].item() / 2  # scores are positive: everything is computed
        first_out = ranked[fitting].item()
        above = ranked[ranked > first_out]  # entries of one value are reused together
        return (first_out + above[-1].item()) / 2 if len(above) else first_out

    def freeze(self, router: Router) -> None:
        """Sets the threshold with which the router's schedule meets the target as nearly as its scores allow."""
        router.threshold = self.cut(router.scores()[1:])

    def check(self, router: Router) -> None:
        """Warns where the frozen schedule is further than 2 % from the target."""
        schedule = router.schedule()
        name, got, target = (("target_speedup", schedule.speedup, self.speedup) if self.cur is None
                             else ("target_cur", schedule.cur, self.cur))
        if abs(got - target) > TOLERANCE * target:
            warnings.warn(f"{name}={target:g}: the nearest schedule above it that the scores allow has {got:.4g}",
                          stacklevel=3)


class Steering:
    """Finds β from what computing each entry is worth, so that the router settles at the target.

    The value of an entry is q = -λ·∂mse/∂r / c, measured with each gradient. With a mean squared error that falls as
    (1 - r)², the loss is least where q = β, so an entry ends with r > τ iff its value at r = τ, q·(1-τ)/(1-r), is
    above β. Therefore β is the cut of these values that keeps to the budget. Being a quantile, it needs no gain to
    tune, follows whatever lr and number of trajectories, and settles when the values do.
    """

    def __init__(self, budget: Budget, steps: int, branches: int, device: torch.device):
        self.budget = budget
        self.values = torch.zeros(steps - 1, branches, device=device)
        self.seen = 0

    def observe(self, values: Tensor) -> float:
        """Takes one trajectory's values at r = τ [T-1, K] into the running mean; returns the β for the next."""
        self.seen += 1
        self.values.lerp_(values, 1 / min(self.seen, WINDOW))
        return max(self.budget.cut(self.values), 0.0)
