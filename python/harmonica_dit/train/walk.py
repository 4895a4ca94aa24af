"""One trajectory under a router's rows: what SDT trains on and what the importance of a step is measured with."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor

import harmonica_kernels as hk
from harmonica_dit.router import Router, computed
from harmonica_dit.sample.trajectory import Guided, Trajectory, call
from harmonica_dit.schedule import forecast_ratios


class Walk:
    """A batch on its way from noise to image, with its feature cache and the decisions taken so far.

    Args:
        router: whose extrapolation and threshold apply.
        trajectory: model, labels, guidance and scheduler, not used elsewhere.
        noise: [n, C, H, W], standard normal.
        hard: whether rows are thresholded, as in inference, or blend.
        cache: of an earlier walk with batches of this size, whose memory graphs know; it is rewound. None: a new one.
    """

    def __init__(self, router: Router, trajectory: Trajectory, noise: Tensor, *, hard: bool = False,
                 cache: hk.FeatureCache | None = None):
        self.router, self.trajectory, self.hard = router, trajectory, hard
        self.x, self.s = trajectory.start(noise), 0
        self.cache: hk.FeatureCache | None = hk.FeatureCache(router.history) if cache is None else cache
        self.cache.rewind()
        self.decisions = torch.empty(0, len(router.branches), dtype=torch.bool, device=noise.device)

    def predict(self, r: Tensor | None = None) -> Tensor:
        """The guided output at this step, with the scores r [K], or with every branch computed and stored."""
        if r is None:
            row = {}
            self._decide(self.decisions.new_ones(self.decisions.shape[1]))
        else:
            decided, e = computed(r, self.router.threshold), self._forecast()
            self._decide(decided)
            if self.hard:
                row = {"gate": tuple(decided.tolist()), "extrapolate": None if e is None else e.tolist()}
            else:
                row = {"gate": r, "threshold": self.router.threshold, "extrapolate": e}
        return self.trajectory.predict(self.x, self.s, cache=self.cache, **row)

    def learn(self, r: Tensor, target: Tensor, weight: Tensor, channels: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """The guided output at this step with the scores r, its error against the target, and ∂(weight·error)/∂r [K].

        The gradient is passed on to what r and the forecasts come from. channels: as in `compared`.
        """
        with torch.enable_grad():
            e = self._forecast()
        self._decide(computed(r, self.router.threshold))
        learned = e is not None and e.requires_grad
        output, error, *gradients = self.trajectory.run(
            compared, self.trajectory.model, *self.trajectory.inputs(self.x, self.s), target, r.detach(),
            None if e is None else e.detach(), weight, self.cache, self.router.threshold, channels, learned)
        torch.autograd.backward([r, e][: len(gradients)], gradients)
        return output, error, gradients[0]

    def teacher(self) -> Tensor:
        """The guided output at this step without caching; the cache is not touched."""
        with torch.no_grad():
            return self.trajectory.predict(self.x, self.s)

    def advance(self, output: Tensor) -> None:
        """Takes the scheduler's step from the guided output."""
        self.x = self.trajectory.advance(output, self.s, self.x)
        self.s += 1

    def fork(self, cached: bool) -> "Walk":
        """A copy that goes on by itself, in the same cache; without a cache it can only compute everything.

        It is the one memory that graphs know: before this walk goes on, the cache has to be what it was again.
        """
        other = copy.copy(self)
        other.trajectory = self.trajectory.fork()
        if not cached:
            other.cache = None
        return other

    def _decide(self, decided: Tensor) -> None:
        self.decisions = torch.cat([self.decisions, decided[None]])

    def _forecast(self) -> Tensor | None:
        if self.router.coefficients is None:
            return None
        return self.router.coefficients[self.s - 1] * forecast_ratios(self.decisions)


def compared(model: Guided, x: Tensor, t: Tensor, rows: Tensor, target: Tensor, r: Tensor, e: Tensor | None,
             weight: Tensor, cache: hk.FeatureCache, threshold: float, channels: int | None,
             learned: bool) -> tuple[Tensor, ...]:
    """The student of one step, forward and backward: what SDT spends its time in.

    It differentiates by itself and renews the cache itself, so that nothing of it is left to do outside and an executor
    can record it as one graph, whatever the step and the router's values.

    Args:
        x, t, rows: what the model is called with, see `Guided`. target: the guided output to compare with.
        r: scores [K]. e: forecast weights [K], None without extrapolation. weight: λ of the step [].
        channels: how many leading output channels are compared, None for all. learned: whether e gets a gradient too.

    Returns:
        The guided output, mean((output - target)²), and the gradients of weight times that by r and, if it is to have
        one and anything was forecast, by e. None of them has a gradient of its own.
    """
    with torch.enable_grad():
        wanted = [scalars.detach().requires_grad_() for scalars in ([r, e] if learned else [r])]
        output = model(x, t, rows, gate=wanted[0], extrapolate=wanted[1] if learned else e, cache=cache,
                       threshold=threshold)
        error = (output[:, :channels].float() - target[:, :channels].float()).square().mean()
        found = torch.autograd.grad(weight * error, wanted, allow_unused=True)
    cache.commit()
    return output.detach(), error.detach(), *(gradient for gradient in found if gradient is not None)


def new_executor(net, steps: int) -> Callable:
    """What trajectories of a training run `net` and `compared` with: one executor, so that its graphs share memory.

    Of T steps with hard rows, all T - 1 keep their graphs through a λ refresh, beside the few that serve every step.
    """
    if getattr(net, "prompts", None) is not None:
        return call  # prompts are looked up on the host, which a graph would not do again
    return hk.compile(call, graphs=steps + 16)
