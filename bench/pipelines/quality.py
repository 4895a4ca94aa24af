"""Other caches beside ours on trained weights: `python -m bench.pipelines quality`.

The bundled model as a `DiTPipeline`, 20 steps of DDIM. Each method is set so that it computes about the share of the
branches that ours computes, where its settings allow that; what it did compute is observed.
"""

import contextlib
import io
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from diffusers import DiffusionPipeline
from rich.progress import track
from torch import Tensor

import harmonica_dit
from bench.bench_caches import observe_branches, silence
from bench.pipelines import rivals
from bench.pipelines.checks import words
from bench.pipelines.fashion import NO_LABEL, fashion_pipe
from bench.pipelines.rivals import Rival, put, tune
from bench.record import installed_version
from harmonica_dit.evaluate import rmse
from harmonica_dit.flops import flop_counter
from harmonica_dit.methods import fora, trunk_forecast
from harmonica_dit.pipelines.adapters import adapt
from harmonica_dit.schedule import Schedule

STEPS, GUIDANCE, CLASSES = 20, 1.5, 10
SPEEDUPS = (2.0, 2.7, 3.7)
FEW = 16  # images that a threshold is found on
OURS = "enable_cache(pipe, speedup)"


def run(pipe: DiffusionPipeline, samples: int, seed: int) -> Tensor:
    """The final images [n, 1, 28, 28], not clamped."""
    labels = [i % CLASSES for i in range(samples)]
    noise = torch.Generator().manual_seed(seed)
    pipe(labels, guidance_scale=GUIDANCE, num_inference_steps=STEPS, generator=noise, output_type="pt")
    return pipe.vae.seen


@dataclass(frozen=True)
class Candidate:
    """A method with settings, at a speedup that it is compared at. threshold None: is to be found."""

    method: str
    rival: Rival
    settings: dict
    speedup: float
    note: str = ""


def candidates(pipe: DiffusionPipeline, seed: int) -> Iterator[Candidate]:
    """Every method at every speedup; where a method takes a number n, every n-th step computes about as much as ours.
    """
    adapter = adapt(pipe.transformer)
    adapter.trace(torch.zeros(2, 1, 28, 28), torch.zeros(2), torch.tensor([0, NO_LABEL]))
    known, by_config = rivals.RIVALS, Rival(rivals.ours, {}, {})
    mag_cache = replace(known["diffusers MagCache"], thresholds=(1e-4, 1.0))
    ratios = calibrated(pipe, seed)
    for speedup, n in zip(SPEEDUPS, (2, 3, 4)):
        every, found = f"n = {n}", dict(threshold=None)

        def made(method: str, rival: Rival, settings: dict, note: str, speedup=speedup) -> Candidate:
            return Candidate(method, rival, settings, speedup, note)

        yield made(OURS, by_config, dict(config=speedup), "")
        for order in (1, 2):
            schedule = trunk_forecast(adapter, STEPS, every=n, order=order)
            yield made(f"enable_cache(pipe, trunk_forecast(…, order={order}))", by_config, dict(config=schedule), every)
        for order in (0, 1, 2):
            schedule = fora(adapter, STEPS, n, order)
            yield made(f"enable_cache(pipe, fora(…, order={order}))", by_config, dict(config=schedule), every)
        for name in ("cache-dit DBCache", "cache-dit DBCache + TaylorSeer"):
            nth = dict(threshold=rivals.NEVER, in_a_row=n - 1)
            yield made(f"{name}, every nth", known[name], nth, f"F1B0, {every}")
            yield made(f"{name}, by threshold", known[name], found, "F1B0")
        for order in (1, 2):
            name = "diffusers TaylorSeer"
            yield made(f"{name}, order {order}", known[name], dict(every=n, order=order), every)
        yield made("diffusers TaylorSeer, lite", known["diffusers TaylorSeer, lite"], dict(every=n),
                   f"{every}; no proj_out is there to be forecast")
        yield made("diffusers FirstBlockCache", known["diffusers FirstBlockCache"], found, "by threshold")
        yield made("diffusers MagCache", mag_cache, found | dict(in_a_row=n + 1, ratios=ratios), "calibrated")
        name = "diffusers PyramidAttentionBroadcast"
        yield made(name, known[name], dict(every=n), f"attention alone, {every}")


def calibrated(pipe: DiffusionPipeline, seed: int) -> tuple[float, ...]:
    """The ratios that MagCache prints in a run for that, which its user copies."""
    def calibrate(pipe, steps):
        from diffusers.hooks import MagCacheConfig

        rivals.enable(pipe, MagCacheConfig(calibrate=True, num_inference_steps=steps))

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        run(put(Rival(calibrate, {}, {}), pipe, STEPS, {}), FEW, seed)
    return tuple(map(float, re.search(r"\[([\d., e-]+)\]\s*$", printed.getvalue().strip())[1].split(",")))


def observe(pipe: DiffusionPipeline, samples: int, seed: int) -> tuple[Tensor, float, float]:
    """A run's images; the share of its T·K branches that were computed, by hooks on what they end with; its FLOPs."""
    names = tuple(f"transformer_blocks.{i}.{part}" for i in range(len(pipe.transformer.transformer_blocks))
                  for part in ("attn1", "ff"))
    with observe_branches(pipe.transformer, names) as ran, flop_counter() as counter:
        images = run(pipe, samples, seed)
    if len(ran) != STEPS:
        raise AssertionError(f"{len(ran)} forwards in {STEPS} steps")
    return images, sum(map(len, ran)) / (STEPS * len(names)), counter.get_total_flops()


def measure(samples: int, seed: int, made: Callable[..., Iterator[Candidate]] = candidates) -> list[dict]:
    """A row for each candidate; one that cannot run says why."""
    pipe, rows, shares = fashion_pipe(), [], {}
    with silence(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted, _, whole = observe(pipe, samples, seed)
        for candidate in track(list(made(pipe, seed)), "methods"):
            row = dict(method=candidate.method, speedup=candidate.speedup, note=candidate.note)
            rows.append(row)
            if installed_version(candidate.rival.package) is None:
                row["words"] = f"{candidate.rival.package} is not installed"
                continue
            try:
                row |= examine(candidate, pipe, wanted, whole, seed, shares)
            except Exception as error:  # whatever their code raises is the finding
                if candidate.rival.method is rivals.ours:
                    raise
                row["words"] = words(error)
            if candidate.method == OURS:
                shares[candidate.speedup] = row["computed"]
    return rows


def examine(candidate: Candidate, pipe: DiffusionPipeline, wanted: Tensor, whole: float, seed: int,
            shares: dict[float, float]) -> dict:
    """shares: what ours computed at each speedup, which a threshold is found for."""
    rival, settings = candidate.rival, candidate.settings
    if settings.get("threshold", 0.0) is None:
        settings = tune(rival, settings, lambda tried: observe(put(rival, pipe, STEPS, tried), FEW, seed)[1],
                        shares[candidate.speedup])
    theirs = put(rival, pipe, STEPS, settings)
    if rival.method is rivals.ours:
        run(theirs, len(wanted), seed)  # it traces a forward of each size once
    images, computed, flops = observe(theirs, len(wanted), seed)
    each = rmse(images, wanted)
    row = dict(computed=computed, flops_speedup=whole / flops, error=each.mean().item(), worst=each.max().item(),
               settings={name: value for name, value in settings.items() if not isinstance(value, Schedule)})
    if rival.method is rivals.ours:
        row["nbytes"] = harmonica_dit.summary(theirs).nbytes // len(wanted)  # with guidance, two rows
    return row


def markdown(rows: list[dict]) -> str:
    lines = ["| compared at | method | computed | FLOPs | RMSE | worst image | cache of an image |", "|---" * 7 + "|"]
    for row in rows:
        of = f"| {row['speedup']:g}× | {row['method']}" + (f" ({row['note']})" if row["note"] else "")
        size = f"{row['nbytes'] / 1024:.0f} KiB" if "nbytes" in row else ""
        lines.append(f"{of} | {row['words']} | | | | |" if "words" in row else
                     f"{of} | {row['computed']:.1%} | {row['flops_speedup']:.2f}× | {row['error']:.4f} "
                     f"| {row['worst']:.3f} | {size} |")
    return "\n".join(lines)
