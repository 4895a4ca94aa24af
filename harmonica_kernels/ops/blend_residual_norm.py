"""Blend, accumulate, normalise, modulate: the training twin of `residual_norm`, functional and differentiable."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ._arguments import Arguments, Dense, Pointers, elsewhere
from ._library import kernels, library
from .run import Term


def blend_residual_norm(x: Tensor, run: Sequence[Term], shift: Tensor | None, scale: Tensor | None, *,
                        e: Tensor | None = None, fresh: Tensor | None = None, r: Tensor | None = None,
                        h_dtype: torch.dtype | None = None, norm: bool = True,
                        eps: float = 1e-6) -> tuple[Tensor, Tensor, Tensor | None]:
    """(x', h, o): `x' = x + Σ gate·o` over the run, in x's dtype, and `h = LN(x')·(1 + scale) + shift`.

    Differentiable in x, every latest and gate, fresh, r, e, shift and scale, not in previous; one pass over memory
    forward and one backward, sums in float32 (in float64 where x is).

    x: [B, N, D]. run: terms whose latest and previous are [B, N, D], gate [B or 1, D] or None for 1.
    shift, scale: [B or 1, D], or None for 0.
    e: [len(run)] extrapolation coefficients, o = (1 + e)·latest - e·previous; None where all are 0.
    fresh: [B, N, D], r: one element; both or neither. With them the first term's output is the soft gate's
    o = r·fresh + (1 - r)·((1 + e)·latest - e·previous) (HarmoniCa, Huang et al., 2025), and is returned in
    fresh's dtype and without gradient, for the cache; else o is None.
    h_dtype: dtype of h, x's by default. norm=False leaves the LN out.
    An empty run returns x itself for x'; norm=False without shift and scale returns x' itself for h.

    On CUDA, r and e are read there, without waiting for them: a coefficient of a term without previous output counts
    as 0 (on the CPU it is an error). Activations that are not contiguous are copied first.

    Raises ValueError (shapes, coefficients, a device beside x's), TypeError (dtypes), NotImplementedError (neither CPU
    nor CUDA).
    """
    if (fresh is None) != (r is None):
        raise ValueError(f"blend_residual_norm: fresh and r go together, got {'r' if fresh is None else 'fresh'} alone")
    if fresh is not None and not run:
        raise ValueError("blend_residual_norm: fresh is blended with the run's first term, and the run is empty")
    h_dtype = x.dtype if h_dtype is None else h_dtype
    makes_h = norm or shift is not None or scale is not None or h_dtype != x.dtype
    if not run and not makes_h:
        return x, x, None
    previous, forecast = _present([term.previous for term in run])
    gate, gated = _present([term.gate for term in run])
    if torch.is_grad_enabled() and any(t.requires_grad for t in previous):
        raise ValueError("blend_residual_norm: run[j].previous is a cached output and has no gradient here; detach it")
    x_new, h, o = _op(x, [term.latest for term in run], previous, forecast, e, gate, gated, fresh, r, shift, scale,
                      h_dtype if makes_h else None, norm, eps)
    if not run:
        x_new = x
    return x_new, h if makes_h else x_new, None if fresh is None else o


def _present(tensors: Sequence[Tensor | None]) -> tuple[list[Tensor], list[bool]]:
    """Those that are there, and for each whether it is: torch.library differentiates lists without None only."""
    return [t for t in tensors if t is not None], [t is not None for t in tensors]


def _spread(present: Sequence[Tensor], mask: Sequence[bool]) -> list[Tensor | None]:
    """The inverse of `_present`."""
    tensors = iter(present)
    return [next(tensors) if there else None for there in mask]


# `forecast` and `gated` say which terms the previous outputs and the gates belong to. Where x_new is x (an empty run),
# h is x_new (h_dtype None) or nothing is blended, that result is an empty tensor: an op may not return its argument.
library.define(
    "blend_residual_norm(Tensor x, Tensor[] latest, Tensor[] previous, bool[] forecast, Tensor? e, Tensor[] gate, "
    "bool[] gated, Tensor? fresh, Tensor? r, Tensor? shift, Tensor? scale, ScalarType? h_dtype, bool norm, float eps) "
    "-> (Tensor x_new, Tensor h, Tensor o)")
# The gradients that `wanted` marks, in the order x, fresh, r, e, shift, scale, latest.., gate..
library.define(
    "blend_residual_norm_backward(Tensor? dx_new, Tensor? dh, Tensor x_new, Tensor[] latest, Tensor[] previous, "
    "bool[] forecast, Tensor? e, Tensor[] gate, bool[] gated, Tensor? fresh, Tensor? r, Tensor? shift, Tensor? scale, "
    "bool norm, float eps, bool[] wanted) -> Tensor[]")
_op = torch.ops.harmonica.blend_residual_norm.default
_backward_op = torch.ops.harmonica.blend_residual_norm_backward.default


def _outputs(x, latest, fresh, h_dtype) -> tuple[Tensor, Tensor, Tensor]:
    def new(wanted: bool, dtype: torch.dtype) -> Tensor:
        return torch.empty(x.shape if wanted else 0, dtype=dtype, device=x.device)

    return (new(bool(latest), x.dtype), new(h_dtype is not None, x.dtype if h_dtype is None else h_dtype),
            new(fresh is not None, x.dtype if fresh is None else fresh.dtype))


def _pack(kind: type[Arguments], op, x, latest, previous, forecast, e, gate, gated, fresh, r, shift, scale, norm,
          eps) -> tuple:
    """The arguments that forward and backward share, checked and packed: terms, fresh, r and the norm's; and e."""
    pack = kind(op, x)
    weights, score = pack.scalars(e, "e", len(latest)), pack.scalars(r, "r")
    terms = pack.terms(latest, _spread(previous, forecast), weights if kind is Pointers and e is not None
                       else [0.0] * len(latest), _spread(gate, gated))
    return pack, (terms, pack.activation(fresh, "fresh"), 0.0 if r is None else score,
                  (pack.rows(shift, "shift"), pack.rows(scale, "scale"), norm, eps)), weights


def _cpu(x, latest, previous, forecast, e, gate, gated, fresh, r, shift, scale, h_dtype, norm, eps):
    pack, packed, _ = _pack(Pointers, "blend_residual_norm", x, latest, previous, forecast, e, gate, gated, fresh, r,
                            shift, scale, norm, eps)
    x_new, h, o = outputs = _outputs(x, latest, fresh, h_dtype)
    kernels.residual_norm(
        tuple(x.shape), pack.activation(x, "x"), pack.activation(x_new if latest else None, "x_new"),
        pack.activation(None if h_dtype is None else h, "h"), pack.activation(None if fresh is None else o, "o"),
        *packed, torch.get_num_threads())
    return outputs


def _cuda(x, latest, previous, forecast, e, gate, gated, fresh, r, shift, scale, h_dtype, norm, eps):
    from .. import triton

    pack, packed, weights = _pack(Dense, "blend_residual_norm", x, latest, previous, forecast, e, gate, gated, fresh, r,
                                  shift, scale, norm, eps)
    x_new, h, o = outputs = _outputs(x, latest, fresh, h_dtype)
    triton.residual_norm(tuple(x.shape), pack.activation(x, "x"), x_new if latest else None,
                         None if h_dtype is None else h, None if fresh is None else o, *packed, weights)
    return outputs


def _fake(x, latest, previous, forecast, e, gate, gated, fresh, r, shift, scale, h_dtype, norm, eps):
    pack, *_ = _pack(Arguments, "blend_residual_norm", x, latest, previous, forecast, e, gate, gated, fresh, r, shift,
                     scale, norm, eps)
    outputs = _outputs(x, latest, fresh, h_dtype)
    pack.activation(x, "x")
    return outputs


def _gradients(x_new, latest, e, gate, fresh, r, shift, scale, wanted) -> list[Tensor | None]:
    of = [x_new, fresh, r, e, shift, scale, *latest, *gate]
    return [torch.empty_like(t, memory_format=torch.contiguous_format) if wants else None
            for t, wants in zip(of, wanted, strict=True)]


def _backward_cpu(dx_new, dh, x_new, latest, previous, forecast, e, gate, gated, fresh, r, shift, scale, norm, eps,
                  wanted):
    pack, packed, _ = _pack(Pointers, "blend_residual_norm_backward", x_new, latest, previous, forecast, e, gate, gated,
                            fresh, r, shift, scale, norm, eps)
    gradients = _gradients(x_new, latest, e, gate, fresh, r, shift, scale, wanted)
    dx, dfresh, dr, de, dshift, dscale = gradients[:6]
    dlatest, dgate = gradients[6:6 + len(latest)], _spread(gradients[6 + len(latest):], gated)
    sum_r, sums_e = kernels.residual_norm_backward(
        tuple(x_new.shape), pack.activation(dx_new, "dx_new"), pack.activation(dh, "dh"),
        pack.activation(x_new, "x_new"), *packed, pack.activation(dx, "dx"), pack.activation(dfresh, "dfresh"),
        [pack.activation(t, "dlatest", j) for j, t in enumerate(dlatest)], pack.rows(dshift, "dshift"),
        pack.rows(dscale, "dscale"), [pack.rows(t, "dgate", j) for j, t in enumerate(dgate)],
        dr is not None or de is not None, torch.get_num_threads())
    if dr is not None:
        dr.fill_(sum_r)
    if de is not None:
        de.copy_(torch.tensor(sums_e, dtype=torch.float64))
    return [t for t in gradients if t is not None]


def _backward_cuda(dx_new, dh, x_new, latest, previous, forecast, e, gate, gated, fresh, r, shift, scale, norm, eps,
                   wanted):
    from .. import triton

    pack, packed, weights = _pack(Dense, "blend_residual_norm_backward", x_new, latest, previous, forecast, e, gate,
                                  gated, fresh, r, shift, scale, norm, eps)
    gradients = _gradients(x_new, latest, e, gate, fresh, r, shift, scale, wanted)
    dx, dfresh, dr, de, dshift, dscale = gradients[:6]
    dlatest, dgate = gradients[6:6 + len(latest)], _spread(gradients[6 + len(latest):], gated)
    triton.residual_norm_backward(
        tuple(x_new.shape), pack.activation(dx_new, "dx_new"), pack.activation(dh, "dh"),
        pack.activation(x_new, "x_new"), *packed, weights, dx, dfresh, dlatest, dshift, dscale, dgate, dr, de)
    return [t for t in gradients if t is not None]


def _backward_fake(dx_new, dh, x_new, latest, previous, forecast, e, gate, gated, fresh, r, shift, scale, norm, eps,
                   wanted):
    pack, *_ = _pack(Arguments, "blend_residual_norm_backward", x_new, latest, previous, forecast, e, gate, gated,
                     fresh, r, shift, scale, norm, eps)
    pack.activation(dx_new, "dx_new")
    pack.activation(dh, "dh")
    gradients = _gradients(x_new, latest, e, gate, fresh, r, shift, scale, wanted)
    return [t for t in gradients if t is not None]


def _setup_context(ctx, inputs, output) -> None:
    x, latest, previous, ctx.forecast, e, gate, ctx.gated, fresh, r, shift, scale, h_dtype, ctx.norm, ctx.eps = inputs
    x_new, h, o = output
    ctx.mark_non_differentiable(*([] if latest else [x_new]), *([h] if h_dtype is None else []), o)
    ctx.set_materialize_grads(False)
    ctx.terms, ctx.gates, ctx.forecasts = len(latest), len(gate), len(previous)
    ctx.save_for_backward(x_new if latest else x, e, fresh, r, shift, scale, *latest, *previous, *gate)


def _backward(ctx, dx_new, dh, _):
    x_new, e, fresh, r, shift, scale, *lists = ctx.saved_tensors
    latest, previous = lists[:ctx.terms], lists[ctx.terms:ctx.terms + ctx.forecasts]
    gate = lists[ctx.terms + ctx.forecasts:]
    (x_wants, latest_wants, _, _, e_wants, gate_wants, _, fresh_wants, r_wants, shift_wants,
     scale_wants) = ctx.needs_input_grad[:11]
    wanted = [x_wants, fresh_wants, r_wants, e_wants, shift_wants, scale_wants, *latest_wants, *gate_wants]
    found = iter([] if dx_new is None and dh is None else _backward_op(
        dx_new, dh, x_new, latest, previous, ctx.forecast, e, gate, ctx.gated, fresh, r, shift, scale, ctx.norm,
        ctx.eps, wanted))
    dx, dfresh, dr, de, dshift, dscale, *rest = [next(found, None) if wants else None for wants in wanted]
    mask = None if ctx.terms else []  # torch.library takes any empty list for a list of tensors
    return (dx, rest[:ctx.terms], [None] * ctx.forecasts, mask, de, rest[ctx.terms:], mask, dfresh, dr, dshift, dscale,
            None, None, None)


def _no_second_derivative(ctx, *_):
    raise NotImplementedError("blend_residual_norm: second derivatives are not supported")


library.impl("blend_residual_norm", _cpu, "CPU")
library.impl("blend_residual_norm", _cuda, "CUDA")
library.impl("blend_residual_norm", elsewhere("blend_residual_norm"), "CompositeExplicitAutograd")
library.impl("blend_residual_norm_backward", _backward_cpu, "CPU")
library.impl("blend_residual_norm_backward", _backward_cuda, "CUDA")
torch.library.register_fake("harmonica::blend_residual_norm", _fake, lib=library)
torch.library.register_fake("harmonica::blend_residual_norm_backward", _backward_fake, lib=library)
torch.library.register_autograd("harmonica::blend_residual_norm", _backward, setup_context=_setup_context, lib=library)
torch.library.register_autograd("harmonica::blend_residual_norm_backward", _no_second_derivative, lib=library)
