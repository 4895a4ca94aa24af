"""residual_norm when the host does not know the run: the kernel reads its start, slots, weights and the step.

The norm before branch k adds the branches start[k]..k-1. If a branch has been computed in this step, start[k] is the
one computed last. Its output still lies where the body left it, and this kernel copies it into its cache slot. If none
has been computed, x has not been written in this step, and the kernel takes the embedding instead.

The kernel takes the run from its end: which terms stand there is known without `start`. So where they lie, the step and
the run's beginning are read side by side, and after them all that the first group of terms needs. A table in device
memory says where outputs and gate rows lie, as distances in values from the arena and from the first gate rows. It does
not hold addresses, since the compiler would not know that a pointer made from a loaded address is aligned. ALIGNED
promises that all distances and strides are multiples of 16.
Bytes as in `residual_norm`, plus x's copy in the first norm of a step.
"""

import triton
import triton.language as tl
from torch import Tensor

from ._launch import FUSED, accumulator, device_of
from ._row import cast, divide, divisor, load_row, modulate, pieces, store_row, warps

TERMS = 2  # at a time: with 4, a lane needs so many registers that half as many rows are in flight


@triton.jit
def _find_terms(last, slot, e, entries, branches, values, HISTORY: tl.constexpr, TERMS: tl.constexpr):
    """Where the terms last, last-1, … lie: latest, what the body left, previous, gate, its strides; and weights."""
    found = ()
    for i in tl.static_range(TERMS):
        j = last - i
        there = j >= 0
        kept = tl.load(slot + j, there, other=0)
        entry = entries + 4 * j
        latest = (kept * branches + j).to(tl.int64) * values
        previous, weight = latest, 0.0
        if HISTORY == 2:
            previous = ((1 - kept) * branches + j).to(tl.int64) * values
            weight = tl.load(e + j, there, other=0.0)
        found = found + ((latest, tl.load(entry, there, other=0), previous, tl.load(entry + 1, there, other=0),
                          tl.load(entry + 2, there, other=0), tl.load(entry + 3, there, other=0), weight),)
    return found


@triton.jit
def _load_terms(found, last, first, computed, s, batch, at, arena, gates, ALIGNED: tl.constexpr, HISTORY: tl.constexpr,
                PIECES: tl.constexpr, D: tl.constexpr, TERMS: tl.constexpr):
    """Outputs, previous outputs and gates of these terms. The first of the run is copied into its slot later."""
    outputs, befores, rows = (), (), ()
    for i in tl.static_range(TERMS):
        latest, left, previous, gate, by_step, by_batch, weight = found[i]
        there = last - i >= first
        place = tl.where(computed & (last - i == first), left, latest)
        gate += s * by_step + batch * by_batch
        if ALIGNED:
            place, gate = tl.multiple_of(place, 16), tl.multiple_of(gate, 16)
        outputs = outputs + (load_row(arena + place + at, there, 0.0, "evict_first", PIECES, D),)
        if HISTORY == 2:
            befores = befores + (load_row(arena + previous + at, there & (weight != 0), 0.0, "evict_first", PIECES, D),)
        rows = rows + (load_row(gates + gate, there & (by_step >= 0), 1.0, "evict_last", PIECES, D),)
    return outputs, befores, rows


@triton.jit
def _add_terms(sum, loaded, found, last, first, computed, at, arena, HISTORY: tl.constexpr, ACC: tl.constexpr,
               PIECES: tl.constexpr, D: tl.constexpr, TERMS: tl.constexpr):
    """sum + Σ gate·o. What a body left elsewhere goes into its slot."""
    outputs, befores, rows = loaded
    for i in tl.static_range(TERMS):
        latest, left, _, _, _, _, weight = found[i]
        store_row(arena + latest + at, outputs[i], computed & (last - i == first) & (left != latest), PIECES, D)
        added = ()
        for p in tl.static_range(len(PIECES)):
            o = outputs[i][p].to(ACC)
            if HISTORY == 2:
                o = (1 + weight.to(ACC)) * o - weight.to(ACC) * befores[i][p].to(ACC)
            added = added + (sum[p] + o * rows[i][p].to(ACC),)
        sum = added
    return sum


@triton.jit(do_not_specialize=["k", "multiplier", "bits", "branches"])
def _kernel(embedded, x, h, arena, gates, entries, compute, start, slot, e, step, shift, shift_step, shift_batch, scale,
            scale_step, scale_batch, k, multiplier, bits, branches, values, ALIGNED: tl.constexpr,
            HISTORY: tl.constexpr, WRITE_X: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr,
            D: tl.constexpr, PIECES: tl.constexpr, TERMS: tl.constexpr):
    row = tl.program_id(0)
    at = row.to(tl.int64) * D
    batch = divide(row, multiplier, bits)
    s = tl.load(step).to(tl.int64)
    first = tl.load(start + k)
    found = _find_terms(k - 1, slot, e, entries, branches, values, HISTORY, TERMS)
    computed = (k > 0) & ((first > 0) | (tl.load(compute) != 0))  # a branch is, in this step, before this norm

    scale_row, shift_row = None, None
    if scale is not None:
        scale_row = load_row(scale + s * scale_step + batch * scale_batch, None, 0.0, "evict_last", PIECES, D)
    if shift is not None:
        shift_row = load_row(shift + s * shift_step + batch * shift_batch, None, 0.0, "evict_last", PIECES, D)
    loaded = _load_terms(found, k - 1, first, computed, s, batch, at, arena, gates, ALIGNED, HISTORY, PIECES, D, TERMS)
    tl.debug_barrier()  # as in residual_norm
    sum = cast(load_row(tl.where(computed, x, embedded) + at, None, 0.0, "evict_first", PIECES, D), ACC, PIECES)
    sum = _add_terms(sum, loaded, found, k - 1, first, computed, at, arena, HISTORY, ACC, PIECES, D, TERMS)
    last = k - 1 - TERMS
    while last >= first:
        found = _find_terms(last, slot, e, entries, branches, values, HISTORY, TERMS)
        loaded = _load_terms(found, last, first, computed, s, batch, at, arena, gates, ALIGNED, HISTORY, PIECES, D,
                             TERMS)
        sum = _add_terms(sum, loaded, found, last, first, computed, at, arena, HISTORY, ACC, PIECES, D, TERMS)
        last -= TERMS
    if WRITE_X:
        store_row(x + at, sum, None, PIECES, D)
    if h is not None:
        store_row(h + at, modulate(sum, scale_row, shift_row, NORM, EPS, ACC, PIECES, D), None, PIECES, D)


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
    with device_of(x):
        _kernel[batch * tokens,](
            embedded, x, h, arena, gates, entries, compute, start, slot, forecast_weights, step, *shift, *scale, k,
            *divisor(tokens), arena.shape[1], arena[0, 0].numel(), ALIGNED=aligned, HISTORY=arena.shape[0],
            WRITE_X=write_x, NORM=norm, EPS=eps, ACC=accumulator(x), D=width, PIECES=pieces(width), TERMS=TERMS,
            num_warps=warps(TERMS * arena.shape[0] * width * x.element_size()), **FUSED)
