"""Runs a transformer's calls of one trajectory by a schedule. Its calls in a step are told apart into streams."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from itertools import groupby
from typing import Any

import torch

from harmonica_dit.flops import Flops
from harmonica_dit.forecaster import taylor
from harmonica_dit.schedule import Schedule

from .calls import Call, is_alike, is_word, same_memory, same_values, see
from .summary import StreamSummary, Summary

STREAMS = 8  # of a transformer; further ones are computed


class Planned:
    """A schedule with what is noted of its steps, in Python's own numbers: reading a tensor may wait for a GPU."""

    def __init__(self, schedule: Schedule):
        self.schedule = schedule
        self.computed: list[list[bool]] = schedule.compute.tolist()
        self.forecast = [_forecasts(schedule, s) for s in range(schedule.steps)]  # branches that are not repeated
        self.terms = [0 if weights is None or schedule.unit == "branch" else
                      sum(len(part) for part in weights if part is not None) for weights in schedule.forecast_weights]

    @property
    def needs_cache(self) -> bool:
        """Whether any step reuses, forecasts or corrects anything."""
        return not all(map(all, self.computed)) or any(w is not None for w in self.schedule.forecast_weights)

    @cached_property
    def pauses(self) -> list[int]:
        """For each branch, at how many steps in a row it is reused at most."""
        return [max(len(list(run)) if not now else 0 for now, run in groupby(column)) for column in zip(*self.computed)]


class Stream:
    """The calls of a trajectory that differ in nothing but the step: those with the prompt, for example.

    It has a cache of its own, and remembers what its steps computed. As long as that is what the schedule says, the
    schedule's rows hold; if steps were missed, rows and weights are found from what the stream has computed.
    """

    def __init__(self, planned: Planned, cache, call: Call, summary: StreamSummary):
        self.planned, self.cache, self.summary = planned, cache, summary
        self.signature, self.conditioning = call.signature, see(call.conditioning, copies=True)
        self.others = see(call.others, copies=False)  # from the second step on without what has changed until then
        self.changing: set[str] | None = None  # what has; None until the second step
        self.crowded = False  # whether it turned out to be several streams, which nothing tells apart
        self.table: list[list[bool]] = []  # what each step computed; nothing, where it was missed
        self.synced, self.last = True, -1  # whether all was as the schedule says; the last step
        self.hoisted: Iterator[dict] | None = None

    def has(self, conditioning: dict[str, Any], tensors) -> bool:
        """Whether its calls are conditioned so. tensors: how they are compared, see `is_alike`."""
        return is_alike(self.conditioning, conditioning, tensors)

    def differing(self, call: Call) -> set[str]:
        """Which of the other arguments are not those of the stream's first call."""
        tensors = same_memory if self.changing is None else same_values
        return {name for name in (self.others.keys() | call.others.keys()) - (self.changing or set())
                if name not in call.others or not is_alike(self.others.get(name), call.others[name], tensors)}

    def rules_out(self, call: Call, differing: set[str]) -> bool:
        """Whether a call that differs in these is none of the stream's: in what was the same before, or in words."""
        return bool(differing) if self.changing is not None else any(
            is_word(self.others.get(name)) or is_word(call.others.get(name)) for name in differing)

    def compare(self, differing: set[str]) -> None:
        """Notes, at the second step, what may change from step to step, and lets go of it."""
        if self.changing is None and self.last >= 0:
            self.others = {name: seen for name, seen in self.others.items() if name not in differing}
            self.changing = differing

    def forget(self) -> None:
        """Nothing of what has been computed is reused."""
        self.cache.reset()
        self.table, self.hoisted = [], None

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
        elif any(not any(row[k] for row in self.table[-pause:]) for k, pause in enumerate(planned.pauses)
                 if not planned.computed[s][k]):
            why = "steps were missed, and what was computed before is older than any that the schedule reuses"
        else:
            table = [*self.table[first:], planned.computed[s]]
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
        name: of the pipeline's component.
        adapter: runs it. planned: the schedule for this trajectory's steps.
        timesteps: what the transformer is given at each step, if that is known; then what depends on them alone is
            computed ahead.
        first: the trajectory's step that is the schedule's first.
        summary: takes what was done.
    """

    def __init__(self, name: str, adapter, planned: Planned, flops: Flops, timesteps: tuple[float, ...] | None,
                 first: int, summary: Summary):
        self.first = first
        self.name, self.adapter, self.planned = name, adapter, planned
        self.flops, self.timesteps, self.summary = flops, timesteps, summary
        self.fused = hasattr(adapter, "hoist")
        self.streams: list[Stream] = []
        self.plain: StreamSummary | None = None  # of calls that have no cache

    def is_current(self) -> bool:
        """Whether the transformer still is what the adapter knows. A fused one follows what its blocks hold."""
        return self.fused or self.adapter.is_current()

    def run(self, s: int, call: Call, ahead: bool = True):
        """The transformer's call at step s. ahead: whether what was computed ahead for the step is for this call."""
        s -= self.first
        stream = None
        if self.planned.needs_cache:
            stream = self._find(s, call)
        else:
            self._note_plain("the schedule reuses nothing")
        if stream is None:
            return call.forward(*call.args, **call.kwargs)
        planned, i = stream.decide(s)
        before, stream.last = stream.last, s
        # not where the weights are: while the model is offloaded they are elsewhere
        schedule, device = planned.schedule, call.latents[0].device
        row, weights = schedule.rows[i], schedule.forecast_weights_on(device)[i]
        if self.planned.schedule.unit == "trunk" and schedule.unit == "branch":  # computed whole
            row = None
        try:
            if self.fused:
                output = self.adapter(*call.args, **call.kwargs, row=row, forecast_weights=weights, cache=stream.cache,
                                      **self._hoisted(stream, schedule, i, device, call, ahead))
            else:
                output = self.adapter._call(call.forward, call.args, call.kwargs, row, weights, stream.cache)
        except BaseException:  # the cache holds two steps mixed, and a loop may catch this and try again
            stream.forget()
            stream.last = before
            raise
        stream.table.append(planned.computed[i])
        self._note(stream, planned, i)
        return output

    def _hoisted(self, stream: Stream, schedule: Schedule, s: int, device: torch.device, call: Call,
                 ahead: bool) -> dict:
        """What was computed ahead for this step; else the step's own condition."""
        if not stream.synced:
            stream.hoisted = None
            return {}
        condition = schedule.condition_on(device)
        if s == 0 and self.timesteps is not None:
            stream.hoisted = self.adapter.hoist(schedule.branch_rows, self.timesteps, *call.args, **call.kwargs,
                                                condition=condition)
        made = None if stream.hoisted is None else next(stream.hoisted)
        if made is not None and ahead:
            return made
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

    def _note_plain(self, why: str) -> None:
        """A call without a cache."""
        if self.plain is None:
            self.plain = StreamSummary(self.name, "other calls")
            self.summary.streams.append(self.plain)
        self.plain.steps += 1
        self.plain.computed += len(self.flops.branches)
        self.plain.flops += self.flops.total
        self.plain.plain_flops += self.flops.total
        self.plain.fallbacks[why] += 1

    def _find(self, s: int, call: Call) -> Stream | None:
        """The stream of a call; a new one, which computes everything, if the call is the first of its kind.

        None if the call may be of several streams, or is not the only such of its step: then nothing tells which cache
        is its own, and no call of these is cached any more.
        """
        alike = self._alike(call)
        differing = {stream: stream.differing(call) for stream in alike}
        if all(stream.rules_out(call, differing[stream]) for stream in alike):
            return self._begin(s, call)
        likely = [stream for stream in alike if not any(
            _is_liker(other, stream, differing) for other in alike if other is not stream)] or alike
        one = likely[0]
        told = all(_is_liker(one, other, differing) for other in alike if other is not one)
        if told and not one.crowded and one.last < s and not one.rules_out(call, differing[one]):
            one.compare(differing[one])
            return one
        if told and differing[one]:
            return self._begin(s, call)
        for stream in likely:
            stream.crowded = True
            stream.forget()
        self._note_plain("nothing tells the calls of a step apart")
        return None

    def _alike(self, call: Call) -> list[Stream]:
        """The streams of calls of this kind with this conditioning."""
        streams = [stream for stream in self.streams if stream.signature == call.signature]
        for tensors in (same_memory, same_values):  # the second waits for a GPU; most pipelines pass the same tensors
            found = [stream for stream in streams if stream.has(call.conditioning, tensors)]
            if found:
                return found
        return []

    def _begin(self, s: int, call: Call) -> Stream | None:
        """A new stream for a call; None if there are enough. No old one makes room: others may differ from it alone."""
        if len(self.streams) == STREAMS:
            self._note_plain(f"there are more than {STREAMS} different calls")
            return None
        number = sum(stream.last == s for stream in self.streams) + 1
        summary = StreamSummary(self.name, call.context or f"call {number} of a step")
        self.summary.streams.append(summary)
        schedule = self.planned.schedule
        cache = schedule.new_cache() if self.fused else self.adapter.new_cache(schedule.history, schedule.unit)
        self.streams.append(Stream(self.planned, cache, call, summary))
        return self.streams[-1]


def _is_liker(one: Stream, other: Stream, differing: dict[Stream, set[str]]) -> bool:
    """Whether a call shares an argument with one stream that it does not share with the other, and not the reverse.

    differing: in what the call differs from each.
    """
    shared, others = (stream.others.keys() - differing[stream] for stream in (one, other))
    return bool(shared & differing[other]) and not others & differing[one]


def _forecasts(schedule: Schedule, s: int) -> int:
    """How many branches step s forecasts, and does not repeat."""
    reused, weights = int((~schedule.compute[s]).sum()), schedule.forecast_weights[s]
    if weights is None or not reused:
        return 0
    if schedule.unit == "trunk":
        return reused if any(part is not None and part.any() for part in weights) else 0
    return sum(e != 0 for e in weights)
