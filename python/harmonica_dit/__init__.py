"""HarmoniCa: learned feature caching for diffusion transformers (Huang et al., ICML 2025)."""

from .models import load
from .router import Router
from .sample import denoise, sample
from .schedule import Schedule
from .train import train_router

__all__ = ["Router", "Schedule", "denoise", "load", "sample", "train_router"]
