"""Where a trajectory begins, and which of its steps a call of a transformer belongs to: in a pipeline, or in a loop."""

import threading
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

from harmonica_dit.validate import shorten

from .adapters.replace_forwards import call_name
from .cached_pipeline import Listener
from .calls import TIMESTEP, Call
from .plans import Plans
from .streams import Streams
from .summary import Summary

# these give the transformer the scheduler's timesteps as they are
AS_THEY_ARE = ("DiTPipeline", "PixArtAlphaPipeline", "PixArtSigmaPipeline")


class PipelineCalls(Listener):
    """One call of a pipeline, whose scheduler and progress bar tell the steps."""

    def __init__(self, plans: Plans, pipe, guidance):
        self.plans, self.scheduler, self.guidance = plans, pipe.scheduler, guidance
        self.hoist = _passes_timesteps_on(type(pipe).__base__)
        order = getattr(pipe.scheduler, "order", 1)
        if order > 1:
            raise ValueError(f"pipe.scheduler: {type(pipe.scheduler).__name__} takes {order} evaluations a step, "
                             f"{INSTEAD}")
        self.summaries: list[Summary] = []
        self.plans_to_reuse = False  # by a schedule that has been followed
        self.given: list[list[tuple]] = []  # of each trajectory: what was called, at which step and timestep
        self.begin()

    def begin(self) -> None:
        self.s, self.total = 0, None
        self.called, self.stepped = False, None  # whether in this step; the timestep of the scheduler's last one
        self.running: dict[nn.Module, Streams] = {}
        self.given.append([])

    def loop(self, total: int | None) -> None:
        self.begin()
        self.total = total

    def advance(self, timestep) -> None:
        # some pipelines make two of the scheduler's steps of one
        if self.called or timestep is not self.stepped:
            self.s += 1
        self.called, self.stepped = False, timestep

    def call(self, name: str, module: nn.Module, forward: Callable, args: tuple, kwargs: dict):
        """A transformer's call."""
        call = Call(module, forward, args, kwargs, call_name.get())
        if module not in self.running or not self.running[module].is_current():
            timesteps = self._timesteps()
            if not self.running:
                self.summaries.append(Summary())
                self.plans.check_call(self.guidance, call.latents)
            self.running[module] = self.plans.streams(
                name, call, steps=len(timesteps), timesteps=timesteps,
                hoist=self.hoist and not module._forward_pre_hooks,  # which may change what it is given
                first=self.s, summary=self.summaries[-1])
            self.plans_to_reuse |= not all(map(all, self.running[module].planned.computed))
        self.called = True
        if isinstance(call.timestep, Tensor):
            self.given[-1].append((module, self.s, call.timestep.amax()))  # read at the end only
        return self.running[module].run(self.s, call)

    def goes_back(self) -> bool:
        """Whether a loop gave a transformer timesteps that rise and fall: it began anew, and was taken to go on."""
        for given in self.given:
            for one in {module for module, _, _ in given}:
                times = {s: float(t) for module, s, t in given if module is one}
                signs = {now < after for now, after in pairwise(times.values()) if now != after}
                if len(signs) > 1:
                    return True
        return False

    def _timesteps(self) -> tuple[float, ...]:
        """The loop's, which may be the last of the scheduler's only (img2img)."""
        timesteps = self.scheduler.timesteps
        timesteps = tuple(timesteps.tolist() if hasattr(timesteps, "tolist") else map(float, timesteps))
        steps = getattr(self.scheduler, "num_inference_steps", None)
        if isinstance(steps, int) and 0 < steps < len(timesteps):
            if any(now == after for now, after in zip(timesteps, timesteps[1:])):
                raise ValueError(f"pipe.scheduler: {type(self.scheduler).__name__} takes {len(timesteps)} evaluations "
                                 f"for {steps} steps, some {INSTEAD}")
            timesteps = timesteps[:steps]  # the others are where the last step ends
        total = len(timesteps) if self.total is None else min(self.total, len(timesteps))
        return timesteps[len(timesteps) - total :]


INSTEAD = "at different latents; use a scheduler of one a step, or harmonica_dit.disable_cache(pipe)"


def _passes_timesteps_on(pipeline: type) -> bool:
    """Whether this class's call gives the transformer the scheduler's timesteps as they are."""
    call = pipeline.__call__  # which a subclass may have replaced
    return call.__module__.startswith("diffusers.") and call.__qualname__.split(".")[0] in AS_THEY_ARE


class LoopCalls:
    """Calls of a transformer by a loop that is not a pipeline's: the timestep that is passed tells the step.

    Reading it waits for a GPU. A trajectory begins where the timestep goes back or a step is left out, and after an
    error. Each thread has its own.

    Args:
        timesteps: as the transformer is given them, one a step, all different.
    """

    def __init__(self, plans: Plans, timesteps: tuple[float, ...]):
        self.plans, self.timesteps = plans, timesteps
        self.summary = Summary()  # of the trajectory that began last
        self.reset()

    def reset(self) -> None:
        """The next call begins a trajectory, in every thread."""
        self._running = threading.local()

    def call(self, module: nn.Module, forward: Callable, args: tuple, kwargs: dict):
        """The transformer's call."""
        call, running = Call(module, forward, args, kwargs, call_name.get()), vars(self._running)
        s, alike = self._step(call)
        streams, last = running.pop("now", (None, -1))  # an error ends the trajectory
        if streams is None or not streams.is_current() or s not in (last, last + 1) or len(self.timesteps) == 1:
            self.summary = Summary()
            streams = self.plans.streams("transformer", call, steps=len(self.timesteps), timesteps=self.timesteps,
                                         hoist=True, first=s, summary=self.summary)
        output = streams.run(s, call, ahead=alike)
        running["now"] = streams, s
        return output

    def _step(self, call: Call) -> tuple[int, bool]:
        """The step, and whether all of the call is at its timestep."""
        t = call.timestep
        if t is None:
            raise ValueError(f"transformer: was called without {' or '.join(TIMESTEP)}, which tells the step")
        # the largest, because some models take a timestep per token, 0 where there is no noise
        least, now = (float(end) for end in (t.aminmax() if isinstance(t, Tensor) else (t, t)))
        gaps = [abs(now - listed) for listed in self.timesteps]
        s = min(range(len(gaps)), key=gaps.__getitem__)
        rounding = torch.finfo(t.dtype).eps if isinstance(t, Tensor) and t.is_floating_point() else 0.0
        if gaps[s] > max(rounding * abs(now), 1e-6 * max(map(abs, self.timesteps))):
            raise ValueError(f"timestep: the transformer was called at {now:g}, the cache was enabled for "
                             f"{shorten(self.timesteps)}; pass them to enable_cache as the transformer is given them")
        return s, least == now
