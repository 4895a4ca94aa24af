"""Caches of diffusers and cache-dit, as their users put them on a pipeline, and ours.

Each method is the code that a user writes: `method(pipe, steps)` sets it up and returns what is called in the
pipeline's place.
"""

import inspect
from collections.abc import Callable

import torch


def nothing(pipe, steps):
    return pipe


def ours(pipe, schedule):
    import harmonica_dit

    harmonica_dit.enable_cache(pipe, schedule)
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


def count_lines(method: Callable) -> int:
    """Lines that a user writes for a method, the pipeline's own call not counted."""
    source = inspect.getsource(method).splitlines()
    own = [line for line in source if line.strip() and not line.strip().startswith(("def ", "return "))]
    return len(own) + (count_lines(in_context) if source[-1].strip() == "return in_context(pipe)" else 0)
