"""Kernels for diffusion transformers that reuse residual branches between denoising steps."""

from ._info import info
from .cache import FeatureCache
from .forward import Branch, Modulation, cached_forward
from .graphs import compile

__all__ = ["Branch", "FeatureCache", "Modulation", "cached_forward", "compile", "info"]
