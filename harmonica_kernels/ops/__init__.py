"""The ops, one file each. `reference` has all of them in plain torch."""

from .bias_gelu import bias_gelu
from .blend_residual_norm import blend_residual_norm
from .cache_commit import cache_commit
from .guided_step import guided_step
from .residual_norm import residual_norm
from .run import Term

FUSED = ("cuda",)  # on these devices guided_step is one kernel, on others plain torch

__all__ = ["FUSED", "Term", "bias_gelu", "blend_residual_norm", "cache_commit", "guided_step", "residual_norm"]
