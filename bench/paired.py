"""Are the images of two ways to train different? Trainings of one against those of the other, on the same noise.

    python -m bench.paired --folder build/comparison-2.0/samples --samples 5000 \\
        --one bench/data/seeds/iepo-2.0-seed{0,1,2}.safetensors --other bench/data/seeds/sdt-2.0-seed{0,1,2}.safetensors

Prints, and writes into bench/results/paired-cpu.json under --name, how far the mean over the one way's trainings lies
above the other's, by error to the uncached images and by Fréchet distance, with the interval of 95 % by the bootstrap
over images, of which every training meets the same draws; and each training's value, whose spread that interval does
not know. Samples are taken from the folder that `harmonica compare --seed 1 --batch 100` has left; what is missing is
made.
"""

import argparse
import json
from pathlib import Path
from statistics import fmean

import torch
from rich.progress import track

import harmonica_dit
from bench import RESULTS
from bench.record import machine, moment
from harmonica_dit.evaluate import Method, from_file
from harmonica_dit.evaluate.bootstrap import interval
from harmonica_dit.evaluate.fashion import fashion_judge
from harmonica_dit.evaluate.samples import Samples
from harmonica_dit.files import replacement

SEED, BATCH, STEPS = 1, 100, 20  # as the tables of docs/comparison.md have them
COLUMNS = ("error", "frechet")


def judged(samples: Samples, method: Method) -> tuple[dict, dict]:
    """A method's figures and their bootstrap's draws."""
    judge, uncached = fashion_judge(), Method("uncached", "uncached", STEPS)
    for first, mine, whole in zip(samples.firsts, samples.batches(method, SEED), samples.batches(uncached, SEED)):
        judge.update(mine, samples.labels_of(first), uncached=whole)
    return judge.result(), judge.draws()


def difference(one: list[tuple[dict, dict]], other: list[tuple[dict, dict]], column: str) -> dict[str, object]:
    """The mean of the one's trainings above the other's mean, its interval, and each training's value."""
    ones, others = ([found[column] for found, _ in group] for group in (one, other))
    drawn = [torch.stack([draws[column] for _, draws in group]).mean(0) for group in (one, other)]
    above = fmean(ones) - fmean(others)
    low, high = interval(drawn[0] - drawn[1], above)
    return dict(above=above, low=low, high=high, one=ones, other=others)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--name", default="iepo-sdt-2.0")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=5000)
    for way in ("--one", "--other"):
        parser.add_argument(way, type=Path, nargs="+", required=True)
    args = parser.parse_args()
    net = harmonica_dit.load("fashion-dit")
    samples = Samples(net, torch.arange(args.samples) % net.num_classes, args.folder, guidance=1.5, batch=BATCH)
    one, other = ([from_file(file, net) for file in files] for files in (args.one, args.other))
    found = [judged(samples, method) for method in track([*one, *other], "judging")]
    result = dict(samples=args.samples, one=[m.name for m in one], other=[m.name for m in other]) | {
        column: difference(found[: len(one)], found[len(one) :], column) for column in COLUMNS}
    for column in COLUMNS:
        above, low, high = (result[column][key] for key in ("above", "low", "high"))
        print(f"{column}: {above:+.4f} ({low:+.4f} … {high:+.4f})")
    path = RESULTS / "paired-cpu.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    with replacement(path) as temporary:
        temporary.write_text(json.dumps(kept | {args.name: moment() | machine() | result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
