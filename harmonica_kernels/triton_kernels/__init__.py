"""The CUDA kernels of the ops, in Triton, one file each: the kernel and the function that launches it.

    residual_norm.py            residual_norm and blend_residual_norm, forward: one pass, a program a row
    residual_norm_backward.py   one pass a term; a program sums over its tokens, torch.sum adds these sums up
    gated_norm.py               residual_norm of a gated trajectory, where only the device knows the run
    cache_commit.py bias_gelu.py guided_step.py
    _row.py                     a row in registers, which the norms share
    _launch.py                  what the launchers share

`ops` checks the arguments and makes them dense (`ops._arguments.Dense`); nothing is checked here. Every activation is a
contiguous [B, N, D], so a row's address is its number times D. D is a constant of the compilation, so the compiler
proves 16-byte alignment and needs no strides. Sums are float32 whatever the storage, or float64 if x is.

Imported when the first CUDA tensor comes, since `import harmonica_kernels` needs torch alone.
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
