"""The ops of the captured nodes of a plan whose unit is the trunk, in buffers that stay where they are.

A step stores its trunk state and tokens in rings; which place is whose, a step reads from tables in device memory. So
one graph serves every schedule and every forecaster of as many states.
"""

import torch
from torch import Tensor

from ...forward import Modulation, trunk_state
from ...ops import Term, residual_norm
from ...trunk import TrunkWeights
from .decision_memory import DecisionMemory, DecisionTables
from .ends import Ends
from .loop import Loop


class TrunkParts(Ends):
    """The ops of a loop's plan, and their memory, beside that of `Ends`.

    states [H + 1, B, N, D]: those of the last H computed steps and, at a computed step, its own. entered [H, B, N, D]:
    the tokens of the last H computed steps.

    Args:
        loop, memory, noise: as in `Ends`. history: H.
    """

    def __init__(self, loop: Loop, memory: DecisionMemory, noise: Tensor, history: int):
        super().__init__(loop, memory, noise)
        self.history = history
        (B, N, D), device = self.tokens.shape, noise.device
        self.states, self.entered = (self.tokens.new_zeros(n, B, N, D) for n in (history + 1, history))
        self.weights = torch.zeros(memory.steps, 2 * history + 2, D, device=device)
        self.places = torch.zeros(memory.steps, 2, dtype=torch.int64, device=device)  # where a step stores both
        self._stack()

    def load(self, tables: DecisionTables) -> None:
        """Writes how each of T steps weighs the rings, where it stores, and what is added to its condition.

        Raises:
            ValueError: something is added to conditions, and the loop takes nothing.
        """
        if tables.condition is not None and self.loop.condition is None:
            raise ValueError("schedule: adds to the steps' conditions, which this trajectory's loop does not take")
        compute, D = (tables.scores[:, 0] > 0).tolist(), self.tokens.shape[2]
        made = [in_rings(w, computed, sum(compute[:s]), self.history, D)
                for s, (w, computed) in enumerate(zip(tables.trunk, compute, strict=True))]
        self.weights.copy_(torch.stack([rows for rows, _ in made]))
        self.places.copy_(torch.tensor([places for _, places in made]))
        if self.loop.condition is not None:
            self.loop.condition.zero_()
            if tables.condition is not None:
                self.loop.condition.copy_(tables.condition)

    def _modulation(self) -> None:
        super()._modulation()
        self._stack()
        self.states.zero_()  # a weight of 0 must not meet what another trajectory may have left: inf or NaN
        self.entered.zero_()

    def _stack(self) -> None:
        """The modulation's rows, the branches' and the final norm's, each one after the other: see `_of_step`."""
        K, B = len(self.loop.branches), self.tokens.shape[0]
        self._stacked = []
        for which in (slice(K), slice(K, K + 1)):
            rows = [row.expand(-1, B, -1) for part in self.modulation for row in part[which] if row is not None]
            self._stacked.append(torch.stack(rows, 1) if rows else None)

    def _of_step(self, final: bool) -> Modulation:
        """The rows [B, D] of the step, of all branches or of the final norm, by one selection."""
        K, stacked = len(self.loop.branches), self._stacked[final]
        rows = iter(() if stacked is None else stacked.index_select(0, self.memory.step)[0])
        which = slice(K, K + 1) if final else slice(K)
        return Modulation(*([None if row is None else next(rows) for row in part[which]] for part in self.modulation))

    def _trunk(self) -> None:
        step, mine = self.memory.step, self._of_step(final=False)
        state = trunk_state(self.loop.branches, self.tokens, mine, self.context)
        places = self.places.index_select(0, step)[0]
        self.states.index_copy_(0, places[:1], state[None])
        self.entered.index_copy_(0, places[1:], self.tokens[None])

    def _weigh(self) -> None:
        [shift], [scale], _ = self._of_step(final=True)
        gates = self.weights.index_select(0, self.memory.step)[0]
        run = [Term(t, None, gate[None]) for t, gate in zip((self.tokens, *self.states, *self.entered), gates)]
        residual_norm(self.tokens, run, shift, scale, h_out=self.h, eps=self.loop.eps)


def in_rings(weights: TrunkWeights | None, computed: bool, kept: int, history: int,
             width: int) -> tuple[Tensor, tuple[int, int]]:
    """A step's weights by places: rows [2·history + 2, D] of tokens - 1, states and entered tokens.

    And the places where it stores its own, if it is computed. kept: how many steps have been computed before it.
    """
    places = kept % (history + 1), kept % history
    rows = torch.zeros(2 * history + 2, width)
    tokens, states, entered = rows[:1], rows[1 : history + 2], rows[history + 2 :]
    tokens -= 1  # the tokens are the base that the others are added to
    own = weights and weights.own
    if computed:
        states[places[0]] += 1 if own is None else 1 + own
    elif own is not None or weights.tokens is not None:
        tokens += 1 if own is None else 1 + own
    else:
        states[(kept - 1) % (history + 1)] += 1
    for i in range(0 if weights is None else len(weights.states)):
        states[(kept - 1 - i) % (history + 1)] += weights.states[i]
        if weights.tokens is not None:
            entered[(kept - 1 - i) % history] += weights.tokens[i]
    return rows, places
