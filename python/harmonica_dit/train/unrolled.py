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
    """

    def __init__(self, compute: Sequence[bool], initial: TrunkForecaster, width: int, correct: bool):
        super().__init__()
        self.compute, self.history, self.correct = tuple(compute), initial.history, correct
        self.states, self.tokens, self.own, self.condition = (nn.ParameterList() for _ in range(4))
        kept = 0
        for s, computed in enumerate(compute):
            n = min(kept, self.history)
            learned = correct or not computed
            self.states.append(nn.Parameter(initial.states[s, :n].expand(n, width).clone(), learned))
            self.tokens.append(nn.Parameter(torch.zeros(0 if computed else n, width), learned))
            self.own.append(nn.Parameter(torch.zeros(width), learned and computed))
            self.condition.append(nn.Parameter(torch.zeros(width if computed else 0), learned))
            kept += computed

    def weights(self, s: int) -> hk.TrunkWeights | None:
        """Of step s, differentiable."""
        if self.compute[s]:
            return correction(self.states[s], self.own[s]) if self.correct else None
        return forecast(self.states[s], self.tokens[s])

    def freeze(self, size: int, origin: str) -> TrunkForecaster:
        """The weights as they are."""
        T, H, D = len(self.compute), self.history, self.own[0].shape[0]
        states, tokens, own, condition = (torch.zeros(T, *shape) for shape in ((H, D), (H, D), (D,), (D,)))
        for s in range(T):
            states[s, : len(self.states[s])] = self.states[s].detach().cpu()
            tokens[s, : len(self.tokens[s])] = self.tokens[s].detach().cpu()
            own[s] = self.own[s].detach().cpu()
            if self.compute[s]:
                condition[s] = self.condition[s].detach().cpu()
        return TrunkForecaster(states, *(table if table.any() else None for table in (tokens, own, condition)), size,
                               origin)


def unroll(trajectory: Trajectory, noise: Tensor, learned: LearnedForecaster, checkpointing: bool = True) -> Tensor:
    """The final image of a trajectory [n, C, H, W], from noise [n, C, H, W].

    With checkpointing each computed step is run again in the backward. So one step's activations are held at a time,
    and between them what the cache holds: at most 2·B·N·D values a computed step, and the latents of every step.
    """
    x, kept = trajectory.start(noise), []
    with torch.no_grad():  # at forecast steps nothing of it depends on what is learned
        precomputed = list(trajectory.hoist([False] * trajectory.steps))
    for s, computed in enumerate(learned.compute):
        options = dict(row=None if computed else False, forecast_weights=learned.weights(s))
        options |= dict(condition=learned.condition[s]) if computed else precomputed[s]

        def step(x: Tensor, *flat: Tensor, s=s, computed=computed, options=options) -> tuple[Tensor, ...]:
            cache = hk.TrunkCache(learned.history)
            for i in range(len(flat) - 2, -1, -2):
                cache._keep(flat[i], flat[i + 1])
            output = trajectory.predict(x, s, cache=cache, **options)
            return (output, cache.state(0), cache.tokens(0)) if computed else (output,)

        flat = [t for pair in kept for t in pair]
        if checkpointing and computed and torch.is_grad_enabled():
            output, *new = checkpoint(step, x, *flat, use_reentrant=False, preserve_rng_state=False)
        else:
            output, *new = step(x, *flat)
        if computed:
            kept = [tuple(new), *kept][: learned.history]
        x = trajectory.advance(output, s, x)
    return x
