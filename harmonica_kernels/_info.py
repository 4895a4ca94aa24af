"""What this installation is made of."""

import importlib.util
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from .ops._library import kernels


def info() -> dict[str, Any]:
    """Version, compiled extension, instruction sets (best first), threads, CUDA, and which code runs each op.

    cuda: whether CUDA tensors can be used here; if not, cuda_reason says what is missing. gated and gated_reason say
    the same about device-gated graphs, which need an extension built with nvcc (gated_build).
    """
    try:
        installed = version("harmonica-kernels")
    except PackageNotFoundError:
        installed = "not installed (running from a source folder)"
    reason = _why_no_cuda()
    cuda = "" if reason else f"; CUDA: Triton {version('triton')}"
    compiled = dict.fromkeys(("residual_norm", "blend_residual_norm", "bias_gelu"), f"CPU: C++ ({kernels.isa()}){cuda}")
    plain = dict.fromkeys(("cache_commit", "guided_step"), f"CPU: plain torch{cuda}")
    return {
        "version": installed,
        "extension": kernels.__file__,
        "isa": kernels.isa(),
        "isas": kernels.available_isas(),
        "threading": kernels.threading(),
        "cuda": not reason,
        "cuda_reason": reason,
        "gated": not why_not_gated(),
        "gated_reason": why_not_gated(),
        "gated_build": kernels.cuda_build(),
        "ops": compiled | plain,
    }


def _why_no_cuda() -> str:
    if torch.version.cuda is None:
        return "this PyTorch is built without CUDA"
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    return ""


def why_not_gated() -> str:
    """Why device-gated graphs cannot run here; empty if they can."""
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
    return ""
