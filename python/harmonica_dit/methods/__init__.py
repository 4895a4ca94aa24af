"""Schedules of methods that need no training, one file each."""

from .fora import fora
from .uncached import uncached

__all__ = ["fora", "uncached"]
