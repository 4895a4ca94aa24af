"""The demonstration: trains forecasts of the trunk, samples with them, and compares them with other methods."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

import harmonica_dit
from harmonica_dit.evaluate import Method, fora_methods, from_file
from harmonica_dit.evaluate.fashion import fashion_judge
from harmonica_dit.evaluate.heat_maps import plot
from harmonica_dit.evaluate.pictures import image_grid
from harmonica_dit.evaluate.plots import plot_tradeoff
from harmonica_dit.evaluate.report import compare_with_bar, print_table
from harmonica_dit.evaluate.solvers import best_solver
from harmonica_dit.fashion.data import CLASSES
from harmonica_dit.files import replacement
from harmonica_dit.methods import trunk_forecast
from harmonica_dit.router import Router
from harmonica_dit.train import train_forecaster

SOLVER = "DPMSolverMultistepScheduler"
ACCURATE = Method("DPM-Solver++ 40 steps", "accurate solution", 40, scheduler=SOLVER)
STEPS, EVERY = 20, 3  # of them every third is computed: 2.8× fewer FLOPs


def run(out: str | os.PathLike, console: Console, *, iterations: int = 60, images: int = 120, held_out: int = 40,
        samples: int = 200) -> list[dict]:
    """Trains forecasts on the bundled model, samples with them, and leaves pictures and figures in `out`.

    Args:
        out: folder for grid.png, router.png, tradeoff.png, forecast.safetensors and rows.json.
        console: where the table goes.
        iterations, images, held_out: as in `train_forecaster`.
        samples: images per method in the comparison.

    Returns:
        The comparison's rows, see `compare`.

    Raises:
        OSError: `out` cannot be written to.
        KeyboardInterrupt: Ctrl-C; the same call goes on where the training stopped.
    """
    out = Path(out)
    net = harmonica_dit.load("fashion-dit")
    start = trunk_forecast(net, STEPS, every=EVERY)
    console.print(f"[bold]1.[/] Training forecasts for {STEPS} steps and {start.speedup:.1f}× fewer FLOPs, towards "
                  f"{images} images that a better solver makes of the same noise")
    training = out / ".training"  # an interrupted demo goes on from here
    learned = train_forecaster(net, start, iterations=iterations, images=images, held_out=held_out,
                               checkpointing=False, out=training)
    learned.save(out / "forecast.safetensors")
    shutil.rmtree(training)
    plot(Router.load("fashion-dit-2.0x"), out / "router.png")

    ours = [Method("learned 2.8×, trained now", "learned forecast", STEPS, learned),
            *(replace(from_file(f"fashion-dit-forecast-{speedup}x", net), name=f"learned {speedup}×")
              for speedup in ("2.8", "3.8"))]
    untrained = Method(f"Adams n={EVERY}", "Adams forecast", STEPS, trunk_forecast(net, STEPS, every=EVERY, adams=True))
    router = replace(from_file("fashion-dit-2.0x", net), name="router 2.0×")
    methods = [*ours, untrained, router, *fora_methods(net, STEPS, 2),
               *fora_methods(net, STEPS, EVERY), *(Method(f"DDIM {n} steps", "fewer steps", n) for n in (10, 7)),
               *(replace(best_solver(net, "DPM-Solver++", n, STEPS), name=f"DPM-Solver++ {n} steps") for n in (10, 7))]
    labels = torch.arange(samples) % len(CLASSES)
    console.print(f"[bold]2.[/] Sampling {samples} images from the same noise in {len(methods) + 2} ways")
    rows = compare_with_bar(net, methods, labels, steps=STEPS, accurate=ACCURATE, judge=fashion_judge)

    ten, by_name = torch.arange(len(CLASSES)), {row["name"]: row for row in rows}
    shown = [Method("uncached", "uncached", STEPS), *ours, *fora_methods(net, STEPS, EVERY), methods[-1]]
    image_grid([harmonica_dit.sample(net, ten, steps=m.steps, schedule=m.schedule, scheduler=m.scheduler)
                for m in shown], [_heading(by_name[m.name]) for m in shown], out / "grid.png", CLASSES)
    plot_tradeoff(rows, out / "tradeoff.png", f"Fashion-MNIST, bundled DiT, {STEPS} steps, only {samples} samples a "
                                              "method: a rough picture")
    with replacement(out / "rows.json") as path:
        path.write_text(json.dumps(rows, indent=1) + "\n")
    print_table(console, rows, f"{samples} images a method: a small sample, label accuracy is good to a few percent")
    console.print("Trained now is the first; the other learned forecasts, and the router, are bundled.")
    console.print(f"[bold]3.[/] Look at {out / 'grid.png'}, {out / 'router.png'} and {out / 'tradeoff.png'}")
    return rows


def _heading(row: dict) -> str:
    if row["family"] == "uncached":
        return f"uncached\n{row['steps']} steps"
    return f"{row['name']}\n{row['flops_speedup']:.2f}× fewer FLOPs\nto accurate {row['accurate_error']:.3f}"
