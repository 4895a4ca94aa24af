"""Kernels for diffusion transformers that reuse residual branches between denoising steps."""

from .cache import FeatureCache
from .forward import Branch, Modulation, cached_forward

__all__ = ["Branch", "FeatureCache", "Modulation", "cached_forward"]
