"""A transformer forward whose residual branches are computed, reused or blended, as a row says.

The row is one step of a schedule (hard), one step of a router's scores (soft), or None (the plain transformer). One
fused call joins two computed bodies, however many reused branches lie between them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cache import FeatureCache
from .ops import Term, blend_residual_norm, residual_norm

STORAGE = (torch.float32, torch.bfloat16, torch.float16)
# Python reads scores on these devices without waiting. On others the device decides which entries are renewed.
HOST = ("cpu",)


@dataclass(frozen=True)
class Branch:
    """One residual branch `x + gate·body(LN(x)·(1 + scale) + shift)`.

    Args:
        body: `body(h, context) -> o`, h and o of shape [B, N, D]. It must not change h, nor return h or a view of it.
            Without grad it must not keep h either: the next body's input is written into the same memory.
        body_out: `body_out(h, context, out)` writes o into `out` instead, a contiguous [B, N, D] cache buffer of h's
            dtype. Hard rows and row=None use it with a cache of that dtype, without grad and outside autocast.
        norm: whether the body gets the norm of x. Without norm and modulation rows the body gets x itself.
        gate: whether the modulation has a gate row for this branch.
        eps: of the norm.
    """

    body: Callable[[Tensor, Any], Tensor]
    body_out: Callable[[Tensor, Any, Tensor], None] | None = None
    norm: bool = True
    gate: bool = True
    eps: float = 1e-6


class Modulation(NamedTuple):
    """The conditioning's rows, each [B or 1, D] (any row stride), or None where a branch has none.

    shift, scale: K + 1 rows each; the last one belongs to the final norm. gate: K rows.
    """

    shift: Sequence[Tensor | None]
    scale: Sequence[Tensor | None]
    gate: Sequence[Tensor | None]


def cached_forward(branches: Sequence[Branch], x: Tensor, mod: Modulation, *,
                   row: Sequence[bool] | Tensor | None = None,
                   forecast_weights: Sequence[float] | Tensor | None = None, cache: FeatureCache | None = None,
                   threshold: float = 0.1, context: Any = None, eps: float = 1e-6) -> Tensor:
    """Runs K residual branches and the final modulated norm: y = LN(x_K)·(1 + scale_K) + shift_K.

    Args:
        branches: the K branches in execution order.
        x: [B, N, D] float32, bfloat16 or float16 (float64 for checking gradients); it is never changed.
        mod: shift, scale and gate rows of the branches and of the final norm.
        row: None computes every branch and, if there is a cache, stores every output. A sequence of K bools is a hard
            row: True computes and stores, False reuses without calling the body. A float tensor [K] is a soft row of
            scores r, differentiable: o = r·body(h) + (1 - r)·reuse. After the backward, o renews the entries with
            r > threshold (`FeatureCache.commit`, which the next forward calls).
        forecast_weights: K weights e for reuse = (1 + e)·latest - e·previous; None or 0 repeats the latest. A float
            tensor [K] is differentiable; an entry has no effect while the cache holds fewer than two outputs.
        cache: one per trajectory; its first forward, with row=None, fills it.
        threshold: τ of a soft row; a hard row does not use it.
        context: whatever the bodies need beside h; every body gets it as it is.
        eps: of the final norm.

    Returns:
        y [B, N, D], in the autocast dtype where autocast is on, else in x's.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it. Nothing has been changed then, except
            after a body returned a wrong output: the cache must be reset after that.
        RuntimeError: the last forward with this cache was interrupted.
        NotImplementedError: x is neither on the CPU nor on a CUDA device.

    On CUDA nothing here waits for the device: the kernels read soft scores and a tensor of forecast weights there.

    Source: HarmoniCa (Huang et al., ICML 2025), section 3; forecasts after TaylorSeer (Liu et al., 2025), first order.
    """
    K = len(branches)
    compute = _check(branches, x, mod, row, forecast_weights, cache, threshold)
    soft = isinstance(row, Tensor)
    if cache is not None:
        cache._begin(x, K)

    device = x.device.type
    autocast = torch.is_autocast_enabled(device)
    in_place_bodies = cache is not None and not soft and not autocast and not torch.is_grad_enabled()
    stream = _Stream(x, torch.get_autocast_dtype(device) if autocast else x.dtype)
    for k, branch in enumerate(branches):
        if not compute[k]:
            stream.reuse(cache, k, mod.gate[k], forecast_weights)
            continue
        h = stream.norm(mod.shift[k], mod.scale[k], branch.norm, branch.eps)
        if in_place_bodies and branch.body_out is not None and cache.dtype in (None, h.dtype):
            o = cache._push(k, h.dtype)
            branch.body_out(h, context, o)
            stream.compute(o, None, mod.gate[k])
            continue
        o = branch.body(h, context)
        _check_output(o, h, x, k)
        if soft:
            stream.blend(o, row[k], cache, k, mod.gate[k], forecast_weights)
            if device not in HOST:
                stream.renew = partial(cache._renew, k, row[k].detach(), threshold)  # the device decides
            elif row[k].item() > threshold:
                stream.renew = partial(cache._renew, k, None, threshold)
        else:
            stream.compute(o, None if cache is None else cache._push(k, o.dtype), mod.gate[k])
    y = stream.norm(mod.shift[K], mod.scale[K], True, eps, last=True)
    if cache is not None:
        cache._end()
    return y


class _Stream:
    """The residual stream x and the run of branch outputs that has not been added to it yet."""

    def __init__(self, x: Tensor, h_dtype: torch.dtype):
        self.x, self.owned, self.h_dtype = x, False, h_dtype
        self.h: Tensor | None = None  # the buffer in which every body gets its input
        self._clear()

    def _clear(self) -> None:
        self.run: list[Term] = []
        self.weights: list[float | Tensor] = []  # forecast weights, one a term
        self.store: Tensor | None = None  # the cache slot for the run's first output
        self.fresh: Tensor | None = None  # r blends it with the run's first term
        self.r: Tensor | None = None
        self.renew: Callable[[Tensor], None] | None = None  # renews an entry with the blended output

    def compute(self, o: Tensor, store: Tensor | None, gate: Tensor | None) -> None:
        self.run.append(Term(o, None, gate))
        self.weights.append(0.0)
        self.store = store

    def reuse(self, cache: FeatureCache, k: int, gate: Tensor | None,
              weights: Sequence[float] | Tensor | None) -> None:
        forecast = weights is not None and (cache.filled(k) == 2 if isinstance(weights, Tensor) else weights[k] != 0)
        self.run.append(Term(cache.latest(k), cache.previous(k) if forecast else None, gate))
        self.weights.append(weights[k] if forecast else 0.0)

    def blend(self, o: Tensor, r: Tensor, cache: FeatureCache, k: int, gate: Tensor | None,
              weights: Sequence[float] | Tensor | None) -> None:
        self.reuse(cache, k, gate, weights)
        self.fresh, self.r = o, r

    def norm(self, shift: Tensor | None, scale: Tensor | None, norm: bool, eps: float, last: bool = False) -> Tensor:
        """Adds the run to x and returns the modulated norm: the one fused call between two bodies."""
        h_dtype = self.h_dtype if norm or shift is not None or scale is not None else self.x.dtype
        if self.fresh is not None or self._wants_grad(shift, scale) or self._weights_on_device():
            h = self._functional(shift, scale, h_dtype, norm, eps)
        else:
            x_out = None
            if self.run and not last:
                x_out = self.x if self.owned else torch.empty_like(self.x, memory_format=torch.contiguous_format)
            weights = [float(weight) for weight in self.weights]
            h_out = self.h if self.h is not None and self.h.dtype == h_dtype else None
            h = residual_norm(self.x, self.run, shift, scale, forecast_weights=weights, x_out=x_out, store=self.store,
                              h_out=h_out, h_dtype=h_dtype, norm=norm, eps=eps)
            if x_out is not None:
                self.x, self.owned = x_out, True
            if h is not self.x and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
                self.h = h  # with grad a body may have saved h; a compiler plans memory itself
        self._clear()
        return h

    def _functional(self, shift: Tensor | None, scale: Tensor | None, h_dtype: torch.dtype, norm: bool,
                    eps: float) -> Tensor:
        weights = None
        if any(isinstance(weight, Tensor) or weight != 0 for weight in self.weights):
            exact = torch.float64 if self.x.dtype == torch.float64 else torch.float32
            # torch.full fills on the device; as_tensor would copy from the host
            weights = torch.stack([weight.to(exact) if isinstance(weight, Tensor) else
                                   torch.full((), weight, dtype=exact, device=self.x.device)
                                   for weight in self.weights])
        self.x, h, o = blend_residual_norm(self.x, self.run, shift, scale, forecast_weights=weights, fresh=self.fresh,
                                           r=self.r, h_dtype=h_dtype, norm=norm, eps=eps)
        self.owned = False  # autograd may have saved x
        if self.store is not None:
            self.store.copy_(self.run[0].latest.detach())
        if self.renew is not None:
            self.renew(o)
        return h

    def _weights_on_device(self) -> bool:
        """Whether reading a forecast weight as a number would wait for the device."""
        return any(isinstance(weight, Tensor) and weight.device.type not in HOST for weight in self.weights)

    def _wants_grad(self, shift: Tensor | None, scale: Tensor | None) -> bool:
        if not torch.is_grad_enabled():
            return False
        tensors = [self.x, shift, scale, *self.weights]
        for term in self.run:
            tensors += [term.latest, term.gate]
        return any(isinstance(t, Tensor) and t.requires_grad for t in tensors)


def _check(branches, x, mod, row, forecast_weights, cache, threshold) -> Sequence[bool]:
    """Raises on wrong arguments, before anything is changed. Returns for each branch whether its body is called."""
    K = len(branches)
    if not isinstance(x, Tensor) or x.dim() != 3 or not x.is_floating_point():
        what = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x: got {what}, expected a float tensor [B, N, D]")
    if x.device.type not in ("cpu", "cuda"):
        raise NotImplementedError(f"x: is on {x.device}; there are kernels for the CPU and for CUDA")
    if x.dtype not in (*STORAGE, torch.float64):
        raise TypeError(f"x: got {x.dtype}, expected float32, bfloat16 or float16 (float64 for checking gradients)")
    _check_modulation(branches, x, mod)
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold: got {threshold}, expected a number from 0 to 1")
    if cache is not None:
        cache._check(x, K)
        cache.commit()
    compute = _check_row(K, row, cache)
    _check_forecast_weights(K, forecast_weights, cache, compute, isinstance(row, Tensor))
    return compute


def _check_modulation(branches, x, mod) -> None:
    K, (B, _, D) = len(branches), x.shape
    dtypes = (torch.float64,) if x.dtype == torch.float64 else STORAGE
    for name, rows, count in (("shift", mod.shift, K + 1), ("scale", mod.scale, K + 1), ("gate", mod.gate, K)):
        if len(rows) != count:
            raise ValueError(f"mod.{name}: got {len(rows)} rows, expected {count} for {K} branches")
        for k, row in enumerate(rows):
            if row is not None and (row.dim() != 2 or row.shape[0] not in (1, B) or row.shape[1] != D):
                raise ValueError(f"mod.{name}[{k}]: got shape {tuple(row.shape)}, expected [{B} or 1, {D}]")
            if row is not None and (row.device != x.device or row.dtype not in dtypes):
                raise TypeError(f"mod.{name}[{k}]: got {row.dtype} on {row.device}, expected one of {dtypes} on "
                                f"{x.device}")
    for k, branch in enumerate(branches):
        if branch.gate != (mod.gate[k] is not None):
            raise ValueError(f"mod.gate[{k}]: got {'no row' if branch.gate else 'a row'}, but branch {k} "
                             f"says gate={branch.gate}")


def _check_row(K, row, cache) -> Sequence[bool]:
    if row is None:
        return (True,) * K
    if isinstance(row, Tensor) and not row.is_floating_point():
        raise TypeError(f"row: got a tensor of {row.dtype}; a hard row is a tuple of Python bools "
                        "(tensor.tolist()), a soft row a float tensor")
    if (tuple(row.shape) != (K,)) if isinstance(row, Tensor) else (len(row) != K):
        got = f"shape {tuple(row.shape)}" if isinstance(row, Tensor) else f"{len(row)} entries"
        raise ValueError(f"row: got {got}, expected {K}, one for each branch")
    if isinstance(row, Tensor):
        if row.device.type in HOST and not torch.compiler.is_compiling() and not row.isfinite().all():
            raise ValueError(f"row: scores must be finite, got {row.tolist()}")
        if cache is None:
            raise ValueError("row: a soft row blends with cached outputs; pass cache=FeatureCache()")
    else:
        for k, entry in enumerate(row):
            if not isinstance(entry, bool):
                raise TypeError(f"row[{k}]: got {entry!r}, expected a Python bool; for soft scores pass one tensor")
        if cache is None and not all(row):
            raise ValueError("row: the row reuses branches; pass cache=FeatureCache()")
    compute = (True,) * K if isinstance(row, Tensor) else row
    for k in range(K):
        if (isinstance(row, Tensor) or not row[k]) and not cache.filled(k):
            raise ValueError(f"row[{k}]: the cache holds no output of branch {k} yet; the first forward of a "
                             "trajectory computes everything (row=None)")
    return compute


def _check_forecast_weights(K, weights, cache, compute, soft) -> None:
    if weights is None:
        return
    if len(weights) != K:
        raise ValueError(f"forecast_weights: got {len(weights)}, expected {K}, one for each branch")
    if isinstance(weights, Tensor):
        if weights.device.type in HOST and not torch.compiler.is_compiling() and not weights.isfinite().all():
            raise ValueError(f"forecast_weights: must be finite, got {weights.tolist()}")
        return
    for k, e in enumerate(weights):
        if not -1e6 < e < 1e6:  # NaN fails too
            raise ValueError(f"forecast_weights[{k}]: got {e}, expected a finite number")
        if e != 0 and (soft or not compute[k]) and (cache is None or cache.filled(k) < 2):
            held = 0 if cache is None else cache.filled(k)
            raise ValueError(f"forecast_weights[{k}]: a forecast needs the branch's last two computed outputs, the "
                             f"cache holds {held}" + (" (FeatureCache(history=2) keeps two)"
                                                if cache is None or cache.history == 1 else ""))


def _check_output(o, h, x, k) -> None:
    if not isinstance(o, Tensor) or o.shape != x.shape:
        what = f"shape {tuple(o.shape)}" if isinstance(o, Tensor) else type(o).__name__
        raise ValueError(f"branches[{k}].body: returned {what}, expected a tensor of shape {tuple(x.shape)}")
    if o is h or (not torch.compiler.is_compiling()
                  and o.untyped_storage().data_ptr() == h.untyped_storage().data_ptr()):
        raise ValueError(f"branches[{k}].body: returned its input or a view of it; x is accumulated in place, so a "
                         "body must return a tensor of its own")
