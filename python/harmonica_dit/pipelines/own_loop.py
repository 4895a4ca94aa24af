"""A pipeline's call as a function of one step: its own loop makes the guided output, whatever the class.

Conditioning, guidance, packing of latents and scaling of timesteps are different in every pipeline class, and none of
it has to be known: the call is given the latents that the step is to begin with, and runs up to it. Until then the
transformer does not run, and the scheduler hands the loop back what it was handed. There the transformer runs as it is
told to, and what the loop then hands the scheduler, the guided output, ends the call.
"""

import copy
import functools
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import SchedulerMixin
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .adapters.generic_cache import Arguments
from .adapters.replace_forwards import replace_forwards
from .cached_pipeline import like

Predict = Callable[[int, Callable, tuple, dict], Any]  # the transformer's call number j of the step: forward, arguments


class Seen:
    """What a call's loop does, step by step.

    calls: at each step the transformer's calls, each by its tensors' names and shapes. samples: what the scheduler was
    handed at each step. grad: whether grad was enabled there.
    """

    def __init__(self):
        self.calls: list[list[tuple]] = [[]]
        self.samples: list[Tensor] = []
        self.grad = False


class OwnLoop:
    """The loop in a pipeline's call. Its pipeline must be nobody else's: what the call uses is put into it.

    Args:
        pipe: a copy of the user's pipeline; the modules may be shared. transformer: the one that its loop calls.

    Attributes:
        puts_latents: whether latents are put in place of what the pipeline's `prepare_latents` makes, for some calls
            take `latents` in another form than their loop (FLUX.2); else they are given to the call.
    """

    def __init__(self, pipe, transformer: nn.Module):
        self.pipe, self.transformer = pipe, transformer
        self._call = type(pipe).__call__
        while getattr(self._call, "__globals__", {}).get("__name__") == "torch.utils._contextlib":
            self._call = self._call.__wrapped__  # diffusers decorates it by torch.no_grad()
        self.puts_latents = False
        self._forms: dict[tuple, Any] = {}  # of outputs, by the call's arguments: on the device "meta"

    def output(self, scheduler: SchedulerMixin, s: int, x: Tensor, predict: Predict, arguments: Mapping) -> Tensor:
        """The guided output at step s for the latents x, as the loop hands it to the scheduler; differentiable in both.

        scheduler: set to its timesteps, and at its start; it is not changed. predict: runs the transformer's calls at
        this step. arguments: of the pipeline's call, but for latents.
        """
        return self._run(scheduler, x, arguments, Seen(), predict, s)

    def watch(self, scheduler: SchedulerMixin, x: Tensor, arguments: Mapping) -> Seen:
        """Runs through all steps without the transformer, with grad enabled; every step begins with the latents x."""
        seen = Seen()
        with torch.enable_grad():
            self._run(scheduler, x, arguments, seen)
        return seen

    def finish(self, scheduler: SchedulerMixin, x: Tensor, arguments: Mapping):
        """What the call returns if its loop ends with the latents x."""
        with torch.no_grad():
            return self._run(scheduler, x, arguments, Seen())

    def begin(self, scheduler: SchedulerMixin, arguments: Mapping, first: Predict) -> Tensor:
        """The latents [1, …] that the call itself begins with, by a generator whose seed is 0.

        first: runs the transformer's calls of the first step. The scheduler is left with the timesteps that the call
        has set.
        """
        seen = Seen()
        with torch.no_grad():
            self._run(scheduler, None, arguments, seen, first, 0, sets=True)
        return seen.samples[0]

    def set_timesteps(self, scheduler: SchedulerMixin, x: Tensor, arguments: Mapping) -> None:
        """Sets the scheduler's timesteps as the call does."""
        with torch.no_grad():
            self._run(scheduler, x, arguments, Seen(), _end, 0, sets=True)

    def _run(self, scheduler: SchedulerMixin, x: Tensor | None, arguments: Mapping, seen: Seen,
             predict: Predict | None = None, at: int | None = None, sets: bool = False):
        """Runs the call up to step `at`, and returns what the scheduler is handed; or to its end, and returns what it
        returns.

        sets: whether the call may set the scheduler's timesteps; else they are what they are.
        """
        def transformer(module: nn.Module, forward: Callable, args: tuple, kwargs: dict):
            calls = seen.calls[-1]
            calls.append(Arguments.of(args, kwargs))
            if len(seen.samples) == at:
                return predict(len(calls) - 1, forward, args, kwargs)
            return self._blank(calls[-1], forward, args, kwargs)

        def step(output: Tensor, sample: Tensor) -> Tensor:
            seen.samples.append(sample)
            seen.grad = torch.is_grad_enabled()
            if len(seen.samples) - 1 == at:
                raise _End(output)
            seen.calls.append([])
            return sample

        stepping = scheduler if sets else copy.copy(scheduler)
        cls = type(scheduler)
        stepping.__class__ = _stepping_class(cls, sets)
        stepping._harmonica_step = step
        vars(self.pipe)["scheduler"] = stepping
        given: dict[str, Any] = dict(latents=x)
        if x is None or self.puts_latents:
            given = dict(generator=torch.Generator().manual_seed(0))
        if x is not None and self.puts_latents:
            vars(self.pipe)["prepare_latents"] = functools.partial(_prepared, x, self.pipe)
        try:
            with replace_forwards({self.transformer: transformer}, inside_hook=True):
                returned = self._call(self.pipe, **arguments, **given)
        except _End as end:
            return end.output
        finally:
            stepping.__class__ = cls
            del stepping._harmonica_step
        if at is not None:
            raise RuntimeError(f"pipe: its call ended after {len(seen.samples)} steps, before step {at}")
        return returned

    def _blank(self, key: tuple, forward: Callable, args: tuple, kwargs: dict):
        """Zeros in the form of what the transformer returns when it is called so; it runs once to see that."""
        if key not in self._forms:
            with torch.no_grad():
                made = forward(*args, **kwargs)
            self._forms[key] = tree_map(lambda t: torch.empty_like(t, device="meta") if isinstance(t, Tensor) else t,
                                        made)
        device = next(self.transformer.parameters()).device
        return tree_map(lambda t: torch.zeros_like(t, device=device) if isinstance(t, Tensor) else t, self._forms[key])


class _End(BaseException):
    """Ends a pipeline's call. Of a kind that no pipeline catches."""

    def __init__(self, output: Tensor | None):
        self.output = output


def _prepared(x: Tensor, pipe, *args, **kwargs):
    """What the pipeline's own `prepare_latents` returns, with x in place of the latents."""
    made = type(pipe).prepare_latents(pipe, *args, **kwargs)
    return (x.to(made[0].dtype), *made[1:]) if isinstance(made, tuple) else x.to(made.dtype)


def _end(*_):
    raise _End(None)


@functools.cache
def _stepping_class(base: type, sets: bool) -> type:
    """The subclass of a scheduler class whose steps are taken by its `_harmonica_step`."""

    class Stepping(base):
        init_noise_sigma = 1.0  # the latents that a call is given are those that the first step begins with

        @functools.wraps(base.set_timesteps)
        def set_timesteps(self, *args, **kwargs):
            if sets:
                super().set_timesteps(*args, **kwargs)

        @functools.wraps(base.step)
        def step(self, model_output, timestep, sample, *args, return_dict=True, **kwargs):
            x = self._harmonica_step(model_output, sample)
            if getattr(self, "_step_index", None) is not None:  # by which some scale the model's input
                self._step_index += 1
            return SimpleNamespace(prev_sample=x) if return_dict else (x,)

    return like(Stepping, base)
