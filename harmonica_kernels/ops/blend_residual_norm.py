"""Blend, accumulate, normalise, modulate: the training twin of `residual_norm`, functional and differentiable."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference
from .run import Term


def blend_residual_norm(x: Tensor, run: Sequence[Term], shift: Tensor | None, scale: Tensor | None, *,
                        e: Tensor | None = None, fresh: Tensor | None = None, r: Tensor | None = None,
                        h_dtype: torch.dtype | None = None, norm: bool = True,
                        eps: float = 1e-6) -> tuple[Tensor, Tensor, Tensor | None]:
    """(x', h, o): `x' = x + Σ gate·o` over the run, `h = LN(x')·(1 + scale) + shift`.

    fresh [B, N, D], r (one element): with them the first output is `o = r·fresh + (1 - r)·reuse`, returned without
    grad in fresh's dtype; otherwise o is None. e: float tensor [len(run)] of extrapolation coefficients.
    """
    weights = [0.0] * len(run) if e is None else list(e.unbind())
    if fresh is None:
        x_new, h = reference.residual_norm(x, run, weights, shift, scale, norm, eps)
        o = None
    else:
        x_new, h, o = reference.blend_residual_norm(x, run, weights, shift, scale, fresh, r, norm, eps)
        o = o.detach().to(fresh.dtype)
    return x_new.to(x.dtype), h.to(x.dtype if h_dtype is None else h_dtype), o
