"""diffusers' pipelines and transformers: schedules for a pipeline or for your own loop, and denoisers to train on.

    apply.py      `apply` makes a pipeline run a schedule
    scheduled.py  `scheduled` makes a transformer run a schedule, whoever calls it
    denoiser.py   makes a denoiser of a pipeline's transformer
    prompts.py    the text conditions of such a denoiser
    adapters/     run diffusers' transformers branch by branch
"""

from .apply import HarmoniCaConfig, apply, remove
from .scheduled import scheduled

__all__ = ["HarmoniCaConfig", "apply", "remove", "scheduled"]
