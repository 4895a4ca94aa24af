"""The `harmonica` operator library, and the compiled kernels behind it."""

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import torch

SOURCE = Path(__file__).resolve().parents[2]  # of the package that is imported


def what_to_do() -> str:
    """How to come by the compiled kernels: they are missing, or installed where another folder comes first."""
    try:
        installed = Path(str(distribution("harmonica-kernels").locate_file("harmonica_kernels")))
    except PackageNotFoundError:
        installed = SOURCE / "harmonica_kernels"
    if any(installed.glob("_C.*")) and installed.resolve().parent != SOURCE:
        return (f"This is the source folder {SOURCE}, which Python looks into before {installed.parent}, where the "
                "package is installed: work in another folder, or `pip install -e .` in this one.")
    return ("They are built by `pip install .` for use from other folders, or by `pip install -e .` for work in the "
            "project's own; a C++ compiler (g++ or clang++) is needed.")


try:
    from .. import _C as kernels
except ImportError as error:
    raise ImportError(
        f"harmonica_kernels' compiled kernels could not be loaded ({error}). {what_to_do()}") from error

library = torch.library.Library("harmonica", "DEF")

__all__ = ["kernels", "library"]
