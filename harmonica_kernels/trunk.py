"""The trunk as the unit of reuse: all branches of a forward together, whose result enters the final norm."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from .cache import Memory
from .ops import Term


class TrunkWeights(NamedTuple):
    """How one step makes the state h that the final norm is given, per channel.

        h = base + own∘x + Σ_i states[i]∘c_i + Σ_i tokens[i]∘e_i

    c_i: the trunk's states of the last computed steps, the newest first; e_i: the tokens that entered these steps. At a
    computed step x is its own state, and base is x. At a forecast step x is the tokens that enter it; base is x if own
    or tokens is given, else c_0.

    states: [n, D or 1], n ≤ the states that the cache holds. tokens: [n, D or 1] or None. own: [D or 1] or None.
    """

    states: Tensor
    tokens: Tensor | None = None
    own: Tensor | None = None


class TrunkCache(Memory):
    """The memory of one trajectory whose steps are computed whole or not at all: its last `history` trunk states.

    Holds at most 2·history·B·N·D values: each state [B, N, D], and a copy of the tokens [B, N, D] that entered its
    forward, so these may be overwritten. A gradient reaches the forwards that made them.

    Args:
        history: 1 to 4.
    """

    def __init__(self, history: int = 2):
        super().__init__(history)

    def reset(self) -> None:
        super().reset()
        self._kept: list[tuple[Tensor, Tensor]] = []  # states and tokens, newest first

    rewind = reset

    def _held(self) -> Sequence[Tensor]:
        return [t for pair in self._kept for t in pair]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(t.nbytes for t in self._held())

    @property
    def filled(self) -> int:
        """How many states the cache holds, 0 to `history`."""
        return len(self._kept)

    def state(self, i: int) -> Tensor:
        """The trunk state [B, N, D] of the last computed step (i = 0) or of an earlier one."""
        return self._kept[i][0]

    def tokens(self, i: int) -> Tensor:
        """The tokens [B, N, D] that entered the forward of `state(i)`."""
        return self._kept[i][1]

    def newest(self) -> tuple[Tensor, Tensor]:
        """The newest state, and the tokens that entered its forward."""
        return self._kept[0]

    def holding(self, states: Sequence[tuple[Tensor, Tensor]]) -> "TrunkCache":
        """A cache of such a trajectory that holds these, the newest first, each as `newest` gave it."""
        made = TrunkCache(self.history)
        made._kept = list(states)
        return made

    # Called by `cached_forward`.

    def _keep(self, state: Tensor, tokens: Tensor) -> None:
        self._kept = [(state, tokens), *self._kept][: self.history]


def base_and_terms(weights: TrunkWeights, x: Tensor, kept: Sequence[tuple[Tensor, Tensor]],
                   computed: bool) -> tuple[Tensor, list[Term]]:
    """Base, and the run that turns it into h, see `TrunkWeights`. kept: cached states and tokens, newest first."""
    own, tokens = weights.own, weights.tokens
    base = x if computed or own is not None or tokens is not None else kept[0][0]
    weighed = [] if own is None else [(own, x)]
    weighed += zip(weights.states, (state for state, _ in kept))
    weighed += zip(() if tokens is None else tokens, (entered for _, entered in kept))
    return base, [Term(t, None, row.expand(1, x.shape[2])) for row, t in weighed]
