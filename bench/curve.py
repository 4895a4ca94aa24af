"""The large-sample curve that ships with the package: quality against speedup, bundled model, float32.

    python -m bench.curve --routers runs/r16.safetensors runs/r20.safetensors --fora 2 3 4 --fewer 14 12 10 8

Each finished row is saved at once; the same command goes on with the rows that are missing, and recomputes those whose
schedule has changed. The uncached images are kept beside, in build/curve. Wall-clock speedups are measured at the end,
for all methods that the command names, interleaved: let the machine be quiet then.
"""

import argparse
import hashlib
import json
import os
from functools import partial
from pathlib import Path

import torch
from rich.progress import track

import harmonica_dit
from bench.kept import content
from bench.record import commit, processor
from bench.timing import interleave, medians
from harmonica_dit.demo import fashion_judge
from harmonica_dit.evaluate import Method, fora_methods, from_file
from harmonica_dit.evaluate.compare import Tally, time_sample
from harmonica_dit.evaluate.named_methods import check_names
from harmonica_dit.fashion import CURVE
from harmonica_dit.files import load_tensors, replacement, save_tensors

ROUNDS = 5  # of the timing, each of them one batch with every method


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--routers", nargs="*", type=Path, default=[], help="router or schedule files")
    parser.add_argument("--fora", nargs="*", type=int, default=[2, 3, 4], help="every n-th step, repeated and forecast")
    parser.add_argument("--fewer", nargs="*", type=int, default=[14, 12, 10, 8], help="plain sampling in fewer steps")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--samples", type=int, default=5000, help="images a method and seed")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=1.5)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=CURVE)
    parser.add_argument("--work", type=Path, default=Path("build/curve"), help="folder for the uncached images")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    net = harmonica_dit.load("fashion-dit")
    methods = [Method("uncached", "uncached", args.steps), *(from_file(path, net) for path in args.routers),
               *(method for n in args.fora for method in fora_methods(net, args.steps, n)),
               *(Method(f"{n} steps", "fewer steps", n) for n in args.fewer)]
    check_names(methods)
    settings = dict(model=net.name, weights=digest(net.state_dict()), samples=args.samples, steps=args.steps,
                    guidance=args.guidance, scheduler="ddim", dtype="float32")
    rows = []
    if args.out.exists():
        found = json.loads(args.out.read_text())
        different = {name: (found.get(name), value) for name, value in settings.items() if found.get(name) != value}
        if different:
            raise SystemExit(f"{args.out} was measured with other settings, (there, here): {different}; move it away")
        rows = found["rows"]
    for seed in args.seeds:
        for method in methods:
            key = dict(name=method.name, seed=seed, schedule=digest(method.schedule))
            if any(all(row[name] == value for name, value in key.items()) for row in rows):
                continue
            row = measure(net, method, args, seed, settings["weights"]) | key
            rows = [old for old in rows if (old["name"], old["seed"]) != (method.name, seed)] + [row]
            save(args.out, settings, rows)
            print({name: row[name] for name in ("name", "seed", "flops_speedup", "error", "label_accuracy", "frechet")},
                  flush=True)
    speedups = wall_speedups(net, methods, args)
    for row in rows:
        if row["name"] in speedups:
            row |= dict(wall_speedup=speedups[row["name"]], threads=args.threads, cpu=processor(), cores=os.cpu_count(),
                        timed_commit=commit())
    save(args.out, settings, rows)


def save(path: Path, settings: dict, rows: list[dict]) -> None:
    with replacement(path) as whole:
        whole.write_text(json.dumps(settings | {"rows": rows}, indent=1) + "\n")


def measure(net, method: Method, args, seed: int, weights: str) -> dict:
    """One row of the curve: `compare`'s, but for the wall-clock speedup, and what it was measured with."""
    labels = torch.arange(args.samples) % net.num_classes
    options = dict(guidance=args.guidance, seed=seed, batch=args.batch)
    kept = args.work / f"uncached-{weights}-{args.samples}-{args.steps}-{args.guidance:g}-{seed}.safetensors"
    uncached = load_tensors(kept)[0]["images"].split(args.batch) if kept.exists() else None
    if uncached is None and method.family != "uncached":
        raise SystemExit(f"the uncached images of seed {seed} are not in {args.work}, but their row is in {args.out}: "
                         "move one of both away")
    tally, made = Tally(fashion_judge()), []
    for i, part in enumerate(track(labels.split(args.batch), f"{method.name}, seed {seed}")):
        if method.family == "uncached" and uncached is not None:
            images = uncached[i]
        else:
            images, _ = time_sample(net, part, method, first=i * args.batch, **options)
        made.append(images)
        tally.update(images, images if uncached is None else uncached[i], part)
    if uncached is None:
        save_tensors(kept, {"images": torch.cat(made)}, {})
    row = tally.row(method, args.steps, None, seed)
    return row | dict(batch=args.batch, torch=torch.__version__, commit=commit())


def wall_speedups(net, methods: list[Method], args) -> dict[str, float]:
    """Each method's, by the median over rounds in which every method samples one batch in turn."""
    labels = torch.arange(args.batch) % net.num_classes
    options = dict(seed=0, guidance=args.guidance, batch=args.batch)
    middle = medians(interleave({method.name: partial(time_sample, net, labels, method, **options)
                                 for method in methods}, ROUNDS))
    return {name: middle["uncached"] / seconds for name, seconds in middle.items()}


def digest(what) -> str:
    """Short checksum of a state dict or of a schedule; "" for no schedule."""
    if what is None:
        return ""
    settings, tensors = ([], list(what.values())) if isinstance(what, dict) else content(what)
    parts = [tensor.numpy().tobytes() for tensor in tensors]
    if not isinstance(what, dict) and (what.forecaster is not None or what.runs is not None):
        parts.append(json.dumps(settings).encode())  # the others' rows in curve.json are without
    return hashlib.sha256(b"".join(parts)).hexdigest()[:12]


if __name__ == "__main__":
    main()
