"""What a plan's captured parts compute, in buffers that stay where they are.

The same lines run eagerly on the CPU and under capture on the GPU; only the norm differs, since there the host does not
know the run.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..forward import Modulation
from ..ops import Term, guided_step, residual_norm
from .loop import Loop
from .memory import GateMemory
from .plan import Op

NO_GATE = -16  # a stride; a multiple of 16 like those of real rows


class Pieces:
    """The ops of a loop's plan, and their memory.

    sample [n, C, ...] is the trajectory's noise before it runs and its image afterwards. x [B, N, D] is the residual
    stream, h what the bodies are given and, at the end of a step, what the head is given. Each branch has `history`
    slots in the arena [history, K, B, N, D]. A body writes into its slot where the slot is known beforehand (one of
    them, and a `body_out`); otherwise the next norm copies the output there on the way, and it lives until then.

    Args:
        loop: the trajectory. memory: its gate's. noise: [n, C, ...], of which the sample takes shape, dtype and device.
    """

    def __init__(self, loop: Loop, memory: GateMemory, noise: Tensor):
        self.loop, self.memory = loop, memory
        self.sample = noise.clone(memory_format=torch.contiguous_format)
        self.modulation: Modulation = loop.modulation()
        self.updates = loop.updates.to(noise.device, torch.float32).contiguous()
        self.tokens = loop.embed(self.sample).contiguous()
        B, N, D = self.tokens.shape
        _check(loop, memory, self.modulation, self.sample, B, D)
        self.x, self.h = torch.zeros_like(self.tokens), torch.zeros_like(self.tokens)
        dtype = loop.branches[0].body(self.h, loop.context).dtype
        K = memory.branches
        self.arena = torch.zeros(memory.history, K, B, N, D, dtype=dtype, device=noise.device)
        self.scratch = torch.zeros(B, N, D, dtype=dtype, device=noise.device) if memory.history == 2 else None
        self.fresh: list[Tensor | None] = [None] * K  # where the bodies left their outputs
        self.output: Tensor | None = None
        # What the norm on CUDA reads of each branch: where the body leaves its output, as a distance from the arena,
        # and where its gate rows lie, from `gates`, with their strides by step and by batch entry.
        self.entries = torch.zeros(K, 4, dtype=torch.int64, device=noise.device)
        # Of the change rule: branch 0's output that the others were computed with, and the one to compare.
        self.reference = torch.zeros(2, *self.arena.shape[2:], dtype=dtype, device=noise.device)

    def run(self, op: Op) -> None:
        """Computes one op of the plan."""
        getattr(self, f"_{op.kind}")(*(() if op.branch is None else (op.branch,)))

    def _modulation(self) -> None:
        self.modulation = self.loop.modulation()

    def _embed(self) -> None:
        self.tokens = self.loop.embed(self.sample).contiguous()

    def _body(self, k: int) -> None:
        branch, context = self.loop.branches[k], self.loop.context
        h = self.h if self.changes(k) else self.x
        if branch.body_out is not None and h.dtype == self.arena.dtype:
            out = self.arena[0, k] if self.scratch is None else self.scratch
            branch.body_out(h, context, out)
        else:
            out = branch.body(h, context)
            if out.shape != h.shape or out.dtype != self.arena.dtype:
                raise ValueError(f"branches[{k}].body: returned {out.dtype} of shape {tuple(out.shape)}, expected "
                                 f"{self.arena.dtype} of shape {tuple(h.shape)}, as branch 0")
            out = out.contiguous()
            if out.data_ptr() % 64:
                out = out.clone()  # the norm on CUDA reads whole vectors
        self.fresh[k] = out

    def _norm(self, k: int) -> None:
        if self.x.is_cuda:
            from ..triton.gated_norm import gated_norm

            gated_norm(self, k)
        else:
            self.norm_here(k)

    def norm_here(self, k: int) -> None:
        """The norm before branch k, or the final one, where the host reads the gate's memory."""
        memory, mod, final = self.memory, self.modulation, k == self.memory.branches
        s, start = int(memory.step), int(memory.start[k])
        computed = k > 0 and bool(memory.compute[start])  # otherwise no norm has gone before in this step
        run, e = [], []
        for j in range(start, k):
            slot = int(memory.slot[j])
            latest = self.fresh[j] if computed and j == start else self.arena[slot, j]
            weight = float(memory.e[j])
            run.append(Term(latest, self.arena[1 - slot, j] if weight else None, _row(mod.gate[j], s)))
            e.append(weight)
        slot = self.arena[int(memory.slot[start]), start] if computed else None
        store = slot if computed and self.fresh[start].data_ptr() != slot.data_ptr() else None
        if not computed:
            self.x.copy_(self.tokens)
        branch = None if final else self.loop.branches[k]
        residual_norm(self.x, run, _row(mod.shift[k], s), _row(mod.scale[k], s), e=e, x_out=self.x, store=store,
                      h_out=self.h, norm=final or branch.norm, eps=self.loop.eps if final else branch.eps)

    def _head(self) -> None:
        self.output = self.loop.head(self.h)

    def _update(self) -> None:
        loop, n = self.loop, len(self.sample)
        unconditional = self.output[n:] if len(self.output) > n else None
        guided_step(self.sample, self.output[:n], unconditional, guidance=loop.guidance, channels=loop.channels,
                    table=self.updates, step=self.memory.step, out=self.sample)

    @property
    def gates(self) -> Tensor:
        """The first branch's gate rows that there are; where there are none, any tensor."""
        return next((rows for rows in self.modulation.gate if rows is not None), self.arena)

    def point(self, fresh: Sequence[int]) -> None:
        """Writes the table that the norm on CUDA reads. fresh: the addresses where the bodies leave their outputs."""
        entries = []
        for address, rows in zip(fresh, self.modulation.gate, strict=True):
            left = _distance(self.arena, address)
            entries.append([left, 0, NO_GATE, 0] if rows is None else
                           [left, _distance(self.gates, rows.data_ptr()), *strides(rows)])
        self.entries.copy_(torch.tensor(entries))

    @property
    def aligned(self) -> bool:
        """Whether all that the norm on CUDA finds in its table are multiples of 16 values."""
        rows = [rows for rows in self.modulation.gate if rows is not None]
        found = [number for r in rows for number in (_distance(self.gates, r.data_ptr()), *strides(r))]
        return all(number % 16 == 0 for number in (self.x.shape[2], *found))

    def changes(self, k: int) -> bool:
        """Whether branch k (K: the head) is given something other than x itself."""
        final = k == self.memory.branches
        return final or self.loop.branches[k].norm or self.modulation.shift[k] is not None \
            or self.modulation.scale[k] is not None

    def change(self) -> None:
        """The sums of the change rule, as the CUDA kernel writes them."""
        which, o = int(self.memory.reference), self.fresh[0]
        reference = self.reference[which].double()
        self.memory.change.zero_()
        self.memory.change[0, 0] = (o.double() - reference).abs().sum()
        self.memory.change[1, 0] = reference.abs().sum()
        self.reference[1 - which].copy_(o)


def strides(rows: Tensor) -> tuple[int, int]:
    """From a step's rows [T, B or 1, D] to the next's, and from a batch entry's to the next's."""
    return rows.stride(0), 0 if rows.shape[1] == 1 else rows.stride(1)


def _distance(base: Tensor, address: int) -> int:
    """From the beginning of base, in its values."""
    return (address - base.data_ptr()) // base.element_size()


def _row(rows: Tensor | None, s: int) -> Tensor | None:
    return None if rows is None else rows[s]


def _check(loop: Loop, memory: GateMemory, mod: Modulation, sample: Tensor, B: int, D: int) -> None:
    """Refuses what the pieces could not run, before any of it does."""
    T, K = memory.steps, memory.branches
    if tuple(loop.updates.shape) != (T, 2):
        raise ValueError(f"loop.updates: got shape {tuple(loop.updates.shape)}, expected [{T}, 2]")
    n = len(sample)
    if B != (n if loop.guidance == 1 else 2 * n):
        raise ValueError(f"loop.embed: returned {B} rows for {n} samples with guidance {loop.guidance}, expected n "
                         "without guidance and 2n with it")
    for name, rows, count in (("shift", mod.shift, K + 1), ("scale", mod.scale, K + 1), ("gate", mod.gate, K)):
        _check_rows(name, rows, count, (T, B, D))
    for k, branch in enumerate(loop.branches):
        if branch.gated != (mod.gate[k] is not None):
            raise ValueError(f"loop.modulation: branch {k} says gated={branch.gated}, its gate rows say otherwise")


def _check_rows(name: str, rows: Sequence[Tensor | None], count: int, shape: tuple[int, int, int]) -> None:
    T, B, D = shape
    if len(rows) != count:
        raise ValueError(f"loop.modulation: got {len(rows)} entries in {name}, expected {count}")
    for k, row in enumerate(rows):
        if row is not None and row.dtype != next(r.dtype for r in rows if r is not None):
            raise TypeError(f"loop.modulation: {name}[{k}] is {row.dtype}, expected one dtype for all rows of {name}")
        if row is not None and tuple(row.shape) not in ((T, B, D), (T, 1, D)):
            raise ValueError(f"loop.modulation: {name}[{k}] has shape {tuple(row.shape)}, expected [{T}, {B} or 1, "
                             f"{D}]")
