"""What steps cost: in FLOPs (`flops.Flops`), or in seconds that were measured on a device."""

import json
import os
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from .files import replacement

LONGEST = 1e9  # seconds that a step may take


@dataclass(frozen=True)
class Costs(ABC):
    """Of a step: each of the K branches where it is computed, and `fixed`, which no schedule skips.

    Of a kind of costs there is also `uncached`, a step without a cache, with which speedups compare.
    """

    branches: tuple[float, ...]
    fixed: float

    @property
    def total(self) -> float:
        """Of a step that computes every branch."""
        return sum(self.branches) + self.fixed

    @property
    def least(self) -> float:
        """Of a step that computes no branch, by what costs least."""
        return self.fixed

    def of_steps(self, compute: Tensor) -> float:
        """Of T steps that compute what `compute` [T, K] says: bools, or shares of the forwards that compute a branch.
        """
        each = torch.tensor(self.branches, dtype=torch.float64)
        return len(compute) * self.fixed + (compute.double() @ each).sum().item()

    def speedup(self, compute: Tensor) -> float:
        """Costs of T uncached steps / those of T steps that compute what `compute` says, as in `of_steps`."""
        return len(compute) * self.uncached / self.of_steps(compute)

    def of_trajectory(self, schedule) -> float:
        """Of all steps of a schedule, its forecasts among them."""
        return self.of_steps(schedule.compute) + self.beside(schedule)

    @abstractmethod
    def beside(self, schedule) -> float:
        """What a schedule costs beside its computed branches and what is fixed, such as its forecasts."""

    def of_router(self, forecasts: bool) -> "Costs":
        """The same for a router's rows, with as much as possible of what comes beside put into `fixed` and `branches`.

        forecasts: whether branches that are not computed are forecast to first order.
        """
        return self


@dataclass(frozen=True)
class Seconds(Costs):
    """What the steps of a batch take on a device, see `harmonica_dit.measure_costs`.

    Args:
        branches: what each of the K branches adds to a step in which it is computed in place of repeated; its norm and
            modulation are part of that.
        fixed: a step that repeats every branch.
        forecast: what a forecast adds where a branch is not computed, for each further output that it reads.
        trunk: a step whose trunk is forecast.
        mixed: what a step takes longer than its parts that computes some of its branches and not the others.
        uncached: a step without a cache; one that computes every branch and stores it may take longer.
        where: what they were measured on, by name.
    """

    forecast: float
    trunk: float
    mixed: float
    uncached: float
    where: dict[str, str | int | float | list[int]] = field(default_factory=dict)

    @property
    def least(self) -> float:
        """Of a step that computes no branch, by what costs least."""
        return min(self.fixed, self.trunk)

    def beside(self, schedule) -> float:
        """What mixed steps and forecasts take longer than their computed and repeated branches do."""
        whole, some = schedule.compute.double().aminmax(dim=1)  # the shares of forwards that compute all, and any
        if schedule.unit == "trunk":
            return (self.trunk - self.fixed) * (1 - whole).sum().item()
        entries = [e for step in schedule.forecast_weights if step for e in step]
        read = sum(len(e) - 1 if isinstance(e, tuple) else e != 0 for e in entries)
        return self.forecast * read + self.mixed * (some - whole).sum().item()

    def of_router(self, forecasts: bool) -> "Seconds":
        """The same where every step is mixed and, with forecasts, each branch that is not computed is forecast."""
        f = self.forecast if forecasts else 0.0
        return replace(self, branches=tuple(c - f for c in self.branches),
                       fixed=self.fixed + self.mixed + f * len(self.branches), forecast=0.0, mixed=0.0)

    def save(self, path: str | os.PathLike) -> None:
        """Writes a JSON file, whole or not at all."""
        with replacement(path) as temporary:
            temporary.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Seconds":
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file. ValueError: it holds something else; the message names it.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no file at {path}")
        try:
            values = json.loads(Path(path).read_text())
            found = cls(**values | dict(branches=tuple(values["branches"])))
            others = found.fixed, found.forecast, found.trunk, found.mixed, found.uncached
            good = all(type(n) in (int, float) and 0 <= n < LONGEST for n in (*found.branches, *others))
            if not good or not found.total or not found.uncached:
                raise ValueError(f"expected finite numbers from 0 on, not all 0, uncached above 0, got {values}")
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ValueError(f"{path} is no table of seconds: {error!s:.200}") from None
        return found
