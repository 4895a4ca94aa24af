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

from .cache import FeatureCache, Forward, run_spans
from .checks import autocast_dtype, check_forward, check_output, is_host
from .ops import Term, blend_residual_norm, residual_norm
from .trunk import TrunkCache, TrunkWeights, base_and_terms


@dataclass(frozen=True)
class Branch:
    """One residual branch `x + gate·body(LN(x)·(1 + scale) + shift)`.

    Args:
        body: `body(h, context) -> o`, h and o of shape [B, N, D]. It must not change h, nor return h or a view of it.
            Without grad it must not keep h either: the next body's input is written into the same memory. o may be a
            buffer that its next call overwrites, as a replayed CUDA graph does.
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
                   row: Sequence[bool] | Tensor | Callable[[Tensor, Tensor], bool] | bool | None = None,
                   forecast_weights: Sequence[float | Sequence[float]] | Tensor | TrunkWeights | None = None,
                   cache: FeatureCache | TrunkCache | None = None,
                   threshold: float = 0.1, context: Any = None, eps: float = 1e-6, model: Any = None) -> Tensor:
    """Runs K residual branches and the final modulated norm: y = LN(x_K)·(1 + scale_K) + shift_K.

    Args:
        branches: the K branches in execution order.
        x: [B, N, D] float32, bfloat16 or float16 (float64 for checking gradients); it is never changed.
        mod: shift, scale and gate rows of the branches and of the final norm.
        row: None computes every branch and, if there is a cache, stores every output. A sequence of K bools is a hard
            row: True computes and stores, False reuses without calling the body. A float tensor [K] is a soft row of
            scores r, differentiable: o = r·body(h) + (1 - r)·reuse. After the backward, o renews the entries with
            r > threshold (`FeatureCache.commit`, which the next forward calls). A function decides within the forward:
            with a `FeatureCache` of runs, the first of two branches or more, the first run is computed, and
            `row(added, reference)` says whether the others are too, or are all reused. added: what the first run has
            added to x, [B, N, D]; reference: the same in the last forward that computed the others, which is what its
            entry goes on to hold.
        forecast_weights: K weights e for reuse = (1 + e)·latest - e·previous; None or 0 repeats the latest. A float
            tensor [K] is differentiable; an entry has no effect while the cache holds fewer than two outputs. With a
            hard row an entry may also be the weights (w_0, w_1, …) of the branch's last outputs, the newest first:
            reuse = Σ w_i·output_i.
        cache: one per trajectory; its first forward, with row=None, fills it. All forwards of a trajectory have x of
            one shape and dtype, one model and one autocast; and if the first runs in `torch.inference_mode`, so do the
            others. Grad may be turned on and off between them. Where a `FeatureCache` holds runs of
            branches, row and forecast_weights have an entry for each run in place of K. With a `TrunkCache` the step is
            computed whole (row=None) or forecast (row=False, then mod needs the final norm's rows alone), and
            forecast_weights are `TrunkWeights`: a forecast's, or a computed step's correction.
        threshold: τ of a soft row; a hard row does not use it.
        context: whatever the bodies need beside h; every body gets it as it is.
        eps: of the final norm.
        model: whose forward it is, such as the module itself. A cache that holds a forward of another model is refused;
            None is not compared.

    Returns:
        y [B, N, D], in the autocast dtype where autocast is on, else in x's.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it. Nothing has been changed then, except
            after a body returned a wrong output: the cache must be reset after that.
        RuntimeError: the last forward with this cache was interrupted.
        NotImplementedError: x is neither on the CPU nor on a CUDA device.

    Gradients: what a `FeatureCache` holds is constant, so none flows through it to the step that computed it. And it is
    overwritten when a later forward computes the branch again: call `backward` before the next forward with the cache.
    After that, backward raises a RuntimeError that says so. For gradients through several steps compute everything
    without a cache, or use a `TrunkCache`, whose states are not overwritten.

    On CUDA nothing here waits for the device: the kernels read soft scores and a tensor of forecast weights there.

    Source: HarmoniCa (Huang et al., ICML 2025), section 3; forecasts after TaylorSeer (Liu et al., 2025), first order.
    """
    compute = check_forward(branches, x, mod, row, forecast_weights, cache, threshold, eps, model)
    K = len(branches)
    soft, device, autocast = isinstance(row, Tensor), x.device.type, autocast_dtype(x.device.type)
    if cache is not None:
        cache._begin(Forward(x.shape, x.dtype, x.device, K), model, autocast)

    x = x.contiguous()  # a convolution's output is not, and each of the passes that read it would copy it
    trunk = cache if isinstance(cache, TrunkCache) else None
    cache = None if trunk else cache  # of the branches
    in_place_bodies = cache is not None and not soft and autocast is None and not torch.is_grad_enabled()
    stream = _Stream(x, x.dtype if autocast is None else autocast)
    if row is False:
        branches = ()
    if soft and not is_host(device):
        # read when an entry is renewed, which may wait for the backward; until then the caller may overwrite the row
        scores = row.detach().clone() if torch.is_grad_enabled() else row.detach()
    for i, (k, end) in enumerate(run_spans(None if cache is None else cache.runs, len(branches))):
        several, branch = end - k > 1, branches[k]
        if not compute[i]:
            stream.reuse(cache, i, None if several else mod.gate[k], forecast_weights)
            continue
        if several:
            before = stream.materialise()
            stream.through(branches, range(k, end), mod, context)
            added = (stream.materialise() - before).detach()
            if i == 0 and callable(row):
                if not row(added, cache.latest(0)):
                    continue  # the others are reused, as `compute` says
                compute = (True,) * len(compute)
            cache._push(i, x.dtype).copy_(added)
            continue
        h = stream.norm(mod.shift[k], mod.scale[k], branch.norm, branch.eps)
        if in_place_bodies and branch.body_out is not None and cache.dtype in (None, h.dtype):
            o = cache._push(i, h.dtype)
            branch.body_out(h, context, o)
            stream.compute(o, None, mod.gate[k])
            continue
        o = branch.body(h, context)
        check_output(o, h, x, k)
        if soft:
            stream.blend(o, row[i], cache, i, mod.gate[k], forecast_weights)
            if not is_host(device):
                stream.renew = partial(cache._renew, i, scores[i], threshold)  # the device decides
            elif row[i].item() > threshold:
                stream.renew = partial(cache._renew, i, None, threshold)
        else:
            stream.compute(o, None if cache is None else cache._push(i, o.dtype), mod.gate[k])
    if trunk:
        stream.weigh_trunk(trunk, x, row is not False, forecast_weights)
    y = stream.norm(mod.shift[K], mod.scale[K], True, eps, last=True)
    for used in (cache, trunk):
        if used is not None:
            used._end()
    return y


def trunk_state(branches: Sequence[Branch], x: Tensor, mod: Modulation, context: Any = None) -> Tensor:
    """What enters the final norm of a forward that computes every branch, [B, N, D]; the arguments are not checked."""
    stream = _Stream(x, x.dtype)
    stream.through(branches, range(len(branches)), mod, context)
    return stream.materialise()


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
              weights: Sequence[float | Sequence[float]] | Tensor | None) -> None:
        if weights is not None and isinstance(weights[k], Sequence):
            one = self.x.new_ones(1, self.x.shape[2]) if gate is None else gate
            self.run += [Term(o, None, one * w) for o, w in zip(cache.outputs(k), weights[k])]
            self.weights += [0.0] * len(weights[k])
            return
        forecast = weights is not None and (cache.filled(k) == 2 if isinstance(weights, Tensor) else weights[k] != 0)
        self.run.append(Term(cache.latest(k), cache.previous(k) if forecast else None, gate))
        self.weights.append(weights[k] if forecast else 0.0)

    def through(self, branches: Sequence[Branch], which: range, mod: Modulation, context: Any) -> None:
        """Computes some branches, one after the other; what they return is not stored."""
        for k in which:
            h = self.norm(mod.shift[k], mod.scale[k], branches[k].norm, branches[k].eps)
            o = branches[k].body(h, context)
            check_output(o, h, self.x, k)
            self.compute(o, None, mod.gate[k])

    def materialise(self) -> Tensor:
        """Adds the run to x, and returns x, into which nothing is written from now on."""
        self.norm(None, None, False, 0.0)
        self.owned = False
        return self.x

    def blend(self, o: Tensor, r: Tensor, cache: FeatureCache, k: int, gate: Tensor | None,
              weights: Sequence[float] | Tensor | None) -> None:
        self.reuse(cache, k, gate, weights)
        self.fresh, self.r = o, r

    def weigh_trunk(self, cache: TrunkCache, tokens: Tensor, computed: bool, weights: TrunkWeights | None) -> None:
        """Keeps a computed state, and lets the final norm have what the weights make of it and of the cached ones."""
        kept = list(cache._kept)  # not this step's own
        if computed:
            cache._keep(self.materialise(), tokens.clone())
        if weights is not None:
            self.x, self.run = base_and_terms(weights, self.x, kept, computed)
            self.weights = [0.0] * len(self.run)

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
        return any(isinstance(weight, Tensor) and not is_host(weight.device.type) for weight in self.weights)

    def _wants_grad(self, shift: Tensor | None, scale: Tensor | None) -> bool:
        if not torch.is_grad_enabled():
            return False
        tensors = [self.x, shift, scale, *self.weights]
        for term in self.run:
            tensors += [term.latest, term.gate]
        return any(isinstance(t, Tensor) and t.requires_grad for t in tensors)
