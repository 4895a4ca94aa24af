"""Other caches of diffusers pipelines beside ours, the work skipped made equal, on one small `DiTPipeline`.

Each method is the code that a user writes: `method(pipe, steps)` sets it up and returns what is called in the
pipeline's place. What it skips is observed, and ours is given a schedule that skips just that.
"""

import copy
import inspect
import logging
from collections.abc import Callable
from contextlib import contextmanager
from statistics import median
from types import SimpleNamespace

import torch
from diffusers import DDIMScheduler, DiTPipeline
from torch import Tensor, nn

from harmonica_dit.flops import Flops, count_call
from harmonica_dit.pipelines.adapters import adapt
from harmonica_dit.schedule import Schedule

from .classes import MODELS
from .measure import Bar, cell, check_counts, forward_clocks, installed, interleaved, medians, relative_error, spread

COLUMNS = {
    "method": lambda row: row["method"],
    "CUR": cell("cur", "{:.1%}"),
    "lines": cell("lines", "{}"),
    "speedup": cell("speedup", "{:.2f}×"),
    "ours": cell("our_speedup", "{:.2f}×"),
    "overhead, ms a step": cell("overhead_ms", "{:+.2f}"),
    "ours ": cell("our_overhead_ms", "{:+.2f}"),
    "error": cell("error", "{:.3g}"),
    "ours  ": cell("our_error", "{:.3g}"),
}
CAPTION = """ours: harmonica_dit.apply with a schedule that skips the same branches at the same steps (2 lines).
speedup: over the plain pipeline. overhead: what a step takes beside the branches computed, less what it takes uncached.
error: of the final latents, root mean square relative to the uncached ones."""


def uncached(pipe, steps):
    return pipe


def first_block_cache(pipe, steps):
    from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache

    apply_first_block_cache(pipe.transformer, FirstBlockCacheConfig(threshold=1e9))
    return in_context(pipe)


def pyramid_attention_broadcast(pipe, steps):
    from diffusers.hooks import PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast

    config = PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2,
                                             spatial_attention_timestep_skip_range=(-1, 1001),
                                             current_timestep_callback=lambda: 500)
    apply_pyramid_attention_broadcast(pipe.transformer, config)
    return in_context(pipe)


def taylorseer_as_it_comes(pipe, steps):
    from diffusers.hooks import TaylorSeerCacheConfig, apply_taylorseer_cache

    config = TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=2)
    apply_taylorseer_cache(pipe.transformer, config)
    return in_context(pipe)


def taylorseer(pipe, steps):
    from diffusers.hooks import TaylorSeerCacheConfig, apply_taylorseer_cache

    config = TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=2, taylor_factors_dtype=torch.float32,
                                   cache_identifiers=[r"transformer_blocks\.\d+\.(attn1|ff)"])
    apply_taylorseer_cache(pipe.transformer, config)
    return in_context(pipe)


def mag_cache(pipe, steps):
    from diffusers.hooks import MagCacheConfig, apply_mag_cache

    config = MagCacheConfig(mag_ratios=[1.0] * steps, num_inference_steps=steps, max_skip_steps=1, retention_ratio=0.0)
    apply_mag_cache(pipe.transformer, config)
    return in_context(pipe)


def sea_cache(pipe, steps):
    from diffusers.hooks import SeaCacheConfig, apply_sea_cache

    apply_sea_cache(pipe.transformer, SeaCacheConfig(threshold=1e9))
    return in_context(pipe)


def faster_cache(pipe, steps):
    from diffusers.hooks import FasterCacheConfig, apply_faster_cache

    config = FasterCacheConfig(spatial_attention_block_skip_range=2, tensor_format="BCHW",
                               attention_weight_callback=lambda _: 0.5, current_timestep_callback=lambda: 500)
    apply_faster_cache(pipe.transformer, config)
    return in_context(pipe)


def cache_dit(pipe, steps):
    import cache_dit

    config = cache_dit.DBCacheConfig(Fn_compute_blocks=1, Bn_compute_blocks=0, residual_diff_threshold=1e9,
                                     max_warmup_steps=1, max_continuous_cached_steps=1, num_inference_steps=steps)
    cache_dit.enable_cache(pipe, cache_config=config)
    return pipe


def in_context(pipe):
    from diffusers.hooks import HookRegistry
    from diffusers.models.cache_utils import CacheMixin

    def call(**arguments):
        HookRegistry.check_if_exists_or_initialize(pipe.transformer).reset_stateful_hooks()
        with CacheMixin.cache_context(pipe.transformer, "both"):  # the transformer's class has no CacheMixin
            return pipe(**arguments)

    return call


METHODS: dict[str, tuple[Callable, str]] = {  # with what should be known of the row
    "diffusers FirstBlockCache": (first_block_cache, "threshold above every difference: only block 0 from step 1 on"),
    "diffusers PyramidAttentionBroadcast": (pyramid_attention_broadcast, "attention at every 2nd step"),
    "diffusers TaylorSeer": (taylorseer, "attention and feed-forward, named by the user; first order; every 2nd step"),
    "diffusers TaylorSeer, as it comes": (taylorseer_as_it_comes, "its default identifiers match no module of DiT"),
    "diffusers MagCache": (mag_cache, "not calibrated (ratios of 1): whole blocks at every 2nd step"),
    "diffusers SeaCache": (sea_cache, "wants step_index and sigma in the cache_context of every step, which "
                                      "DiTPipeline does not give: runs everything"),
    "diffusers FasterCache": (faster_cache, "halves the guided batch by keyword arguments' names; DiTPipeline gives "
                                            "hidden_states by position, and class_labels is not among them"),
    "cache-dit DBCache": (cache_dit, "threshold above every difference, at most 1 cached step in a row, F1B0"),
}


def bench_caches(*, steps: int, rounds: int, heads: int | None = None, layers: int | None = None) -> list[dict]:
    """A row for the uncached pipeline and one for each method, with what ours makes of the same schedule.

    The pipeline is a DiT-XL/2 256 of fewer heads with random weights, one image with guidance.

    Raises:
        ValueError: a number is out of range; the message names it.
    """
    check_counts(steps=steps, rounds=rounds, heads=heads, layers=layers)
    for name, value in (("steps", steps), ("layers", layers)):
        if value == 1:
            raise ValueError(f"{name}: got 1, expected at least 2, for these caches to have something to skip")
    transformer, arguments = MODELS["dit-xl-2-256"].build(heads, layers)
    adapter = adapt(transformer)
    flops = count_call(adapter, lambda: adapter(**arguments, timestep=torch.zeros(2)))
    pairs, rows = {}, []
    with quiet(), Bar(len(METHODS) + rounds + 1) as bar:
        plain = Candidate(transformer, steps, uncached)
        plain.run()
        for name, (method, note) in METHODS.items():
            bar.say(name)
            row = dict(method=name, lines=lines(method), note=note)
            rows.append(row)
            if method is cache_dit and installed("cache-dit") is None:
                row["note"] = "not installed (pip install cache-dit)"
            else:
                found = watched(transformer, steps, method, row, adapter.branch_names, flops)
                if found is not None:
                    pairs[name] = found
            bar.advance()
        bar.say("timing")
        own_times: list[list[float]] = []

        def clocked() -> None:
            body = [0.0] * len(adapter.branch_names)
            modules = [[plain.pipe.transformer.get_submodule(name)] for name in adapter.branch_names]
            with forward_clocks(modules, body):
                plain.run()
            own_times.append(body)

        candidates = {"uncached": plain.run, "clocked": clocked}
        for name, (theirs, ours, _) in pairs.items():
            candidates |= {name: theirs.run, f"{name}: ours": ours.run}
        seconds = interleaved(candidates, rounds, bar)
    middle, quartiles = medians(seconds), spread(seconds)
    body = [median(values) / steps for values in zip(*own_times[1:])]
    rest = middle["clocked"] - steps * sum(body)

    def overhead(name: str, schedule: Schedule) -> float:
        computed = sum(b for row in schedule.rows for b, c in zip(body, row) if c)
        return 1000 * (middle[name] - computed - rest) / steps

    for row in rows:
        if row["method"] not in pairs:
            continue
        name, (theirs, ours, schedule) = row["method"], pairs[row["method"]]
        row |= dict(cur=schedule.cur, flops_speedup=schedule.speedup, our_lines=lines(applied),
                    computed=[sum(r) for r in schedule.rows], seconds=quartiles[name],
                    our_seconds=quartiles[f"{name}: ours"], speedup=middle["uncached"] / middle[name],
                    our_speedup=middle["uncached"] / middle[f"{name}: ours"], overhead_ms=overhead(name, schedule),
                    our_overhead_ms=overhead(f"{name}: ours", schedule),
                    error=relative_error(theirs.latents, plain.latents),
                    our_error=relative_error(ours.latents, plain.latents))
    first = dict(method="uncached", cur=0.0, lines=0, speedup=1.0, seconds=quartiles["uncached"], error=0.0,
                 note=f"{1000 * sum(body):.1f} ms a step in branches, {1000 * rest / steps:.1f} ms in all the rest")
    return [first, *rows]


class Candidate:
    """A pipeline of its own with one method on it."""

    def __init__(self, transformer: nn.Module, steps: int, method: Callable):
        scheduler = DDIMScheduler(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, clip_sample=False)
        self.steps, self.vae = steps, Latents()
        shared = {id(parameter): parameter for parameter in transformer.parameters()}
        own = type("DiTPipeline", (DiTPipeline,), {})  # cache-dit replaces the __call__ of a pipeline's class
        self.pipe = own(copy.deepcopy(transformer, shared), self.vae, scheduler)
        self.pipe.set_progress_bar_config(disable=True)
        self.call = method(self.pipe, steps)

    def run(self) -> None:
        self.call(class_labels=[207], guidance_scale=4.0, num_inference_steps=self.steps, output_type="pt",
                  generator=torch.Generator().manual_seed(0))

    @property
    def latents(self) -> Tensor:
        """The last run's, final."""
        return self.vae.seen


class Latents(nn.Module):
    """In the VAE's place: keeps the latents."""

    config = SimpleNamespace(scaling_factor=1.0, block_out_channels=(1,))
    device, dtype = torch.device("cpu"), torch.float32

    def decode(self, latents: Tensor) -> SimpleNamespace:
        self.seen = latents
        return SimpleNamespace(sample=latents[:, :3])


def watched(transformer: nn.Module, steps: int, method: Callable, row: dict, branches: tuple[str, ...],
            flops: Flops) -> tuple[Candidate, Candidate, Schedule] | None:
    """The method's candidate, ours with the same work skipped, and that schedule; None where there is nothing to
    compare, which the row then says."""
    try:
        theirs = Candidate(transformer, steps, method)
        with observed(theirs.pipe.transformer, branches) as ran:
            theirs.run()
    except Exception as error:  # whatever their code raises is the finding
        row["note"] = f"{type(error).__name__}: {error} ({row['note']})"
        return None
    compute = torch.tensor([[name in step for name in branches] for step in ran])
    row["cur"] = 1 - compute.double().mean().item()
    if compute.all():
        row["note"] = f"skips nothing: {row['note']}"
        return None
    schedule = Schedule(compute, branches, flops, torch.full(compute.shape, 1.0) if method is taylorseer else None,
                        origin=row["method"])
    return theirs, Candidate(transformer, steps, lambda pipe, steps: applied(pipe, schedule)), schedule


def applied(pipe, schedule):
    import harmonica_dit

    harmonica_dit.apply(pipe, schedule)
    return pipe


@contextmanager
def observed(transformer: nn.Module, branches: tuple[str, ...]):
    """Yields a list that gets, for each step run within the block, the set of the branches that did their work.

    A branch did where its last linear ran: caches replace the forwards of blocks and of attention.
    """
    ran: list[set[str]] = []
    handles = [transformer.pos_embed.register_forward_hook(lambda *_: ran.append(set()))]
    for name in branches:
        module = transformer.get_submodule(name)
        last = module.net[-1] if name.endswith(".ff") else module.to_out[0]
        handles.append(last.register_forward_hook(lambda *_, name=name: ran[-1].add(name)))
    try:
        yield ran
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def quiet():
    """Keeps what the libraries log out of the table; errors are told."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def lines(method: Callable) -> int:
    """Lines that a user writes for a method, the pipeline's own call not counted."""
    source = inspect.getsource(method).splitlines()
    own = [line for line in source if line.strip() and not line.strip().startswith(("def ", "return "))]
    return len(own) + (lines(in_context) if source[-1].strip() == "return in_context(pipe)" else 0)
