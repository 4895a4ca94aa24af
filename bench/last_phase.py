"""Does a router gain from a last phase that hardens its scores? Four ways to train the last quarter, from one start.

    python -m bench.last_phase    writes bench/results/last-phase-cpu.json; half an hour on one core, goes on there

The bundled model, T = 20, 2.0×, outputs repeated, seed 0: 90 trajectories as always, then 30 each way; and what the raw
mean of λ was whenever it was measured. Images are of seed 1, errors are to the uncached ones.
"""

import argparse
import csv
import json
import shutil
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch

import harmonica_dit
from bench import RESULTS
from bench.paired import BATCH, COLUMNS, STEPS, difference, judged
from bench.record import machine, moment
from harmonica_dit.evaluate import Method
from harmonica_dit.evaluate.samples import Samples
from harmonica_dit.files import replacement
from harmonica_dit.router import LIMIT, Router
from harmonica_dit.train import train as trainer
from harmonica_dit.train import train_router
from harmonica_dit.train.budget import Budget
from harmonica_dit.train.sdt import Measurements, train_trajectory

SPEEDUP, START, TOTAL, GROWTH = 2.0, 90, 120, 6.0
USUAL, MONOTONE, GROWING, HARD = "as before", "monotone cost", "monotone cost, scores pulled apart", "hard rows"


def pull_apart(router: Router, threshold: float, trajectories: int) -> None:
    """Moves the logits so that the target's cut is at the threshold; away from it they grow, by GROWTH in the end."""
    cut = Budget(router.flops, router.steps, speedup=SPEEDUP).threshold(router)
    cut, middle = (torch.tensor(p, dtype=torch.float64).logit().item() for p in (cut, threshold))
    for row in router.logits:
        row.detach().sub_(cut).mul_(GROWTH ** (1 / trajectories)).add_(middle).clamp_(-LIMIT, LIMIT)


class Phase:
    """Stands in for `train_trajectory`."""

    def __init__(self, way: str, trajectories: int):
        self.way, self.trajectories, self.beta = way, trajectories, None

    @torch.no_grad()
    def __call__(self, router, student, optimizer, importance, costs, beta, *, channels=None, threshold=0.1):
        self.beta = beta if self.beta is None else self.beta
        if self.way == HARD:  # what the hard rows' gradients say of β is something else
            beta = self.beta
        if self.way == GROWING:
            pull_apart(router, threshold, self.trajectories)
        student.advance(student.predict())
        losses, errors, values = [], [], []
        for s in range(1, router.steps):
            target = student.teacher()
            with torch.enable_grad():
                r, priced = router.score(s), router.score(s)
                if self.way == HARD:  # what runs is 0 or 1, the gradient passes as if it were r
                    r = r + ((r > threshold).float() - r).detach()
                else:  # of the same slope at the threshold; between two ends the loss has no least
                    priced = (1 - (1 - priced).square()) / (2 * (1 - threshold))
                cost = beta * (costs * priced).sum()
            output, error, gradient = student.learn(r, target, importance[s], channels)
            values.append(-gradient / costs * (1 - threshold) / (1 - router.score(s)))
            cost.backward()
            optimizer.step()
            router.clamp_(s)
            optimizer.zero_grad(set_to_none=True)
            student.advance(output)
            losses.append(importance[s] * error + cost)
            errors.append(error)
        return Measurements(torch.stack(losses), torch.stack(errors), torch.stack(values))


def train(net, way: str, folder: Path, start: int = START, total: int = TOTAL, **options) -> Router:
    """A router whose last `total - start` trajectories were trained this way."""
    train_way = partial(train_router, net, steps=STEPS, target_speedup=SPEEDUP, extrapolation=0.0, seed=0, **options)
    begun, out = folder / "start", folder / way.replace(" ", "-").replace(",", "")
    if not out.exists():
        train_way(trajectories=start, out=begun)
        shutil.copytree(begun, out)
    phase = train_trajectory if way == USUAL else Phase(way, total - start)
    with patch.object(trainer, "train_trajectory", phase):
        return train_way(trajectories=total, out=out)


def raw_means(folder: Path) -> dict[int, float]:
    """λ's raw mean by the trajectory before which it was measured, of the training in a folder."""
    with open(folder / "log.csv", newline="") as log:
        rows = [(int(row["trajectory"]), float(row["importance"])) for row in csv.DictReader(log)]
    return {n: mean for (n, mean), (_, last) in zip(rows, [(0, None), *rows]) if mean != last}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--folder", type=Path, default=Path("build/last-phase"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    net = harmonica_dit.load("fashion-dit")
    samples = Samples(net, torch.arange(args.samples) % net.num_classes, args.folder / "samples", guidance=1.5,
                      batch=BATCH)
    rows, usual = [], None
    for way in (USUAL, MONOTONE, GROWING, HARD):
        router = train(net, way, args.folder)
        schedule = router.schedule()
        found = judged(samples, Method(way, way, STEPS, schedule))
        usual = usual or found
        rows.append(dict(way=way, soft_share=router.soft_share, flops_speedup=schedule.speedup) | {
            column: dict(value=found[0][column]) | difference([found], [usual], column) for column in COLUMNS})
        print("| {way} | {soft_share:.2f} | {flops_speedup:.2f}× |".format_map(rows[-1]), *(
            "{value:.4f}, {above:+.4f} ({low:+.4f} … {high:+.4f}) |".format_map(rows[-1][column])
            for column in COLUMNS), flush=True)
    importance = raw_means(args.folder / "as-before")
    print("λ's raw mean:", importance)
    with replacement(RESULTS / "last-phase-cpu.json") as path:
        path.write_text(json.dumps(moment() | machine() | dict(samples=args.samples, rows=rows, importance=importance),
                                   indent=1) + "\n")


if __name__ == "__main__":
    main()
