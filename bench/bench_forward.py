"""A whole trajectory: ours beside the same model in plain PyTorch, and beside what its schedule promises.

    OMP_NUM_THREADS=2 python -m pytest bench/bench_forward.py [-k fashion]

plain / ours: uncached trajectory of the plain model (tests/support/plain_dit.py) over ours; ≥ 1 is no slower.
should / does: the time that the schedule should take over the time that it takes. Should = the fixed part + the
    computed bodies' own times, both measured in the uncached trajectories: a body's time by a clock around it, the
    fixed part as all the rest. Reused branches are promised to cost nothing.
wall, FLOPs: its speedups over our own uncached trajectory.
"""

import sys
import time
from pathlib import Path
from statistics import median

import pytest
import torch

import harmonica_dit
import harmonica_kernels as hk
from harmonica_dit.methods import fora
from harmonica_dit.models import CONFIGS, DiT
from harmonica_dit.sample import Trajectory, denoise, image_noise
from harmonica_dit.schedule import Schedule

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support.plain_dit import PlainDiT  # noqa: E402  (the tests' reference model is this benchmark's too)

ROUNDS = 4
MODELS = {"fashion-dit": dict(images=32, steps=20), "DiT-B/2": dict(images=8, steps=4)}  # rows: twice the images


class Plain(torch.nn.Module):
    """The plain model behind the denoisers' signature."""

    guidance, guidance_channels, scheduler = DiT.guidance, DiT.guidance_channels, DiT.scheduler

    def __init__(self, net: DiT, **config):
        super().__init__()
        self.net, self.sample_shape, self.num_classes = PlainDiT(**config).eval(), net.sample_shape, net.num_classes
        self.net.load_state_dict(net.state_dict())

    def forward(self, x, t, y):
        return self.net(x, t, y)


class Clocks:
    """Adds up, for each branch, the time spent in its body."""

    def __init__(self, net: DiT):
        self.seconds = [0.0] * len(net.branches)
        self.branches = [hk.Branch(self._timed(k, b.body)) for k, b in enumerate(net.branches)]

    def _timed(self, k, body):
        def timed(h, context):
            start = time.perf_counter()
            o = body(h, context)
            self.seconds[k] += time.perf_counter() - start
            return o
        return timed


def schedules(net: DiT, steps: int) -> list[Schedule]:
    """FORA n=2, and rows that reuse 37.5 % of the entries at random."""
    every_second = fora(net, steps, 2)
    entries = torch.rand(steps - 1, len(net.branches), generator=torch.Generator().manual_seed(0))
    reused = int(0.375 * steps * len(net.branches))
    compute = torch.ones(steps, len(net.branches), dtype=torch.bool)
    compute[1:].view(-1)[entries.view(-1).argsort()[:reused]] = False
    return [every_second, Schedule(compute=compute, branches=net.branch_names, flops=count_flops(net),
                                   origin="random, CUR 37.5 %")]


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_trajectory(interleaved, report, name):
    images, steps = MODELS[name].values()
    torch.manual_seed(0)
    if name == "fashion-dit":
        net, config = harmonica_dit.load(name), harmonica_dit.models.FASHION
    else:
        config = CONFIGS[name] | dict(input_size=32, in_channels=4)
        net = DiT(**config, name=name).eval().requires_grad_(False)
        for p in net.parameters():
            p.normal_(std=0.02)
    plain, labels = Plain(net, **config), torch.arange(images) % net.num_classes
    noise = image_noise(0, 0, images, net.sample_shape)
    clocks, own_branches, bodies = Clocks(net), net.branches, []

    def run(model, schedule=None):
        trajectory = Trajectory(model, labels, steps=steps)
        start = time.perf_counter()
        denoise(trajectory, noise, schedule)
        return time.perf_counter() - start

    def clocked(_):
        net.branches, clocks.seconds[:] = clocks.branches, [0.0] * len(own_branches)
        seconds = run(net)
        net.branches = own_branches
        bodies.append(list(clocks.seconds))
        return seconds

    found = {schedule.origin: schedule for schedule in schedules(net, steps)}
    seconds = interleaved({"plain": lambda _: run(plain), "ours": lambda _: run(net), "clocked": clocked}
                          | {origin: lambda _, schedule=schedule: run(net, schedule)
                             for origin, schedule in found.items()}, ROUNDS)
    body = [median(values) / steps for values in zip(*bodies[-ROUNDS:])]
    fixed = seconds["clocked"] - steps * sum(body)
    for origin, schedule in found.items():
        should = fixed + sum(sum(b for b, c in zip(body, row) if c) for row in schedule.rows)
        wall = seconds["ours"] / seconds[origin]
        report(model=name, rows=2 * images, T=steps, **{
            "ours, s": seconds["ours"], "plain / ours": seconds["plain"] / seconds["ours"], "schedule": origin,
            "should / does": should / seconds[origin], "wall": wall, "FLOPs": schedule.speedup,
            "wall / FLOPs": wall / schedule.speedup})
