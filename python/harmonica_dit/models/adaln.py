"""adaLN-Zero (Peebles & Xie, 2023): the modulation of many steps at once, and of it only what is needed."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import harmonica_kernels as hk
from harmonica_kernels import ops

from .plain_modules import has_own_forward, is_plain_linear


def add_block(made: Sequence[hk.Modulation], i: int, run: Sequence[int], computed: Sequence[Sequence[int]],
              linear: nn.Linear | None, activated: Tensor, whole: Callable[[], Tensor]) -> None:
    """Writes the rows of block i's two branches into the steps' modulations, each an entry for each of K branches.

    Of a branch that a step reuses, only the gate is written.

    Args:
        made: of all steps. run: the S steps that run blocks. computed: for each branch, which of these compute it.
        linear: the adaLN layer, of which only what is needed is computed. None computes `whole()`, which is for a layer
            on which something has been put.
        activated: what enters the layer [S, B, D]. whole: the layer's output [S, B, 6·D].
    """
    for k, steps, (shift_scale, gates) in zip((2 * i, 2 * i + 1), computed, _rows(linear, activated, computed, whole)):
        for j, rows in zip(steps, shift_scale):
            made[run[j]].shift[k], made[run[j]].scale[k] = rows.chunk(2, 1)
        for s, gate in zip(run, gates):
            made[s].gate[k] = gate


def linear_of(layer: nn.Module) -> nn.Linear | None:
    """The linear layer of an activation and a linear layer, if nothing has been put on any of the three."""
    if type(layer) is not nn.Sequential or len(layer) != 2 or not has_own_forward(layer):
        return None
    activation, linear = layer
    return linear if type(activation) is nn.SiLU and has_own_forward(activation) and is_plain_linear(linear) else None


def _rows(linear: nn.Linear | None, activated: Tensor, computed: Sequence[Sequence[int]],
          whole: Callable[[], Tensor]) -> list[tuple[Sequence[Tensor], Tensor]]:
    """For each branch, shift and scale [B, 2·D] of the steps that compute it, and the gates [S, B, D] of all steps."""
    S, _, D = activated.shape
    if linear is None or activated.device.type in ops.FUSED:  # where a launch costs more than rows that nobody reads
        made_whole = whole() if linear is None else linear(activated)
        return [([part[s][:, : 2 * D] for s in steps], part[..., 2 * D :])
                for part, steps in zip(made_whole.split(3 * D, 2), computed)]

    def part(x: Tensor, start: int, end: int) -> Tensor:
        return F.linear(x, linear.weight[start:end], None if linear.bias is None else linear.bias[start:end])

    made: list[tuple[Sequence[Tensor], Tensor]] = []
    for branch, steps in enumerate(computed):
        # of the layer's output, first:last is the branch's shift and scale, last:end its gate
        first, last, end = 3 * D * branch, 3 * D * branch + 2 * D, 3 * D * (branch + 1)
        if len(steps) == S:
            made.append(part(activated, first, end).split((2 * D, D), 2))
        elif steps:
            # slices are stacked, because a list of indices would have to be copied to the device
            chosen = torch.stack([activated[s] for s in steps])
            made.append((part(chosen, first, last), part(activated, last, end)))
        else:
            made.append(((), part(activated, last, end)))
    return made
