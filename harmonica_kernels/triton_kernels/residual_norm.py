"""Accumulate, normalise, modulate in one pass: a row of x stays in registers from its load to its norm.

Memory bound. Bytes: B·N·D·(x + every latest + every forecast's previous + fresh, read; x_out + h + first, written),
each in its own storage size. At 3.35 TB/s (H100), an activation of 4096 rows of 1152 in bfloat16 is 9.4 MB and 2.8 µs:
5.6 µs at R = 0 (without x_out), 11.3 µs at R = 1, 31 µs at R = 8. The tokens of a batch entry share modulation rows,
which come from the L1 cache: they are loaded with evict_last. Activations are read once and loaded with evict_first.

The run is unrolled, so that the loads of several terms are in flight at once. A run of more than 4 terms is padded to
8, 16 or 32, so that few lengths are compiled; a padded term's loads are predicated off. If only some terms of a run
have a forecast or a gate, the loads of the others' previous outputs or gates are predicated off too.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import accumulator, device_of, tile

GROUP = tl.constexpr(8)  # terms whose loads are in flight together; with 16, registers spill
EXACT = 4  # each run length up to this is compiled
LONGEST = 32  # longer runs take several launches, with a float32 sum between them
NO_GATE = -16  # a row stride that says no gate; a multiple of 16 like real strides, or Triton would compile anew


@triton.jit(do_not_specialize=["rows", "tokens", "count"])
def _residual_norm(x, x_out, h, first, terms, e, fresh, r, shift, shift_stride, scale, scale_stride, rows, tokens,
                   count, TERMS: tl.constexpr, FORECAST: tl.constexpr, HAS_GATE: tl.constexpr, PADDED: tl.constexpr,
                   DEVICE_E: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr, D: tl.constexpr,
                   ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    mask = col < D
    if ROWS > 1:
        mask = mask & (row < rows)
    at = row.to(tl.int64) * D + col
    batch = (row // tokens).to(tl.int64)

    sum = tl.load(x + at, mask, other=0.0, eviction_policy="evict_first").to(ACC)
    for group in tl.static_range(0, TERMS, GROUP):
        if group < count:  # a branch on a launch argument, so that loads are not hoisted out of it
            for j in tl.static_range(group, min(group + GROUP, TERMS)):
                latest, previous, gate, gate_stride = terms[j]
                there = mask
                if PADDED:
                    there = mask & (col < tl.where(j < count, D, 0))
                o = tl.load(latest + at, there, other=0.0, eviction_policy="evict_first").to(ACC)
                if FORECAST:
                    if DEVICE_E:
                        number = tl.full([1, 1], j, tl.int32)
                        weight = tl.load(e + number, number < count, other=0.0).to(ACC)
                    else:
                        weight = tl.full([1, 1], e[j], ACC)
                    before = tl.load(previous + at, there & (weight != 0), other=0.0, eviction_policy="evict_first")
                    o = (1 + weight) * o - weight * before.to(ACC)
                if j == 0:
                    if fresh is not None:
                        score = tl.load(r).to(ACC)
                        o = score * tl.load(fresh + at, mask, other=0.0, eviction_policy="evict_first").to(ACC) \
                            + (1 - score) * o
                    if first is not None:
                        tl.store(first + at, o.to(first.dtype.element_ty), mask)
                if HAS_GATE:
                    o *= tl.load(gate + batch * gate_stride + col, there & (col < tl.where(gate_stride >= 0, D, 0)),
                                 other=1.0, eviction_policy="evict_last").to(ACC)
                sum += o
    if x_out is not None:
        tl.store(x_out + at, sum.to(x_out.dtype.element_ty), mask)

    if h is not None:
        y = sum
        if NORM:
            mean = tl.sum(sum, 1)[:, None] / D
            y = tl.where(mask, sum - mean, 0.0)
            y *= tl.rsqrt(tl.sum(y * y, 1)[:, None] / D + EPS)
        if scale is not None:
            y *= 1 + tl.load(scale + batch * scale_stride + col, mask, other=0.0,
                             eviction_policy="evict_last").to(ACC)
        if shift is not None:
            y += tl.load(shift + batch * shift_stride + col, mask, other=0.0, eviction_policy="evict_last").to(ACC)
        tl.store(h + at, y.to(h.dtype.element_ty), mask)


def residual_norm(shape: tuple[int, int, int], x: Tensor, x_out: Tensor | None, h: Tensor | None, first: Tensor | None,
                  run: Sequence[tuple], fresh: Tensor | None, r: Tensor | float, norm: tuple,
                  e: Tensor | None = None) -> None:
    """`residual_norm` of csrc/kernels.h. run: (latest, previous, e, (gate, stride)) of each term; norm: (shift, scale,
    norm, eps). e: the forecast weights as a tensor [len(run)] on the device, which replaces those in the run."""
    batch, tokens, width = shape
    rows = batch * tokens
    if rows == 0:
        return
    if len(run) > LONGEST:
        partial = torch.empty(shape, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        residual_norm(shape, x, partial, None, first, run[:LONGEST], fresh, r, norm, None if e is None else e[:LONGEST])
        residual_norm(shape, partial, x_out, h, None, run[LONGEST:], None, 0.0, norm,
                      None if e is None else e[LONGEST:])
        return
    forecasts = any(previous is not None and (e is not None or weight != 0) for _, previous, weight, _ in run)
    if forecasts and e is None and x.dtype is torch.float64:
        # a launch would round a float argument to float32
        e = torch.tensor([weight for *_, weight, _ in run], dtype=torch.float64, device=x.device)
    some_gate = next((gate for *_, gate in run if gate is not None), None)
    terms, weights = [], []
    for latest, previous, weight, gate in run:
        rows_of_gate = gate or (some_gate and (some_gate[0], NO_GATE)) or (None, 0)
        terms.append((latest, latest if forecasts and previous is None else previous if forecasts else None,
                      *rows_of_gate))
        weights.append(weight)
    count = len(terms)
    padded = count if count <= EXACT else triton.next_power_of_2(count)
    terms += terms[-1:] * (padded - count)
    weights += [0.0] * (padded - count)
    (shift, scale, normed, eps), absent = norm, (None, 0)
    config = tile(width)
    with device_of(x):
        _residual_norm[triton.cdiv(rows, config["ROWS"]),](
            x, x_out, h, first, tuple(terms) or None,
            None if not forecasts else tuple(weights) if e is None else e, fresh, None if fresh is None else r,
            *(shift or absent), *(scale or absent), rows, tokens, count, TERMS=padded, FORECAST=forecasts,
            HAS_GATE=some_gate is not None, PADDED=padded != count, DEVICE_E=e is not None, NORM=normed, EPS=eps,
            ACC=accumulator(x), **config)
