"""Blend, accumulate, normalise, modulate: the training twin of `residual_norm`, functional and differentiable."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._arguments import Arguments, Dense, Pointers, refusal
from ._library import kernels, library
from .run import Term


def blend_residual_norm(x: Tensor, run: Sequence[Term], shift: Tensor | None, scale: Tensor | None, *,
                        forecast_weights: Tensor | None = None, fresh: Tensor | None = None,
                        r: Tensor | None = None, h_dtype: torch.dtype | None = None, norm: bool = True,
                        eps: float = 1e-6) -> tuple[Tensor, Tensor, Tensor | None]:
    """(x', h, o): `x' = x + Σ gate·o` over the run, in x's dtype, and `h = LN(x')·(1 + scale) + shift`.

    Differentiable in x, every latest and gate, fresh, r, forecast_weights, shift and scale, not in previous. Forward
    takes one pass over memory, backward one (on CUDA one a term). Sums are float32, or float64 if x is.

    x: [B, N, D]. run: terms whose latest and previous are [B, N, D], gate [B or 1, D] or None for 1.
    shift, scale: [B or 1, D], or None for 0.
    forecast_weights: [len(run)], e in o = (1 + e)·latest - e·previous; None where all are 0.
    fresh: [B, N, D], r: one element; both or neither. With them the first term's output is blended,
    o = r·fresh + (1 - r)·((1 + e)·latest - e·previous) (HarmoniCa, Huang et al., 2025). It is returned for the
    cache, in fresh's dtype and without gradient; otherwise o is None.
    h_dtype: dtype of h, x's by default. norm=False leaves the LN out.
    An empty run returns x itself for x'; norm=False without shift and scale returns x' itself for h.

    On CUDA the kernel reads r and forecast_weights, and Python does not wait for them. So the weight of a term without
    previous output counts as 0 there; on the CPU, one other than 0 is an error. Activations on CUDA that are not
    contiguous are copied first.

    Raises ValueError (shapes, forecast weights, a device other than x's), TypeError (dtypes), NotImplementedError
    (neither CPU nor CUDA).
    """
    if (fresh is None) != (r is None):
        raise ValueError(f"blend_residual_norm: fresh and r go together, got {'r' if fresh is None else 'fresh'} alone")
    if fresh is not None and not run:
        raise ValueError("blend_residual_norm: fresh is blended with the run's first term, and the run is empty")
    h_dtype = x.dtype if h_dtype is None else h_dtype
    makes_h = norm or shift is not None or scale is not None or h_dtype != x.dtype
    if not run and not makes_h:
        return x, x, None
    previous, forecasts = _drop_none([term.previous for term in run])
    gate, has_gate = _drop_none([term.gate for term in run])
    if torch.is_grad_enabled() and any(t.requires_grad for t in previous):
        raise ValueError("blend_residual_norm: run[j].previous is a cached output and has no gradient here; detach it")
    problem = _Problem(x, [term.latest for term in run], previous, forecasts, forecast_weights, gate, has_gate, fresh,
                       r, shift, scale, norm, eps)
    x_new, h, o = _op(*problem, h_dtype if makes_h else None)
    if not run:
        x_new = x
    return x_new, h if makes_h else x_new, None if fresh is None else o


def _drop_none(tensors: Sequence[Tensor | None]) -> tuple[list[Tensor], list[bool]]:
    """The tensors that are not None, and for each entry whether it is one.

    torch.library differentiates only lists without None.
    """
    return [t for t in tensors if t is not None], [t is not None for t in tensors]


def _restore_none(present: Sequence[Tensor], mask: Sequence[bool]) -> list[Tensor | None]:
    """The inverse of `_drop_none`."""
    tensors = iter(present)
    return [next(tensors) if there else None for there in mask]


class _Problem(NamedTuple):
    """The arguments that forward and backward share, in the order of the ops' schemas."""

    x: Tensor  # in the backward: x'
    latest: list[Tensor]
    previous: list[Tensor]
    forecasts: list[bool]  # for each term, whether it has one of `previous`
    forecast_weights: Tensor | None
    gate: list[Tensor]
    has_gate: list[bool]  # for each term, whether it has one of `gate`
    fresh: Tensor | None
    r: Tensor | None
    shift: Tensor | None
    scale: Tensor | None
    norm: bool
    eps: float

    def pack(self, kind: type[Arguments], op: str) -> tuple:
        """Checks and packs for a device's kernels. Returns the packer, the kernels' arguments, the forecast weights."""
        pack = kind(op, self.x)
        weights = pack.scalars(self.forecast_weights, "forecast_weights", len(self.latest))
        score = pack.scalars(self.r, "r")
        on_host = kind is Pointers and self.forecast_weights is not None
        terms = pack.terms(self.latest, _restore_none(self.previous, self.forecasts),
                           weights if on_host else [0.0] * len(self.latest), _restore_none(self.gate, self.has_gate))
        norm = pack.rows(self.shift, "shift"), pack.rows(self.scale, "scale"), self.norm, self.eps
        return pack, (terms, pack.activation(self.fresh, "fresh"), 0.0 if self.r is None else score, norm), weights

    def outputs(self, h_dtype: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor]:
        """Buffers for x', h and o; an empty tensor for one that is not computed."""
        def new(wanted: bool, dtype: torch.dtype) -> Tensor:
            return torch.empty(self.x.shape if wanted else 0, dtype=dtype, device=self.x.device)

        dtype = self.x.dtype
        return (new(bool(self.latest), dtype), new(h_dtype is not None, dtype if h_dtype is None else h_dtype),
                new(self.fresh is not None, dtype if self.fresh is None else self.fresh.dtype))

    def gradients(self, wanted: Sequence[bool]) -> "_Gradients":
        """Buffers for the gradients that are wanted."""
        of = [self.x, self.fresh, self.r, self.forecast_weights, self.shift, self.scale, *self.latest, *self.gate]
        made = [torch.empty_like(t, memory_format=torch.contiguous_format) if wants else None
                for t, wants in zip(of, wanted, strict=True)]
        return _Gradients(*made[:6], made[6:6 + len(self.latest)], made[6 + len(self.latest):])


class _Gradients(NamedTuple):
    """The gradients of a problem's tensors, None if not wanted; in the order of `wanted`."""

    x: Tensor | None
    fresh: Tensor | None
    r: Tensor | None
    forecast_weights: Tensor | None
    shift: Tensor | None
    scale: Tensor | None
    latest: list[Tensor | None]
    gate: list[Tensor | None]  # only of the terms that have a gate

    def present(self) -> list[Tensor]:
        return [t for t in (*self[:6], *self.latest, *self.gate) if t is not None]


# An op may not return one of its arguments. A result that is not computed is an empty tensor: x_new if the run is empty
# (the caller takes x instead), h without h_dtype (the caller takes x_new), and o if nothing is blended.
PROBLEM = ("Tensor x, Tensor[] latest, Tensor[] previous, bool[] forecasts, Tensor? forecast_weights, Tensor[] gate, "
           "bool[] has_gate, Tensor? fresh, Tensor? r, Tensor? shift, Tensor? scale, bool norm, float eps")
library.define(f"blend_residual_norm({PROBLEM}, ScalarType? h_dtype) -> (Tensor x_new, Tensor h, Tensor o)")
library.define(f"blend_residual_norm_backward(Tensor? dx_new, Tensor? dh, {PROBLEM}, bool[] wanted) -> Tensor[]")
_op = torch.ops.harmonica.blend_residual_norm.default
_backward_op = torch.ops.harmonica.blend_residual_norm_backward.default


def _cpu(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    problem, h_dtype = _Problem(*arguments[:-1]), arguments[-1]
    pack, packed, _ = problem.pack(Pointers, "blend_residual_norm")
    x_new, h, o = outputs = problem.outputs(h_dtype)
    kernels.residual_norm(
        tuple(problem.x.shape), pack.activation(problem.x, "x"),
        pack.activation(x_new if problem.latest else None, "x_new"),
        pack.activation(None if h_dtype is None else h, "h"),
        pack.activation(None if problem.fresh is None else o, "o"), *packed, torch.get_num_threads())
    return outputs


def _cuda(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    from .. import triton_kernels

    problem, h_dtype = _Problem(*arguments[:-1]), arguments[-1]
    pack, packed, weights = problem.pack(Dense, "blend_residual_norm")
    x_new, h, o = outputs = problem.outputs(h_dtype)
    triton_kernels.residual_norm(
        tuple(problem.x.shape), pack.activation(problem.x, "x"), x_new if problem.latest else None,
        None if h_dtype is None else h, None if problem.fresh is None else o, *packed, weights)
    return outputs


def _fake(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    problem, h_dtype = _Problem(*arguments[:-1]), arguments[-1]
    pack, *_ = problem.pack(Arguments, "blend_residual_norm")
    outputs = problem.outputs(h_dtype)
    pack.activation(problem.x, "x")
    return outputs


def _backward_cpu(dx_new, dh, *arguments) -> list[Tensor]:
    problem, wanted = _Problem(*arguments[:-1]), arguments[-1]
    pack, packed, _ = problem.pack(Pointers, "blend_residual_norm_backward")
    d = problem.gradients(wanted)
    sum_r, sums_e = kernels.residual_norm_backward(
        tuple(problem.x.shape), pack.activation(dx_new, "dx_new"), pack.activation(dh, "dh"),
        pack.activation(problem.x, "x_new"), *packed, pack.activation(d.x, "dx"), pack.activation(d.fresh, "dfresh"),
        [pack.activation(t, "dlatest", j) for j, t in enumerate(d.latest)], pack.rows(d.shift, "dshift"),
        pack.rows(d.scale, "dscale"),
        [pack.rows(t, "dgate", j) for j, t in enumerate(_restore_none(d.gate, problem.has_gate))],
        d.r is not None or d.forecast_weights is not None, torch.get_num_threads())
    if d.r is not None:
        d.r.fill_(sum_r)
    if d.forecast_weights is not None:
        d.forecast_weights.copy_(torch.tensor(sums_e, dtype=torch.float64))
    return d.present()


def _backward_cuda(dx_new, dh, *arguments) -> list[Tensor]:
    from .. import triton_kernels

    problem, wanted = _Problem(*arguments[:-1]), arguments[-1]
    pack, packed, weights = problem.pack(Dense, "blend_residual_norm_backward")
    d = problem.gradients(wanted)
    triton_kernels.residual_norm_backward(
        tuple(problem.x.shape), pack.activation(dx_new, "dx_new"), pack.activation(dh, "dh"),
        pack.activation(problem.x, "x_new"), *packed, weights, d.x, d.fresh, d.latest, d.shift, d.scale,
        _restore_none(d.gate, problem.has_gate), d.r, d.forecast_weights)
    return d.present()


def _backward_fake(dx_new, dh, *arguments) -> list[Tensor]:
    problem, wanted = _Problem(*arguments[:-1]), arguments[-1]
    pack, *_ = problem.pack(Arguments, "blend_residual_norm_backward")
    pack.activation(dx_new, "dx_new")
    pack.activation(dh, "dh")
    return problem.gradients(wanted).present()


def _setup_context(ctx, inputs, output) -> None:
    problem, h_dtype = _Problem(*inputs[:-1]), inputs[-1]
    x_new, h, o = output
    ctx.mark_non_differentiable(*([] if problem.latest else [x_new]), *([h] if h_dtype is None else []), o)
    ctx.set_materialize_grads(False)
    ctx.terms, ctx.forecasts, ctx.has_gate = len(problem.latest), problem.forecasts, problem.has_gate
    ctx.norm, ctx.eps = problem.norm, problem.eps
    ctx.save_for_backward(x_new if problem.latest else problem.x, problem.forecast_weights, problem.fresh, problem.r,
                          problem.shift, problem.scale, *problem.latest, *problem.previous, *problem.gate)


def _saved(ctx) -> tuple[Tensor | None, ...]:
    """What the forward has saved; RuntimeError if it has been overwritten since."""
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise RuntimeError(
            "blend_residual_norm: what this backward needs has been overwritten. A cached output is, once a later "
            "forward with the same cache computes its branch. Call backward() after each step, before the next forward "
            "with the cache; what is reused counts as constant. For gradients through several steps compute "
            "everything, without a cache (row=None, cache=None), or use a TrunkCache"
        ) from error


def _backward(ctx, dx_new, dh, _) -> tuple:
    x_new, weights, fresh, r, shift, scale, *lists = _saved(ctx)
    terms, end = ctx.terms, ctx.terms + sum(ctx.forecasts)
    problem = _Problem(x_new, lists[:terms], lists[terms:end], ctx.forecasts, weights, lists[end:], ctx.has_gate, fresh,
                       r, shift, scale, ctx.norm, ctx.eps)
    wants = _Problem(*ctx.needs_input_grad[: len(problem)])
    wanted = [wants.x, wants.fresh, wants.r, wants.forecast_weights, wants.shift, wants.scale, *wants.latest,
              *wants.gate]
    found = iter([] if dx_new is None and dh is None else _backward_op(dx_new, dh, *problem, wanted))
    dx, dfresh, dr, dweights, dshift, dscale, *rest = [next(found, None) if wants else None for wants in wanted]
    mask = None if terms else []  # torch.library takes an empty list of bools for a list of tensors
    return (dx, rest[:terms], [None] * len(problem.previous), mask, dweights, rest[terms:], mask, dfresh, dr, dshift,
            dscale, None, None, None)


def _no_second_derivative(ctx, *_):
    raise NotImplementedError("blend_residual_norm: second derivatives are not supported")


library.impl("blend_residual_norm", _cpu, "CPU")
library.impl("blend_residual_norm", _cuda, "CUDA")
library.impl("blend_residual_norm", refusal("blend_residual_norm"), "CompositeExplicitAutograd")
library.impl("blend_residual_norm_backward", _backward_cpu, "CPU")
library.impl("blend_residual_norm_backward", _backward_cuda, "CUDA")
torch.library.register_fake("harmonica::blend_residual_norm", _fake, lib=library)
torch.library.register_fake("harmonica::blend_residual_norm_backward", _backward_fake, lib=library)
torch.library.register_autograd("harmonica::blend_residual_norm", _backward, setup_context=_setup_context, lib=library)
torch.library.register_autograd("harmonica::blend_residual_norm_backward", _no_second_derivative, lib=library)
