"""Cached against plain trajectories of diffusers' transformers, and what becomes of the FLOPs that are saved."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

from harmonica_dit.flops import count_call
from harmonica_dit.pipelines.adapters import adapt
from harmonica_dit.pipelines.adapters.generic import GenericAdapter
from harmonica_dit.schedule import Schedule

from .classes import MODELS, Model
from .measure import (
    Bar,
    cell,
    check_counts,
    check_cur,
    forward_clocks,
    interleaved,
    medians,
    random_schedule,
    spread,
)

COLUMNS = {
    "model": lambda row: row["model"],
    "K": cell("K", "{}"),
    "tokens": cell("tokens", "{}"),
    "CUR": cell("cur", "{:.1%}"),
    "FLOPs speedup": cell("flops_speedup", "{:.2f}×"),
    "wall speedup": cell("wall_speedup", "{:.2f}×"),
    "wall / FLOPs": cell("wall_over_flops", "{:.3f}"),
    "plain / ours, CUR 0": cell("plain_over_ours", "{:.2f}"),
    "should / does": cell("should_over_does", "{:.3f}"),
    "cache, MB": lambda row: f"{row['cache_bytes'] / 1e6:.1f}",
    "error at CUR 0": cell("error_at_cur_0", "{:.1e}"),
}
CAPTION = """speedups: over the plain diffusers model; FLOPs: of the branches and all the rest.
should: the fixed part + the computed branches' own times, measured with nothing reused; does: the time it takes.
error at CUR 0: largest difference from the plain forward over its largest value."""


def bench_models(*, names: Sequence[str], steps: int, cur: float, rounds: int, heads: int | None = None,
                 layers: int | None = None) -> Iterator[dict]:
    """Yields a row for each of the named models, see `MODELS`.

    Each runs trajectories of `steps` forwards, its inputs fixed: plain, with everything computed and stored, and with
    a share `cur` of the branches reused at random. heads, layers: instead of a model's own.

    Raises:
        ValueError: a model is not known, or a number is out of range; the message names it.
    """
    for name in names:
        if name not in MODELS:
            raise ValueError(f"model: got {name!r}, expected one of {', '.join(MODELS)}")
    check_counts(steps=steps, rounds=rounds, heads=heads, layers=layers)
    check_cur(cur, steps)
    with Bar(len(names) * (rounds + 1)) as bar:
        for name in names:
            bar.say(name)
            yield measured(name, MODELS[name], bar, steps, cur, rounds, heads, layers)


@torch.inference_mode()
def measured(name: str, model: Model, bar: Bar, steps: int, cur: float, rounds: int, heads: int | None,
             layers: int | None) -> dict:
    run = Runner(model, steps, heads, layers)
    schedule = random_schedule(run.adapter.branch_names, run.flops, steps, cur)
    everything = random_schedule(run.adapter.branch_names, run.flops, steps, 0.0)
    wanted, found = run.plain(steps - 1), run.cached(everything)
    own_times, hoists = [], {"computed": [], "cached": []}

    def computed() -> None:
        with run.clocks() as bodies:
            run.cached(everything, hoists["computed"])
        own_times.append(bodies)

    seconds = interleaved({"plain": lambda: [run.plain(s) for s in range(steps)], "computed": computed,
                           "cached": lambda: run.cached(schedule, hoists["cached"])}, rounds, bar)
    middle = medians(seconds)
    body = [median(values) / steps for values in zip(*own_times[1:])]
    hoist = {kind: median(values[1:]) for kind, values in hoists.items()}
    fixed = middle["computed"] - hoist["computed"] - steps * sum(body)
    should = fixed + hoist["cached"] + sum(b for row in schedule.rows for b, c in zip(body, row) if c)
    wall = middle["plain"] / middle["cached"]
    return dict(
        model=name, cls=type(run.transformer).__name__, path="generic" if run.generic else "fused",
        K=len(body), width=run.adapter.architecture["D"], rows=len(wanted), tokens=run.tokens, steps=steps,
        cur=schedule.cur, flops_speedup=schedule.speedup, wall_speedup=wall,
        wall_over_flops=wall / schedule.speedup, plain_over_ours=middle["plain"] / middle["computed"],
        should_over_does=should / middle["cached"], cache_bytes=run.cache.nbytes,
        error_at_cur_0=((found - wanted).abs().max() / wanted.abs().max()).item(),
        seconds=spread(seconds), hoist_seconds=hoist, fixed_seconds=fixed, body_seconds=body)


class Runner:
    """A model, plain and through its adapter."""

    def __init__(self, model: Model, steps: int, heads: int | None = None, layers: int | None = None):
        self.transformer, self.arguments = model.build(heads, layers)
        self.timesteps = torch.linspace(999, 0, steps).round().tolist()
        self.made = [model.timestep(t) for t in self.timesteps]
        self.adapter = adapt(self.transformer)
        self.generic = isinstance(self.adapter, GenericAdapter)
        first = self.arguments | dict(timestep=self.made[0])
        if self.generic:
            self.flops = self.adapter.trace(**first)
        else:
            self.flops = count_call(self.adapter, lambda: self.adapter(**first))

    def plain(self, s: int) -> Tensor:
        """diffusers' own forward at step s."""
        return self.transformer(**self.arguments, timestep=self.made[s], return_dict=False)[0]

    def cached(self, schedule: Schedule, hoists: list[float] | None = None) -> Tensor:
        """A trajectory; the last step's output. Adds the time that hoisting took to `hoists`."""
        start = time.perf_counter()
        more: list[dict[str, Any]] = [{}] * schedule.steps
        if not self.generic:
            more = list(self.adapter.hoist(schedule.rows, self.timesteps, **self.arguments, timestep=self.made[0]))
        if hoists is not None:
            hoists.append(time.perf_counter() - start)
        self.cache = self.adapter.new_cache(schedule.history)
        for timestep, row, hoisted in zip(self.made, schedule.rows, more):
            output = self.adapter(**self.arguments, timestep=timestep, return_dict=False, **hoisted, row=row,
                                  cache=self.cache)[0]
        return output

    @property
    def tokens(self) -> int:
        """Of a branch's output, text included where it passes through the same branch; of the first branch."""
        latest = self.cache.latest(0)
        outputs = [o for o in (latest[0] if isinstance(latest[0], tuple) else latest)] if self.generic else [latest]
        return sum(o.shape[-2] for o in outputs)

    @contextmanager
    def clocks(self):
        """Within the block, the list that it yields adds up the time spent in each branch."""
        seconds = [0.0] * len(self.adapter.branch_names)
        if self.generic:
            with forward_clocks(self.adapter.modules, seconds):
                yield seconds
            return

        def timed(k: int, call: Callable) -> Callable:
            def run(*arguments):
                start = time.perf_counter()
                o = call(*arguments)
                seconds[k] += time.perf_counter() - start
                return o
            return run

        branches = list(self.adapter.branches)
        self.adapter.branches[:] = [replace(b, body=timed(k, b.body), body_out=timed(k, b.body_out))
                                    for k, b in enumerate(branches)]
        try:
            yield seconds
        finally:
            self.adapter.branches[:] = branches
