"""The memory in which the device decides: `DecisionMemory` of csrc/kernels.h, as tensors."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...trunk import TrunkWeights

PARTS = 264  # partial sums of the change rule: two for each of an H100's 132 multiprocessors


class DecisionTables(NamedTuple):
    """What a router or a schedule decides by.

    scores: float32 [T, K]; or [T, 1], ∞ for a computed step and -∞ for another, of a schedule that forecasts the trunk.
    extrapolation: float32 [T, K] coefficients; None where all reuse repeats. trunk: for each of T steps the weights of
    the trunk's cached states, as `cached_forward` takes them. states: how many of them are kept at most. condition:
    [T, D'] that is added to the steps' conditions, or None.
    """

    scores: Tensor
    extrapolation: Tensor | None = None
    trunk: Sequence[TrunkWeights | None] | None = None
    states: int = 0
    condition: Tensor | None = None

    @property
    def unit(self) -> str:
        return "branch" if self.trunk is None else "trunk"

    @property
    def history(self) -> int:
        if self.trunk is not None:
            return self.states
        return 1 if self.extrapolation is None else 2


class DecisionMemory:
    """Scores, extrapolation and threshold, and the decisions that the device makes from them.

    The host writes the first three between trajectories. Every tensor stays where it is: the graph holds its address.

    Args:
        steps, branches: T and K. history: cache slots per branch, 1 or 2. device: of all tensors.
        parts: how many partial sums the change rule takes.
    """

    def __init__(self, steps: int, branches: int, history: int, device: torch.device, parts: int = PARTS):
        T, K = self.steps, self.branches = steps, branches
        self.history, self.parts = history, parts

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.scores = zeros(T, K, dtype=torch.float32)
        self.extrapolation = zeros(T, K, dtype=torch.float32)
        self.threshold = zeros(1, dtype=torch.float64)
        self.conditions = zeros(K + 1, dtype=torch.int64)
        self.change = zeros(2, parts, dtype=torch.float64)
        self.step, self.again, self.reference = zeros(1), zeros(1), zeros(1)
        self.compute, self.start, self.slot = zeros(K), zeros(K + 1), zeros(K)
        self.latest_at, self.previous_at = zeros(K), zeros(K)
        self.forecast_weights = zeros(K, dtype=torch.float32)
        self.reused = zeros(T, K, dtype=torch.uint8)

    def addresses(self) -> dict[str, int]:
        """Sizes and the tensors' addresses by name, as the compiled `decide` takes them."""
        return {name: value.data_ptr() if isinstance(value, Tensor) else value for name, value in vars(self).items()}
