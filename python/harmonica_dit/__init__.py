"""HarmoniCa: learned feature caching for diffusion transformers (Huang et al., ICML 2025)."""

from importlib.util import find_spec
from typing import TYPE_CHECKING

from harmonica_kernels import __version__
from harmonica_kernels._lazy import import_when_used

if TYPE_CHECKING:
    from .load import load
    from .models import quantize
    from .pipelines import HarmoniCaConfig, disable_cache, enable_cache, summary
    from .published_routers import load_published_router
    from .router import Router
    from .sample import denoise, measure_costs, sample
    from .schedule import Schedule
    from .train import prune, train_forecaster, train_learning_to_cache, train_router

NEEDED = ("diffusers", "filelock", "matplotlib", "numpy", "PIL", "prdc", "rich", "safetensors", "torchmetrics", "typer")
for _needed in NEEDED:
    if find_spec(_needed) is None:
        raise ModuleNotFoundError(f"{_needed} is missing; pip install 'harmonica-kernels[dit]' brings it", name=_needed)

__all__ = ["HarmoniCaConfig", "Router", "Schedule", "__version__", "denoise", "disable_cache", "enable_cache", "load",
           "load_published_router", "measure_costs", "prune", "quantize", "sample", "summary", "train_forecaster",
           "train_learning_to_cache", "train_router"]

import_when_used(__name__)
