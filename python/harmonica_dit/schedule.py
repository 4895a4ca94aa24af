"""A schedule: which branches are computed at which step, and how the others are forecast. Every method ends as one."""

import math
import os
import warnings
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from harmonica_dit.files import load_tensors, save_tensors
from harmonica_dit.flops import Flops
from harmonica_dit.validate import (
    FORMAT,
    check_architecture,
    check_branches,
    check_content,
    check_fits,
    check_flops,
    check_resolution,
    check_table,
    check_timesteps,
    describe,
    is_number,
    shorten,
)

FIELDS = ("branches", "flops", "origin", "model", "timesteps")
OPTIONAL = ("guidance", "resolution", "architecture")  # files of before these were kept have none


def forecast_ratios(compute: Tensor) -> Tensor:
    """What a coefficient a is multiplied by to give the forecast weight e of the step after `compute`'s rows.

    (steps since the latest computed output) / (steps between the last two computed ones), after TaylorSeer (Liu et
    al., 2025), first order.

    Args:
        compute: bool [s, K], the decisions of steps 0..s-1.

    Returns:
        float32 [K], 0 where fewer than two outputs have been computed.
    """
    s = len(compute)
    numbers = torch.arange(1, s + 1, device=compute.device)[:, None]
    computed = torch.nn.functional.pad(torch.where(compute, numbers, 0), (0, 0, 1, 0))  # a row for "never"
    latest = computed.amax(0)
    previous = torch.where(computed < latest, computed, 0).amax(0)
    return torch.where(previous > 0, (s + 1 - latest) / (latest - previous), 0.0)


@dataclass(frozen=True, eq=False)
class Schedule:
    """The frozen compute table of one trajectory.

    Args:
        compute: bool [T, K], True where branch k is computed at step s; row 0 computes everything.
        branches: the K branches' names in execution order.
        flops: what a row's forward costs, branch by branch.
        extrapolation: float32 [T, K] extrapolation coefficients a; None is zeros, which repeat the latest output.
        origin: the method and its settings, in words.
        model: name of the model that it was made for, "" if any.
        timesteps: the T timesteps that it was made for, None if any.
        guidance: the guidance scale that it was made for, None if any.
        resolution: height and width of the latents that it was made for, None if any.
        architecture: the fingerprint of the model's class (see `adapt`), None where it is not known.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
    """

    compute: Tensor
    branches: tuple[str, ...]
    flops: Flops
    extrapolation: Tensor | None = None
    origin: str = ""
    model: str = ""
    timesteps: tuple[float, ...] | None = None
    guidance: float | None = None
    resolution: tuple[int, int] | None = None
    architecture: dict[str, str | int] | None = None

    def __post_init__(self):
        compute = self.compute
        if not isinstance(compute, Tensor) or compute.dtype != torch.bool or compute.dim() != 2 or not compute.numel():
            raise TypeError(f"compute: got {describe(compute)}, expected a bool tensor [T, K]")
        T, K = compute.shape
        if not compute[0].all():
            skipped = (~compute[0]).nonzero().flatten().tolist()
            raise ValueError(f"compute: row 0 has to compute every branch, for there is nothing to reuse yet; it "
                             f"reuses {skipped}")
        if self.extrapolation is None:
            object.__setattr__(self, "extrapolation", torch.zeros(T, K))
        check_table("extrapolation", self.extrapolation, T, K)
        object.__setattr__(self, "compute", compute.cpu())
        object.__setattr__(self, "extrapolation", self.extrapolation.detach().cpu())
        object.__setattr__(self, "branches", check_branches(self.branches, K))
        check_flops(self.flops, K)
        if self.timesteps is not None:
            object.__setattr__(self, "timesteps", check_timesteps(self.timesteps, T))
        for name in ("origin", "model"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"{name}: got {getattr(self, name)!r}, expected text")
        if self.guidance is not None and not is_number(self.guidance):
            raise ValueError(f"guidance: got {self.guidance!r}, expected a finite number")
        object.__setattr__(self, "resolution", check_resolution(self.resolution))
        check_architecture(self.architecture)

    @property
    def steps(self) -> int:
        """T."""
        return len(self.compute)

    @property
    def cur(self) -> float:
        """Cache utilization ratio: reused entries / (T·K), from 0 to 1."""
        return 1 - self.compute.sum().item() / self.compute.numel()

    @property
    def speedup(self) -> float:
        """FLOPs of the uncached trajectory / FLOPs of this one, what no schedule skips counted in both."""
        computed = (self.compute.double() @ torch.tensor(self.flops.branches, dtype=torch.float64)).sum().item()
        return self.steps * self.flops.total / (self.steps * self.flops.fixed + computed)

    @property
    def history(self) -> int:
        """Outputs that a feature cache has to keep for each branch: 2 where a reused branch is forecast, else 1."""
        return 1 if all(row is None for row in self.forecast_weights) else 2

    @cached_property
    def rows(self) -> tuple[tuple[bool, ...], ...]:
        """The T hard rows."""
        return tuple(map(tuple, self.compute.tolist()))

    @cached_property
    def forecast_weights(self) -> tuple[tuple[float, ...] | None, ...]:
        """The T rows of forecast weights e = a·ratio, 0 where a branch is computed; None for a row that has none."""
        rows = []
        for s in range(self.steps):
            e = self.extrapolation[s] * forecast_ratios(self.compute[:s]) * ~self.compute[s]
            rows.append(tuple(e.tolist()) if e.any() else None)
        return tuple(rows)

    def resampled(self, timesteps: tuple[float, ...]) -> "Schedule":
        """For other timesteps, as many as you like: each row is the one of the nearest timestep; row 0 computes.

        Raises:
            ValueError: this schedule does not say what timesteps it was made for.
        """
        if self.timesteps is None:
            raise ValueError("schedule: does not say what timesteps it was made for, so its rows cannot be mapped to "
                             "others")
        timesteps = check_timesteps(timesteps, len(timesteps))
        made, wanted = (torch.tensor(values, dtype=torch.float64) for values in (self.timesteps, timesteps))
        rows = (wanted[:, None] - made).abs().argmin(1)  # the noisier of two equally near
        compute = self.compute[rows]
        compute[0] = True
        return replace(self, compute=compute, extrapolation=self.extrapolation[rows], timesteps=timesteps,
                       origin=f"{self.origin}, resampled from {self.steps} steps")

    def decision_tables(self) -> tuple[Tensor, Tensor | None]:
        """Scores that every threshold decides alike, and extrapolation coefficients [T, K], for `executor.load`."""
        scores = torch.where(self.compute, math.inf, -math.inf)
        return scores, None if self.history == 1 else self.extrapolation

    def save(self, path: str | os.PathLike) -> None:
        """Writes a safetensors file, whole or not at all."""
        metadata = {name: getattr(self, name) for name in FIELDS + OPTIONAL} | dict(
            kind="schedule", format=FORMAT, flops=[self.flops.branches, self.flops.fixed])
        save_tensors(path, {"compute": self.compute, "extrapolation": self.extrapolation}, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Schedule":
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not a whole schedule of this format; the message names it and what is wrong.
        """
        return cls.from_tensors(*load_tensors(path), path)

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], metadata: dict, path: str | os.PathLike) -> "Schedule":
        """What `load` makes of a file's content; `path` is for its messages."""
        tensors, metadata = check_content(tensors, metadata, path, "schedule", ("compute", "extrapolation"), FIELDS,
                                          optional_fields=OPTIONAL)
        try:
            return cls(**tensors, **metadata)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from None

    def check(self, net, trajectory) -> None:
        """Refuses a model with other branches or a trajectory of other length; other timesteps are a warning.

        Raises:
            ValueError: it cannot run this schedule; the message says what differs.
        """
        check_fits("schedule: ", self, net)
        if trajectory.steps != self.steps:
            raise ValueError(f"schedule: for {self.steps} steps, the trajectory has {trajectory.steps}")
        if self.timesteps is not None and self.timesteps != tuple(trajectory.timesteps):
            warnings.warn(f"schedule: made for other timesteps ({shorten(self.timesteps)}) than the trajectory's "
                          f"({shorten(trajectory.timesteps)})", stacklevel=3)
