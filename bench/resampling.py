"""What a schedule for 20 steps is worth in other numbers of steps: resampled, by the nearest row, or made for them.

    python -m bench.resampling    writes bench/results/resampling-cpu.json; some minutes on one core

Each error is the mean RMSE to the uncached images in that number of steps, from the same noise. "Nearest row" is what
`Schedule.resampled` did before: each step took the row of the nearest timestep.
"""

import argparse
import json
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from rich.progress import track

import harmonica_dit
from bench import RESULTS
from bench.forecasts import GUIDANCE, STEPS
from bench.record import machine, moment
from harmonica_dit import resample
from harmonica_dit.evaluate import rmse
from harmonica_dit.evaluate.samples import content
from harmonica_dit.files import replacement
from harmonica_dit.methods import fora, trunk_forecast
from harmonica_dit.router import Router
from harmonica_dit.sample.schedulers import make_scheduler
from harmonica_dit.schedule import Schedule

ROUTERS = ("fashion-dit-1.6x", "fashion-dit-2.0x", "fashion-dit-2.0x-forecast")
METHODS = {"FORA n=2 + forecast": lambda net, steps: fora(net, steps, 2, 1),
           "FORA n=3 + forecast": lambda net, steps: fora(net, steps, 3, 1),
           "trunk, 2 times": lambda net, steps: trunk_forecast(net, steps, speedup=2)}
LAST = (0.01, 0.25, 0.5)  # see `harmonica_dit.resample`; at 0 rounding would decide


def timesteps(steps: int) -> tuple[float, ...]:
    return tuple(make_scheduler("ddim", steps).timesteps.tolist())


def nearest(schedule: Schedule, wanted: tuple[float, ...]) -> Schedule:
    """Each step takes the row of the nearest timestep."""
    rows = (torch.tensor(wanted)[:, None] - torch.tensor(schedule.timesteps)).abs().argmin(1)
    compute = schedule.compute[rows]
    compute[0] = True
    return replace(schedule, compute=compute, extrapolation=schedule.extrapolation[rows], timesteps=wanted)


def candidates(net, steps: int) -> Iterator[tuple[str, str, Schedule]]:
    """Method, rule and schedule."""
    wanted = timesteps(steps)
    made = {name: replace(make(net, STEPS), timesteps=timesteps(STEPS)) for name, make in METHODS.items()}
    for name, schedule in (made | {name: Router.load(name).schedule() for name in ROUTERS}).items():
        if schedule.unit == "branch":
            yield name, "nearest row", nearest(schedule, wanted)
        own = resample.LAST
        for resample.LAST in LAST:
            yield name, f"resampled, {resample.LAST:g}", schedule.resampled(wanted)
        resample.LAST = own
        if name in METHODS:
            yield name, "made for it", METHODS[name](net, steps)


def measure(net, steps: int, samples: int, seed: int) -> list[dict]:
    """A row for each candidate; equal schedules are sampled once."""
    labels, options = torch.arange(samples) % net.num_classes, dict(seed=seed, guidance=GUIDANCE, batch=samples)
    uncached, found, rows = harmonica_dit.sample(net, labels, steps=steps, **options), {}, []
    for name, rule, schedule in track(list(candidates(net, steps)), f"{steps} steps"):
        key = tuple(table.numpy().tobytes() for table in content(schedule)[1])
        if key not in found:
            images = harmonica_dit.sample(net, labels, steps=steps, schedule=schedule, **options)
            found[key] = rmse(images, uncached).mean().item()
        rows.append(dict(steps=steps, method=name, rule=rule, cur=schedule.cur, flops_speedup=schedule.speedup,
                         error=found[key]))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--steps", nargs="*", type=int, default=[10, 50])
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "resampling-cpu.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", "schedule: made for")  # the CUR is in the table
    net = harmonica_dit.load("fashion-dit")
    own = {name: Router.load(name).schedule().cur for name in ROUTERS}
    own |= {name: make(net, STEPS).cur for name, make in METHODS.items()}
    rows = [row for steps in args.steps for row in measure(net, steps, args.samples, args.seed)]
    settings = dict(samples=args.samples, seed=args.seed, made_for=STEPS, cur=own, last=resample.LAST)
    with replacement(args.out) as path:
        path.write_text(json.dumps(machine() | moment() | settings | dict(rows=rows), indent=1) + "\n")
    rules = ("nearest row", *(f"resampled, {last:g}" for last in LAST), "made for it")
    print("| steps | method | " + " | ".join(rules) + " |\n" + "|---" * (len(rules) + 2) + "|")
    by = {(row["steps"], row["method"], row["rule"]): row for row in rows}
    for steps in args.steps:
        for name in own:
            cells = (by.get((steps, name, rule)) for rule in rules)
            print(f"| {steps} | {name}, CUR {own[name]:.2f} | " + " | ".join(
                "–" if row is None else f"{row['error']:.4f} ({row['cur']:.2f})" for row in cells) + " |")


if __name__ == "__main__":
    main()
