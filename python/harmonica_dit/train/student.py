"""The student: one trajectory under a router's rows. SDT trains on it, and λ is measured with it."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor

import harmonica_kernels as hk
from harmonica_dit.router import Router, decide
from harmonica_dit.sample.trajectory import Guided, Trajectory, run_eagerly
from harmonica_dit.schedule import forecast_ratios


class Student:
    """A batch on its way from noise to image, with its feature cache and the decisions taken so far.

    Args:
        router: whose extrapolation and threshold apply.
        trajectory: model, labels, guidance and scheduler, not used elsewhere.
        noise: [n, C, H, W], standard normal.
        hard: whether rows are thresholded, as in inference, or blend.
        cache: one to work in, which is rewound; recorded graphs need the same one again. None: a new one.
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
            decided, e = decide(r, self.router.threshold), self._forecast()
            self._decide(decided)
            if self.hard:
                row = {"row": tuple(decided.tolist()), "forecast_weights": None if e is None else e.tolist()}
            else:
                row = {"row": r, "threshold": self.router.threshold, "forecast_weights": e}
        return self.trajectory.predict(self.x, self.s, cache=self.cache, **row)

    def learn(self, r: Tensor, target: Tensor, weight: Tensor, channels: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """The guided output at this step with the scores r, its error against the target, and ∂(weight·error)/∂r [K].

        The gradient is passed on to what r and the forecasts come from. channels: as in `student_step`.
        """
        with torch.enable_grad():
            e = self._forecast()
        self._decide(decide(r, self.router.threshold))
        learned = e is not None and e.requires_grad
        output, error, *gradients = self.trajectory.executor(
            student_step, self.trajectory.model, *self.trajectory.inputs(self.x, self.s), target, r.detach(),
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

    def fork(self, cached: bool) -> "Student":
        """A copy that goes on by itself; without a cache it can only compute everything.

        Both work in one cache, because recorded graphs hold its addresses. Put its contents back before this one goes
        on.
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


def student_step(model: Guided, x: Tensor, t: Tensor, rows: Tensor, target: Tensor, r: Tensor, e: Tensor | None,
             weight: Tensor, cache: hk.FeatureCache, threshold: float, channels: int | None,
             learned: bool) -> tuple[Tensor, ...]:
    """The student's forward and backward at one step: where SDT spends its time.

    It calls autograd and renews the cache itself, so that an executor can record all of it as one graph, which serves
    every step and whatever values the router has.

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
        output = model(x, t, rows, row=wanted[0], forecast_weights=wanted[1] if learned else e, cache=cache,
                       threshold=threshold)
        error = (output[:, :channels].float() - target[:, :channels].float()).square().mean()
        found = torch.autograd.grad(weight * error, wanted, allow_unused=True)
    cache.commit()
    return output.detach(), error.detach(), *(gradient for gradient in found if gradient is not None)


def new_executor(net, steps: int) -> Callable:
    """How the trajectories of a training run `net` and `student_step`: one executor, so that its graphs share memory.

    It keeps a graph for each of the T - 1 hard rows of a λ refresh, beside the few that serve every step.
    """
    if getattr(net, "prompts", None) is not None:
        return run_eagerly  # prompts are looked up on the host, which a graph would not do again
    return hk.compile(run_eagerly, graphs=steps + 16)
