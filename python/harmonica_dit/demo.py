"""The demonstration: trains a router, samples with it, and compares it with methods that need no training."""

import json
import os
import shutil
from pathlib import Path

import torch
from rich.console import Console

import harmonica_dit
from harmonica_dit.evaluate import Judge, Method, fewer_steps, fora_methods
from harmonica_dit.evaluate.pictures import image_grid, plot, plot_tradeoff
from harmonica_dit.evaluate.table import compare_with_bar, table
from harmonica_dit.fashion import CURVE
from harmonica_dit.fashion.classifier import load_classifier, reference_of
from harmonica_dit.fashion.data import CLASSES
from harmonica_dit.files import replacement
from harmonica_dit.train import train_router


def run(out: str | os.PathLike, console: Console, *, steps: int = 10, target_speedup: float = 1.8,
        trajectories: int = 60, batch: int = 16, samples: int = 200) -> list[dict]:
    """Trains a router on the bundled model, samples with it, and leaves pictures and figures in `out`.

    Args:
        out: folder for grid.png, router.png, tradeoff.png, router.safetensors and rows.json.
        console: where the table goes.
        steps, target_speedup, trajectories, batch: as in `train_router`.
        samples: images per method in the comparison.

    Returns:
        The comparison's rows, see `compare`.

    Raises:
        OSError: `out` cannot be written to.
        KeyboardInterrupt: Ctrl-C; the same call goes on where the training stopped.
    """
    out = Path(out)
    net = harmonica_dit.load("fashion-dit")
    console.print(f"[bold]1.[/] Training a router for {steps} steps and {target_speedup:g}× fewer FLOPs, from noise "
                  f"alone: {trajectories} trajectories of {batch} images")
    training = out / ".training"  # an interrupted demo goes on from here
    router = train_router(net, steps=steps, target_speedup=target_speedup, trajectories=trajectories, batch=batch,
                          lr=0.1, importance="gain", extrapolation=1.0, out=training)
    router.save(out / "router.safetensors")
    shutil.rmtree(training)
    plot(router, out / "router.png")

    ours = Method("router + forecast", "router + forecast", steps, router.schedule())
    methods = [ours, *fora_methods(net, steps, 2), *fora_methods(net, steps, 3),
               *dict.fromkeys(fewer_steps(steps, speedup) for speedup in (1.4, target_speedup, 2.5))]
    labels = torch.arange(samples) % len(CLASSES)
    console.print(f"[bold]2.[/] Sampling {samples} images from the same noise in {len(methods) + 1} ways")
    rows = compare_with_bar(net, methods, labels, steps=steps, judge=fashion_judge)

    ten = torch.arange(len(CLASSES))
    shown = [Method("uncached", "uncached", steps), *methods[:3], fewer_steps(steps, target_speedup)]
    by_name = {row["name"]: row for row in rows}
    image_grid([harmonica_dit.sample(net, ten, steps=m.steps, schedule=m.schedule) for m in shown],
               [_heading(by_name[m.name]) for m in shown], out / "grid.png", CLASSES)
    groups = {f"this run: {steps} steps, only {samples} samples a method, a rough picture": rows}
    if CURVE.exists():
        curve = json.loads(CURVE.read_text())
        groups[f"shipped: {curve['steps']} steps, {curve['samples']:,} samples a method"] = curve["rows"]
    plot_tradeoff(groups, out / "tradeoff.png", "Quality against speedup: Fashion-MNIST, bundled DiT")
    with replacement(out / "rows.json") as path:
        path.write_text(json.dumps(rows, indent=1) + "\n")
    console.print(table(rows, f"{samples} images a method: a small sample, label accuracy is good to a few percent"))
    console.print(f"[bold]3.[/] Look at {out / 'grid.png'}, {out / 'router.png'} and {out / 'tradeoff.png'}")
    return rows


def fashion_judge(name: str = "plain") -> Judge:
    """A judge of the bundled model's samples, see `harmonica_dit.fashion.classifier.JUDGES`."""
    return Judge(load_classifier(name), reference_of(name))


def _heading(row: dict) -> str:
    if row["family"] == "uncached":
        return f"uncached\n{row['steps']} steps"
    return f"{row['name']}\n{row['flops_speedup']:.2f}× fewer FLOPs\nerror {row['error']:.3f}"
