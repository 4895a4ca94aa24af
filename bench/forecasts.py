"""Learned forecasts of the trunk and their rivals on the bundled model: error, Fréchet distances, what they cost.

    python -m bench.forecasts sample --only '*2.8x*' 'DDIM, 7*'    makes samples, in build/samples; goes on there
    python -m bench.forecasts table                                judges them; writes bench/results/forecasts-cpu.json
    python -m bench.forecasts solvers --seed 2 --samples 500       chooses the rivals' order and spacing

Several processes may sample at once. Judges: the bundled classifiers; precision and recall against the test images
(Debian's package dataset-fashion-mnist) in the second one's features. Forecasters in --files beside the bundled ones
are those of other training seeds.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from statistics import fmean

import torch
from rich.progress import track
from torch import Tensor

import harmonica_dit
from bench import RESULTS, ROOT
from bench.record import machine, moment
from harmonica_dit.evaluate import Method, from_file, rmse
from harmonica_dit.evaluate.bootstrap import RESAMPLES
from harmonica_dit.evaluate.fashion import fashion_judge
from harmonica_dit.evaluate.samples import Samples
from harmonica_dit.evaluate.solvers import EVENLY, SOLVERS, SPACINGS, evenly_spaced, solver
from harmonica_dit.fashion import FORECASTS, data
from harmonica_dit.fashion.classifier import JUDGES, load_classifier
from harmonica_dit.files import replacement
from harmonica_dit.methods import fora, trunk_forecast
from harmonica_dit.progress import progress_bar

CHOSEN = RESULTS / "solvers-cpu.json"  # the rivals' settings
ACCURATE = "DPM-Solver++, 40 steps"
STEPS, GUIDANCE, BATCH = 20, 1.5, 100
NEIGHBOURS = 5  # of precision and recall

def methods(net, files: Sequence[Path] = ()) -> Iterator[Method]:
    """All methods of the tables."""
    dpm = "DPMSolverMultistepScheduler"
    yield Method("DDIM, 20 steps", "DDIM", STEPS)
    yield Method(ACCURATE, "DPM-Solver++", 40, scheduler=dpm)
    for path in (*sorted(FORECASTS.glob("*.safetensors")), *files):
        yield from_file(path, net)
    for n in (2, 3, 4, 5):
        for order in range(4):
            yield Method(f"branches, n = {n}, order {order}", "FORA + forecast", STEPS, fora(net, STEPS, n, order))
            yield Method(f"trunk, n = {n}, order {order}", "trunk", STEPS,
                         trunk_forecast(net, STEPS, every=n, order=order))
        yield Method(f"trunk, n = {n}, Adams", "Adams", STEPS, trunk_forecast(net, STEPS, every=n, adams=True))
    for steps in (10, 7, 5, 4):
        yield Method(f"DDIM, {steps} steps", "DDIM", steps)
        yield Method(f"DDIM, {steps} steps, {EVENLY}", "DDIM", steps, evenly_spaced(net, steps, STEPS))
        yield Method(f"Adams, {steps} steps, {EVENLY}", "Adams", steps, evenly_spaced(net, steps, STEPS, adams=True))
    if CHOSEN.exists():
        for row in json.loads(CHOSEN.read_text())["chosen"]:
            yield solver(net, row["solver"], row["steps"], row["order"], row["spacing"], STEPS)
    yield Method("DPM-Solver++, 20 steps", "DPM-Solver++", STEPS, scheduler=dpm)
    for n in (2, 3, 4):
        yield Method(f"DPM-Solver++, branches, n = {n}, order 1", "FORA + forecast", STEPS, fora(net, STEPS, n, 1), dpm)


def measure(method: Method, samples: Samples, seed: int, references: dict[str, Tensor], real: Tensor | None) -> dict:
    """A method's row: errors to both references, and what the judges say; intervals are of the bootstrap."""
    labels, images = samples.labels, torch.cat(list(samples.batches(method, seed)))
    row = dict(name=method.name, family=method.family, samples=len(labels), seed=seed, steps=method.steps,
               flops_speedup=method.speedup(STEPS))
    if method.schedule is not None and method.schedule.unit == "trunk":
        row |= dict(parameters=method.schedule.forecaster.parameters, origin=method.schedule.origin)
    row["error"] = {name: fmean(rmse(images[: len(wanted)], wanted[: len(images)]).tolist())
                    for name, wanted in references.items()}
    row["judges"] = {}
    for name in JUDGES:
        judge = fashion_judge(name)
        for part, asked in zip(images.split(BATCH), labels.split(BATCH)):
            judge.update(part, asked)
        row["judges"][name] = dict(frechet=judge.frechet_distance, accuracy=judge.label_accuracy,
                                   resampled=judge.draws()["frechet"].tolist())
    if real is not None:
        from prdc import compute_prdc

        found = compute_prdc(real.numpy(), judge.kept.stack().numpy(), NEIGHBOURS)
        row |= dict(precision=float(found["precision"]), recall=float(found["recall"]))
    return row


def add_intervals(rows: list[dict]) -> None:
    """How far each Fréchet distance is above the uncached DDIM's, with the interval that holds 95 % of the draws."""
    base = next((row for row in rows if row["name"] == "DDIM, 20 steps"), None)
    for row in rows if base else ():
        for name, judged in row["judges"].items():
            above = torch.tensor(judged["resampled"]) - torch.tensor(base["judges"][name]["resampled"])
            judged["above"] = judged["frechet"] - base["judges"][name]["frechet"]
            judged["interval"] = above.quantile(torch.tensor([0.025, 0.975])).tolist()
    for row in rows:
        for judged in row["judges"].values():
            judged.pop("resampled")


def markdown(rows: Sequence[dict]) -> str:
    lines = ["| method | FLOPs speedup | error to uncached | to accurate | Fréchet, above uncached (95 %) "
             "| second judge | precision, recall | accuracy |", "|" + "---|" * 8]
    for row in rows:
        first, second = (row["judges"][name] for name in JUDGES)
        low, high = first.get("interval", (float("nan"),) * 2)
        lines.append(f"| {row['name']} | {row['flops_speedup']:.2f}× | {row['error'].get('uncached', 0):.4f} "
                     f"| {row['error'].get('accurate', 0):.4f} | {first['frechet']:.2f}, {first.get('above', 0):+.2f} "
                     f"({low:+.2f} … {high:+.2f}) | {second['frechet']:.2f} | {row.get('precision', 0):.3f}, "
                     f"{row.get('recall', 0):.3f} | {first['accuracy']:.1%} |")
    return "\n".join(lines)


def samples_of(net, count: int, folder: Path) -> Samples:
    return Samples(net, torch.arange(count) % net.num_classes, folder, guidance=GUIDANCE, batch=BATCH)


def table(net, args) -> None:
    everything = {method.name: method for method in methods(net, args.files)}
    few, samples = samples_of(net, args.errors, args.folder), samples_of(net, args.samples, args.folder)
    references = {name: torch.cat(list(few.batches(everything[of], args.seed)))
                  for name, of in (("uncached", "DDIM, 20 steps"), ("accurate", ACCURATE))}
    real = None
    if (data.FOLDER / "t10k-images-idx3-ubyte.gz").exists():
        real = load_classifier(JUDGES[1]).features(data.load("test")[0][: args.samples])
    rows = [measure(method, samples, args.seed, references, real)
            for method in track(chosen(everything.values(), args.only), "judging")]
    add_intervals(rows)
    if args.only and args.out.exists():  # the others' rows stay
        found = {row["name"]: row for row in rows}
        rows = [found.pop(row["name"], row) for row in json.loads(args.out.read_text())["rows"]] + list(found.values())
    result = machine() | moment() | dict(steps=STEPS, guidance=GUIDANCE, seed=args.seed, errors_of=args.errors,
                                         resamples=RESAMPLES, rows=rows)
    with replacement(args.out) as path:
        path.write_text(json.dumps(result, indent=1) + "\n")
    print(markdown(rows))


def choose_solvers(net, args) -> None:
    """The setting of each rival with the smallest Fréchet distance, by the first judge, at each number of steps."""
    samples, rows = samples_of(net, args.samples, args.folder), []
    if args.spacings:  # the others' rows stay
        rows = [row for row in json.loads(CHOSEN.read_text())["rows"] if row["spacing"] not in args.spacings]
    for steps in (10, 7, 5, 4):
        for name in SOLVERS:
            for order in (2, 3):
                for spacing in args.spacings or SPACINGS:
                    method = solver(net, name, steps, order, spacing, STEPS)
                    if method is None:
                        continue
                    judge = fashion_judge()
                    for images, labels in zip(samples.batches(method, args.seed), samples.labels.split(BATCH)):
                        judge.update(images, labels)
                    rows.append(dict(solver=name, steps=steps, order=order, spacing=spacing,
                                     frechet=judge.frechet.compute().item()))
                    print(rows[-1], flush=True)
    best = [min((row for row in rows if (row["solver"], row["steps"]) == key), key=lambda row: row["frechet"])
            for key in dict.fromkeys((row["solver"], row["steps"]) for row in rows)]
    result = machine() | moment() | dict(samples=args.samples, seed=args.seed, chosen=best, rows=rows)
    with replacement(CHOSEN) as path:
        path.write_text(json.dumps(result, indent=1) + "\n")


def chosen(every, patterns: Sequence[str]) -> list[Method]:
    return [method for method in every if not patterns or any(fnmatch(method.name, p) for p in patterns)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("command", choices=["sample", "table", "solvers"])
    parser.add_argument("--only", nargs="*", default=[],
                        help="names of methods, with * and ?; of a table, the others' rows stay")
    parser.add_argument("--files", nargs="*", type=Path, default=[], help="schedule files beside the bundled ones")
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--spacings", nargs="*", choices=list(SPACINGS), help="of solvers: try these alone anew")
    parser.add_argument("--errors", type=int, default=1000, help="images that errors are taken of")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "samples")
    parser.add_argument("--out", type=Path, default=RESULTS / "forecasts-cpu.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    net = harmonica_dit.load("fashion-dit")
    if args.command == "table":
        return table(net, args)
    if args.command == "solvers":
        return choose_solvers(net, args)
    wanted = chosen(methods(net, args.files), args.only)
    with progress_bar() as bar:
        task = bar.add_task("sampling", total=len(wanted) * args.samples)
        samples_of(net, args.samples, args.folder).make(wanted, [args.seed],
                                                        lambda done: bar.update(task, completed=done))


if __name__ == "__main__":
    main()
