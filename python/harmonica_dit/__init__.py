"""HarmoniCa: learned feature caching for diffusion transformers (Huang et al., ICML 2025)."""

from .load import load
from .models import quantize
from .pipelines import HarmoniCaConfig, disable_cache, enable_cache, summary
from .published_routers import load_published_router
from .router import Router
from .sample import denoise, measure_costs, sample
from .schedule import Schedule
from .train import prune, train_forecaster, train_learning_to_cache, train_router

__all__ = ["HarmoniCaConfig", "Router", "Schedule", "denoise", "disable_cache", "enable_cache", "load",
           "load_published_router", "measure_costs", "prune", "quantize", "sample", "summary", "train_forecaster",
           "train_learning_to_cache", "train_router"]
