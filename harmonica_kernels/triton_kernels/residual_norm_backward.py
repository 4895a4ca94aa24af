"""Backward of residual_norm and blend_residual_norm, from the stored x'.

G is the whole gradient of x', the part through h included. dx = G, and for each term do = gate·G, dgate = Σ G·o,
dfresh = r·do, dlatest = (1 - r)(1 + e)·do, dr = Σ do·(fresh - reuse), de = (1 - r)·Σ do·(latest - previous).

A run takes one pass a term, and each pass computes G anew; every run of a soft row has one term.
Memory bound. Bytes of an SDT iteration's call, which wants only dx, dfresh and dr: dx_new, dh, x', latest, fresh read,
dx and dfresh written, 7·B·N·D values; 64·256 rows of 1152 in bfloat16 are 264 MB, 79 µs at 3.35 TB/s (H100).

No atomics: a program writes its sums (a row of float32 for each modulation gradient, a number each for dr and de) to a
buffer, and torch.sum adds them up in an order that depends on the shape alone.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import accumulator, device_of, tile

TOKENS = 16  # a program that sums modulation gradients; its float32 row costs 1/8 of their bfloat16 activation


@triton.jit(do_not_specialize=["tokens", "chunks", "j"])
def _residual_norm_backward(dx_new, dh, x_new, latest, previous, e, j, fresh, r, gate, gate_stride, scale, scale_stride,
                            dx, dfresh, dlatest, dshift, dscale, dgate, dr, de, tokens, chunks, NORM: tl.constexpr,
                            EPS: tl.constexpr, ACC: tl.constexpr, STEPS: tl.constexpr, D: tl.constexpr,
                            ROWS: tl.constexpr, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    batch = (program // chunks).to(tl.int64)
    start = (program % chunks) * (STEPS * ROWS)
    col = tl.arange(0, BLOCK)[None, :]
    dshift_sum = tl.zeros([ROWS, BLOCK], ACC)
    dscale_sum = tl.zeros([ROWS, BLOCK], ACC)
    dgate_sum = tl.zeros([ROWS, BLOCK], ACC)
    dr_sum = tl.zeros([ROWS, BLOCK], ACC)
    de_sum = tl.zeros([ROWS, BLOCK], ACC)

    for step in range(STEPS):
        token = start + step * ROWS + tl.arange(0, ROWS)[:, None]
        mask = (token < tokens) & (col < D)
        at = (batch * tokens + token) * D + col

        g = tl.zeros([ROWS, BLOCK], ACC)
        if dx_new is not None:
            g = tl.load(dx_new + at, mask, other=0.0, eviction_policy="evict_first").to(ACC)
        if dh is not None:
            d = tl.load(dh + at, mask, other=0.0, eviction_policy="evict_first").to(ACC)
            y = tl.load(x_new + at, mask, other=0.0, eviction_policy="evict_first").to(ACC)
            rstd = 1.0
            if NORM:
                mean = tl.sum(y, 1)[:, None] / D
                y = tl.where(mask, y - mean, 0.0)
                rstd = tl.rsqrt(tl.sum(y * y, 1)[:, None] / D + EPS)
                y *= rstd
            if dshift is not None:
                dshift_sum += d
            if dscale is not None:
                dscale_sum += d * y
            if scale is not None:
                d *= 1 + tl.load(scale + batch * scale_stride + col, col < D, other=0.0,
                                 eviction_policy="evict_last").to(ACC)
            if NORM:
                d = rstd * (d - tl.sum(d, 1)[:, None] / D - y * (tl.sum(d * y, 1)[:, None] / D))
            g += d
        if dx is not None:
            tl.store(dx + at, g.to(dx.dtype.element_ty), mask)

        if latest is not None:
            weight, score = 0.0, 0.0
            if e is not None:
                weight = tl.load(e + j).to(ACC)
            if fresh is not None:
                score = tl.load(r).to(ACC)
            do = tl.where(mask, g, 0.0)  # the norm's means reach the columns beyond D
            if gate is not None:
                do *= tl.load(gate + batch * gate_stride + col, col < D, other=0.0,
                              eviction_policy="evict_last").to(ACC)
            if dlatest is not None:
                tl.store(dlatest + at, ((1 - score) * (1 + weight) * do).to(dlatest.dtype.element_ty), mask)
            if dfresh is not None:
                tl.store(dfresh + at, (score * do).to(dfresh.dtype.element_ty), mask)
            if dgate is not None or dr is not None or de is not None:
                o = tl.load(latest + at, mask, other=0.0, eviction_policy="evict_first").to(ACC)
                if previous is not None:
                    before = tl.load(previous + at, mask, other=0.0, eviction_policy="evict_first").to(ACC)
                    if de is not None:
                        de_sum += (1 - score) * do * (o - before)
                    o = tl.where(weight != 0, (1 + weight) * o - weight * before, o)
                if fresh is not None:
                    new = tl.load(fresh + at, mask, other=0.0, eviction_policy="evict_first").to(ACC)
                    if dr is not None:
                        dr_sum += do * (new - o)
                    o = score * new + (1 - score) * o
                if dgate is not None:
                    dgate_sum += tl.where(mask, g, 0.0) * o

    cols = tl.arange(0, BLOCK)
    to = program.to(tl.int64) * D + cols
    if dshift is not None:
        tl.store(dshift + to, tl.sum(dshift_sum, 0), cols < D)
    if dscale is not None:
        tl.store(dscale + to, tl.sum(dscale_sum, 0), cols < D)
    if dgate is not None:
        tl.store(dgate + to, tl.sum(dgate_sum, 0), cols < D)
    if dr is not None:
        tl.store(dr + program, tl.sum(tl.sum(dr_sum, 1), 0))
    if de is not None:
        tl.store(de + program, tl.sum(tl.sum(de_sum, 1), 0))


def residual_norm_backward(shape: tuple[int, int, int], dx_new: Tensor | None, dh: Tensor | None, x_new: Tensor,
                           run: Sequence[tuple], fresh: Tensor | None, r: Tensor | None, norm: tuple, e: Tensor | None,
                           dx: Tensor | None, dfresh: Tensor | None, dlatest: Sequence[Tensor | None],
                           dshift: Tensor | None, dscale: Tensor | None, dgate: Sequence[Tensor | None],
                           dr: Tensor | None, de: Tensor | None) -> None:
    """`residual_norm_backward` of csrc/kernels.h: writes the gradients that are not None. run, norm and e as in
    `residual_norm`. Activations are contiguous, dshift, dscale, dgate [B or 1, D]; dr has one element; de is
    [len(run)]."""
    batch, tokens, width = shape
    config, acc = tile(width), torch.promote_types(x_new.dtype, torch.float32)
    sums_rows = any(t is not None for t in (dshift, dscale, *dgate))
    config["STEPS"] = triton.cdiv(TOKENS, config["ROWS"]) if sums_rows else 1
    if sums_rows:
        config["num_warps"] = min(16, 2 * config["num_warps"])  # the sums stay in registers
    chunks = triton.cdiv(tokens, config["STEPS"] * config["ROWS"])
    (_, scale, normed, eps), absent = norm, (None, 0)

    def partial(gradient: Tensor | None, *columns: int) -> Tensor | None:
        if gradient is None:
            return None
        return torch.empty(batch, chunks, *columns, dtype=acc, device=x_new.device)

    def add_rows(gradient: Tensor | None, sums: Tensor | None) -> None:
        if gradient is not None:
            sums = sums.flatten(0, 1).sum(0, keepdim=True) if gradient.shape[0] == 1 else sums.sum(1)
            gradient.copy_(sums)

    if de is not None:
        de.zero_()  # the gradient of a term without a previous output
    for j in range(max(1, len(run))):
        latest, previous, _, gate = run[j] if run else (None, None, 0.0, None)
        blended = (fresh, r) if j == 0 else (None, None)
        of_x = (dx, dfresh, dshift, dscale, dr) if j == 0 else (None,) * 5
        of_term = (dlatest[j], dgate[j]) if run else (None, None)
        wants_e = None if previous is None else de
        if all(t is None for t in (*of_x, *of_term, wants_e)):
            continue
        dshift_sums, dscale_sums, dgate_sums = (partial(t, width) for t in (*of_x[2:4], of_term[1]))
        dr_sums, de_sums = partial(of_x[4]), partial(wants_e)
        if batch * chunks > 0:
            with device_of(x_new):
                _residual_norm_backward[batch * chunks,](
                    dx_new, dh, x_new, latest, previous, None if previous is None else e, j, *blended,
                    *(gate or absent), *(scale or absent), *of_x[:2], of_term[0], dshift_sums, dscale_sums, dgate_sums,
                    dr_sums, de_sums, tokens, chunks, NORM=normed, EPS=eps, ACC=accumulator(x_new), **config)
        add_rows(of_x[2], dshift_sums)
        add_rows(of_x[3], dscale_sums)
        add_rows(of_term[1], dgate_sums)
        if of_x[4] is not None:
            dr.copy_(dr_sums.sum().view(dr.shape))
        if wants_e is not None:
            de[j].copy_(de_sums.sum())
