"""The CUDA kernels of the ops, in Triton, one file each: the kernel, and the function that launches it.

    residual_norm.py            both residual_norm and blend_residual_norm, forward: one pass, rows to programs
    residual_norm_backward.py   one pass a term; sums over tokens by program, added up in a fixed order afterwards
    cache_commit.py bias_gelu.py guided_step.py
    _launch.py                  what the launchers share

`ops` checks and makes dense what these functions are given (`ops._arguments.Dense`); nothing is checked here. Every
activation is a contiguous [B, N, D], so a row's address is its number times D: with D a constant of the compilation the
compiler proves 16-byte alignment and needs no strides. Sums are float32 whatever the storage, float64 where x is.

Imported with the first CUDA tensor, for `import harmonica_kernels` needs torch alone.
"""

try:
    import triton  # noqa: F401
except ImportError as error:
    raise ImportError("harmonica_kernels: CUDA tensors need Triton, which could not be imported; `pip install triton` "
                      "(PyTorch's CUDA builds for Linux bring the one that fits them)") from error

from .bias_gelu import bias_gelu
from .cache_commit import cache_commit
from .guided_step import guided_step
from .residual_norm import residual_norm
from .residual_norm_backward import residual_norm_backward

__all__ = ["bias_gelu", "cache_commit", "guided_step", "residual_norm", "residual_norm_backward"]
