"""A trajectory whose trunk forecasts are learned: differentiable from the final image back through every step."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import harmonica_kernels as hk
from harmonica_dit.forecaster import TrunkForecaster, correction, forecast
from harmonica_dit.sample.trajectory import Trajectory


class LearnedForecaster(nn.Module):
    """The weights of a `TrunkForecaster` per channel as parameters, a step's only for the states that it has.

    Args:
        compute: [T], whether a step is computed. initial: where the weights start. width: D.
        correct: whether computed steps get weights.
        entering: whether what enters a step can be weighed, its tokens and condition; the generic path sees neither.
    """

    def __init__(self, compute: Sequence[bool], initial: TrunkForecaster, width: int, correct: bool,
                 entering: bool = True):
        super().__init__()
        self.compute, self.history, self.correct = tuple(compute), initial.history, correct
        self.states, self.tokens, self.own, self.condition = (nn.ParameterList() for _ in range(4))
        kept = 0
        for s, computed in enumerate(compute):
            n = min(kept, self.history)
            learned = correct or not computed
            self.states.append(nn.Parameter(initial.states[s, :n].expand(n, width).clone(), learned))
            self.tokens.append(nn.Parameter(torch.zeros(n if entering and not computed else 0, width), learned))
            self.own.append(nn.Parameter(torch.zeros(width), learned and computed))
            self.condition.append(nn.Parameter(torch.zeros(width if entering and computed else 0), learned))
            kept += computed

    def weights(self, s: int) -> hk.TrunkWeights | None:
        """Of step s, differentiable."""
        if self.compute[s]:
            return correction(self.states[s], self.own[s]) if self.correct else None
        return forecast(self.states[s], self.tokens[s] if len(self.tokens[s]) else None)

    def freeze(self, size: int, origin: str) -> TrunkForecaster:
        """The weights as they are."""
        T, H, D = len(self.compute), self.history, self.own[0].shape[0]
        states, tokens, own, condition = (torch.zeros(T, *shape) for shape in ((H, D), (H, D), (D,), (D,)))
        for s in range(T):
            states[s, : len(self.states[s])] = self.states[s].detach().cpu()
            tokens[s, : len(self.tokens[s])] = self.tokens[s].detach().cpu()
            own[s] = self.own[s].detach().cpu()
            if len(self.condition[s]):
                condition[s] = self.condition[s].detach().cpu()
        return TrunkForecaster(states, *(table if table.any() else None for table in (tokens, own, condition)), size,
                               origin)


def unroll(trajectory: Trajectory, noise: Tensor, learned: LearnedForecaster, checkpointing: bool = True) -> Tensor:
    """The final image of a trajectory [n, C, H, W], from noise [n, C, H, W].

    With checkpointing each computed step is run again in the backward. So one step's activations are held at a time,
    and between them what the cache holds: at most 2·B·N·D values a computed step, and the latents of every step.
    """
    x, cache, kept = trajectory.start(noise), trajectory.new_cache(learned.history, "trunk"), []
    with torch.no_grad():  # at forecast steps nothing of it depends on what is learned
        precomputed = list(trajectory.hoist([False] * trajectory.steps))
    for s, computed in enumerate(learned.compute):
        options = dict(row=None if computed else False, forecast_weights=learned.weights(s))
        if len(learned.condition[s]):
            options |= dict(condition=learned.condition[s])
        elif not computed:
            options |= precomputed[s]

        def step(x: Tensor, kept: Sequence, cache=cache, s=s, options=options) -> tuple:
            cache = cache.holding(kept)
            return trajectory.predict(x, s, cache=cache, **options), cache

        if checkpointing and computed and torch.is_grad_enabled():
            output, cache = checkpoint(step, x, kept, use_reentrant=False, preserve_rng_state=False)
        else:
            output, cache = step(x, kept)
        if computed:
            kept = [cache.newest(), *kept][: learned.history]
        x = trajectory.advance(output, s, x)
    return x
