"""The norm of a gated trajectory: which branches its run holds stands in the memory that decides."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...ops import Term, residual_norm
from .parts import Parts

NO_GATE = -16  # in place of a stride; a multiple of 16 like the strides of real rows


def norm_on_cpu(parts: Parts, k: int) -> None:
    """The norm before branch k, or the final one, where the host reads the memory that decides."""
    memory, mod, final = parts.memory, parts.modulation, k == parts.memory.branches
    s, start = int(memory.step), int(memory.start[k])
    computed = k > 0 and bool(memory.compute[start])  # otherwise no norm has gone before in this step
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
    """The same where only the device knows the run: one launch, whatever it will hold."""
    from ...triton_kernels.gated_norm import gated_norm

    loop, memory, mod, final = parts.loop, parts.memory, parts.modulation, k == parts.memory.branches
    branch = None if final else loop.branches[k]
    shift, scale = ((None, 0, 0) if rows is None else (rows, *strides(rows)) for rows in (mod.shift[k], mod.scale[k]))
    gated_norm(k, parts.tokens, parts.x, parts.h if parts.changes(k) else None, parts.arena, gate_rows(parts),
               parts.entries, memory.compute, memory.start, memory.slot, memory.forecast_weights, memory.step, shift,
               scale, aligned=aligned(parts), write_x=not final, norm=final or branch.norm,
               eps=loop.eps if final else branch.eps)


def point(parts: Parts, fresh: Sequence[int]) -> None:
    """Writes the table that the norm on CUDA reads, a row [4] a branch: where the body leaves its output, as a distance
    from the arena, and where its gate rows lie, as one from `gate_rows`, with their strides by step and by batch entry.

    fresh: the addresses where the bodies leave their outputs.
    """
    entries = []
    for address, rows in zip(fresh, parts.modulation.gate, strict=True):
        left = _distance(parts.arena, address)
        entries.append([left, 0, NO_GATE, 0] if rows is None else
                       [left, _distance(gate_rows(parts), rows.data_ptr()), *strides(rows)])
    parts.entries.copy_(torch.tensor(entries))


def gate_rows(parts: Parts) -> Tensor:
    """The first branch's gate rows that there are; where there are none, any tensor."""
    return next((rows for rows in parts.modulation.gate if rows is not None), parts.arena)


def aligned(parts: Parts) -> bool:
    """Whether all that the norm on CUDA finds in its table are multiples of 16 values."""
    rows = [rows for rows in parts.modulation.gate if rows is not None]
    found = [number for r in rows for number in (_distance(gate_rows(parts), r.data_ptr()), *strides(r))]
    return all(number % 16 == 0 for number in (parts.x.shape[2], *found))


def strides(rows: Tensor) -> tuple[int, int]:
    """From a step's rows [T, B or 1, D] to the next's, and from a batch entry's to the next's."""
    return rows.stride(0), 0 if rows.shape[1] == 1 else rows.stride(1)


def _distance(base: Tensor, address: int) -> int:
    """From the beginning of base, in its values."""
    return (address - base.data_ptr()) // base.element_size()


def _row(rows: Tensor | None, s: int) -> Tensor | None:
    return None if rows is None else rows[s]
