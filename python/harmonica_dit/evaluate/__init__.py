"""How good and how fast cached sampling is, in figures and in pictures."""

from typing import TYPE_CHECKING

from harmonica_kernels._lazy import import_when_used

if TYPE_CHECKING:
    from .bootstrap import interval
    from .compare import compare
    from .extractors import Inception, load_clip
    from .metrics import Judge, image_errors, rmse
    from .named_methods import Method, fewer_steps, fora_methods, from_file, read_schedule
    from .reference import Reference

__all__ = ["Inception", "Judge", "Method", "Reference", "compare", "fewer_steps", "fora_methods",
           "from_file", "image_errors", "interval", "load_clip", "read_schedule", "rmse"]

import_when_used(__name__)
