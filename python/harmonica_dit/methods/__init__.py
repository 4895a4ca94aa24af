"""Methods that need no training, one file each. Some are calibrated: they sample a few images."""

from typing import TYPE_CHECKING

from harmonica_kernels._lazy import import_when_used

if TYPE_CHECKING:
    from .delta_dit import delta_dit
    from .first_block import first_block
    from .fora import fora
    from .smoothcache import smoothcache
    from .step_search import step_search
    from .taylorseer import taylorseer
    from .trunk import trunk_forecast
    from .uncached import uncached

__all__ = ["delta_dit", "first_block", "fora", "smoothcache", "step_search", "taylorseer", "trunk_forecast",
           "uncached"]

import_when_used(__name__)
