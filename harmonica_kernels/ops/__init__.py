"""The ops, one file each. `reference` holds all of them in plain torch."""

from .blend_residual_norm import blend_residual_norm
from .residual_norm import residual_norm
from .run import Term

__all__ = ["Term", "blend_residual_norm", "residual_norm"]
