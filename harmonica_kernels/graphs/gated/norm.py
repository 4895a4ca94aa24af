"""The norm of a gated trajectory; the decision memory says which branches its run holds."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...ops import Term, residual_norm
from .parts import Parts

NO_GATE = -16  # the stride of a branch without gate; a multiple of 16, like all strides if `is_aligned`


def norm_on_cpu(parts: Parts, k: int) -> None:
    """The norm before branch k, or the final one (k = K); the host reads the decision memory."""
    memory, mod, final = parts.memory, parts.modulation, k == parts.memory.branches
    s, start = int(memory.step), int(memory.start[k])
    computed = k > 0 and bool(memory.compute[start])  # otherwise this is the step's first norm
    run, weights = [], []
    for j in range(start, k):
        slot = int(memory.slot[j])
        latest = parts.fresh[j] if computed and j == start else parts.arena[slot, j]
        weight = float(memory.forecast_weights[j])
        run.append(Term(latest, parts.arena[1 - slot, j] if weight else None, _row(mod.gate[j], s)))
        weights.append(weight)
    slot = parts.arena[int(memory.slot[start]), start] if computed else None
    store = slot if computed and parts.fresh[start].data_ptr() != slot.data_ptr() else None
    if not computed:
        parts.x.copy_(parts.tokens)
    branch = None if final else parts.loop.branches[k]
    residual_norm(parts.x, run, _row(mod.shift[k], s), _row(mod.scale[k], s), forecast_weights=weights, x_out=parts.x,
                  store=store, h_out=parts.h, norm=final or branch.norm,
                  eps=parts.loop.eps if final else branch.eps)


def norm_on_cuda(parts: Parts, k: int) -> None:
    """The same if only the device knows the run: one launch, whatever the run will be."""
    from ...triton_kernels.gated_norm import gated_norm

    loop, memory, mod, final = parts.loop, parts.memory, parts.modulation, k == parts.memory.branches
    branch = None if final else loop.branches[k]
    shift, scale = ((None, 0, 0) if rows is None else (rows, *strides(rows)) for rows in (mod.shift[k], mod.scale[k]))
    gated_norm(k, parts.tokens, parts.x, parts.h if parts.needs_h(k) else None, parts.arena, gate_rows(parts),
               parts.entries, memory.compute, memory.start, memory.slot, memory.forecast_weights, memory.step, shift,
               scale, aligned=is_aligned(parts), write_x=not final, norm=final or branch.norm,
               eps=loop.eps if final else branch.eps)


def point(parts: Parts, fresh: Sequence[int]) -> None:
    """Writes the table [K, 4] that the norm on CUDA reads. All entries count values.

    Columns: the distance from the arena to the output that the body leaves; the distance from `gate_rows` to the
    branch's gate rows; the strides of these rows by step (NO_GATE without gate) and by batch entry.

    fresh: the addresses of the outputs that the bodies leave.
    """
    entries = []
    for address, rows in zip(fresh, parts.modulation.gate, strict=True):
        left = _distance(parts.arena, address)
        entries.append([left, 0, NO_GATE, 0] if rows is None else
                       [left, _distance(gate_rows(parts), rows.data_ptr()), *strides(rows)])
    parts.entries.copy_(torch.tensor(entries))


def gate_rows(parts: Parts) -> Tensor:
    """The gate rows of the first branch that has a gate; if none has, any tensor."""
    return next((rows for rows in parts.modulation.gate if rows is not None), parts.arena)


def is_aligned(parts: Parts) -> bool:
    """Whether D, and the gates' distances and strides in the table of the norm on CUDA, are multiples of 16 values."""
    rows = [rows for rows in parts.modulation.gate if rows is not None]
    found = [number for r in rows for number in (_distance(gate_rows(parts), r.data_ptr()), *strides(r))]
    return all(number % 16 == 0 for number in (parts.x.shape[2], *found))


def strides(rows: Tensor) -> tuple[int, int]:
    """The strides of rows [T, B or 1, D] by step and by batch entry; 0 where one row serves every entry."""
    return rows.stride(0), 0 if rows.shape[1] == 1 else rows.stride(1)


def _distance(base: Tensor, address: int) -> int:
    """From the beginning of base to address, in base's values."""
    return (address - base.data_ptr()) // base.element_size()


def _row(rows: Tensor | None, s: int) -> Tensor | None:
    return None if rows is None else rows[s]
