"""TaylorSeer as published beside ours, from the second order on: which weights are the better rival?

    python -m bench.taylor_weights    writes bench/results/taylor-weights-cpu.json; a quarter of an hour on one core

The paper weighs the i-th difference of a branch's outputs by uⁱ/i!, u pauses after the newest one; ours is Lagrange's
polynomial through them. The bundled model, T = 20, DDIM; images of seed 1, errors are to the uncached ones.
"""

import argparse
import json
from dataclasses import dataclass, replace
from itertools import pairwise
from math import factorial
from pathlib import Path

import torch
from torch import Tensor

import harmonica_dit
from bench import RESULTS
from bench.paired import BATCH, COLUMNS, STEPS, difference, judged
from bench.record import machine, moment
from harmonica_dit.evaluate import Method
from harmonica_dit.evaluate.samples import Samples
from harmonica_dit.files import replacement
from harmonica_dit.forecaster import BranchForecaster
from harmonica_dit.methods import taylorseer


@dataclass(frozen=True)
class Published(BranchForecaster):
    """With the differences and weights of TaylorSeer (Liu et al., 2025), as diffusers has them."""

    def weights(self, compute: Tensor) -> tuple:
        rows = []
        for s, row in enumerate(compute.tolist()):
            computed = [p for p in range(s + 1) if compute[p, 0]][-self.order - 1 :]
            w = differences(computed, s)
            rows.append(None if row[0] or len(w) < 2 else (tuple(w),) * len(row))
        return tuple(rows)


def differences(computed: list[int], s: int) -> list[float]:
    """Weights of the outputs at these steps, sorted from the newest, in the forecast at step s."""
    n = len(computed)
    level, found = torch.eye(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    gaps = torch.tensor([float(b - a) for a, b in pairwise(computed)], dtype=torch.float64)
    for i in range(n):  # level: the i-th differences over the pauses to i
        found += level[-1] * (s - computed[-1]) ** i / factorial(i)
        level = (level[1:] - level[:-1]) / gaps[i:, None]
    return found.flip(0).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--folder", type=Path, default=Path("build/taylor-weights"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    net, rows = harmonica_dit.load("fashion-dit"), []
    for every in (2, 3):
        for order in (2, 3):
            ours = taylorseer(net, STEPS, every, order)
            found = {}
            for name, schedule in (("ours", ours), ("published", replace(ours, forecaster=Published(order)))):
                samples = Samples(net, torch.arange(args.samples) % net.num_classes, args.folder / name, guidance=1.5,
                                  batch=BATCH)
                found[name] = judged(samples, Method(f"{name}, n = {every}, order {order}", name, STEPS, schedule))
            rows.append(dict(every=every, order=order, flops_speedup=ours.speedup) | {
                column: {name: one[0][column] for name, one in found.items()}
                | difference([found["published"]], [found["ours"]], column) for column in COLUMNS})
            print(f"| {every} | {order} |", *(
                "{ours:.4f}, {published:.4f}, {above:+.4f} ({low:+.4f} … {high:+.4f}) |".format_map(rows[-1][column])
                for column in COLUMNS), flush=True)
    with replacement(RESULTS / "taylor-weights-cpu.json") as path:
        path.write_text(json.dumps(moment() | machine() | dict(samples=args.samples, rows=rows), indent=1) + "\n")


if __name__ == "__main__":
    main()
