"""PixArt at full width and depth, random weights, bfloat16, one image with guidance: what a cache gains on a GPU.

A trajectory with 55 % of the branches reused at random, beside diffusers' own model, each eager and in one graph; and
one that forecasts the trunk at every second step. wall / FLOPs: the speedup over diffusers' eager model, over that of
the FLOPs; HarmoniCa measures 1.69× of 2.07× (Huang et al., ICML 2025). A router costs nothing where its schedule is
read before the first step; gated / captured is what it costs to decide by its scores on the device.

Weights: the same at 256 pixels on copies with quantized weights, each beside the model in bfloat16, both captured.
HarmoniCa has 1.18× by 4 bits alone and 1.85× with its router too.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor

import harmonica_kernels as hk
from bench.diffusers_models import pixart
from bench.problems import random_schedule
from bench.timing import relative_error
from harmonica_dit.flops import count_flops
from harmonica_dit.methods import trunk_forecast
from harmonica_dit.models.quantized import KINDS, quantize, weight_bytes
from harmonica_dit.pipelines.denoiser import PipelineDenoiser
from harmonica_dit.pipelines.prompts import Prompts
from harmonica_dit.sample import denoise

from . import models
from .record import Record

CUR, PAPER = 0.55, 1.69 / 2.07


class Case(NamedTuple):
    side: int  # of the latent
    text: int  # tokens
    micro_conditions: bool
    steps: int
    rounds: int


CASES = {"PixArt-α 1024": Case(128, 120, True, 20, 5), "PixArt-Σ 2K": Case(256, 300, False, 4, 3)}
SMALL = Case(32, 120, False, 20, 9)


def run(record: Record) -> None:
    parts = {"quantized": lambda: quantized(record, SMALL)}
    parts |= {name: lambda name=name, case=case: measure(record, name, case) for name, case in CASES.items()}
    for name, part in parts.items():  # the last one takes the longest
        with torch.inference_mode(), record.attempt(name):
            part()
        if not record.tiny:
            torch.cuda.empty_cache()


def denoisers(record: Record, case: Case) -> tuple[PipelineDenoiser, PipelineDenoiser]:
    """The model through its adapter, and as diffusers has it, on the same weights."""
    side, heads, layers = (8, 2, 2) if record.tiny else (case.side, 16, 28)
    config, arguments = pixart(side, case.text, case.micro_conditions)(heads, [layers])
    transformer = models.with_weights(record.device, lambda: PixArtTransformer2DModel(**config))
    ours, plain = (denoiser(transformer, arguments) for _ in range(2))
    plain.adapter = plain.transformer
    return ours, plain


def denoiser(transformer: PixArtTransformer2DModel, arguments: dict[str, Tensor]) -> PipelineDenoiser:
    """Of one prompt and the empty one, encoded as a forward's arguments are."""
    prompts = Prompts(("a prompt",), "PixArt", arguments["encoder_hidden_states"], arguments["encoder_attention_mask"])
    return PipelineDenoiser(transformer, "ddim", name="PixArt", guidance=4.5, prompts=prompts)


def measure(record: Record, name: str, case: Case) -> None:
    ours, plain = denoisers(record, case)
    device, steps = record.device, 4 if record.tiny else case.steps
    schedule = random_schedule(ours.branch_names, count_flops(ours), steps, CUR)
    whole = trunk_forecast(ours, steps, every=2)
    noise, executor = models.noise(ours, 1, device), hk.compile(denoise)
    mine, theirs = (models.trajectory(net, 1, device, steps) for net in (ours, plain))
    record.check(f"{name}: a forward of ours beside diffusers'",
                 relative_error(mine.predict(noise, 0), theirs.predict(noise, 0)), 0.05)
    candidates: dict[str, Callable[[], Tensor]] = {
        "plain": lambda: denoise(theirs, noise), "plain, in a graph": lambda: executor(theirs, noise),
        "computed, eager": lambda: denoise(mine, noise), "computed": lambda: executor(mine, noise),
        "cached, eager": lambda: denoise(mine, noise, schedule), "cached": lambda: executor(mine, noise, schedule),
        "whole steps": lambda: executor(mine, noise, whole)}
    for _ in range(2):  # runs, records
        candidates["plain, in a graph"]()
    for way, eager in (("computed", denoise(mine, noise)), ("cached", denoise(mine, noise, schedule)),
                       ("whole steps", denoise(mine, noise, whole))):
        check_captured(record, f"{name}, {way}", candidates[way], eager)
    record.stage(f"{name}, timing")
    seconds = record.time(name, candidates, case.rounds, warmup=1)
    record.row(case=name, T=steps, **{f"{way}, ms": value * 1e3 for way, value in seconds.items()})
    for way, its, uncached in (("cached, eager", schedule, "computed, eager"), ("cached", schedule, "computed"),
                               ("whole steps", whole, "computed")):
        wall = seconds["plain"] / seconds[way]
        record.row(case=name, way=way, wall=wall, FLOPs=its.speedup, **{
            "CUR, %": 100 * its.cur, "wall / FLOPs": wall / its.speedup,
            "wall over ours without a cache": seconds[uncached] / seconds[way]})
    record.ratio(f"{name}, {CUR:.0%} CUR: wall / FLOPs", seconds["plain"] / seconds["cached"] / schedule.speedup, PAPER)
    step, computed = seconds["computed"] / steps, sum(row is not False for row in whole.rows)
    skipped = (seconds["whole steps"] - computed * step) / (steps - computed)
    record.row(case=name, **{"computed step, ms": step * 1e3, "skipped step, ms": skipped * 1e3,
                             "skipped / computed": skipped / step})
    in_a_graph = seconds["plain, in a graph"] / seconds["computed"]
    record.ratio(f"{name}, uncached: diffusers in a graph / ours", in_a_graph, 1.0)
    with record.attempt(f"{name}, decided on the device"):  # last: what fails here must spoil nothing else
        gated = hk.compile(denoise, mode="gated")
        both = {"cached": candidates["cached"], "gated": lambda: gated(mine, noise, schedule)}
        record.check(f"{name}: gated beside captured", relative_error(both["gated"](), both["cached"]()), 0.02)
        seconds = record.time(f"{name}, decided on the device", both, case.rounds, warmup=1)
        record.row(case=name, **{"gated / captured": seconds["gated"] / seconds["cached"]})


def pair(name: str, executor, trajectory, noise: Tensor, schedule) -> dict[str, Callable[[], Tensor]]:
    """One trajectory with everything computed, and by the schedule."""
    return {name: lambda: executor(trajectory, noise), f"{name}, cached": lambda: executor(trajectory, noise, schedule)}


def check_captured(record: Record, name: str, captured: Callable[[], Tensor], eager: Tensor) -> None:
    for _ in range(3):  # runs, records, replays
        found = captured()
    record.check(f"{name}: captured beside eager", relative_error(found, eager), 0.02)


def quantized(record: Record, case: Case) -> None:
    ours, _ = denoisers(record, case)
    steps = 4 if record.tiny else case.steps
    schedule = random_schedule(ours.branch_names, count_flops(ours), steps, CUR)
    trajectory, noise = models.trajectory(ours, 1, record.device, steps), models.noise(ours, 1, record.device)
    executor = hk.compile(denoise)
    exact = denoise(trajectory, noise)
    candidates = pair("bfloat16", executor, trajectory, noise, schedule)
    check_captured(record, "bfloat16", candidates["bfloat16"], exact)
    for kind in KINDS:
        record.stage(f"weights in {kind}")
        try:
            net = denoiser(quantize(ours.transformer, kind), dict(encoder_hidden_states=ours.prompts.embeddings,
                                                                  encoder_attention_mask=ours.prompts.mask))
            its = models.trajectory(net, 1, record.device, steps)
            eager = denoise(its, noise)
        except Exception as reason:  # torchao has no kernel for this kind here, and each says so in its own way
            record.row(weights=kind, refused=f"{type(reason).__name__}: {reason}"[:300])
            continue
        record.row(weights=kind, MB=weight_bytes(net) / 1e6, error=relative_error(eager, exact))
        with record.attempt(f"weights in {kind}, captured"):  # ours has to
            made = pair(kind, executor, its, noise, schedule)
            check_captured(record, kind, made[kind], eager)
            candidates |= made
    record.stage("quantized, timing")
    seconds = record.time("quantized", candidates, case.rounds, warmup=3)
    record.row(FLOPs=schedule.speedup, **{"router alone": seconds["bfloat16"] / seconds["bfloat16, cached"],
                                          "bfloat16, ms": seconds["bfloat16"] * 1e3})
    for kind in KINDS:
        if kind in seconds:
            record.row(weights=kind, **{"quantized alone": seconds["bfloat16"] / seconds[kind],
                                        "both": seconds["bfloat16"] / seconds[f"{kind}, cached"]})
