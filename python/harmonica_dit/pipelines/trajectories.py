"""Where a trajectory begins, and which of its steps a call of a transformer belongs to: in a pipeline, or in a loop."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from harmonica_dit.validate import shorten

from .adapters.replace_forwards import call_name
from .cached_pipeline import Listener
from .plans import Plans
from .streams import Streams, latents_of, named
from .summary import Summary

# these give the transformer the scheduler's timesteps as they are
AS_THEY_ARE = ("DiTPipeline", "PixArtAlphaPipeline", "PixArtSigmaPipeline")
TIMESTEP = ("timestep", "timesteps", "t")  # what transformers call it


class PipelineCalls(Listener):
    """One call of a pipeline, whose scheduler and progress bar tell the steps."""

    def __init__(self, plans: Plans, pipe, guidance):
        self.plans, self.scheduler, self.guidance = plans, pipe.scheduler, guidance
        self.hoist = any(cls.__name__ in AS_THEY_ARE for cls in type(pipe).__mro__)
        order = getattr(pipe.scheduler, "order", 1)
        if order > 1:
            raise ValueError(f"pipe.scheduler: {type(pipe.scheduler).__name__} takes {order} evaluations a step, at "
                             "different latents; use a scheduler of one a step, or harmonica_dit.disable_cache(pipe)")
        self.summaries: list[Summary] = []
        self.plans_to_reuse = False  # by a schedule that has been followed
        self.begin()

    def begin(self) -> None:
        self.s, self.total = 0, None
        self.running: dict[nn.Module, Streams] = {}

    def loop(self, total: int | None) -> None:
        self.begin()
        self.total = total

    def advance(self) -> None:
        self.s += 1

    def call(self, name: str, module: nn.Module, forward: Callable, args: tuple, kwargs: dict):
        """A transformer's call."""
        if module not in self.running:
            timesteps = self._timesteps()
            if not self.running:
                self.summaries.append(Summary())
                self.plans.check_call(self.guidance, latents_of(module, args, kwargs))
            self.running[module] = self.plans.streams(
                name, module, forward, args, kwargs, steps=len(timesteps), timesteps=timesteps, hoist=self.hoist,
                first=self.s, summary=self.summaries[-1])
            self.plans_to_reuse |= not all(map(all, self.running[module].planned.computed))
        return self.running[module].run(self.s, call_name.get(), forward, args, kwargs)

    def _timesteps(self) -> tuple[float, ...]:
        """The loop's, which may be the last of the scheduler's only (img2img)."""
        timesteps = self.scheduler.timesteps.tolist()
        return tuple(timesteps if self.total is None or self.total > len(timesteps) else
                     timesteps[len(timesteps) - self.total :])


class LoopCalls:
    """Calls of a transformer by a loop that is not a pipeline's: the timestep that is passed tells the step.

    Reading it waits for a GPU. A trajectory begins where the timestep goes back, and after an error.

    Args:
        timesteps: as the transformer is given them, one a step, all different.
    """

    def __init__(self, plans: Plans, timesteps: tuple[float, ...]):
        self.plans, self.timesteps = plans, timesteps
        self.summary = Summary()
        self.reset()

    def reset(self) -> None:
        """The next call begins a trajectory."""
        self.s, self.streams = -1, None

    def call(self, module: nn.Module, forward: Callable, args: tuple, kwargs: dict):
        """The transformer's call."""
        s = self._step(module, args, kwargs)
        try:
            again = self.streams is not None and s == self.s == 0 and self.streams.has_run(
                s, call_name.get(), args, kwargs)
            if self.streams is None or s < self.s or again:
                self.summary = Summary()
                self.streams = self.plans.streams(
                    "transformer", module, forward, args, kwargs, steps=len(self.timesteps), timesteps=self.timesteps,
                    hoist=True, first=s, summary=self.summary)
            self.s = s
            return self.streams.run(s, call_name.get(), forward, args, kwargs)
        except BaseException:
            self.reset()
            raise

    def _step(self, module: nn.Module, args: tuple, kwargs: dict) -> int:
        arguments = named(module, args, kwargs)
        t = next((arguments[name] for name in TIMESTEP if arguments.get(name) is not None), None)
        if t is None:
            raise ValueError(f"transformer: was called without {' or '.join(TIMESTEP)}, which tells the step")
        # amax, because some models take a timestep per token, 0 where there is no noise
        now = float(t.amax() if isinstance(t, Tensor) else t)
        gaps = [abs(now - listed) for listed in self.timesteps]
        s = min(range(len(gaps)), key=gaps.__getitem__)
        rounding = torch.finfo(t.dtype).eps if isinstance(t, Tensor) and t.is_floating_point() else 1e-6
        if gaps[s] > max(rounding, 1e-6) * max(map(abs, self.timesteps)):
            raise ValueError(f"timestep: the transformer was called at {now:g}, the cache was enabled for "
                             f"{shorten(self.timesteps)}; pass them to enable_cache as the transformer is given them")
        return s
