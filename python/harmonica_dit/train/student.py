"""The student: one trajectory with a router's rows. SDT trains the router on it, and λ is measured with it."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor

import harmonica_kernels as hk
from harmonica_dit import ranks
from harmonica_dit.flops import runs_by_its_loop
from harmonica_dit.forecaster import forecast_ratios
from harmonica_dit.router import Router, decide
from harmonica_dit.sample.trajectory import Guided, Trajectory, run_eagerly


class Student:
    """A batch on its way from noise to image, with its feature cache and the decisions taken so far.

    Args:
        router: its extrapolation and threshold apply.
        trajectory: model, labels, guidance and scheduler; nothing else may use it.
        noise: [n, C, H, W], standard normal.
        hard: True applies the threshold to rows, as in inference; False blends.
        cache: the one to work in, of `Trajectory.new_cache`; it is rewound. Recorded graphs use the memory of one, so
            their calls need that cache again. None makes a new one.
    """

    def __init__(self, router: Router, trajectory: Trajectory, noise: Tensor, *, hard: bool = False,
                 cache=None):
        self.router, self.trajectory, self.hard = router, trajectory, hard
        self.x, self.s = trajectory.start(noise), 0
        self.cache = trajectory.new_cache(router.history) if cache is None else cache
        self.cache.rewind()
        self.decisions = torch.empty(0, len(router.branches), dtype=torch.bool, device=noise.device)

    def predict(self, r: Tensor | None = None) -> Tensor:
        """The guided output at this step with the scores r [K]. None computes and stores every branch."""
        if r is None:
            forward = {}
            self._note(self.decisions.new_ones(self.decisions.shape[1]))
        else:
            decision, e = decide(r, self.router.threshold), self._forecast()
            self._note(decision)
            if self.hard:
                forward = {"row": tuple(decision.tolist()), "forecast_weights": None if e is None else e.tolist()}
            else:
                forward = {"row": r, "threshold": self.router.threshold, "forecast_weights": e}
        return self.trajectory.predict(self.x, self.s, cache=self.cache, **forward)

    def learn(self, r: Tensor, target: Tensor, weight: Tensor, channels: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """The guided output at this step with the scores r, its error against the target, and ∂(weight·error)/∂r [K].

        Error and gradients are of the images of all ranks. The gradients by r and by the forecast weights go on to the
        router's Parameters. channels: as in `student_step`.
        """
        with torch.enable_grad():
            e = self._forecast()
        self._note(decide(r, self.router.threshold))
        learned = e is not None and e.requires_grad
        output, error, *gradients = self.trajectory.executor(
            student_step, self.trajectory.model, *self.trajectory.inputs(self.x, self.s), target, r.detach(),
            None if e is None else e.detach(), weight, self.cache, self.router.threshold, channels, learned,
            **self.trajectory.conditions)
        error, *gradients = ranks.mean([error, *gradients], len(self.x))
        torch.autograd.backward([r, e][: len(gradients)], gradients)
        return output, error, gradients[0]

    def teacher(self) -> Tensor:
        """The guided output at this step without caching; the cache is not touched."""
        with torch.no_grad():
            return self.trajectory.predict(self.x, self.s)

    def advance(self, output: Tensor) -> None:
        """Takes the scheduler's step with the guided output."""
        self.x = self.trajectory.advance(output, self.s, self.x)
        self.s += 1

    def fork(self, cached: bool) -> "Student":
        """A copy that goes on independently; without a cache it can only compute everything.

        Both work in the same cache, because recorded graphs hold its addresses. Put the cache's contents back before
        the original goes on.
        """
        other = copy.copy(self)
        other.trajectory = self.trajectory.fork()
        if not cached:
            other.cache = None
        return other

    def _note(self, decision: Tensor) -> None:
        self.decisions = torch.cat([self.decisions, decision[None]])

    def _forecast(self) -> Tensor | None:
        """The forecast weights e [K] at this step, None without extrapolation."""
        if self.router.coefficients is None:
            return None
        return self.router.coefficients[self.s - 1] * forecast_ratios(self.decisions)


def student_step(model: Guided, x: Tensor, t: Tensor, labels: Tensor, target: Tensor, r: Tensor, e: Tensor | None,
                 weight: Tensor, cache, threshold: float, channels: int | None,
                 learned: bool, **conditions: Tensor) -> tuple[Tensor, ...]:
    """The student's forward and backward at one step, in which SDT spends its time.

    It calls autograd and renews the cache itself, so that an executor can record everything as one graph. The graph
    serves every step and every value of the router.

    Args:
        x, t, labels: the model's arguments, see `Guided`. target: the guided output to compare with.
        r: scores [K]. e: forecast weights [K], None without extrapolation. weight: λ of the step [].
        channels: how many leading output channels are compared, None for all. learned: whether e gets a gradient too.
        conditions: the trajectory's.

    Returns:
        The guided output; error = mean((output - target)²); the gradient of weight·error by r; and, if `learned` and
        anything was forecast, its gradient by e. All are detached.
    """
    with torch.enable_grad():
        wanted = [scalars.detach().requires_grad_() for scalars in ([r, e] if learned else [r])]
        output = model(x, t, labels, row=wanted[0], forecast_weights=wanted[1] if learned else e, cache=cache,
                       threshold=threshold, **conditions)
        error = (output[:, :channels].float() - target[:, :channels].float()).square().mean()
        found = torch.autograd.grad(weight * error, wanted, allow_unused=True)
    cache.commit()
    return output.detach(), error.detach(), *(gradient for gradient in found if gradient is not None)


def new_executor(net, steps: int) -> Callable:
    """The executor that runs `net` and `student_step` in all trajectories of a training; its graphs share memory.

    It has room for a graph for each of the T - 1 hard rows of a λ refresh, beside the few that serve every step.
    """
    if runs_by_its_loop(net):
        return run_eagerly  # the loop runs on the host, which a replayed graph would not do again
    return hk.compile(run_eagerly, graphs=steps + 16)
