"""The `harmonica` operator library, and the compiled kernels behind it."""

import torch

try:
    from .. import _C as kernels
except ImportError as error:
    raise ImportError(
        f"harmonica_kernels' compiled kernels could not be loaded ({error}). They are built by `pip install .` in the "
        "project's folder, or, for work on it, `pip install -e .`; a C++ compiler (g++ or clang++) is needed."
    ) from error

library = torch.library.Library("harmonica", "DEF")

__all__ = ["kernels", "library"]
