"""HarmoniCa: learned feature caching for diffusion transformers (Huang et al., ICML 2025)."""

from .models import load
from .models.adapters.scheduled import scheduled
from .pipelines import HarmoniCaConfig, apply, remove
from .router import Router
from .sample import denoise, sample
from .schedule import Schedule
from .train import train_router

__all__ = ["HarmoniCaConfig", "Router", "Schedule", "apply", "denoise", "load", "remove", "sample", "scheduled",
           "train_router"]
