"""residual_norm when the host does not know the run: the kernel reads its start, slots, weights and the step.

The norm before branch k adds the branches start[k]..k-1. If a branch has been computed in this step, start[k] is the
one computed last. Its output still lies where the body left it, and this kernel copies it into its cache slot. If none
has been computed, x has not been written in this step, and the kernel takes the embedding instead.

The kernel takes four terms of the run at a time, so that their loads are in flight together. A table in device memory
says where outputs and gate rows lie, as distances in values from the arena and from the first gate rows. It does not
hold addresses, since the compiler would not know that a pointer made from a loaded address is aligned. ALIGNED promises
that all distances and strides are multiples of 16.
Bytes as in `residual_norm`, plus x's copy in the first norm of a step.
"""

import triton
import triton.language as tl
from torch import Tensor

from ._launch import accumulator, device_of

TERMS = 4  # at a time


@triton.jit(do_not_specialize=["k", "tokens", "branches"])
def _kernel(embedded, x, h, arena, gates, entries, compute, start, slot, e, step, shift, shift_step, shift_batch, scale,
            scale_step, scale_batch, k, tokens, branches, values, ALIGNED: tl.constexpr,
            HISTORY: tl.constexpr, WRITE_X: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr,
            D: tl.constexpr, BLOCK: tl.constexpr, TERMS: tl.constexpr):
    row = tl.program_id(0)
    col = tl.arange(0, BLOCK)
    mask = col < D
    at = row.to(tl.int64) * D + col
    batch = (row // tokens).to(tl.int64)
    s = tl.load(step).to(tl.int64)
    first = tl.load(start + k)
    computed = (tl.load(compute + first) * (first < k)).to(tl.int32)  # 0 or 1; D times it is a mask's width

    sum = tl.load(embedded + at, col < D * (1 - computed), other=0.0).to(ACC)
    sum += tl.load(x + at, col < D * computed, other=0.0).to(ACC)
    for begin in range(first, k, TERMS):
        for i in tl.static_range(TERMS):
            j = begin + i
            there = (j < k).to(tl.int32)
            fresh = computed * (j == first).to(tl.int32)
            kept = tl.load(slot + j, j < k, other=0).to(tl.int64)
            latest = (kept * branches + j) * values
            entry = entries + 4 * j
            left, gate = tl.load(entry, j < k, other=0), tl.load(entry + 1, j < k, other=0)
            by_step, by_batch = tl.load(entry + 2, j < k, other=0), tl.load(entry + 3, j < k, other=0)
            if ALIGNED:
                left, gate = tl.multiple_of(left, 16), tl.multiple_of(gate, 16)
                by_step, by_batch = tl.multiple_of(by_step, 16), tl.multiple_of(by_batch, 16)
            o = tl.load(arena + latest + at, col < D * (there - fresh), other=0.0)
            o += tl.load(arena + left + at, col < D * fresh, other=0.0)
            tl.store(arena + latest + at, o, col < D * fresh * (left != latest).to(tl.int32))
            o = o.to(ACC)
            if HISTORY == 2:
                weight = tl.load(e + j, j < k, other=0.0).to(ACC)
                before = tl.load(arena + ((1 - kept) * branches + j) * values + at,
                                 col < D * (weight != 0).to(tl.int32), other=0.0).to(ACC)
                o = (1 + weight) * o - weight * before
            has_gate = there * (by_step >= 0).to(tl.int32)
            sum += o * tl.load(gates + gate + s * by_step + batch * by_batch + col, col < D * has_gate,
                               other=1.0).to(ACC)
    if WRITE_X:
        tl.store(x + at, sum.to(x.dtype.element_ty), mask)

    if h is not None:
        y = sum
        if NORM:
            mean = tl.sum(sum, 0) / D
            y = tl.where(mask, sum - mean, 0.0)
            y *= tl.rsqrt(tl.sum(y * y, 0) / D + EPS)
        if scale is not None:
            y *= 1 + tl.load(scale + s * scale_step + batch * scale_batch + col, mask, other=0.0).to(ACC)
        if shift is not None:
            y += tl.load(shift + s * shift_step + batch * shift_batch + col, mask, other=0.0).to(ACC)
        tl.store(h + at, y.to(h.dtype.element_ty), mask)


def gated_norm(k: int, embedded: Tensor, x: Tensor, h: Tensor | None, arena: Tensor, gates: Tensor, entries: Tensor,
               compute: Tensor, start: Tensor, slot: Tensor, forecast_weights: Tensor, step: Tensor,
               shift: tuple[Tensor | None, int, int], scale: tuple[Tensor | None, int, int], *, aligned: bool,
               write_x: bool, norm: bool, eps: float) -> None:
    """The norm before branch k, or the final one (k = K).

    embedded, x, h: [B, N, D] contiguous. arena: [history, K, B, N, D]. gates: the tensor from which the distances to
    gate rows count. entries: int64 [K, 4], see `graphs.gated.norm.point`. compute, slot, forecast_weights [K],
    start [K + 1], step [1]: of the decision memory. shift, scale: rows [T, B or 1, D] with their strides by step and by
    batch entry.
    """
    batch, tokens, width = x.shape
    block = triton.next_power_of_2(width)
    with device_of(x):
        _kernel[batch * tokens,](
            embedded, x, h, arena, gates, entries, compute, start, slot, forecast_weights, step, *shift, *scale, k,
            tokens, arena.shape[1], arena[0, 0].numel(), ALIGNED=aligned, HISTORY=arena.shape[0], WRITE_X=write_x,
            NORM=norm, EPS=eps, ACC=accumulator(x), D=width, BLOCK=block, TERMS=TERMS,
            num_warps=min(16, max(1, block // 512)))
