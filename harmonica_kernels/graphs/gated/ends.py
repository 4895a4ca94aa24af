"""The ops at both ends of a step, which the plans of every unit have, in buffers that stay where they are."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...forward import Modulation
from ...ops import guided_step
from .decision_memory import DecisionMemory
from .loop import Loop
from .plan import Op


class Ends:
    """Modulation and context, embedding, head and update, and their memory.

    sample [n, C, ...] holds the noise before a trajectory and the image after it. tokens [B, N, D] enter a step's first
    branch, h [B, N, D] its head.

    Args:
        loop: the trajectory. memory: its decision memory. noise: [n, C, ...]; the sample gets its shape, dtype and
            device.
    """

    def __init__(self, loop: Loop, memory: DecisionMemory, noise: Tensor):
        self.loop, self.memory = loop, memory
        self.sample = noise.clone(memory_format=torch.contiguous_format)
        self.modulation: Modulation = loop.modulation()
        self.context = loop.context()
        self.updates = loop.updates.to(noise.device, torch.float32).contiguous()
        self.tokens = loop.embed(self.sample).contiguous()
        B, _, D = self.tokens.shape
        _check(loop, memory.steps, self.modulation, self.sample, B, D)
        self.h = torch.zeros_like(self.tokens)
        self.output: Tensor | None = None

    def run(self, op: Op) -> None:
        """Computes one op of the plan."""
        getattr(self, f"_{op.kind}")(*(() if op.branch is None else (op.branch,)))

    def _modulation(self) -> None:
        self.modulation, self.context = self.loop.modulation(), self.loop.context()

    def _embed(self) -> None:
        self.tokens = self.loop.embed(self.sample).contiguous()

    def _head(self) -> None:
        self.output = self.loop.head(self.h)

    def _update(self) -> None:
        loop, n = self.loop, len(self.sample)
        unconditional = self.output[n:] if len(self.output) > n else None
        guided_step(self.sample, self.output[:n], unconditional, guidance=loop.guidance, channels=loop.channels,
                    table=self.updates, step=self.memory.step, out=self.sample)


def _check(loop: Loop, T: int, mod: Modulation, sample: Tensor, B: int, D: int) -> None:
    """Raises on a loop that the parts cannot run, before any body runs."""
    K = len(loop.branches)
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
