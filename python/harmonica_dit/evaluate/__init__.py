"""How good and how fast cached sampling is, in figures and in pictures."""

from .compare import compare
from .metrics import Judge, psnr, rmse
from .named_methods import Method, fewer_steps, fora_methods, from_file, read_schedule

__all__ = ["Judge", "Method", "compare", "fewer_steps", "fora_methods", "from_file", "psnr", "read_schedule", "rmse"]
