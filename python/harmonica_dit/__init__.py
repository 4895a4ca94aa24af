"""HarmoniCa: learned feature caching for diffusion transformers (Huang et al., ICML 2025)."""

from .models import load
from .sample import sample

__all__ = ["load", "sample"]
