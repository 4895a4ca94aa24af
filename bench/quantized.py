"""A router as a plug-in of a quantized PixArt-α: speedup and error of either alone and of both."""

import copy
from collections.abc import Callable
from functools import partial

import torch
from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline
from torch import Tensor, nn

from harmonica_dit.flops import count_call
from harmonica_dit.pipelines import apply
from harmonica_dit.pipelines.adapters import adapt
from harmonica_dit.schedule import Schedule

from .classes import MODELS
from .measure import (
    Bar,
    cell,
    check_counts,
    check_cur,
    installed,
    interleaved,
    medians,
    random_schedule,
    relative_error,
    spread,
)

GROUP = 72  # weights that share a scale of int4: the width of a head, which divides that of every linear
COLUMNS = {
    "weights": lambda row: row["weights"],
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


def int8_weight_only():
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig()


def int8_dynamic():
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return Int8DynamicActivationInt8WeightConfig()


def int4_unpacked():
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup

    return IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(GROUP))


def int4_packed():
    from torchao.quantization import Int4WeightOnlyConfig

    return Int4WeightOnlyConfig(group_size=32)


def fp8_dynamic():
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig

    return Float8DynamicActivationFloat8WeightConfig()


KINDS: dict[str, Callable] = {"int8 weight-only": int8_weight_only, "int8 dynamic": int8_dynamic,
                              "int4 weight-only, dequantized": int4_unpacked,
                              "int4 weight-only, packed": int4_packed, "fp8 dynamic": fp8_dynamic}


def bench_quantized(*, steps: int, cur: float, rounds: int, heads: int | None = None,
                    layers: int | None = None) -> list[dict]:
    """A row for each kind of quantized weights; a kind that cannot run here says why.

    The pipeline is a PixArt-α 256 of fewer heads with random weights, one image with guidance, sampled to latents.
    The linears of its blocks are quantized. The router's schedule reuses a share `cur` at random.

    Raises:
        ValueError: a number is out of range; the message names it.
    """
    check_counts(steps=steps, rounds=rounds, heads=heads, layers=layers)
    check_cur(cur, steps)
    transformer, arguments = MODELS["pixart-alpha-256"].build(heads, layers)
    adapter = adapt(transformer)
    flops = count_call(adapter, lambda: adapter(**arguments, timestep=torch.zeros(2)))
    schedule = random_schedule(adapter.branch_names, flops, steps, cur)
    plain, router = Pipeline(transformer, arguments), Pipeline(transformer, arguments, schedule)
    wanted, of_router = plain.run(steps), router.run(steps)
    candidates = {"plain": partial(plain.run, steps), "router": partial(router.run, steps)}
    rows: list[dict] = []
    with Bar(len(KINDS) + rounds + 1) as bar:
        for kind, config in KINDS.items():
            bar.say(kind)
            row = dict(weights=kind)
            rows.append(row)
            try:
                model = quantized(transformer, config)
                alone, both = Pipeline(model, arguments), Pipeline(model, arguments, schedule)
                row |= dict(error_quantized=relative_error(alone.run(steps), wanted),
                            error_router=relative_error(of_router, wanted),
                            error_both=relative_error(both.run(steps), wanted))
            except (ImportError, AssertionError, NotImplementedError, RuntimeError, ValueError, TypeError) as error:
                row["note"] = f"cannot run here: {type(error).__name__}: {' '.join(str(error).split())}"
            else:
                candidates |= {kind: partial(alone.run, steps), f"{kind}: both": partial(both.run, steps)}
            bar.advance()
        bar.say("timing")
        seconds = interleaved(candidates, rounds, bar)
    middle, quartiles = medians(seconds), spread(seconds)
    speedup = {name: middle["plain"] / value for name, value in middle.items()}
    for row in rows:
        kind = row["weights"]
        if kind in middle:
            row |= dict(cur=schedule.cur, flops_speedup=schedule.speedup, speedup_quantized=speedup[kind],
                        speedup_router=speedup["router"], speedup_both=speedup[f"{kind}: both"],
                        product=speedup[kind] * speedup["router"],
                        seconds={name: quartiles[key] for name, key in (("plain", "plain"), ("router", "router"),
                                                                        ("quantized", kind),
                                                                        ("both", f"{kind}: both"))})
    return rows


def quantized(transformer: nn.Module, config: Callable) -> nn.Module:
    """A copy with the linears of its blocks quantized.

    Raises:
        ImportError: torchao is not installed. ValueError: it left a linear as it was. Whatever else torchao raises.
    """
    if installed("torchao") is None:
        raise ImportError("torchao is not installed (pip install torchao)")
    from torchao.quantization import quantize_

    model = copy.deepcopy(transformer)
    quantize_(model.transformer_blocks, config())
    for name, module in model.transformer_blocks.named_modules():
        if isinstance(module, nn.Linear) and type(module.weight) is nn.Parameter:
            raise ValueError(f"torchao left transformer_blocks.{name}, {module.in_features} wide, as it was")
    return model


class Pipeline:
    """A pipeline for latents, with a schedule applied or without."""

    def __init__(self, transformer: nn.Module, arguments: dict, schedule: Schedule | None = None):
        scheduler = DPMSolverMultistepScheduler(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02)
        self.pipe = PixArtAlphaPipeline(None, None, None, transformer, scheduler)
        self.pipe.set_progress_bar_config(disable=True)
        text, mask = arguments["encoder_hidden_states"], arguments["encoder_attention_mask"]
        self.text = dict(prompt_embeds=text[:1], prompt_attention_mask=mask[:1], negative_prompt=None,
                         negative_prompt_embeds=text[1:], negative_prompt_attention_mask=mask[1:])
        self.size = 8 * transformer.config.sample_size
        if schedule is not None:
            apply(self.pipe, schedule)

    def run(self, steps: int) -> Tensor:
        """The final latents."""
        return self.pipe(**self.text, num_inference_steps=steps, guidance_scale=4.5, height=self.size, width=self.size,
                         use_resolution_binning=False, output_type="latent",
                         generator=torch.Generator().manual_seed(0)).images
