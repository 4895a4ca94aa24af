"""The ops of the captured nodes of a plan whose unit is the branch, in buffers that stay where they are.

The same lines run eagerly on the CPU and under capture on the GPU. Only the norm differs (norm.py): on the GPU the host
does not know which branches a run holds.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .decision_memory import DecisionMemory
from .ends import Ends
from .loop import Loop


class Parts(Ends):
    """The ops of a loop's plan, and their memory, beside that of `Ends`.

    x [B, N, D] is the residual stream. h [B, N, D] is also the input of the bodies. Each branch has `history` slots in
    the arena [history, K, B, N, D]. With one slot, a `body_out` writes straight into it. Otherwise the next norm copies
    the body's output into the slot, and the output must stay until then.

    Args:
        loop, memory, noise: as in `Ends`. norm: `norm(parts, k)` computes the norm before branch k, or the final one
            (K), on that device.
    """

    def __init__(self, loop: Loop, memory: DecisionMemory, noise: Tensor, norm: Callable[["Parts", int], None]):
        super().__init__(loop, memory, noise)
        self._norm_before = norm
        B, N, D = self.tokens.shape
        self.x = torch.zeros_like(self.tokens)
        dtype = loop.branches[0].body(self.h, self.context).dtype
        K = memory.branches
        self.arena = torch.zeros(memory.history, K, B, N, D, dtype=dtype, device=noise.device)
        self.scratch = torch.zeros(B, N, D, dtype=dtype, device=noise.device) if memory.history == 2 else None
        self.fresh: list[Tensor | None] = [None] * K  # the outputs that the bodies left
        # The table that the norm on CUDA reads, see `norm.point`.
        self.entries = torch.zeros(K, 4, dtype=torch.int64, device=noise.device)
        # For the change rule: branch 0's output when the other branches were last computed, and its newest output.
        self.reference = torch.zeros(2, *self.arena.shape[2:], dtype=dtype, device=noise.device)

    def _body(self, k: int) -> None:
        branch, context = self.loop.branches[k], self.context
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
