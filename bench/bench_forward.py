"""A whole trajectory: ours beside the same model in plain PyTorch, and beside what its schedule promises.

    OMP_NUM_THREADS=2 python -m pytest bench/bench_forward.py [-k fashion] [--rounds 4]

plain / ours: uncached trajectory of the plain model (tests/support/plain_dit.py) over ours; ≥ 1 is no slower.
should / does: the time that the schedule should take over the time that it takes. Should = the fixed part + the
    computed bodies' own times, both measured in the uncached trajectories: a body's time by a clock around it, the
    fixed part as all the rest. Reused branches are promised to cost nothing.
wall, FLOPs: its speedups over our own uncached trajectory.
forecast / computed: what a step takes whose trunk is forecast over what a computed one takes, from the trajectory that
    computes its first step alone.
"""

from dataclasses import replace
from statistics import median

import pytest
import torch

import harmonica_kernels as hk
from bench.problems import Plain, random_dit, random_schedule
from bench.record import cell
from bench.replay import Measured
from bench.timing import add_time, branch_seconds
from harmonica_dit.flops import count_flops
from harmonica_dit.forecaster import TrunkForecaster
from harmonica_dit.methods import fora, trunk_forecast
from harmonica_dit.sample import Trajectory, denoise, image_noise
from harmonica_dit.schedule import Schedule
from harmonica_dit.timing import interleave, medians

LONE = "trunk, one step computed"
SIZES = {"fashion-dit": dict(images=32, steps=20), "DiT-B/2": dict(images=8, steps=4)}
TINY = dict(images=1, steps=3, rounds=1, warmup=0, depth=1)
SCHEDULES = {"FORA n=2": lambda net, steps: fora(net, steps, 2),
             "random": lambda net, steps: random_schedule(net.branch_names, count_flops(net), steps, 0.375),
             "trunk n=2": lambda net, steps: learned_like(trunk_forecast(net, steps, every=2), net.width),
             LONE: lambda net, steps: learned_like(trunk_forecast(net, steps, every=steps), net.width)}
COLUMNS = {
    "model": cell("model"),
    "rows": cell("rows"),
    "T": cell("steps"),
    "ours, s": cell("ours_s", "{:.3g}"),
    "plain / ours": cell("plain_over_ours", "{:.2f}"),
    "schedule": cell("schedule"),
    "should / does": cell("should_over_does", "{:.3f}"),
    "wall": cell("wall_speedup", "{:.2f}×"),
    "FLOPs": cell("flops_speedup", "{:.2f}×"),
    "wall / FLOPs": cell("wall_over_flops", "{:.3f}"),
    "forecast / computed": cell("forecast_over_computed", "{:.3f}"),
}
CAPTION = "rows: of a forward, with guidance twice the images. ours: uncached."


@pytest.fixture(scope="module", params=SIZES)
def measured(request, settings):
    return measure(request.param, **settings(TINY, **SIZES[request.param], rounds=4, warmup=2, depth=None))


@pytest.mark.parametrize("candidate", ["plain", "ours", "clocked", *SCHEDULES])
def test_trajectory(measured, replay, candidate):
    replay(measured, candidate)


def learned_like(schedule: Schedule, width: int) -> Schedule:
    """With weights per channel for all that a learned forecaster weighs: up to three states, tokens, conditions."""
    T, H = schedule.steps, min(3, int(schedule.compute[:, 0].sum()))
    states, tokens = (torch.rand(T, H, width) / 10 for _ in range(2))
    own, condition = (torch.rand(T, width) / 10 for _ in range(2))
    return replace(schedule, forecaster=TrunkForecaster(states, tokens, own, condition, schedule.forecaster.size))


@torch.inference_mode()
def measure(name: str, images: int, steps: int, rounds: int, warmup: int, depth: int | None) -> Measured:
    """depth: of a model with random weights, in place of its own."""
    net, config = random_dit(name, depth)
    labels, noise = torch.arange(images) % net.num_classes, image_noise(0, 0, images, net.sample_shape)
    plain, ours = (Trajectory(model, labels, steps=steps) for model in (Plain(net, torch.float32, config), net))
    schedules = {kind: make(net, steps) for kind, make in SCHEDULES.items()}
    bodies: list[list[float]] = []  # of each clocked trajectory

    def run_clocked() -> None:
        bodies.append([0.0] * len(own))
        net.branches = [hk.Branch(add_time(branch.body, bodies[-1], k)) for k, branch in enumerate(own)]
        denoise(ours, noise)
        net.branches = own

    own = net.branches
    seconds = interleave({"plain": lambda: denoise(plain, noise), "ours": lambda: denoise(ours, noise),
                          "clocked": run_clocked}
                         | {kind: lambda schedule=schedule: denoise(ours, noise, schedule)
                            for kind, schedule in schedules.items()}, rounds, warmup=warmup)
    middle = medians(seconds)
    body = [median(values) / steps for values in zip(*bodies[-rounds:])]
    fixed = middle["clocked"] - steps * sum(body)
    rows = {}
    for kind, schedule in schedules.items():
        should, wall = fixed + branch_seconds(schedule.compute.tolist(), body), middle["ours"] / middle[kind]
        rows[kind] = dict(model=name, rows=2 * images, steps=steps, ours_s=middle["ours"],
                          plain_over_ours=middle["plain"] / middle["ours"], schedule=schedule.origin,
                          should_over_does=should / middle[kind], wall_speedup=wall, flops_speedup=schedule.speedup,
                          wall_over_flops=wall / schedule.speedup)
        if kind == LONE:
            rows[kind]["forecast_over_computed"] = (steps / wall - 1) / (steps - 1)
    return Measured(name, seconds, rows)
