"""The methods that are compared, as their users put them on a pipeline of any class, and their settings.

Each method is the code that a user writes, `method(pipe, steps, …)`; what follows after `*` are its settings.
"""

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from diffusers import DiffusionPipeline, hooks
from diffusers.models.cache_utils import CacheMixin

from bench import other_caches

ALL_PARTS = [r".*blocks\.\d+\.(attn\w*|ff\w*|\w*_mlp)"]  # attention and feed-forward, as every model here names them


APPLY = {hooks.FirstBlockCacheConfig: hooks.apply_first_block_cache, hooks.MagCacheConfig: hooks.apply_mag_cache,
         hooks.PyramidAttentionBroadcastConfig: hooks.apply_pyramid_attention_broadcast,
         hooks.TaylorSeerCacheConfig: hooks.apply_taylorseer_cache, hooks.SeaCacheConfig: hooks.apply_sea_cache,
         hooks.FasterCacheConfig: hooks.apply_faster_cache}


def enable(pipe, config):
    """`pipe.transformer.enable_cache(config)`, or what a user calls where the transformer has no such method."""
    if isinstance(pipe.transformer, CacheMixin):
        pipe.transformer.enable_cache(config)
    else:
        APPLY[type(config)](pipe.transformer, config)


def ours(pipe, steps, *, config):
    import harmonica_dit

    harmonica_dit.enable_cache(pipe, config)


def first_block_cache(pipe, steps, *, threshold):
    from diffusers.hooks import FirstBlockCacheConfig

    enable(pipe, FirstBlockCacheConfig(threshold=threshold))


def pyramid_attention_broadcast(pipe, steps, *, every):
    from diffusers.hooks import PyramidAttentionBroadcastConfig

    config = PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=every,
                                             cross_attention_block_skip_range=every,
                                             spatial_attention_timestep_skip_range=(-1, 1001),
                                             cross_attention_timestep_skip_range=(-1, 1001),
                                             current_timestep_callback=lambda: 500)
    enable(pipe, config)


def taylorseer(pipe, steps, *, every, order=1):
    from diffusers.hooks import TaylorSeerCacheConfig

    config = TaylorSeerCacheConfig(cache_interval=every, disable_cache_before_step=1, max_order=order,
                                   taylor_factors_dtype=torch.float32, cache_identifiers=ALL_PARTS)
    enable(pipe, config)


def taylorseer_lite(pipe, steps, *, every):
    from diffusers.hooks import TaylorSeerCacheConfig

    config = TaylorSeerCacheConfig(cache_interval=every, disable_cache_before_step=1,
                                   taylor_factors_dtype=torch.float32, use_lite_mode=True)
    enable(pipe, config)


def mag_cache(pipe, steps, *, in_a_row, ratios=(1.0,), threshold=0.06, retention=0.0):
    from diffusers.hooks import MagCacheConfig

    config = MagCacheConfig(mag_ratios=list(ratios), num_inference_steps=steps, max_skip_steps=in_a_row,
                            threshold=threshold, retention_ratio=retention)
    enable(pipe, config)


def sea_cache(pipe, steps, *, threshold):
    from diffusers.hooks import SeaCacheConfig

    config = SeaCacheConfig(threshold=threshold, max_consecutive_cached=1, cache_end_steps=0)
    enable(pipe, config)


def faster_cache(pipe, steps, *, every):
    from diffusers.hooks import FasterCacheConfig

    config = FasterCacheConfig(spatial_attention_block_skip_range=every, unconditional_batch_skip_range=every,
                               spatial_attention_timestep_skip_range=(-1, 1001),
                               unconditional_batch_timestep_skip_range=(-1, 1001),
                               tensor_format="BCHW", attention_weight_callback=lambda _: 0.5,
                               current_timestep_callback=lambda: 500)
    enable(pipe, config)


def cache_dit(pipe, steps, *, threshold, in_a_row=-1, warmup=1):
    import cache_dit

    config = cache_dit.DBCacheConfig(Fn_compute_blocks=1, Bn_compute_blocks=0, residual_diff_threshold=threshold,
                                     max_warmup_steps=warmup, max_continuous_cached_steps=in_a_row,
                                     num_inference_steps=steps)
    cache_dit.enable_cache(pipe, cache_config=config)


def cache_dit_taylorseer(pipe, steps, *, threshold, in_a_row=-1, warmup=2):
    import cache_dit

    config = cache_dit.DBCacheConfig(Fn_compute_blocks=1, Bn_compute_blocks=0, residual_diff_threshold=threshold,
                                     max_warmup_steps=warmup, max_continuous_cached_steps=in_a_row,
                                     num_inference_steps=steps)
    calibrator = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=1)
    cache_dit.enable_cache(pipe, cache_config=config, calibrator_config=calibrator)


@dataclass(frozen=True)
class Rival:
    """everything: settings with which each step is computed, and whatever the method does is done nevertheless.

    second: settings that compute about every second step; `threshold=None` is to be found, see `tune`.
    """

    method: Callable[..., None]
    everything: dict
    second: dict
    note: str = ""
    package: str = "diffusers"
    thresholds: tuple[float, float] = field(default=(1e-3, 10.0))

    def lines(self, pipe: DiffusionPipeline) -> int:
        """That a user writes, the pipeline's own call not counted."""
        own = other_caches.count_lines(self.method)
        uses_context = self.package == "diffusers" and self.method is not ours
        return own + (other_caches.count_lines(other_caches.in_context) if uses_context and needs_context(pipe) else 0)


NEVER = 1e9  # no difference is above it
RIVALS: dict[str, Rival] = {
    "ours": Rival(ours, dict(config=1.0), dict(config=1.81), "a speedup of 1.81 is every second of 20 steps"),
    "diffusers FirstBlockCache": Rival(first_block_cache, dict(threshold=0.0), dict(threshold=None),
                                       "block 0 is computed at every step; the threshold is found by trying"),
    "diffusers PyramidAttentionBroadcast": Rival(pyramid_attention_broadcast, dict(every=1), dict(every=2),
                                                 "attention alone, self- and cross-, at every second step"),
    "diffusers TaylorSeer": Rival(taylorseer, dict(every=1), dict(every=2),
                                  "attention and feed-forward, named by the user; first order"),
    "diffusers TaylorSeer, lite": Rival(taylorseer_lite, dict(every=1), dict(every=2),
                                        "forecasts the output of a last layer that is called proj_out"),
    "diffusers MagCache": Rival(mag_cache, dict(in_a_row=0), dict(in_a_row=1), "not calibrated, ratios of 1"),
    "diffusers SeaCache": Rival(sea_cache, dict(threshold=0.0), dict(threshold=NEVER), "at most 1 step in a row"),
    "diffusers FasterCache": Rival(faster_cache, dict(every=1), dict(every=2), "attention, and the negative prompt"),
    "cache-dit DBCache": Rival(cache_dit, dict(threshold=0.0), dict(threshold=NEVER, in_a_row=1),
                               "F1B0; at most 1 cached step in a row", "cache-dit"),
    "cache-dit DBCache + TaylorSeer": Rival(cache_dit_taylorseer, dict(threshold=0.0),
                                            dict(threshold=NEVER, in_a_row=1), "F1B0, first order", "cache-dit"),
}


def needs_context(pipe: DiffusionPipeline) -> bool:
    """Whether the pipeline does not tell diffusers' caches which of a step's calls it makes."""
    return "cache_context" not in inspect.getsource(type(pipe).__call__)


def put(rival: Rival, pipe: DiffusionPipeline, steps: int, settings: dict) -> DiffusionPipeline:
    """A pipeline of the same parts, with a copy of the transformer that shares its weights, and the method on it.

    Its class is its own, because cache-dit replaces the `__call__` of a pipeline's class. Where the pipeline needs a
    context, it is called in one, as `other_caches.in_context` does.
    """
    shared = {id(p): p for p in (*pipe.transformer.parameters(), *pipe.transformer.buffers())}
    base, theirs = type(pipe), copy.copy(pipe)
    theirs.__class__ = type(base.__name__, (base,), {"__module__": base.__module__})
    theirs.register_modules(transformer=copy.deepcopy(pipe.transformer, shared),
                            scheduler=copy.deepcopy(pipe.scheduler))
    rival.method(theirs, steps, **settings)
    if rival.package == "diffusers" and rival.method is not ours and needs_context(pipe):
        type(theirs).__call__ = in_context(base.__call__)
    return theirs


def in_context(call: Callable) -> Callable:
    def run(self, *args, **kwargs):
        hooks.HookRegistry.check_if_exists_or_initialize(self.transformer).reset_stateful_hooks()
        with CacheMixin.cache_context(self.transformer, "both"):
            return call(self, *args, **kwargs)
    return run


def tune(rival: Rival, settings: dict, share: Callable[[dict], float], wanted: float, trials: int = 8) -> dict:
    """The settings with the threshold, of those tried, at which the computed share is nearest to the one wanted.

    share: of these settings. A larger threshold computes less.
    """
    low, high = rival.thresholds
    found: list[tuple[float, float]] = []
    for _ in range(trials):
        middle = (low * high) ** 0.5
        computed = share(settings | dict(threshold=middle))
        found.append((abs(computed - wanted), middle))
        low, high = (middle, high) if computed > wanted else (low, middle)
    return settings | dict(threshold=min(found)[1])
