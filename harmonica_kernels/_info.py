"""What this installation is made of."""

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from .ops._library import kernels


def cuda_missing() -> str | None:
    """Why no CUDA graph can be gated here, in words; None where one can."""
    build = kernels.cuda_build()
    if not build["runtime"]:
        return "the extension was built without nvcc (12.4 or newer); put it on the PATH and install again"
    if not build["driver"]:
        return "there is no NVIDIA driver"
    version = lambda number: f"{number // 1000}.{number % 1000 // 10}"
    if build["driver"] < build["needed"]:
        return (f"the driver is too old: it serves CUDA {version(build['driver'])}, {version(build['needed'])} is "
                f"needed by an extension built with {version(build['runtime'])}")
    if build["error"] or not build["devices"]:
        return f"there is no GPU ({build['error'] or 'the driver lists none'})"
    return None


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
        "cuda": cuda_missing() is None,
        "cuda_reason": cuda_missing() or "",
        "cuda_build": kernels.cuda_build(),
        "ops": {"residual_norm": path, "blend_residual_norm": path},
    }
