"""HarmoniCa: learned feature caching for diffusion transformers (Huang et al., ICML 2025)."""

from .load import load
from .pipelines import HarmoniCaConfig, apply, remove, scheduled
from .published_routers import load_published_router
from .router import Router
from .sample import denoise, sample
from .schedule import Schedule
from .train import train_forecaster, train_router

__all__ = ["HarmoniCaConfig", "Router", "Schedule", "apply", "denoise", "load", "load_published_router", "remove",
           "sample", "scheduled", "train_forecaster", "train_router"]
