"""One trajectory under a router's rows: what SDT trains on and what the importance of a step is measured with."""

import copy

import torch
from torch import Tensor

import harmonica_kernels as hk
from harmonica_dit.router import Router, computed
from harmonica_dit.sample.trajectory import Trajectory
from harmonica_dit.schedule import forecast_ratios


class Walk:
    """A batch on its way from noise to image, with its feature cache and the decisions taken so far.

    Args:
        router: whose extrapolation and threshold apply.
        trajectory: model, labels, guidance and scheduler, not used elsewhere.
        noise: [n, C, H, W], standard normal.
        hard: whether rows are thresholded, as in inference, or blend.
    """

    def __init__(self, router: Router, trajectory: Trajectory, noise: Tensor, *, hard: bool = False):
        self.router, self.trajectory, self.hard = router, trajectory, hard
        self.x, self.s = trajectory.start(noise), 0
        self.cache: hk.FeatureCache | None = hk.FeatureCache(router.history)
        self.decisions = torch.empty(0, len(router.branches), dtype=torch.bool, device=noise.device)

    def predict(self, r: Tensor | None = None) -> Tensor:
        """The guided output at this step, with the scores r [K], or with every branch computed and stored."""
        if r is None:
            decided, row = self.decisions.new_ones(self.decisions.shape[1]), {}
        else:
            decided, e = computed(r, self.router.threshold), self._forecast()
            if self.hard:
                row = {"gate": tuple(decided.tolist()), "extrapolate": None if e is None else e.tolist()}
            else:
                row = {"gate": r, "threshold": self.router.threshold, "extrapolate": e}
        self.decisions = torch.cat([self.decisions, decided[None]])
        return self.trajectory.predict(self.x, self.s, cache=self.cache, **row)

    def teacher(self) -> Tensor:
        """The guided output at this step without caching; the cache is not touched."""
        with torch.no_grad():
            return self.trajectory.predict(self.x, self.s)

    def advance(self, output: Tensor) -> None:
        """Takes the scheduler's step from the guided output."""
        self.x = self.trajectory.advance(output, self.s, self.x)
        self.s += 1

    def fork(self, cache: hk.FeatureCache | None) -> "Walk":
        """A copy that goes on by itself in `cache`'s memory; without one it can only compute everything."""
        other = copy.copy(self)
        other.trajectory = self.trajectory.fork()
        other.cache = None if cache is None else cache.copy_(self.cache)
        return other

    def _forecast(self) -> Tensor | None:
        if self.router.coefficients is None:
            return None
        return self.router.coefficients[self.s - 1] * forecast_ratios(self.decisions)
