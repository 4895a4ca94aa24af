"""Accumulate the branches since the last norm, normalise, modulate: inference, in place, no autograd."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ._arguments import Arguments, Dense, Pointers, refusal
from ._library import kernels, library
from .run import Term


def residual_norm(x: Tensor, run: Sequence[Term], shift: Tensor | None, scale: Tensor | None, *,
                  forecast_weights: Sequence[float] | None = None, x_out: Tensor | None = None,
                  store: Tensor | None = None, h_out: Tensor | None = None, h_dtype: torch.dtype | None = None,
                  norm: bool = True, eps: float = 1e-6) -> Tensor:
    """`x_out = x + Σ gate·o` over the run; returns `h = LN(x_out)·(1 + scale) + shift` of adaLN (Peebles & Xie, 2023).

    One pass over memory, whatever the run's length. Sums and statistics are float32, or float64 if x is.

    x: [B, N, D]. run: terms whose latest and previous are [B, N, D], gate [B or 1, D] or None for 1.
    shift, scale: [B or 1, D], or None for 0.
    forecast_weights: one e a term, o = (1 + e)·latest - e·previous; None where all are 0.
    x_out: [B, N, D], may be x itself; None if the sum is not needed afterwards (x is only read).
    store: [B, N, D] buffer of any storage dtype, receives a copy of run[0].latest; run[0]'s forecast weight must be 0.
    h_out: [B, N, D] buffer for h, which saves the page faults of a new one; None makes a new one.
    h_dtype: dtype of h and h_out, x's by default. norm=False leaves the LN out. Without shift and scale too, and if
    h_dtype is x_out's, h is x_out itself. With an empty run and no x_out it is x itself, and nothing is computed.

    On CUDA, activations that are not contiguous are copied first.

    Raises ValueError (shapes, overlap, forecast weights, a device other than x's), TypeError (dtypes),
    NotImplementedError (neither CPU nor CUDA), and RuntimeError if a gradient is asked for: `blend_residual_norm` is
    differentiable.
    """
    if torch.is_grad_enabled() and _requires_grad(x, run, shift, scale):
        raise RuntimeError("residual_norm is for inference and gives no gradients: call it under torch.no_grad(), or "
                           "use blend_residual_norm")
    if x_out is x and not run:
        x_out = None  # nothing is added
    x_new = x if x_out is None else x_out
    h_dtype = x.dtype if h_dtype is None else h_dtype
    if h_out is not None and h_out.dtype != h_dtype:
        raise TypeError(f"residual_norm: h_out is {h_out.dtype}, expected {h_dtype} like h")
    if norm or shift is not None or scale is not None or h_dtype != x_new.dtype or (run and x_out is None):
        h = torch.empty(x.shape, dtype=h_dtype, device=x.device) if h_out is None else h_out
    elif x_out is None:
        return x
    else:
        h = None
    _op(None if x_out is x else x, x_out, h, store, [term.latest for term in run], [term.previous for term in run],
        [0.0] * len(run) if forecast_weights is None else forecast_weights, [term.gate for term in run], shift, scale,
        norm, eps)
    return x_new if h is None else h


def _requires_grad(x: Tensor, run: Sequence[Term], shift: Tensor | None, scale: Tensor | None) -> bool:
    tensors = [x, shift, scale]
    for term in run:
        tensors += term
    return any(t is not None and t.requires_grad for t in tensors)


# x = None: in place. h = None: no norm.
library.define(
    "residual_norm(Tensor? x, Tensor(a!)? x_out, Tensor(b!)? h, Tensor(c!)? store, Tensor[] latest, "
    "Tensor?[] previous, float[] forecast_weights, Tensor?[] gate, Tensor? shift, Tensor? scale, bool norm, "
    "float eps) -> ()")
_op = torch.ops.harmonica.residual_norm.default


def _pack(kind: type[Arguments], x, x_out, h, store, latest, previous, weights, gate, shift, scale, norm,
          eps) -> tuple:
    """Checks the op's arguments and packs them as the first nine arguments of a device's kernel."""
    like = x_out if x is None else x
    pack = kind("residual_norm", like)
    if store is not None and (not latest or (kind is not Arguments and weights[0] != 0)):
        raise ValueError("residual_norm: store receives run[0].latest, so the run must not be empty and its "
                         "forecast weight must be 0")
    out = pack.activation(x_out, "x_out", out=True)
    return pack, (
        tuple(like.shape), out if x is None else pack.activation(x, "x"), out, pack.activation(h, "h", out=True),
        pack.activation(store, "store", out=True), pack.terms(latest, previous, weights, gate), None, 0.0,
        (pack.rows(shift, "shift"), pack.rows(scale, "scale"), norm, eps))


def _cpu(x, x_out, h, store, *rest) -> None:
    pack, packed = _pack(Pointers, x, x_out, h, store, *rest)
    kernels.residual_norm(*packed, torch.get_num_threads())
    _count_writes(x_out, h, store)


def _cuda(x, x_out, h, store, *rest) -> None:
    from .. import triton_kernels

    pack, packed = _pack(Dense, x, x_out, h, store, *rest)
    pack.refuse_overlap()
    triton_kernels.residual_norm(*packed)
    pack.finish()
    _count_writes(x_out, h, store)


def _count_writes(*outputs: Tensor | None) -> None:
    """Counts a write, as PyTorch's in-place ops do: a backward that needs an overwritten tensor must raise."""
    torch.autograd.graph.increment_version([t for t in outputs if t is not None])


def _fake(*arguments) -> None:
    _pack(Arguments, *arguments)


library.impl("residual_norm", _cpu, "CPU")
library.impl("residual_norm", _cuda, "CUDA")
library.impl("residual_norm", refusal("residual_norm"), "CompositeExplicitAutograd")
torch.library.register_fake("harmonica::residual_norm", _fake, lib=library)
