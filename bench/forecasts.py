"""Learned forecasts of the trunk and their rivals on the bundled model: error, Fréchet distances, what they cost.

    python -m bench.forecasts sample --only '*2.8x*' 'DDIM, 7*'    makes samples, in build/forecasts; goes on there
    python -m bench.forecasts table                                judges them; writes bench/results/forecasts-cpu.json
    python -m bench.forecasts solvers --seed 1 --samples 1000      chooses the rivals' order and spacing

Several processes may sample at once. Judges: the bundled classifiers; precision and recall against the test images
(Debian's package dataset-fashion-mnist) in the second one's features. Forecasters in --files beside the bundled ones
are those of other training seeds.
"""

import argparse
import inspect
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from statistics import fmean

import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from rich.progress import track
from torch import Tensor

import harmonica_dit
from bench import ROOT
from bench.kept import PART, kept_samples
from bench.record import machine, moment
from harmonica_dit.demo import fashion_judge
from harmonica_dit.evaluate import Method, from_file, rmse
from harmonica_dit.fashion import FORECASTS, data
from harmonica_dit.fashion.classifier import JUDGES
from harmonica_dit.files import replacement
from harmonica_dit.forecaster import taylor
from harmonica_dit.methods import fora, trunk_forecast, uncached
from harmonica_dit.methods.spacing import spread
from harmonica_dit.sample.schedulers import NOISE, make_scheduler
from harmonica_dit.schedule import Schedule

RESULTS = ROOT / "bench" / "results"
CHOSEN = RESULTS / "solvers-cpu.json"  # the rivals' settings
ACCURATE = "DPM-Solver++, 40 steps"
STEPS, GUIDANCE = 20, 1.5
RESAMPLES = 200  # of the bootstrap
NEIGHBOURS = 5  # of precision and recall
EVERY = "every nth"  # of the 20 timesteps, as forecasts have them
SPACINGS = {"trailing": dict(timestep_spacing="trailing"), "linspace": dict(timestep_spacing="linspace"),
            "karras": dict(use_karras_sigmas=True), "lu": dict(use_lu_lambdas=True), EVERY: {}}
SOLVERS = {"DPM-Solver++": DPMSolverMultistepScheduler, "UniPC": UniPCMultistepScheduler}


def solver(net, name: str, steps: int, order: int, spacing: str) -> Method | None:
    """A solver of diffusers in so many steps; None if it has no such spacing."""
    wanted = NOISE | SPACINGS[spacing]
    parameters = inspect.signature(SOLVERS[name]).parameters
    if not wanted.keys() <= parameters.keys() or (
            spacing == EVERY and "timesteps" not in inspect.signature(SOLVERS[name].set_timesteps).parameters):
        return None
    schedule = None
    if spacing == EVERY:
        schedule = every_nth(net, steps)
    return Method(f"{name}, {steps} steps", name, steps, schedule, SOLVERS[name](**wanted, solver_order=order))


def every_nth(net, steps: int, adams: bool = False) -> Schedule:
    """So many of the 20 timesteps, as evenly as forecasts have them; everything is computed, corrected or not."""
    times = make_scheduler("ddim", STEPS).timesteps.tolist()
    kept = tuple(t for t, computed in zip(times, spread(STEPS, steps)) if computed)
    forecaster = taylor([True] * steps, int(adams), net.tokens * net.width, adams)
    return replace(uncached(net, steps), timesteps=kept, forecaster=forecaster)


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
        yield Method(f"DDIM, {steps} steps, {EVERY}", "DDIM", steps, every_nth(net, steps))
        yield Method(f"Adams, {steps} steps, {EVERY}", "Adams", steps, every_nth(net, steps, adams=True))
    if CHOSEN.exists():
        for row in json.loads(CHOSEN.read_text())["chosen"]:
            yield solver(net, row["solver"], row["steps"], row["order"], row["spacing"])
    yield Method("DPM-Solver++, 20 steps", "DPM-Solver++", STEPS, scheduler=dpm)
    for n in (2, 3, 4):
        yield Method(f"DPM-Solver++, branches, n = {n}, order 1", "FORA + forecast", STEPS, fora(net, STEPS, n, 1), dpm)


def measure(net, method: Method, folder: Path, samples: int, seed: int, references: dict[str, Tensor],
            real: Tensor | None) -> dict:
    """A method's row: errors to both references, and what the judges say; intervals are of the bootstrap."""
    labels = torch.arange(samples) % net.num_classes
    images = torch.cat(list(kept_samples(net, method, labels, folder, seed=seed, guidance=GUIDANCE, batch=100)))
    row = dict(name=method.name, family=method.family, samples=samples, seed=seed, steps=method.steps,
               flops_speedup=method.speedup(STEPS))
    if method.schedule is not None and method.schedule.unit == "trunk":
        row |= dict(parameters=method.schedule.forecaster.parameters, origin=method.schedule.origin)
    row["error"] = {name: fmean(rmse(images[: len(wanted)], wanted[: len(images)]).tolist())
                    for name, wanted in references.items()}
    row["judges"] = {}
    for name in JUDGES:
        judge = fashion_judge(name)
        features = torch.cat([judge.features(part) for part in images.split(PART)])
        judge.add(features, labels)
        row["judges"][name] = dict(frechet=judge.frechet_distance, accuracy=judge.label_accuracy,
                                   resampled=resampled(name, features, labels))
    if real is not None:
        from prdc import compute_prdc  # which needs scikit-learn

        found = compute_prdc(real.numpy(), features.numpy(), NEIGHBOURS)
        row |= dict(precision=float(found["precision"]), recall=float(found["recall"]))
    return row


def resampled(judge_name: str, features: Tensor, labels: Tensor) -> list[float]:
    """Fréchet distances of samples drawn with replacement, by the same draws for every method."""
    generator, distances = torch.Generator().manual_seed(0), []
    judge = fashion_judge(judge_name)
    judge.frechet.reset_real_features = False
    for _ in range(RESAMPLES):
        drawn = torch.randint(len(labels), (len(labels),), generator=generator)
        judge.frechet.reset()
        judge.add(features[drawn], labels[drawn])
        distances.append(judge.frechet_distance)
    return distances


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


def table(net, args) -> None:
    everything = {method.name: method for method in methods(net, args.files)}
    labels = torch.arange(args.samples) % net.num_classes
    options = dict(seed=args.seed, guidance=GUIDANCE, batch=100)
    references = {}
    for name, of in (("uncached", "DDIM, 20 steps"), ("accurate", ACCURATE)):
        references[name] = torch.cat(list(kept_samples(net, everything[of], labels[: args.errors], args.folder,
                                                       **options)))
    real = None
    if (data.FOLDER / "t10k-images-idx3-ubyte.gz").exists():
        real = fashion_judge(JUDGES[1]).features(data.load("test")[0][: args.samples])
    rows = [measure(net, method, args.folder, args.samples, args.seed, references, real)
            for method in track(chosen(everything.values(), args.only), "judging")]
    add_intervals(rows)
    result = machine() | moment() | dict(steps=STEPS, guidance=GUIDANCE, seed=args.seed, errors_of=args.errors,
                                         resamples=RESAMPLES, rows=rows)
    with replacement(args.out) as path:
        path.write_text(json.dumps(result, indent=1) + "\n")
    print(markdown(rows))


def choose_solvers(net, args) -> None:
    """The setting of each rival with the smallest Fréchet distance, by the first judge, at each number of steps."""
    labels, rows = torch.arange(args.samples) % net.num_classes, []
    for steps in (10, 7, 5, 4):
        for name in SOLVERS:
            for order in (2, 3):
                for spacing in SPACINGS:
                    method = solver(net, name, steps, order, spacing)
                    if method is None:
                        continue
                    judge = fashion_judge()
                    for i, images in enumerate(kept_samples(net, method, labels, args.folder, seed=args.seed,
                                                            guidance=GUIDANCE, batch=100)):
                        judge.update(images, labels[i * PART : i * PART + len(images)])
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
    parser.add_argument("--only", nargs="*", default=[], help="names of methods, with * and ?")
    parser.add_argument("--files", nargs="*", type=Path, default=[], help="schedule files beside the bundled ones")
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--errors", type=int, default=1000, help="images that errors are taken of")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "forecasts")
    parser.add_argument("--out", type=Path, default=RESULTS / "forecasts-cpu.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    net = harmonica_dit.load("fashion-dit")
    if args.command == "table":
        return table(net, args)
    if args.command == "solvers":
        return choose_solvers(net, args)
    labels = torch.arange(args.samples) % net.num_classes
    for method in chosen(methods(net, args.files), args.only):
        for i, _ in enumerate(kept_samples(net, method, labels, args.folder, seed=args.seed, guidance=GUIDANCE,
                                           batch=100)):
            print(method.name, (i + 1) * PART, flush=True)


if __name__ == "__main__":
    main()
