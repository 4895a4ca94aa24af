"""The ops of a plan's captured nodes, in buffers that stay where they are.

The same lines run eagerly on the CPU and under capture on the GPU. Only the norm differs (norm.py): on the GPU the host
does not know which branches a run holds.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...forward import Modulation
from ...ops import guided_step
from .decision_memory import DecisionMemory
from .loop import Loop
from .plan import Op


class Parts:
    """The ops of a loop's plan, and their memory.

    sample [n, C, ...] holds the noise before a trajectory and the image after it. x [B, N, D] is the residual stream.
    h [B, N, D] is the input of the bodies and, at the end of a step, of the head. Each branch has `history` slots in
    the arena [history, K, B, N, D]. With one slot, a `body_out` writes straight into it. Otherwise the next norm copies
    the body's output into the slot, and the output must stay until then.

    Args:
        loop: the trajectory. memory: its decision memory. noise: [n, C, ...]; the sample gets its shape, dtype and
            device. norm: `norm(parts, k)` computes the norm before branch k, or the final one (K), on that device.
    """

    def __init__(self, loop: Loop, memory: DecisionMemory, noise: Tensor, norm: Callable[["Parts", int], None]):
        self.loop, self.memory, self._norm_before = loop, memory, norm
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
        self.fresh: list[Tensor | None] = [None] * K  # the outputs that the bodies left
        self.output: Tensor | None = None
        # The table that the norm on CUDA reads, see `norm.point`.
        self.entries = torch.zeros(K, 4, dtype=torch.int64, device=noise.device)
        # For the change rule: branch 0's output when the other branches were last computed, and its newest output.
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
        h = self.h if self.needs_h(k) else self.x
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
                out = out.clone()  # the norm on CUDA reads whole vectors, which must be aligned
        self.fresh[k] = out

    def _norm(self, k: int) -> None:
        self._norm_before(self, k)

    def _head(self) -> None:
        self.output = self.loop.head(self.h)

    def _update(self) -> None:
        loop, n = self.loop, len(self.sample)
        unconditional = self.output[n:] if len(self.output) > n else None
        guided_step(self.sample, self.output[:n], unconditional, guidance=loop.guidance, channels=loop.channels,
                    table=self.updates, step=self.memory.step, out=self.sample)

    def needs_h(self, k: int) -> bool:
        """Whether branch k (K: the head) gets another input than x itself."""
        final = k == self.memory.branches
        return final or self.loop.branches[k].norm or self.modulation.shift[k] is not None \
            or self.modulation.scale[k] is not None

    def change(self) -> None:
        """Writes the sums of the change rule and keeps branch 0's output, as the CUDA kernel does."""
        which, o = int(self.memory.reference), self.fresh[0]
        reference = self.reference[which].double()
        self.memory.change.zero_()
        self.memory.change[0, 0] = (o.double() - reference).abs().sum()
        self.memory.change[1, 0] = reference.abs().sum()
        self.reference[1 - which].copy_(o)


def _check(loop: Loop, memory: DecisionMemory, mod: Modulation, sample: Tensor, B: int, D: int) -> None:
    """Raises on a loop that the parts cannot run, before any body runs."""
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
        if branch.gate != (mod.gate[k] is not None):
            raise ValueError(f"loop.modulation: branch {k} says gate={branch.gate}, its gate rows say otherwise")


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
