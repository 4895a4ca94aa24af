"""Accumulate, normalise, modulate in one pass: a row of x stays in registers from its load to its norm.

Memory bound. Bytes: B·N·D·(x + every latest + every forecast's previous + fresh, read; x_out + h + first, written),
each in its own storage size. At 3.35 TB/s (H100), an activation of 4096 rows of 1152 in bfloat16 is 9.4 MB and 2.8 µs:
5.6 µs at R = 0 (without x_out), 11.3 µs at R = 1, 31 µs at R = 8. The tokens of a batch entry share modulation rows,
which come from the L1 cache: they are loaded with evict_last. Activations are read once and loaded with evict_first.

A program has one row: of one term in one warp, of more in several, so that registers hold what is in flight: on an
H100, 4096 rows of two terms take 22.0 µs in one warp, 19.0 in two (a copy of as many bytes: 17.8).
The run is unrolled. All loads of its first terms, scale and shift too, are issued before anything waits for one. A run
of more than 4 terms is padded to 8, 16 or 32, so that few lengths are compiled; a padded term's loads are predicated
off. If only some terms of a run have a forecast or a gate, the loads of the others' previous outputs or gates are too.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ._launch import FUSED, accumulator, dependent_launch, device_of
from ._row import cast, divide, divisor, load_row, modulate, pieces, store_row, warps

GROUP = 8  # terms whose loads are in flight together
EXACT = 4  # each run length up to this is compiled
LONGEST = 32  # longer runs take several launches, with a float32 sum between them
NO_GATE = -16  # a row stride that says no gate; a multiple of 16 like real strides, or Triton would compile anew


@triton.jit
def _load_terms(terms, e, BEGIN: tl.constexpr, END: tl.constexpr, count, at, batch, FORECAST: tl.constexpr,
                HAS_GATE: tl.constexpr, CERTAIN: tl.constexpr, DEVICE_E: tl.constexpr, ACC: tl.constexpr,
                PIECES: tl.constexpr, D: tl.constexpr):
    """What the terms BEGIN..END-1 read: latest and previous outputs, gates, weights. The first CERTAIN are there."""
    latest, previous, gates, weights = (), (), (), ()
    for j in tl.static_range(BEGIN, END):
        o, before, gate, gate_stride = terms[j]
        latest = latest + (load_row(o + at, None if j < CERTAIN else j < count, 0.0, "evict_first", PIECES, D),)
        if FORECAST:
            if DEVICE_E:
                weight = tl.load(e + j, j < count, other=0.0).to(ACC)
            else:
                weight = tl.full((), e[j], ACC)
            weights = weights + (weight,)
            previous = previous + (load_row(before + at, weight != 0, 0.0, "evict_first", PIECES, D),)
        if HAS_GATE:
            has_gate = gate_stride >= 0
            if j >= CERTAIN:
                has_gate = has_gate & (j < count)
            gates = gates + (load_row(gate + batch * gate_stride, has_gate, 1.0, "evict_last", PIECES, D),)
    return latest, previous, gates, weights


@triton.jit
def _add_terms(sum, loaded, at, fresh, score, first, FORECAST: tl.constexpr, HAS_GATE: tl.constexpr, ACC: tl.constexpr,
               PIECES: tl.constexpr, D: tl.constexpr):
    """sum + Σ gate·o. fresh: blended with the first term's output; first: receives that."""
    latest, previous, gates, weights = loaded
    for j in tl.static_range(len(latest)):
        added = ()
        output = ()
        for i in tl.static_range(len(PIECES)):
            o = latest[j][i].to(ACC)
            if FORECAST:
                o = (1 + weights[j]) * o - weights[j] * previous[j][i].to(ACC)
            if j == 0:
                if fresh is not None:
                    o = score * fresh[i].to(ACC) + (1 - score) * o
            output = output + (o,)
            if HAS_GATE:
                o *= gates[j][i].to(ACC)
            added = added + (sum[i] + o,)
        if j == 0:
            if first is not None:
                store_row(first + at, output, None, PIECES, D)
        sum = added
    return sum


@triton.jit(do_not_specialize=["multiplier", "bits", "count"])
def _residual_norm(x, x_out, h, first, terms, e, fresh, r, shift, shift_stride, scale, scale_stride, multiplier, bits,
                   count, TERMS: tl.constexpr, CERTAIN: tl.constexpr, GROUP: tl.constexpr, FORECAST: tl.constexpr,
                   HAS_GATE: tl.constexpr, DEVICE_E: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr,
                   ACC: tl.constexpr, D: tl.constexpr, PIECES: tl.constexpr, DEPENDENT: tl.constexpr):
    row = tl.program_id(0)
    at = row.to(tl.int64) * D
    batch = divide(row, multiplier, bits)
    if DEPENDENT:
        gdc_wait()  # all memory, read and written, may still be in use by the kernel before
        gdc_launch_dependents()

    # What the norm and the first group read is asked for before any of it is used. ptxas would move loads down to where
    # they are used, but not past a barrier; x comes after it, and the sum cannot begin without x.
    scale_row, shift_row, fresh_row, score = None, None, None, None
    if scale is not None:
        scale_row = load_row(scale + batch * scale_stride, None, 0.0, "evict_last", PIECES, D)
    if shift is not None:
        shift_row = load_row(shift + batch * shift_stride, None, 0.0, "evict_last", PIECES, D)
    if fresh is not None:
        score = tl.load(r).to(ACC)
    loaded = _load_terms(terms, e, 0, min(GROUP, TERMS), count, at, batch, FORECAST, HAS_GATE, CERTAIN, DEVICE_E, ACC,
                         PIECES, D)
    if fresh is not None:
        fresh_row = load_row(fresh + at, None, 0.0, "evict_first", PIECES, D)
    tl.debug_barrier()
    x_row = load_row(x + at, None, 0.0, "evict_first", PIECES, D)

    sum = cast(x_row, ACC, PIECES)
    sum = _add_terms(sum, loaded, at, fresh_row, score, first, FORECAST, HAS_GATE, ACC, PIECES, D)
    for group in tl.static_range(GROUP, TERMS, GROUP):
        if group < count:  # a branch on a launch argument, so that loads are not hoisted out of it
            # not by a name: after a branch it would have to have the types that it had before
            sum = _add_terms(sum, _load_terms(terms, e, group, min(group + GROUP, TERMS), count, at, batch, FORECAST,
                                              HAS_GATE, CERTAIN, DEVICE_E, ACC, PIECES, D),
                             at, None, None, None, FORECAST, HAS_GATE, ACC, PIECES, D)
    if x_out is not None:
        store_row(x_out + at, sum, None, PIECES, D)
    if h is not None:
        store_row(h + at, modulate(sum, scale_row, shift_row, NORM, EPS, ACC, PIECES, D), None, PIECES, D)


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
    multiplier, bits = divisor(tokens)
    outputs = min(GROUP, padded) * (2 if forecasts else 1)
    held = max(1, min(outputs, 2), outputs // 2)  # two or more, with their gates, fill a lane with half of them
    with device_of(x):
        _residual_norm[rows,](
            x, x_out, h, first, tuple(terms) or None,
            None if not forecasts else tuple(weights) if e is None else e, fresh, None if fresh is None else r,
            *(shift or absent), *(scale or absent), multiplier, bits, count, TERMS=padded,
            CERTAIN=count if padded == count else padded // 2, GROUP=GROUP, FORECAST=forecasts,
            HAS_GATE=some_gate is not None, DEVICE_E=e is not None, NORM=normed, EPS=eps, ACC=accumulator(x), D=width,
            PIECES=pieces(width), num_warps=warps(held * width * x.element_size()), **dependent_launch(), **FUSED)
