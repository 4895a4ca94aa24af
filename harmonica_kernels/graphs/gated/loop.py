"""A trajectory, split into functions that a graph can capture."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...forward import Branch, Modulation


@dataclass(frozen=True, eq=False)
class Loop:
    """T denoising steps: `x_{s+1} = a_s·x_s + b_s·ε_s`, `ε_s` the guided output of a transformer of K branches.

    Its functions are called while a graph is captured. They must launch the same work at every call, on static tensors,
    wait for nothing, and draw no random numbers.

    Args:
        branches: the K branches in execution order.
        modulation: `modulation() -> Modulation` of all steps, rows [T, B or 1, D]. Called once a trajectory.
        embed: [n, C, ...] latents -> tokens [B, N, D]; B = 2n with guidance, the conditional rows first.
        head: [B, N, D] after the final norm -> the model's output [B, C', ...], C' ≥ C.
        updates: [T, 2] float32, the scheduler's a and b.
        guidance: scale of classifier-free guidance (Ho & Salimans, 2022); 1 where B = n.
        channels: how many leading channels are guided; None for all.
        context: `context()` -> what the bodies get beside h, see `Branch`. Called once a trajectory.
        eps: of the final norm.
        condition: [T, D'] that `modulation` reads: what a schedule adds to the steps' conditions. It is written before
            a trajectory. None takes no such schedules.
    """

    branches: Sequence[Branch]
    modulation: Callable[[], Modulation]
    embed: Callable[[Tensor], Tensor]
    head: Callable[[Tensor], Tensor]
    updates: Tensor
    guidance: float = 1.0
    channels: int | None = None
    context: Callable[[], Any] = lambda: None
    eps: float = 1e-6
    condition: Tensor | None = None
