"""What this installation is made of."""

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from .ops._library import kernels


def info() -> dict[str, Any]:
    """Version, compiled extension, instruction sets (best first), threads, CUDA, and which code runs each op."""
    try:
        installed = version("harmonica-kernels")
    except PackageNotFoundError:
        installed = "not installed (running from a source folder)"
    path = f"C++ ({kernels.isa()})"
    return {
        "version": installed,
        "extension": kernels.__file__,
        "isa": kernels.isa(),
        "isas": kernels.available_isas(),
        "threading": kernels.threading(),
        "cuda": False,
        "cuda_reason": "this version has CPU kernels only",
        "ops": {"residual_norm": path, "blend_residual_norm": path},
    }
