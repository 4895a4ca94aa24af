"""Cached against plain trajectories of diffusers' transformers, and what becomes of the FLOPs that are saved.

    OMP_NUM_THREADS=2 python -m pytest bench/bench_models.py [-k flux] [--full] [--steps 5] [--cur 0.56] [--rounds 5]
                                       [--heads 1] [--layers 2] [--benchmark-json=FILE]

Trajectories of `steps` forwards, their inputs fixed, on random weights: plain, with everything computed and stored and
clocks around the branches, with a share `cur` of the branches reused at random, and by `enable_cache` with the trunk
forecast at every second step. --heads, --layers: instead of a model's own. --full: pixart-alpha-1024 too.
"""

import copy
import time
from contextlib import contextmanager
from dataclasses import replace
from statistics import median
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.diffusers_models import MODELS, Model
from bench.problems import random_schedule
from bench.record import cell
from bench.replay import Measured
from bench.timing import add_time, branch_seconds, forward_clocks, quartiles
from harmonica_dit.methods import trunk_forecast
from harmonica_dit.pipelines import enable_cache
from harmonica_dit.pipelines.adapters import adapt
from harmonica_dit.pipelines.adapters.generic import GenericAdapter
from harmonica_dit.schedule import Schedule
from harmonica_dit.timing import interleave, medians

LONG = {"pixart-alpha-1024"}
TINY = dict(steps=4, rounds=1, warmup=0, heads=1, layers=2)
COLUMNS = {
    "model": cell("model"),
    "K": cell("K"),
    "tokens": cell("tokens"),
    "CUR": cell("cur", "{:.1%}"),
    "FLOPs speedup": cell("flops_speedup", "{:.2f}×"),
    "wall speedup": cell("wall_speedup", "{:.2f}×"),
    "wall / FLOPs": cell("wall_over_flops", "{:.3f}"),
    "plain / ours, CUR 0": cell("plain_over_ours", "{:.2f}"),
    "should / does": cell("should_over_does", "{:.3f}"),
    "cache, MB": lambda row: f"{row['cache_bytes'] / 1e6:.1f}",
    "error at CUR 0": cell("error_at_cur_0", "{:.1e}"),
    "trunk: FLOPs speedup": cell("trunk_flops_speedup", "{:.2f}×"),
    "trunk: wall / FLOPs": cell("trunk_wall_over_flops", "{:.3f}"),
    "trunk: skipped / computed step": cell("skipped_over_computed", "{:.4f}"),
    "trunk: cache, MB": lambda row: f"{row['trunk_cache_bytes'] / 1e6:.1f}",
}
CAPTION = """speedups: over the plain diffusers model; FLOPs: of the branches and all the rest.
should: the fixed part + the computed branches' own times, measured with nothing reused; does: the time it takes.
error at CUR 0: largest difference from the plain forward over its largest value.
cache: of a state of each branch, and of two states of the trunk, which is forecast from them to first order."""

@pytest.fixture(scope="module", params=MODELS)
def measured(request, settings):
    if request.param in LONG and not request.config.getoption("full"):
        pytest.skip("takes long; --full runs it")
    return measure(request.param, **settings(TINY, steps=5, cur=0.56, rounds=5, warmup=1, heads=None, layers=None))


@pytest.mark.parametrize("candidate", ["plain", "computed", "cached", "trunk"])
def test_model(measured, replay, candidate):
    replay(measured, candidate)


@torch.inference_mode()
def measure(name: str, steps: int, cur: float, rounds: int, warmup: int, heads: int | None,
            layers: int | None) -> Measured:
    """One of MODELS; heads, layers: instead of its own."""
    run = Runner(MODELS[name], steps, heads, layers)
    schedule = random_schedule(run.adapter.branch_names, run.flops, steps, cur)
    everything = random_schedule(run.adapter.branch_names, run.flops, steps, 0.0)
    wanted, found = run.plain(steps - 1), run.cached(everything)
    own_times: list[list[float]] = []
    hoists: dict[str, list[float]] = {"computed": [], "cached": []}
    trunk = trunk_forecast(run.adapter, steps, every=2)
    by_step: list[list[float]] = []

    def run_clocked() -> None:
        with run.clocks() as bodies:
            run.cached(everything, hoists["computed"])
        own_times.append(bodies)

    with run.caching(trunk) as forecast:
        seconds = interleave({"plain": lambda: [run.plain(s) for s in range(steps)], "computed": run_clocked,
                              "cached": lambda: run.cached(schedule, hoists["cached"]),
                              "trunk": lambda: by_step.append(forecast())}, rounds, warmup=warmup)
    middle = medians(seconds)
    body = [median(values) / steps for values in zip(*own_times[-rounds:])]
    hoist = {kind: median(values[-rounds:]) for kind, values in hoists.items()}
    fixed = middle["computed"] - hoist["computed"] - steps * sum(body)
    should = fixed + hoist["cached"] + branch_seconds(schedule.rows, body)
    wall = middle["plain"] / middle["cached"]
    step = [median(values) for values in zip(*by_step[-rounds:])]
    whole = trunk.compute.all(1).tolist()
    computed, skipped = (median([t for t, one in zip(step, whole) if one is kind]) for kind in (True, False))
    row = dict(
        model=name, cls=type(run.transformer).__name__, path="generic" if run.generic else "fused",
        K=len(body), width=run.adapter.architecture["D"], rows=len(wanted), tokens=run.tokens, steps=steps,
        cur=schedule.cur, flops_speedup=schedule.speedup, wall_speedup=wall,
        wall_over_flops=wall / schedule.speedup, plain_over_ours=middle["plain"] / middle["computed"],
        should_over_does=should / middle["cached"], cache_bytes=run.cache.nbytes,
        trunk_flops_speedup=trunk.speedup, trunk_wall_over_flops=middle["plain"] / middle["trunk"] / trunk.speedup,
        skipped_over_computed=skipped / computed, trunk_cache_bytes=run.adapter.cache_nbytes(2, "trunk"),
        error_at_cur_0=((found - wanted).abs().max() / wanted.abs().max()).item(),
        seconds={kind: quartiles(values) for kind, values in seconds.items()}, hoist_seconds=hoist,
        fixed_seconds=fixed, body_seconds=body)
    return Measured(name, seconds, {"cached": row})


class Runner:
    """A model, plain and through its adapter."""

    def __init__(self, model: Model, steps: int, heads: int | None = None, layers: int | None = None):
        self.transformer, self.arguments = model.build(heads, layers)
        self.timesteps = torch.linspace(999, 0, steps).round().tolist()
        self.made = [model.timestep(t) for t in self.timesteps]
        self.adapter = adapt(self.transformer)
        self.generic = isinstance(self.adapter, GenericAdapter)
        first = self.arguments | dict(timestep=self.made[0])
        self.flops = self.adapter.trace(**first)

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

    @contextmanager
    def caching(self, schedule: Schedule):
        """Yields a function that runs a trajectory as `enable_cache` does, and returns each step's seconds."""
        other = copy.copy(self)
        other.transformer = copy.deepcopy(self.transformer)
        enabled = enable_cache(other.transformer, schedule, timesteps=[float(t[0]) for t in self.made])

        def run() -> list[float]:
            enabled.reset()
            seconds = []
            for s in range(schedule.steps):
                start = time.perf_counter()
                other.plain(s)
                seconds.append(time.perf_counter() - start)
            return seconds

        yield run
        enabled.disable()

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

        branches = list(self.adapter.branches)
        self.adapter.branches[:] = [
            replace(b, body=add_time(b.body, seconds, k), body_out=add_time(b.body_out, seconds, k))
            for k, b in enumerate(branches)]
        try:
            yield seconds
        finally:
            self.adapter.branches[:] = branches
