"""A router as a plug-in of a quantized PixArt-α: speedup and error of either alone and of both.

    OMP_NUM_THREADS=2 python -m pytest bench/bench_quantized.py [--steps 10] [--cur 0.56] [--rounds 5] [--heads 2]
                                       [--layers 28] [--benchmark-json=FILE]

The pipeline is a PixArt-α 256 of fewer heads with random weights, one image with guidance, sampled to latents. The
linears of its blocks are quantized by torchao. The router's schedule reuses a share `cur` at random. Every candidate
runs in every round, so -k chooses what is shown, not what is run.
"""

from functools import partial

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline
from torch import Tensor, nn

from bench.diffusers_models import MODELS
from bench.problems import random_schedule
from bench.record import cell
from bench.replay import Measured
from bench.timing import quartiles, relative_error
from harmonica_dit.flops import count_call
from harmonica_dit.models import quantize
from harmonica_dit.pipelines import enable_cache
from harmonica_dit.pipelines.adapters import adapt
from harmonica_dit.schedule import Schedule
from harmonica_dit.timing import interleave, medians

TINY = dict(steps=3, cur=0.5, rounds=1, warmup=0, heads=4, layers=2)
COLUMNS = {
    "weights": cell("weights"),
    "speedup, quantized": cell("speedup_quantized", "{:.2f}×"),
    "router": cell("speedup_router", "{:.2f}×"),
    "both": cell("speedup_both", "{:.2f}×"),
    "product": cell("product", "{:.2f}×"),
    "error, quantized": cell("error_quantized", "{:.3g}"),
    "router ": cell("error_router", "{:.3g}"),
    "both ": cell("error_both", "{:.3g}"),
}
CAPTION = """speedup: over the unquantized pipeline without router. router: alone, on unquantized weights.
product: of the two speedups, which both together would reach if neither stood in the other's way.
error: of the final latents, root mean square relative to those of the unquantized pipeline without router."""


KINDS = {"int8 weight-only": "int8", "int8 dynamic": "int8-dynamic", "int4 weight-only, dequantized": "int4",
         "int4 weight-only, packed": "int4-packed", "fp8 dynamic": "fp8-dynamic"}


@pytest.fixture(scope="module")
def measured(settings):
    return measure(**settings(TINY, steps=10, cur=0.56, rounds=5, warmup=1, heads=None, layers=None))


@pytest.mark.parametrize("candidate", ["plain", "router", *(f"{kind}{of}" for kind in KINDS for of in ("", ": both"))])
def test_pipeline(measured, replay, candidate):
    replay(measured, candidate)


def measure(steps: int, cur: float, rounds: int, warmup: int, heads: int | None,
            layers: int | None) -> Measured:
    """A row for each kind of quantized weights; a kind that cannot run here says why. heads, layers: instead of the
    model's own."""
    transformer, arguments = MODELS["pixart-alpha-256"].build(heads, layers)
    adapter = adapt(transformer)
    flops = count_call(adapter, lambda: adapter(**arguments, timestep=torch.zeros(2)))
    schedule = random_schedule(adapter.branch_names, flops, steps, cur)
    plain, router = Pipeline(transformer, arguments), Pipeline(transformer, arguments, schedule)
    wanted, of_router = plain.run(steps), router.run(steps)
    candidates = {"plain": partial(plain.run, steps), "router": partial(router.run, steps)}
    rows: dict[str, dict] = {}
    for kind, name in KINDS.items():
        row = rows[kind] = dict(weights=kind)
        try:
            model = quantize(transformer, name)
            alone = Pipeline(model, arguments)
            of_quantized = alone.run(steps)
        except (ImportError, AssertionError, NotImplementedError, RuntimeError, ValueError, TypeError) as error:
            row["note"] = f"cannot run here: {type(error).__name__}: {' '.join(str(error).split())}"
            continue
        both = Pipeline(model, arguments, schedule)  # where the weights run alone, an error beside ours is our fault
        row |= dict(error_quantized=relative_error(of_quantized, wanted),
                    error_router=relative_error(of_router, wanted),
                    error_both=relative_error(both.run(steps), wanted))
        candidates |= {kind: partial(alone.run, steps), f"{kind}: both": partial(both.run, steps)}
    seconds = interleave(candidates, rounds, warmup=warmup)
    speedup = {name: medians(seconds)["plain"] / value for name, value in medians(seconds).items()}
    for kind, row in rows.items():
        if kind in seconds:
            row |= dict(cur=schedule.cur, flops_speedup=schedule.speedup, speedup_quantized=speedup[kind],
                        speedup_router=speedup["router"], speedup_both=speedup[f"{kind}: both"],
                        product=speedup[kind] * speedup["router"],
                        seconds={name: quartiles(seconds[key]) for name, key in (
                            ("plain", "plain"), ("router", "router"), ("quantized", kind), ("both", f"{kind}: both"))})
    return Measured("PixArtAlphaPipeline", seconds, rows)


class Pipeline:
    """A pipeline for latents, with a cache or without."""

    def __init__(self, transformer: nn.Module, arguments: dict, schedule: Schedule | None = None):
        scheduler = DPMSolverMultistepScheduler(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02)
        self.pipe = PixArtAlphaPipeline(None, None, None, transformer, scheduler)
        self.pipe.set_progress_bar_config(disable=True)
        text, mask = arguments["encoder_hidden_states"], arguments["encoder_attention_mask"]
        self.text = dict(prompt_embeds=text[:1], prompt_attention_mask=mask[:1], negative_prompt=None,
                         negative_prompt_embeds=text[1:], negative_prompt_attention_mask=mask[1:])
        self.size = 8 * transformer.config.sample_size
        if schedule is not None:
            enable_cache(self.pipe, schedule)

    def run(self, steps: int) -> Tensor:
        """The final latents."""
        return self.pipe(**self.text, num_inference_steps=steps, guidance_scale=4.5, height=self.size, width=self.size,
                         use_resolution_binning=False, output_type="latent",
                         generator=torch.Generator().manual_seed(0)).images
