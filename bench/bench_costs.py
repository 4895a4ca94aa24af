"""Speedups asked for in measured time: what the table of costs promises, and what the clock says.

    OMP_NUM_THREADS=1 python -m pytest bench/bench_costs.py [-k fashion] [--rounds 9] [--benchmark-json=FILE]

A table is measured anew (`measure_costs`), then whole trajectories are timed whose schedules meet a speedup by that
table: routers with scores drawn at random, which are cut as trained ones are, repeating and forecasting; FORA; steps
computed whole with forecasts of the trunk between them. Seconds are `steady_clock`'s.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bench.problems import random_dit
from bench.record import cell
from bench.replay import Measured
from harmonica_dit.costs import Seconds
from harmonica_dit.flops import count_flops
from harmonica_dit.methods import fora, trunk_forecast
from harmonica_dit.router import Router
from harmonica_dit.sample import Trajectory, denoise, image_noise, measure_costs
from harmonica_dit.schedule import Schedule
from harmonica_dit.timing import interleave, medians, steady_clock
from harmonica_dit.train.budget import Budget

SIZES = {"fashion-dit": dict(images=8, steps=20), "DiT-S/2": dict(images=2, steps=10)}
TINY = dict(images=1, steps=6, rounds=1, warmup=0)
SPEEDUPS = (1.5, 2.0, 2.8)


def router(net, steps: int, speedup: float, costs: Seconds, forecasts: bool) -> Schedule:
    K = len(net.branch_names)
    made = Router(torch.randn(steps, K, generator=torch.Generator().manual_seed(0)), net.branch_names, count_flops(net),
                  tuple(range(steps)), extrapolation=torch.ones(steps, K) if forecasts else None)
    Budget(costs, steps, speedup=speedup, forecasts=forecasts).set_threshold(made)
    return made.schedule()


METHODS: dict[str, Callable[..., Schedule]] = {
    "router": lambda *asked: router(*asked, forecasts=False),
    "router + forecast": lambda *asked: router(*asked, forecasts=True),
    "FORA": lambda net, steps, speedup, costs: fora(net, steps, speedup=speedup, costs=costs),
    "trunk": lambda net, steps, speedup, costs: trunk_forecast(net, steps, speedup=speedup, costs=costs)}
COLUMNS = {
    "schedule": cell("schedule"),
    "model": cell("model"),
    "images": cell("images"),
    "asked for": cell("asked", "{:.2f}×"),
    "by the table": cell("table", "{:.3f}×"),
    "on the clock": cell("clock", "{:.3f}×"),
    "clock / table": cell("clock_over_table", "{:.3f}"),
    "FLOPs": cell("flops", "{:.3f}×"),
}
CAPTION = """speedups over the uncached trajectory. by the table: met from above, as nearly as whole entries can, which
of FORA and the trunk are whole steps."""


@pytest.fixture(scope="module", params=SIZES)
def measured(request, settings):
    return measure(request.param, **settings(TINY, **SIZES[request.param], rounds=7, warmup=1))


@pytest.mark.parametrize("candidate", ["uncached", *(f"{name} {speedup}" for name in METHODS for speedup in SPEEDUPS)])
def test_costs(measured, replay, candidate):
    replay(measured, candidate)


def measure(model: str, images: int, steps: int, rounds: int, warmup: int) -> Measured:
    net, _ = random_dit(model)
    with tempfile.TemporaryDirectory() as folder:
        costs = measure_costs(net, batch=images, rounds=rounds, path=Path(folder) / "costs.json")
    schedules: dict[str, Schedule | None] = {"uncached": None}
    asked = {}
    for name, make in METHODS.items():
        for speedup in SPEEDUPS:
            schedules[f"{name} {speedup}"] = make(net, steps, speedup, costs)
            asked[f"{name} {speedup}"] = speedup
    trajectory = Trajectory(net, torch.arange(images) % net.num_classes, steps=steps)
    noise = image_noise(0, 0, images, net.sample_shape)
    seconds = interleave({name: lambda made=made: denoise(trajectory.fork(), noise, made)
                          for name, made in schedules.items()}, rounds, warmup=warmup, clock=steady_clock())
    middle, rows = medians(seconds), {}
    for name, speedup in asked.items():
        clock, table = middle["uncached"] / middle[name], schedules[name].speedup_by(costs)
        rows[name] = dict(schedule=schedules[name].origin, model=model, images=images, T=steps, asked=speedup,
                          table=table, clock=clock, clock_over_table=clock / table, flops=schedules[name].speedup)
    return Measured(model, seconds, rows)
