"""Runs a transformer's calls of one trajectory by a schedule. Its calls in a step are told apart into streams."""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from harmonica_dit.flops import Flops
from harmonica_dit.forecaster import taylor
from harmonica_dit.schedule import Schedule

from .adapters.generic_cache import tensors_of
from .summary import StreamSummary, Summary

# arguments that tell a step's calls apart, and stay the same from step to step
CONDITIONING = re.compile("encoder_hidden|caption|cap_feats|prompt|text|class_labels|pooled|skip_layers|perturb|isolat")
STREAMS = 8  # of a transformer; more calls in a step than these are no streams, and an older one makes room


class Planned:
    """A schedule with what is noted of its steps, in Python's own numbers: reading a tensor may wait for a GPU."""

    def __init__(self, schedule: Schedule):
        self.schedule, self.forecaster = schedule, schedule.forecaster
        self.computed: list[list[bool]] = schedule.compute.tolist()
        self.forecast = [_forecasts(schedule, s) for s in range(schedule.steps)]  # branches that are not repeated
        self.terms = [0 if weights is None or schedule.unit == "branch" else
                      sum(len(part) for part in weights if part is not None) for weights in schedule.forecast_weights]


class Stream:
    """The calls of a trajectory that differ in nothing but the step: those with the prompt, for example.

    It has a cache of its own, and remembers what its steps computed. As long as that is what the schedule says, the
    schedule's rows hold; if steps were missed, rows and weights are found from what the stream has computed.
    """

    def __init__(self, planned: Planned, cache, conditioning: dict[str, Any], shapes: tuple, summary: StreamSummary):
        self.planned, self.cache, self.summary = planned, cache, summary
        self.conditioning, self.shapes = conditioning, shapes
        self.table: list[list[bool]] = []  # what each step computed; nothing, where it was missed
        self.synced, self.last = True, -1  # whether all was as the schedule says; the last step
        self.hoisted: Iterator[dict] | None = None

    def decide(self, s: int) -> tuple[Planned, int]:
        """The plan to run step s by, and the step's number in it."""
        planned = self.planned
        schedule, K = planned.schedule, len(planned.computed[0])
        if self.synced and s == len(self.table) and s < schedule.steps:
            return planned, s
        self.synced = False
        self.table += [[False] * K] * (s - len(self.table))
        first = next((i for i, row in enumerate(self.table) if any(row)), None)
        if s >= schedule.steps:
            why = f"the schedule has {schedule.steps} steps"
        elif first is None:
            why = "there was nothing to reuse yet"
        elif schedule.unit == "trunk" and schedule.forecaster.rule is None:
            why = "steps were missed, and learned weights are for all of them"
        else:
            wanted = [now or not any(row[k] for row in self.table) for k, now in enumerate(planned.computed[s])]
            table = [*self.table[first:], wanted]
            changes: dict[str, Any] = dict(extrapolation=schedule.extrapolation[first : s + 1])
            if schedule.unit == "trunk":
                order, adams = schedule.forecaster.rule
                changes["forecaster"] = taylor([row[0] for row in table], order, schedule.forecaster.size, adams)
            return Planned(replace(schedule, compute=torch.tensor(table), timesteps=None, **changes)), len(table) - 1
        self.summary.fallbacks[why] += 1
        return Planned(replace(schedule, compute=torch.ones(1, K, dtype=torch.bool), extrapolation=None, timesteps=None,
                               forecaster=None)), 0


class Streams:
    """One transformer in one trajectory.

    Args:
        transformer: the module. name: of the pipeline's component.
        adapter: runs it. planned: the schedule for this trajectory's steps.
        timesteps: what the transformer is given at each step, if that is known; then what depends on them alone is
            computed ahead.
        first: the trajectory's step that is the schedule's first.
        summary: takes what was done.
    """

    def __init__(self, transformer: nn.Module, name: str, adapter, planned: Planned, flops: Flops,
                 timesteps: tuple[float, ...] | None, first: int, summary: Summary):
        self.first = first
        self.transformer, self.name, self.adapter, self.planned = transformer, name, adapter, planned
        self.flops, self.timesteps, self.summary = flops, timesteps, summary
        self.fused = hasattr(adapter, "hoist")
        self.streams: list[Stream] = []

    def run(self, s: int, context: str | None, forward: Callable, args: tuple, kwargs: dict):
        """The transformer's call at step s. context: what the pipeline calls it, see diffusers' `cache_context`."""
        s -= self.first
        stream = self._find(s, context, args, kwargs)
        planned, i = stream.decide(s)
        stream.last = s
        # not where the weights are: while the model is offloaded they are elsewhere
        schedule, device = planned.schedule, latents_of(self.transformer, args, kwargs)[0].device
        row, weights = schedule.rows[i], schedule.forecast_weights_on(device)[i]
        if self.planned.schedule.unit == "trunk" and schedule.unit == "branch":  # computed whole
            row = None
        if self.fused:
            output = self.adapter(*args, **kwargs, row=row, forecast_weights=weights, cache=stream.cache,
                                  **self._hoisted(stream, schedule, i, device, args, kwargs))
        else:
            output = self.adapter._call(forward, args, kwargs, row, weights, stream.cache)
        stream.table.append(planned.computed[i])
        self._note(stream, planned, i)
        return output

    def _hoisted(self, stream: Stream, schedule: Schedule, s: int, device: torch.device, args: tuple,
                 kwargs: dict) -> dict:
        """What was computed ahead for this step; else the step's own condition."""
        if not stream.synced:
            stream.hoisted = None
            return {}
        condition = schedule.condition_on(device)
        if s == 0 and self.timesteps is not None:
            stream.hoisted = self.adapter.hoist(schedule.branch_rows, self.timesteps, *args, **kwargs,
                                                condition=condition)
        if stream.hoisted is not None:
            return next(stream.hoisted)
        return {} if condition is None else dict(condition=condition[s])

    def _note(self, stream: Stream, planned: Planned, s: int) -> None:
        summary, flops, computed = stream.summary, self.flops, planned.computed[s]
        summary.steps += 1
        summary.computed += sum(computed)
        summary.reused += len(computed) - sum(computed)
        summary.forecast += planned.forecast[s]
        summary.flops += flops.fixed + sum(f for f, now in zip(flops.branches, computed) if now)
        if planned.schedule.unit == "trunk":
            summary.flops += 2.0 * planned.schedule.forecaster.size * planned.terms[s]
        summary.plain_flops += flops.total
        summary.nbytes = max(summary.nbytes, stream.cache.nbytes)

    def has_run(self, s: int, context: str | None, args: tuple, kwargs: dict) -> bool:
        """Whether such a call has been run at step s already."""
        s -= self.first
        conditioning, shapes = self._describe(context, args, kwargs)
        return any(stream.last == s and stream.shapes == shapes
                   and _alike(stream.conditioning, conditioning, torch.equal) for stream in self.streams)

    def _describe(self, context: str | None, args: tuple, kwargs: dict) -> tuple[dict[str, Any], tuple]:
        """What a call shares with the others of its stream: the conditioning, and the shapes of the latents."""
        arguments = named(self.transformer, args, kwargs)
        conditioning = {name: value for name, value in arguments.items() if CONDITIONING.search(name)}
        if context is not None:
            conditioning["cache_context"] = context
        return conditioning, tuple(tuple(t.shape) for t in latents_of(self.transformer, args, kwargs))

    def _find(self, s: int, context: str | None, args: tuple, kwargs: dict) -> Stream:
        """The stream of a call. A call that is of none begins one, and so computes everything."""
        conditioning, shapes = self._describe(context, args, kwargs)
        free = [stream for stream in self.streams if stream.last < s and stream.shapes == shapes]
        for alike in (_same_memory, torch.equal):  # the second waits for a GPU; most pipelines pass the same tensors
            for stream in free:
                if _alike(stream.conditioning, conditioning, alike):
                    return stream
        number = sum(stream.last == s for stream in self.streams) + 1
        summary = StreamSummary(self.name, context or f"call {number} of a step")
        self.summary.streams.append(summary)
        if len(self.streams) == STREAMS:
            self.streams.remove(min(self.streams, key=lambda stream: stream.last))
        self.streams.append(Stream(self.planned, self._new_cache(), conditioning, shapes, summary))
        return self.streams[-1]

    def _new_cache(self):
        schedule = self.planned.schedule
        return schedule.new_cache() if self.fused else self.adapter.new_cache(schedule.history, schedule.unit)


def named(transformer: nn.Module, args: tuple, kwargs: dict) -> dict[str, Any]:
    """A call's arguments by their names."""
    return dict(zip(_parameters(type(transformer)), args)) | kwargs


def latents_of(transformer: nn.Module, args: tuple, kwargs: dict) -> list[Tensor]:
    """What a call is to denoise: transformers take it first. Some take a list, an image each."""
    latents = named(transformer, args, kwargs).get(_parameters(type(transformer))[0])
    return [t for t in tensors_of(latents) if isinstance(t, Tensor)]


@cache
def _parameters(cls: type) -> tuple[str, ...]:
    return tuple(signature(cls.forward).parameters)[1:]


def _forecasts(schedule: Schedule, s: int) -> int:
    """How many branches step s forecasts, and does not repeat."""
    reused, weights = int((~schedule.compute[s]).sum()), schedule.forecast_weights[s]
    if weights is None or not reused:
        return 0
    if schedule.unit == "trunk":
        return reused if any(part is not None and part.any() for part in weights) else 0
    return sum(e != 0 for e in weights)


def _alike(one: Any, other: Any, tensors: Callable[[Tensor, Tensor], bool]) -> bool:
    """Whether two calls' conditioning is alike."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one is other or (one.shape == other.shape and one.dtype == other.dtype and tensors(one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_alike(one[name], other[name], tensors) for name in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(_alike(a, b, tensors) for a, b in zip(one, other))
    return one is other or (not isinstance(one, Tensor) and not isinstance(other, Tensor) and one == other)


def _same_memory(one: Tensor, other: Tensor) -> bool:
    return one.stride() == other.stride() and one.data_ptr() == other.data_ptr()
