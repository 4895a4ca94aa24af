"""What this installation is made of."""

import importlib.util
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from .ops._library import kernels


def info() -> dict[str, Any]:
    """Version, compiled extension, instruction sets (best first), threads, CUDA, and which code runs each op.

    cuda: whether CUDA tensors can be used here; if not, cuda_reason says what is missing.
    """
    try:
        installed = version("harmonica-kernels")
    except PackageNotFoundError:
        installed = "not installed (running from a source folder)"
    reason = _why_no_cuda()
    cuda = "" if reason else f"; CUDA: Triton {version('triton')}"
    compiled, plain = f"CPU: C++ ({kernels.isa()}){cuda}", f"CPU: plain torch{cuda}"
    return {
        "version": installed,
        "extension": kernels.__file__,
        "isa": kernels.isa(),
        "isas": kernels.available_isas(),
        "threading": kernels.threading(),
        "cuda": not reason,
        "cuda_reason": reason,
        "ops": {"residual_norm": compiled, "blend_residual_norm": compiled, "cache_commit": plain, "bias_gelu": plain,
                "guided_step": plain},
    }


def _why_no_cuda() -> str:
    if torch.version.cuda is None:
        return "this PyTorch is built without CUDA"
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    return ""
