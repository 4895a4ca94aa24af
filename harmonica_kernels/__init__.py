"""Kernels for diffusion transformers that reuse residual branches between denoising steps."""

from typing import TYPE_CHECKING

from ._lazy import import_when_used

if TYPE_CHECKING:
    from ._info import info
    from .cache import FeatureCache
    from .forward import Branch, Modulation, cached_forward
    from .graphs import compile
    from .trunk import TrunkCache, TrunkWeights

__version__ = "0.1.0"
__all__ = ["Branch", "FeatureCache", "Modulation", "TrunkCache", "TrunkWeights", "cached_forward", "compile", "info"]

import_when_used(__name__)
