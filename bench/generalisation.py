"""Forecasts where they were not trained: other guidance scales, and labels that were left out of the training.

    python -m bench.generalisation --guidance 1 1.5 2.5 4 --half FILE    writes bench/results/generalisation-cpu.json

FILE: the schedule that `train_forecaster(net, schedule, labels=[0, 1, 2, 3, 4])` made; it is used with all labels. Each
error is the mean RMSE to the accurate solution (40 steps of DPM-Solver++) of the same noise at the same guidance scale.
"""

import argparse
import json
import warnings
from pathlib import Path
from statistics import fmean

import torch
from rich.progress import track

import harmonica_dit
from bench import RESULTS
from bench.forecasts import ACCURATE, BATCH, STEPS, methods
from bench.record import machine, moment
from harmonica_dit.evaluate import Method, rmse
from harmonica_dit.evaluate.samples import Samples
from harmonica_dit.files import replacement
from harmonica_dit.schedule import Schedule

SHOWN = ("DDIM, 20 steps", "fashion-dit-forecast-2.8x", "trunk, n = 3, Adams", "branches, n = 3, order 1")


def errors(net, shown: list[Method], reference: Method, guidance: float, args) -> dict[str, dict[str, float]]:
    """Each method's error, over all labels and over either half of them."""
    labels = torch.arange(args.samples) % net.num_classes
    samples = Samples(net, labels, args.folder, guidance=guidance, batch=BATCH)
    wanted = torch.cat(list(samples.batches(reference, args.seed)))
    halves = {"all": labels >= 0, "first half": labels < net.num_classes // 2,
              "second half": labels >= net.num_classes // 2}
    found = {}
    for method in shown:
        each = rmse(torch.cat(list(samples.batches(method, args.seed))), wanted)
        found[method.name] = {half: fmean(each[those].tolist()) for half, those in halves.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--guidance", nargs="*", type=float, default=[1.0, 1.5, 2.5, 4.0])
    parser.add_argument("--half", type=Path, help="schedule file of a training on the first half of the labels")
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("build/samples"))
    parser.add_argument("--out", type=Path, default=RESULTS / "generalisation-cpu.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", "schedule: made for")  # which is the point here
    net = harmonica_dit.load("fashion-dit")
    everything = {method.name: method for method in methods(net)}
    shown = [everything[name] for name in SHOWN]
    if args.half is not None:
        shown.append(Method("trained on the first half", "learned forecast", STEPS, Schedule.load(args.half), "ddim"))
    rows = [dict(guidance=guidance, errors=errors(net, shown, everything[ACCURATE], guidance, args))
            for guidance in track(args.guidance, "guidance scales")]
    with replacement(args.out) as path:
        path.write_text(json.dumps(machine() | moment() | dict(samples=args.samples, seed=args.seed, rows=rows),
                                   indent=1) + "\n")
    print("| guidance | " + " | ".join(method.name for method in shown) + " |\n" + "|---" * (len(shown) + 1) + "|")
    for row in rows:
        print(f"| {row['guidance']:g} | " + " | ".join(
            "{all:.4f} ({first half:.4f}, {second half:.4f})".format_map(row["errors"][method.name])
            for method in shown) + " |")


if __name__ == "__main__":
    main()
