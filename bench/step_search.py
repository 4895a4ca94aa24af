"""Which 7 of 20 steps to compute: evenly spaced, searched by swaps, or by dynamic programming; errors of the images.

    python -m bench.step_search    writes bench/results/step-search-cpu.json; about two minutes on one core

Dynamic programming takes the errors of the uncached trajectory's guided outputs: those of the first-order forecast of
each step from each pair of earlier ones, root mean squared over the images that `step_search` calibrates on, and finds
the steps with the least sum over all that are forecast. "Weighed" multiplies a step's error by what the solver makes of
an output there in the final image, if nothing else changes.
"""

import argparse
import json
import math

import torch

import harmonica_dit
from bench import RESULTS
from bench.forecasts import GUIDANCE, STEPS
from bench.record import machine, moment
from harmonica_dit.evaluate import Method, compare
from harmonica_dit.files import replacement
from harmonica_dit.flops import trunk_costs
from harmonica_dit.methods import step_search, trunk_forecast
from harmonica_dit.methods.calibration import calibration_labels
from harmonica_dit.methods.trunk import forecast_between
from harmonica_dit.sample import Trajectory, image_noise
from harmonica_dit.sample.trajectory import FIRST_IMAGE

COMPUTED, IMAGES = 7, 16


@torch.no_grad()
def forecast_errors(net) -> tuple[dict[tuple[int | None, int, int], float], list[float]]:
    """By (the computed step before the last, or None; the last; the step that is forecast), and each step's weight."""
    trajectory = Trajectory(net, calibration_labels(net, IMAGES, 0), steps=STEPS, guidance=GUIDANCE)
    x, outputs = trajectory.start(image_noise(0, FIRST_IMAGE, IMAGES, net.sample_shape)), []
    for s in range(STEPS):
        output = trajectory.predict(x, s)
        outputs.append(output[:, : x.shape[1]])
        x = trajectory.advance(output, s, x)
    errors = {}
    for b in range(STEPS):
        for a in range(b) if b else (None,):
            slope = 0.0 if a is None else (outputs[b] - outputs[a]) / (b - a)
            for s in range(b + 1, STEPS):
                off = outputs[b] + (s - b) * slope - outputs[s]
                errors[a, b, s] = off.square().mean().sqrt().item()
    updates = trajectory.scheduler.updates().tolist()
    return errors, [abs(b) * math.prod(a for a, _ in updates[s + 1 :]) for s, (_, b) in enumerate(updates)]


def least_sum(errors: dict[tuple[int | None, int, int], float], weights: list[float], computed: int) -> tuple[int, ...]:
    """The computed steps with the least weighed sum of errors."""
    def pause(a: int | None, b: int, end: int) -> float:
        return sum(weights[s] * errors[a, b, s] for s in range(b + 1, end))

    best: dict[tuple[int | None, int], tuple[float, tuple[int, ...]]] = {(None, 0): (0.0, (0,))}  # by the last two
    for _ in range(computed - 1):
        ways = [((b, c), (cost + pause(a, b, c), (*chosen, c))) for (a, b), (cost, chosen) in best.items()
                for c in range(b + 1, STEPS)]
        best = {last: min(way for other, way in ways if other == last) for last in {last for last, _ in ways}}
    return min((cost + pause(a, b, STEPS), chosen) for (a, b), (cost, chosen) in best.items())[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    net = harmonica_dit.load("fashion-dit")
    flops, size = trunk_costs(net)
    errors, weights = forecast_errors(net)

    def dynamic(weights: list[float]):
        chosen = least_sum(errors, weights, COMPUTED)
        return forecast_between([s in chosen for s in range(STEPS)], "dynamic programming", flops=flops, size=size,
                                order=1, names=net.branch_names, model=net.name)

    schedules = {"every third": trunk_forecast(net, STEPS, every=3),
                 "searched": step_search(net, STEPS, COMPUTED, images=IMAGES, guidance=GUIDANCE),
                 "dynamic programming": dynamic([1.0] * STEPS), "dynamic programming, weighed": dynamic(weights)}
    methods = [Method(name, name, STEPS, schedule) for name, schedule in schedules.items()]
    rows = compare(net, methods, torch.arange(args.samples) % net.num_classes, steps=STEPS, guidance=GUIDANCE,
                   seeds=[args.seed])
    found = [dict(method=row["name"], computed=schedule.compute[:, 0].nonzero().flatten().tolist(),
                  flops_speedup=row["flops_speedup"], error=row["error"])
             for row, schedule in zip(rows[1:], schedules.values(), strict=True)]
    with replacement(RESULTS / "step-search-cpu.json") as path:
        path.write_text(json.dumps(moment() | machine() | dict(samples=args.samples, seed=args.seed, rows=found),
                                   indent=1) + "\n")
    print("| method | computed steps | FLOPs speedup | error to uncached |\n|---|---|---|---|")
    for row in found:
        print(f"| {row['method']} | {', '.join(map(str, row['computed']))} | {row['flops_speedup']:.2f}× "
              f"| {row['error']:.4f} |")


if __name__ == "__main__":
    main()
