"""A whole trajectory: ours beside the same model in plain PyTorch, and beside what its schedule promises.

    python bench/bench_forward.py [--threads 2] [--rounds 9] [--models fashion-dit DiT-B/2]

Each round times every candidate once, in turn, so that a busy machine slows all of them alike; the table has ratios of
medians. Columns:

plain/ours: uncached trajectory of the plain model (tests/plain_dit.py) over ours; ≥ 1 is no slower.
should/does: the time that the schedule should take over the time that it takes. Should = the fixed part + the computed
    bodies' own times, both measured in the uncached trajectories: a body's time by a clock around it, the fixed part as
    all the rest. Reused branches are promised to cost nothing.
wall, FLOPs: speedups over our own uncached trajectory.
"""

import argparse
import sys
import time
from collections import defaultdict
from pathlib import Path
from statistics import median

import torch

import harmonica_dit
import harmonica_kernels as hk
from harmonica_dit.models import CONFIGS, DiT, count_flops
from harmonica_dit.sample import Trajectory, denoise, image_noise
from harmonica_dit.schedule import Schedule
from harmonica_dit.schedules import fora

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from plain_dit import PlainDiT  # noqa: E402  (the tests' reference model is this benchmark's too)

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


def measure(name: str, images: int, steps: int, rounds: int) -> None:
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
    clocks, own_branches = Clocks(net), net.branches
    rows = schedules(net, steps)

    def run(model, schedule=None):
        trajectory = Trajectory(model, labels, steps=steps)
        start = time.perf_counter()
        denoise(trajectory, noise, schedule)
        return time.perf_counter() - start

    times, bodies = defaultdict(list), []
    for _ in range(rounds + 1):
        times["plain"].append(run(plain))
        times["ours"].append(run(net))
        net.branches, clocks.seconds[:] = clocks.branches, [0.0] * len(own_branches)
        times["clocked"].append(run(net))
        net.branches = own_branches
        bodies.append(list(clocks.seconds))
        for schedule in rows:
            times[schedule.origin].append(run(net, schedule))
    mid = {key: median(values[1:]) for key, values in times.items()}  # the first round warms up
    body = [median(values) / steps for values in zip(*bodies[1:])]
    fixed = mid["clocked"] - steps * sum(body)
    print(f"\n{name}: {2 * images} rows, T = {steps}, uncached {mid['ours']:.2f} s, "
          f"plain/ours {mid['plain'] / mid['ours']:.3f}")
    print(f"  {'schedule':<22}{'should/does':>12}{'wall':>8}{'FLOPs':>8}{'wall/FLOPs':>12}")
    for schedule in rows:
        should = fixed + sum(sum(b for b, c in zip(body, row) if c) for row in schedule.rows)
        wall = mid["ours"] / mid[schedule.origin]
        print(f"  {schedule.origin:<22}{should / mid[schedule.origin]:>12.3f}{wall:>8.2f}{schedule.speedup:>8.2f}"
              f"{wall / schedule.speedup:>12.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{args.threads} threads, float32, medians of {args.rounds} interleaved rounds")
    with torch.inference_mode():
        for name in args.models:
            measure(name, **MODELS[name], rounds=args.rounds)


if __name__ == "__main__":
    main()
