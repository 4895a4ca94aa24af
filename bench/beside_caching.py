"""What else spends less, on the bundled model: Learning-to-Cache as trained by its own loss, quantization, pruning.

    python -m bench.beside_caching [--samples 2000] [--iterations 1200] [--retrain 200] [--folder build/beside-caching]

needs Fashion-MNIST (Debian: dataset-fashion-mnist). Learning-to-Cache's router and all samples are kept in the folder,
and the same command goes on there. T = 20, DDIM, guidance 1.5, seed 0, one thread. Prints a table in Markdown, and
writes bench/results/beside-caching-cpu.json.
"""

import argparse
import json
from pathlib import Path

import torch

import harmonica_dit
from bench import RESULTS
from bench.record import machine, moment
from harmonica_dit.demo import fashion_judge
from harmonica_dit.evaluate import Method
from harmonica_dit.evaluate.named_methods import with_net
from harmonica_dit.evaluate.report import compare_with_bar, markdown
from harmonica_dit.fashion import data
from harmonica_dit.methods import fora
from harmonica_dit.models import quantize, weight_bytes
from harmonica_dit.router import Router, read
from harmonica_dit.schedule import Schedule
from harmonica_dit.train import prune, train_learning_to_cache
from harmonica_dit.train.budget import Budget

STEPS = 20
BETA, LR, BATCH = 2e-4, 0.03, 16  # the published 5e-6, 1e-3 and 64 are for DiT-XL/2 and 20,000 iterations
SPEEDUPS = (1.2, 1.4, 1.6, 1.8)
ROUTER = "fashion-dit-2.0x-forecast"


def cut(router: Router, speedup: float) -> Schedule:
    """The router's schedule at the threshold that meets a FLOPs speedup."""
    Budget(router.flops, router.steps, speedup=speedup).set_threshold(router)
    return router.schedule()


def methods(net, images, labels, iterations: int, retrain: int, folder: Path, bundled: Schedule) -> list[Method]:
    """bundled: the schedule of HarmoniCa's router."""
    router = train_learning_to_cache(net, images, labels, steps=STEPS, beta=BETA, lr=LR, batch=BATCH,
                                     iterations=iterations, out=folder / "learning-to-cache")
    repeat, forecast = (fora(net, STEPS, 2, order) for order in (0, 1))
    learned = router.schedule()
    made = [Method("Learning-to-Cache, θ = 0.1", "Learning-to-Cache", STEPS, learned)]
    for speedup in SPEEDUPS:
        made += [Method(f"Learning-to-Cache, {speedup}×", "Learning-to-Cache", STEPS, cut(router, speedup)),
                 Method(f"FORA, {speedup}×", "FORA", STEPS, fora(net, STEPS, speedup=speedup))]
    made += [Method("HarmoniCa", "router + forecast", STEPS, bundled), Method("FORA n=2", "FORA", STEPS, repeat),
             Method("FORA n=2 + forecast", "FORA + forecast", STEPS, forecast)]
    for kind in ("int8", "int8-dynamic"):
        small = quantize(net, kind)
        size = f"{kind} ({weight_bytes(small) / weight_bytes(net):.2f} of the bytes)"
        made += [with_net(size, kind, STEPS, net, small),
                 with_net(f"{kind}, Learning-to-Cache", kind, STEPS, net, small, learned),
                 with_net(f"{kind}, HarmoniCa", kind, STEPS, net, small, bundled),
                 with_net(f"{kind}, FORA n=2 + forecast", kind, STEPS, net, small, forecast)]
    for times in (0, retrain):
        narrow = prune(net, 1.5, images, labels, timesteps=50, iterations=times, batch=64, lr=5e-4)
        name = f"pruned, {times} iterations"
        made += [with_net(name, "pruning", STEPS, net, narrow),
                 with_net(f"{name}, FORA n=2 + forecast", "pruning", STEPS, net, narrow, fora(narrow, STEPS, 2, 1))]
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--iterations", type=int, default=1200, help="of Learning-to-Cache's training")
    parser.add_argument("--retrain", type=int, default=200, help="iterations of the pruned model's retraining")
    parser.add_argument("--folder", type=Path, default=Path("build/beside-caching"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    net = harmonica_dit.load("fashion-dit")
    bundled = read(ROUTER, net).schedule()
    made = methods(net, *data.load("train"), args.iterations, args.retrain, args.folder, bundled)
    rows = compare_with_bar(net, made, torch.arange(args.samples) % net.num_classes, steps=STEPS, guidance=1.5,
                            batch=50, judge=fashion_judge, folder=args.folder / "samples")
    print(markdown(rows, f"{args.samples} samples, seed 0"))
    for row in rows:
        row.pop("wall_speedup")  # of what was sampled beside other work
    result = moment() | machine() | dict(samples=args.samples, iterations=args.iterations, retrain=args.retrain,
                                         rows=rows)
    (RESULTS / "beside-caching-cpu.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
