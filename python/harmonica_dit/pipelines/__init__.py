"""diffusers' pipelines and transformers: a cache on a pipeline or on a loop, and denoisers to train on.

    enable.py            `enable_cache`, `disable_cache`, `summary`
    config.py            what is wanted: a speedup or a schedule
    cached_pipeline.py   hears when a pipeline's steps begin and end
    trajectories.py      which trajectory and step a transformer's call belongs to, in a pipeline or in a loop
    plans.py             the adapter, the costs and the schedule of a trajectory
    calls.py             a call: what tells it from the others of its step
    streams.py           runs a step's calls, each with its own cache
    summary.py           what was done
    denoiser.py          makes a denoiser of a pipeline's transformer, on the fused path
    prompts.py           the text conditions of such a denoiser
    loop_denoiser.py     makes one of any other pipeline
    trainable.py         what it has to be for that
    own_loop.py          runs a pipeline's own loop up to a step
    conditions.py        the prompts of such a denoiser
    step_cache.py        the caches of a step's calls as one
    adapters/            run diffusers' transformers, branch by branch or as a whole
"""

from .config import HarmoniCaConfig
from .enable import disable_cache, enable_cache, summary

__all__ = ["HarmoniCaConfig", "disable_cache", "enable_cache", "summary"]
