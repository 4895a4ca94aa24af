"""Accumulate the branches since the last norm, normalise, modulate: inference, in place, no autograd."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference
from .run import Term


def residual_norm(x: Tensor, run: Sequence[Term], shift: Tensor | None, scale: Tensor | None, *,
                  e: Sequence[float] | None = None, x_out: Tensor | None = None, store: Tensor | None = None,
                  h_dtype: torch.dtype | None = None, norm: bool = True, eps: float = 1e-6) -> Tensor:
    """`x_out = x + Σ gate·o` over the run; returns `h = LN(x_out)·(1 + scale) + shift`.

    x, x_out: [B, N, D]; x_out may be x itself and is required unless the run is empty (x is then only read).
    store: [B, N, D] buffer that receives `run[0].latest` on the way. e: one coefficient a term, None where all are 0.
    norm=False without shift and scale returns x_out (x where the run is empty) itself.
    """
    h_dtype = x.dtype if h_dtype is None else h_dtype
    with torch.no_grad():
        x_new, h = reference.residual_norm(x, run, [0.0] * len(run) if e is None else e, shift, scale, norm, eps)
        if store is not None:
            store.copy_(run[0].latest)
        if x_out is not None:
            x_out.copy_(x_new)
        if not norm and shift is None and scale is None and h_dtype == x.dtype:
            return x if x_out is None else x_out
        return h.to(h_dtype)
