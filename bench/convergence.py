"""How accurate the accurate target is: distances between solutions of the same ODE from the same noise.

    python -m bench.convergence    writes bench/results/convergence-cpu.json; five minutes on one core

DPM-Solver++ in 20 to 160 steps, the reference's DDIM in 20 and 1000, and diffusers' own DDIM, which steps by a fixed
stride, in 20 of each of its spacings: the mean RMSE between the images of each two.
"""

import argparse
import json
from itertools import combinations
from pathlib import Path

import torch
from diffusers import DDIMScheduler
from rich.progress import track

import harmonica_dit
from bench import RESULTS
from bench.forecasts import GUIDANCE
from bench.record import machine, moment
from harmonica_dit.evaluate import rmse
from harmonica_dit.files import replacement
from harmonica_dit.sample.schedulers import NOISE

DPM = "DPMSolverMultistepScheduler"
SOLUTIONS = {"DDIM 20": (20, "ddim"), "DPM-Solver++ 20": (20, DPM), "DPM-Solver++ 40": (40, DPM),
             "DPM-Solver++ 80": (80, DPM), "DPM-Solver++ 160": (160, DPM), "DDIM 1000": (1000, "ddim")} | {
    f"diffusers' DDIM 20, {spacing}": (20, DDIMScheduler(**NOISE, clip_sample=False, timestep_spacing=spacing))
    for spacing in ("trailing", "linspace", "leading")}


def distances(net, images: int, seed: int, solutions: dict) -> dict[str, dict[str, float]]:
    """Between each two solutions, by their names."""
    labels = torch.arange(images) % net.num_classes
    made = {name: harmonica_dit.sample(net, labels, steps=steps, scheduler=scheduler, guidance=GUIDANCE, seed=seed,
                                       batch=images)
            for name, (steps, scheduler) in track(solutions.items(), "solving")}
    found: dict[str, dict[str, float]] = {name: {name: 0.0} for name in made}
    for a, b in combinations(made, 2):
        found[a][b] = found[b][a] = rmse(made[a], made[b]).mean().item()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--images", type=int, default=40)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "convergence-cpu.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = distances(harmonica_dit.load("fashion-dit"), args.images, args.seed, SOLUTIONS)
    with replacement(args.out) as path:
        path.write_text(json.dumps(machine() | moment() | dict(images=args.images, seed=args.seed, distances=found),
                                   indent=1) + "\n")
    print("| | " + " | ".join(found) + " |\n" + "|---" * (len(found) + 1) + "|")
    for name, row in found.items():
        print(f"| {name} | " + " | ".join(f"{row[other]:.4f}" for other in found) + " |")


if __name__ == "__main__":
    main()
