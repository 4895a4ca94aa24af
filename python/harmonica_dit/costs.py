"""What steps cost: in FLOPs (`flops.Flops`), or in seconds that were measured on a device."""

import json
import math
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from .files import replacement


@dataclass(frozen=True)
class Costs:
    """Of a step: each of the K branches where it is computed, and `fixed`, which no schedule skips."""

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
        """Costs of T whole steps / those of T steps that compute what `compute` says, as in `of_steps`."""
        return len(compute) * self.total / self.of_steps(compute)

    def of_trajectory(self, schedule) -> float:
        """Of all steps of a schedule, its forecasts among them."""
        return self.of_steps(schedule.compute) + self.of_forecasts(schedule)

    def of_forecasts(self, schedule) -> float:
        """What a schedule's forecasts add to its computed branches and to what is fixed."""
        raise NotImplementedError

    def forecasting(self) -> "Costs":
        """The same where each branch that is not computed is forecast to first order, in `fixed`."""
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
        where: what they were measured on, by name.
    """

    forecast: float
    trunk: float
    where: dict[str, str | int | float | list[int]] = field(default_factory=dict)

    @property
    def least(self) -> float:
        """Of a step that computes no branch, by what costs least."""
        return min(self.fixed, self.trunk)

    def of_forecasts(self, schedule) -> float:
        """What a schedule's forecasts take longer than repeating; of the trunk they may take less time."""
        if schedule.unit == "trunk":
            return (self.trunk - self.fixed) * (~schedule.compute[:, 0]).sum().item()
        entries = [e for step in schedule.forecast_weights if step for e in step]
        return self.forecast * sum(len(e) - 1 if isinstance(e, tuple) else e != 0 for e in entries)

    def forecasting(self) -> "Seconds":
        """The same where each branch that is not computed is forecast to first order, in `fixed`."""
        f = self.forecast
        return replace(self, branches=tuple(c - f for c in self.branches), fixed=self.fixed + f * len(self.branches),
                       forecast=0.0)

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
            if not all(0 <= n < math.inf for n in (*found.branches, found.fixed, found.forecast, found.trunk)):
                raise ValueError(f"expected finite numbers from 0 on, got {values}")
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} is no table of seconds: {error!s:.200}") from None
        return found
