"""A schedule: which branches are computed at which step, and how the others are forecast. Every method makes one."""

import math
import os
import warnings
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

import harmonica_kernels as hk
from harmonica_dit.costs import Costs
from harmonica_dit.fashion import find
from harmonica_dit.files import load_tensors, save_tensors
from harmonica_dit.flops import Flops
from harmonica_dit.forecaster import (
    FORECASTER_TABLES,
    BranchForecaster,
    Rule,
    TrunkForecaster,
    forecast_ratios,
    forecaster_content,
    lowered_order,
    make_forecaster,
)
from harmonica_dit.resample import resample
from harmonica_dit.validate import (
    FORMAT,
    WITH_FORECASTER,
    check_alike_in_runs,
    check_architecture,
    check_branches,
    check_content,
    check_costs,
    check_fits,
    check_resolution,
    check_scheduler,
    check_scheduler_config,
    check_table,
    check_timesteps,
    describe,
    is_number,
    shorten,
)
from harmonica_kernels.cache import check_runs, run_spans
from harmonica_kernels.graphs.gated import DecisionTables

# older files lack those of OPTIONAL
FIELDS = ("branches", "flops", "origin", "model", "timesteps")
OPTIONAL = ("guidance", "resolution", "architecture", "scheduler", "scheduler_config", "labels", "runs")


@dataclass(frozen=True, eq=False, repr=False)
class Schedule:
    """The frozen compute table of one trajectory.

    Args:
        compute: bool [T, K], True where branch k is computed at step s; row 0 computes everything.
        branches: the K branches' names in execution order.
        flops: of a forward of batch 1, branch by branch.
        extrapolation: float32 [T, K] extrapolation coefficients a; None is zeros, which repeat the latest output.
        forecaster: in place of extrapolation coefficients: of the branches; or of the trunk, for a schedule whose steps
            are computed whole or not at all. Sampling with a forecaster of the trunk takes the schedule's timesteps.
        origin: the method and its settings, in words.
        model: name of the model that the schedule was made for; "" is any model.
        timesteps, guidance, resolution: the T timesteps, the guidance scale, and height and width of the latents that
            the schedule was made for; None is any.
        architecture: the fingerprint of the model's class (see `adapt`), None if unknown.
        runs: how many branches are cached and decided together, in execution order; compute and extrapolation are the
            same for all of a run. None is one each. See `harmonica_kernels.FeatureCache`.
        scheduler: its name, see `make_scheduler`; scheduler_config: its settings, see `config_of`; labels: the classes
            or prompts' numbers. What the schedule was made for; None is any.

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
    scheduler: str | None = None
    scheduler_config: dict | None = None
    labels: tuple[int, ...] | None = None
    runs: tuple[int, ...] | None = None
    forecaster: BranchForecaster | TrunkForecaster | None = None

    def __post_init__(self):
        compute = self.compute
        if not isinstance(compute, Tensor) or compute.dtype != torch.bool or compute.dim() != 2 or not compute.numel():
            raise TypeError(f"compute: got {describe(compute)}, expected a bool tensor [T, K]")
        T, K = compute.shape
        if not compute[0].all():
            skipped = (~compute[0]).nonzero().flatten().tolist()
            raise ValueError(f"compute: row 0 has to compute every branch, nothing is cached yet; it reuses {skipped}")
        if self.extrapolation is None:
            object.__setattr__(self, "extrapolation", torch.zeros(T, K))
        check_table("extrapolation", self.extrapolation, T, K)
        object.__setattr__(self, "compute", compute.cpu())
        object.__setattr__(self, "extrapolation", self.extrapolation.detach().cpu())
        object.__setattr__(self, "branches", check_branches(self.branches, K))
        check_costs("flops", self.flops, K, Flops)
        if self.timesteps is not None:
            object.__setattr__(self, "timesteps", check_timesteps(self.timesteps, T))
        for name in ("origin", "model", "scheduler"):
            value = getattr(self, name)
            if not isinstance(value, str) and not (name == "scheduler" and value is None):
                raise TypeError(f"{name}: got {value!r}, expected text")
        if self.labels is not None:
            if not isinstance(self.labels, (tuple, list)) or not all(type(label) is int for label in self.labels):
                raise TypeError(f"labels: got {shorten(self.labels)}, expected whole numbers")
            object.__setattr__(self, "labels", tuple(self.labels))
        if self.guidance is not None and not is_number(self.guidance):
            raise ValueError(f"guidance: got {self.guidance!r}, expected a finite number")
        object.__setattr__(self, "resolution", check_resolution(self.resolution))
        check_architecture(self.architecture)
        check_scheduler_config(self.scheduler, self.scheduler_config)
        if self.runs is not None:
            object.__setattr__(self, "runs", check_runs(self.runs))
            check_alike_in_runs(self.runs, compute=self.compute, extrapolation=self.extrapolation)
            if self.unit == "trunk":
                raise ValueError("runs: got some beside a forecaster of the trunk; give one of both")
        if self.forecaster is not None:
            self._check_forecaster()

    def _check_forecaster(self) -> None:
        forecaster, compute = self.forecaster, self.compute
        if not isinstance(forecaster, (BranchForecaster, TrunkForecaster)):
            raise TypeError(f"forecaster: got {type(forecaster).__name__}, expected a TrunkForecaster or a "
                            "BranchForecaster")
        if self.extrapolation.any():
            raise ValueError("extrapolation: got coefficients beside a forecaster; give one of both")
        if self.unit == "branch":
            return
        if len(forecaster.states) != self.steps:
            raise ValueError(f"forecaster: for {len(forecaster.states)} steps, the schedule has {self.steps}")
        computed = int(compute.all(1).sum())
        if forecaster.history > max(1, computed):
            raise ValueError(f"forecaster: keeps {forecaster.history} states, the schedule computes {computed} steps")
        partly = (compute.any(1) & ~compute.all(1)).nonzero().flatten().tolist()
        if partly:
            raise ValueError(f"compute: steps {partly} are computed in part; a forecaster of the trunk has whole ones")

    def __repr__(self) -> str:
        return (f"<Schedule {self.origin or 'of unknown origin'}: {self.steps} steps, {len(self.branches)} branches, "
                f"CUR {self.cur:.1%}, FLOPs speedup {self.speedup:.2f}×>")

    @property
    def steps(self) -> int:
        """T."""
        return len(self.compute)

    @property
    def unit(self) -> str:
        """What is reused: "branch" or "trunk"."""
        return "branch" if self.forecaster is None else self.forecaster.unit

    @property
    def cur(self) -> float:
        """Cache utilization ratio: reused entries / (T·K), from 0 to 1."""
        return 1 - self.compute.sum().item() / self.compute.numel()

    @property
    def speedup(self) -> float:
        """FLOPs of the uncached trajectory / FLOPs of this one. Both include the FLOPs that no schedule skips."""
        return self.speedup_by(self.flops)

    def speedup_by(self, costs: Costs) -> float:
        """`speedup` in other costs, such as the seconds that `measure_costs` found."""
        return self.steps * costs.uncached / costs.of_trajectory(self)

    @property
    def history(self) -> int:
        """How many outputs of each branch, or states of the trunk, a cache has to keep: 1 if nothing is forecast."""
        if self.forecaster is not None:
            return self.forecaster.history
        return 1 if all(row is None for row in self.forecast_weights) else 2

    def new_cache(self, net=None):
        """A cache for one trajectory. net: the denoiser, which may have a kind of its own."""
        if hasattr(net, "new_cache"):
            return net.new_cache(self.history, self.unit, self.runs)
        return hk.FeatureCache(self.history, self.runs) if self.unit == "branch" else hk.TrunkCache(self.history)

    @cached_property
    def rows(self) -> tuple[tuple[bool, ...] | bool | None, ...]:
        """The T hard rows; with a forecaster of the trunk None for a computed step and False for a forecast one.

        Where runs of branches are decided together, with an entry for each run.
        """
        return self.branch_rows if self.runs is None else tuple(map(self._by_runs, self.branch_rows))

    @cached_property
    def branch_rows(self) -> tuple[tuple[bool, ...] | bool | None, ...]:
        """As `rows`, but with an entry for each branch in any case."""
        if self.unit == "trunk":
            return tuple(None if row[0] else False for row in self.compute.tolist())
        return tuple(map(tuple, self.compute.tolist()))

    def _by_runs(self, row: tuple | None) -> tuple | None:
        """An entry for each run in place of one for each of its branches."""
        if self.runs is None or row is None:
            return row
        return tuple(row[first] for first, _ in run_spans(self.runs, len(row)))

    @cached_property
    def forecast_weights(self) -> tuple[tuple[float, ...] | hk.TrunkWeights | None, ...]:
        """For each step, K forecast weights e = a·ratio, 0 where a branch is computed, or None if all are 0.

        With a forecaster its weights, on the CPU.
        """
        if self.unit == "trunk":
            return self.forecaster.weights(self.compute[:, 0].tolist())
        if self.forecaster is not None:
            return tuple(map(self._by_runs, self.forecaster.weights(self.compute)))
        rows = []
        for s in range(self.steps):
            e = self.extrapolation[s] * forecast_ratios(self.compute[:s]) * ~self.compute[s]
            rows.append(self._by_runs(tuple(e.tolist())) if e.any() else None)
        return tuple(rows)

    def resampled(self, timesteps: tuple[float, ...]) -> "Schedule":
        """This schedule for other timesteps, any number of them: each branch keeps its share of computed steps.

        The first step computes everything. Warns if the CUR moves by more than 0.05. See `harmonica_dit.resample`.

        Raises:
            ValueError: this schedule does not say what timesteps it was made for, or its forecaster was learned for
                them; or the new ones neither fall nor rise, or move against the schedule's.
        """
        return resample(self, timesteps)

    def nothing_gained(self) -> str | None:
        """What this schedule was made to gain and does not, in words, for a warning; None if there is nothing such."""
        if self.compute.all() and all(step is None for step in self.forecast_weights):
            return "reuses nothing: every branch is computed at every step"
        rule = Rule(int(self.extrapolation[~self.compute].any())) if self.forecaster is None else self.forecaster.rule
        return None if rule is None else lowered_order(self.compute, rule)

    def forecast_weights_on(self, device: torch.device) -> tuple[tuple[float, ...] | hk.TrunkWeights | None, ...]:
        """`forecast_weights` with tensors on a device, where they stay."""
        if self.unit == "branch":
            return self.forecast_weights
        if device not in self._moved:
            with torch.inference_mode(False):  # they are for forwards in any mode
                self._moved[device] = tuple(step and hk.TrunkWeights(*(
                    part if part is None else part.to(device) for part in step)) for step in self.forecast_weights)
        return self._moved[device]

    def condition_on(self, device: torch.device) -> Tensor | None:
        """What a forecaster adds to the steps' conditions, [T, D], on a device, where it stays; None is nothing."""
        if self.unit == "branch" or self.forecaster.condition is None:
            return None
        if ("condition", device) not in self._moved:
            with torch.inference_mode(False):
                self._moved["condition", device] = self.forecaster.condition.to(device)
        return self._moved["condition", device]

    @cached_property
    def _moved(self) -> dict:
        return {}

    def decision_tables(self) -> DecisionTables:
        """What an executor decides by, for `executor.load`. The scores are ±∞, so every threshold decides alike.

        Raises:
            ValueError: branches are forecast to a higher order than the first, or run by run.
        """
        scores = torch.where(self.compute, math.inf, -math.inf)
        if self.unit == "trunk":
            return DecisionTables(scores[:, :1], None, self.forecast_weights, self.history, self.forecaster.condition)
        if self.runs is not None:
            raise ValueError('schedule: decides on runs of branches, which mode="gated" does not; use mode="captured"')
        if self.forecaster is not None:
            raise ValueError(f'schedule: its forecaster ({self.forecaster.origin}) is none that mode="gated" knows; '
                             'use mode="captured"')
        return DecisionTables(scores, None if self.history == 1 else self.extrapolation)

    def save(self, path: str | os.PathLike) -> None:
        """Writes a safetensors file, whole or not at all."""
        metadata = {name: getattr(self, name) for name in FIELDS + OPTIONAL} | dict(
            kind="schedule", format=FORMAT, flops=[self.flops.branches, self.flops.fixed])
        tensors = {"compute": self.compute, "extrapolation": self.extrapolation}
        if self.runs is not None:
            metadata["format"] = WITH_FORECASTER
        if self.forecaster is not None:
            tables, about = forecaster_content(self.forecaster)
            metadata |= dict(format=WITH_FORECASTER, forecaster=about)
            tensors |= tables
        save_tensors(path, tensors, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Schedule":
        """Reads what `save` wrote, or the bundled schedule of a name (see `harmonica_dit.fashion.find`).

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not a whole schedule of this format; the message names it and what is wrong.
        """
        path = find(path)
        return cls.from_tensors(*load_tensors(path), path)

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], metadata: dict, path: str | os.PathLike) -> "Schedule":
        """Makes a schedule from the content of a file, for `load`. path: for error messages."""
        tensors, metadata = check_content(tensors, metadata, path, "schedule", ("compute", "extrapolation"), FIELDS,
                                          FORECASTER_TABLES, (*OPTIONAL, "forecaster"))
        try:
            tables = {name: tensors.pop(name, None) for name in FORECASTER_TABLES}
            if "forecaster" in metadata:
                metadata["forecaster"] = make_forecaster(tables, metadata["forecaster"])
            return cls(**tensors, **metadata)
        except KeyError as error:
            raise ValueError(f"{path}: its forecaster has no {error}") from None
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from None

    def check(self, net, trajectory) -> None:
        """Refuses another architecture, other branches and another number of steps; with a forecaster of the trunk also
        another width and another scheduler. Warns of other timesteps, guidance and labels.

        Raises:
            ValueError: the schedule does not fit; the message says what differs.
        """
        check_fits("schedule: ", self, net)
        if self.unit == "trunk":
            self.forecaster.check_width("schedule: ", net.width)
            check_scheduler("schedule: ", self, trajectory.scheduler_name, trajectory.scheduler_config)
        if trajectory.steps != self.steps:
            raise ValueError(f"schedule: for {self.steps} steps, the trajectory has {trajectory.steps}")
        if self.timesteps is not None and self.timesteps != tuple(trajectory.timesteps):
            warnings.warn(f"schedule: made for other timesteps ({shorten(self.timesteps)}) than the trajectory's "
                          f"({shorten(trajectory.timesteps)})", stacklevel=3)
        if None not in (self.guidance, scale := trajectory.model.scale) and self.guidance != scale:
            warnings.warn(f"schedule: made for guidance {self.guidance:g}, the trajectory's is {scale:g}", stacklevel=3)
        others = set() if self.labels is None else set(trajectory.labels.tolist()) - set(self.labels)
        if others:
            warnings.warn(f"schedule: made for the labels {shorten(self.labels)}, used with {shorten(sorted(others))}",
                          stacklevel=3)
