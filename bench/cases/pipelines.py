"""`DiTPipeline`s whose every second step is skipped, by `enable_cache` and by other caches as their users put them."""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from diffusers import DiffusionPipeline, DiTTransformer2DModel
from torch import Tensor

from bench.bench_caches import silence
from bench.pipelines.fashion import fashion_pipe
from bench.pipelines.rivals import RIVALS, Rival, put, tune
from bench.problems import random_weights
from bench.record import installed_version
from bench.timing import relative_error
from harmonica_dit.flops import flop_counter

from . import COMPILED, OURS, PLAIN, Candidate, Case, compile_each

OTHERS = ("diffusers FirstBlockCache", "diffusers TaylorSeer", "diffusers MagCache", "cache-dit DBCache")
NAMES = (PLAIN, COMPILED, OURS, *OTHERS)
HALF = 0.5  # of the FLOPs: what a threshold is tuned to
EXACT = 1e-3


def compile_blocks(pipe: DiffusionPipeline, steps: int) -> None:
    compile_each(pipe.transformer.transformer_blocks)  # DiT's class does not name its `_repeated_blocks`


def dit_s_2(tiny: bool) -> DiTTransformer2DModel:
    """DiT-S/2 at 256 pixels in diffusers' class, random weights."""
    return random_weights(DiTTransformer2DModel(
        num_attention_heads=6, attention_head_dim=64, in_channels=4, out_channels=4, num_layers=2 if tiny else 12,
        sample_size=8 if tiny else 32))


def pipeline(transformer: Callable[[bool], DiTTransformer2DModel | None], images: int, steps: int, near: float,
             tiny: bool) -> Mapping[str, Candidate]:
    """near: how far an image may be from the uncached one where every second step is skipped."""
    images, steps = (1, 4) if tiny else (images, steps)
    pipe = fashion_pipe(transformer(tiny))

    def run(pipe: DiffusionPipeline) -> Tensor:
        with silence():
            pipe(list(range(images)), guidance_scale=1.5, num_inference_steps=steps, output_type="pt",
                 generator=torch.Generator().manual_seed(0))
        return pipe.vae.seen

    def share(rival: Rival, settings: dict) -> float:
        with flop_counter() as counter:
            run(put(rival, pipe, steps, settings))
        return counter.get_total_flops() / whole

    def prepare(name: str) -> Callable[[], Tensor]:
        """The rival's run, after one with everything computed, which must be the plain pipeline's.

        Raises: whatever keeps it from that.
        """
        rival, settings = RIVALS[name], RIVALS[name].second
        if installed_version(rival.package) is None:
            raise ImportError(f"{rival.package} is not installed")
        if not (off := relative_error(run(put(rival, pipe, steps, rival.everything)), plain)) <= EXACT:
            raise AssertionError(f"differs by {off:.2g} with everything computed")
        if settings.get("threshold", 0.0) is None:
            settings = tune(rival, settings, partial(share, rival), HALF)
        return partial(run, put(rival, pipe, steps, settings))

    plain = run(pipe).clone()
    with flop_counter() as counter:
        run(pipe)
    whole = counter.get_total_flops()
    made = {PLAIN: Candidate(partial(run, pipe)),
            COMPILED: Candidate(partial(run, put(Rival(compile_blocks, {}, {}), pipe, steps, {})), EXACT, rival=True),
            OURS: Candidate(prepare("ours"), near)}
    return made | {name: Candidate(attempt(partial(prepare, name)), near, rival=True) for name in OTHERS}


def attempt(prepare: Callable[[], Callable]) -> Callable:
    """What was prepared, or a function that raises what kept it from that."""
    try:
        return prepare()
    except Exception as error:  # whatever their code raises is the finding
        kept = error

    def fail():
        raise kept
    return fail


CASES = [
    Case("DiTPipeline of fashion-dit, T = 20, 4 images", NAMES, partial(pipeline, lambda tiny: None, 4, 20, 1.0), 7),
    Case("DiTPipeline of DiT-S/2, T = 4, 1 image", NAMES, partial(pipeline, dit_s_2, 1, 4, 2.0), 5),
]
