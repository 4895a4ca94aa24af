"""What a forecast learns with more beside its weights a channel, and with less: ablations, on the bundled model.

    python -m bench.forecast_forms --form none    writes its row into bench/results/forecast-forms-cpu.json

Seven of 20 steps are computed; towards the accurate images, otherwise by the trainer's defaults, which are "none".
Less: "states", neither tokens nor conditions are weighed, as on the generic path; "no-features", no error in the
model's own features in the loss. More, matrices: at a forecast step the newest state c_0 is replaced by
c_0 + M·(c_0 - c_1), by c_0 + M·c_0 where there is no c_1, before the weights a channel are applied; M [D, D] starts at
0. "shared": one M for all forecast steps; "low-rank": one of rank 4 a step; "matrix": one a step.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import torch
from rich.progress import track
from torch import Tensor, nn

import harmonica_dit
import harmonica_kernels as hk
from bench import RESULTS
from bench.forecasts import ACCURATE, BATCH, GUIDANCE, STEPS, methods, samples_of
from bench.record import machine, moment
from harmonica_dit.evaluate import rmse
from harmonica_dit.evaluate.fashion import fashion_judge
from harmonica_dit.files import replacement
from harmonica_dit.forecaster import TrunkForecaster, taylor
from harmonica_dit.methods import trunk_forecast
from harmonica_dit.sample.trajectory import Trajectory, image_noise
from harmonica_dit.schedule import Schedule
from harmonica_dit.train.forecaster import SLOWER, _Run
from harmonica_dit.train.frozen_model import freeze
from harmonica_dit.train.unrolled import LearnedForecaster, unroll

FORMS = ("none", "states", "no-features", "shared", "low-rank", "matrix")
RANK, HISTORY, PERCEPTUAL = 4, 3, 0.5
OUT = RESULTS / "forecast-forms-cpu.json"


class Forecaster(LearnedForecaster):
    """Weights a channel, and matrices at the forecast steps."""

    def __init__(self, form: str, compute: Sequence[bool], initial: TrunkForecaster, width: int):
        super().__init__(compute, initial, width, correct=True, entering=form != "states")
        self.form, self.matrices = form, nn.ParameterList()
        count = 1 if form == "shared" else len(compute)
        if form == "low-rank":
            begun = torch.randn(count, width, RANK, generator=torch.Generator().manual_seed(0)) * width**-0.5
            self.matrices.extend([begun, torch.zeros(count, RANK, width)])
        elif form in ("shared", "matrix"):
            self.matrices.append(torch.zeros(count, width, width))

    def times_matrix(self, s: int, state: Tensor) -> Tensor:
        """The state [B, N, D] times step s's matrix."""
        for part in self.matrices:
            state = state @ part[0 if self.form == "shared" else s]
        return state

    @property
    def numbers(self) -> int:
        """Parameters that are in use."""
        steps = 1 if self.form == "shared" else self.compute.count(False)
        return sum(p.numel() for part in (self.states, self.tokens, self.own, self.condition) for p in part) + sum(
            part[0].numel() * steps for part in self.matrices)


class Mixed(Trajectory):
    """A trajectory whose forecast steps are given other states than the cache's."""

    def __init__(self, learned: Forecaster, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.learned = learned

    def predict(self, x: Tensor, s: int, *, cache: hk.TrunkCache, row=None, **forward) -> Tensor:
        if row is False and len(self.learned.matrices):
            kept = [(cache.state(i), cache.tokens(i)) for i in range(cache.filled)]
            change = kept[0][0] - kept[1][0] if len(kept) > 1 else kept[0][0]
            kept[0] = kept[0][0] + self.learned.times_matrix(s, change), kept[0][1]
            cache = cache.holding(kept)
        return super().predict(x, s, cache=cache, row=row, **forward)


class Run(_Run):
    """The trainer's, with matrices."""

    def __init__(self, net, schedule: Schedule, learned: Forecaster, settings: dict, *options):
        super().__init__(net, schedule, learned, settings, *options)
        if len(learned.matrices):
            scale = SLOWER if learned.form == "low-rank" else SLOWER / 10  # all D entries of a row move the same way
            self.optimizer.add_param_group(dict(params=list(learned.matrices), scale=scale))

    def _trajectory(self, numbers: Tensor) -> Mixed:
        return Mixed(self.learned, self.net, self.labels[numbers], steps=STEPS, guidance=GUIDANCE)


def train(net, form: str, iterations: int, seed: int, images: int = 1200) -> Run:
    """A finished training of this form, otherwise by `train_forecaster`'s defaults."""
    schedule = trunk_forecast(net, STEPS, every=3, adams=True)
    compute = schedule.compute[:, 0].tolist()
    initial = taylor(compute, 1, adams=True)
    initial = replace(initial, states=torch.cat([initial.states, torch.zeros(STEPS, HISTORY - initial.history, 1)], 1))
    run = Run(net, schedule, Forecaster(form, compute, initial, net.width), dict(
        target="accurate", history=HISTORY, iterations=iterations, images=images, held_out=40, batch=10, lr=4e-3,
        perceptual=0.0 if form == "no-features" else PERCEPTUAL, labels=None, guidance=GUIDANCE,
        guidance_channels=None, scheduler="ddim", autocast=None, seed=seed), False, None, True)
    with freeze(net):
        run.train()
    return run


@torch.no_grad()
def draw(net, learned: Forecaster, labels: Tensor, seed: int) -> Tensor:
    """Images of the sampler's noise."""
    made = []
    for first, part in track([*zip(range(0, len(labels), BATCH), labels.split(BATCH))], "sampling"):
        trajectory = Mixed(learned, net, part, steps=STEPS, guidance=GUIDANCE)
        made.append(unroll(trajectory, image_noise(seed, first, len(part), net.sample_shape), learned))
    return torch.cat(made).clamp(-1, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--form", choices=FORMS, required=True)
    parser.add_argument("--iterations", type=int, default=600)
    parser.add_argument("--training-seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1, help="of the images that are judged")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("build/samples"))
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    net = harmonica_dit.load("fashion-dit")
    run = train(net, args.form, args.iterations, args.training_seed)
    samples, judge = samples_of(net, args.samples, args.folder), fashion_judge()
    images = draw(net, run.learned, samples.labels, args.seed)
    judge.update(images, samples.labels)
    accurate = next(method for method in methods(net) if method.name == ACCURATE)
    wanted = torch.cat(list(samples.batches(accurate, args.seed)))
    parameters = run.learned.numbers
    row = moment() | dict(form=args.form, rank=RANK, seed=args.training_seed, iterations=args.iterations,
                          parameters=parameters, share=parameters / sum(p.numel() for p in net.parameters()),
                          held_out=run.error, samples=args.samples, accurate_error=fmean(rmse(images, wanted).tolist()),
                          frechet=judge.frechet_distance)
    kept = json.loads(args.out.read_text())["rows"] if args.out.exists() else []
    kept = [old for old in kept if (old["form"], old["seed"]) != (row["form"], row["seed"])]
    with replacement(args.out) as path:
        path.write_text(json.dumps(machine() | dict(rows=[*kept, row]), indent=1) + "\n")
    print(row)


if __name__ == "__main__":
    main()
