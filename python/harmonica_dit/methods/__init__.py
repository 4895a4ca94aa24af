"""Schedules of methods that need no training, one file each."""

from .fora import fora
from .trunk import trunk_forecast
from .uncached import uncached

__all__ = ["fora", "trunk_forecast", "uncached"]
