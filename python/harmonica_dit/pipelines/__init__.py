"""diffusers' pipelines and transformers: a schedule on a pipeline or on a loop of your own, and denoisers to train on.

    apply.py      `apply`, a schedule on a pipeline
    scheduled.py  `scheduled`, a schedule on whoever calls a transformer
    denoiser.py   a pipeline's transformer behind the denoisers' signature; prompts.py its text conditions
    adapters/     diffusers' transformers run branch by branch
"""

from .apply import HarmoniCaConfig, apply, remove
from .scheduled import scheduled

__all__ = ["HarmoniCaConfig", "apply", "remove", "scheduled"]
