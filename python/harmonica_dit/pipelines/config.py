"""What is to be done with a pipeline's calls: a speedup to reach, or a schedule that is there already."""

import os
from dataclasses import dataclass
from functools import cached_property

from harmonica_dit.costs import Costs
from harmonica_dit.router import Router, schedule_of
from harmonica_dit.schedule import Schedule
from harmonica_dit.validate import is_number

MISMATCH = ("error", "resample")


@dataclass(frozen=True)
class HarmoniCaConfig:
    """What `enable_cache` does; exactly one of `speedup` and `schedule`.

    Args:
        speedup: needs no training: of whatever number of steps a call has, as many are computed as it leaves, whole and
            as evenly spaced as they can be. At the others the trunk is forecast to first order; or the branches, where
            a model's trunk cannot be reused.
        costs: what the speedup is in: None is FLOPs; measured seconds of the model's branches, see
            `harmonica_dit.measure_costs`.
        schedule: a schedule, a router, a file of either, or the name of a bundled one.
        threshold: τ of a router; None takes its own.
        on_mismatch: what to do if a call's timesteps are not the schedule's. "error" refuses another number of them;
            "resample" maps the schedule to them (`Schedule.resampled`).

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
    """

    speedup: float | None = None
    schedule: str | os.PathLike | Router | Schedule | None = None
    threshold: float | None = None
    on_mismatch: str = "error"
    costs: Costs | None = None

    def __post_init__(self):
        if (self.speedup is None) == (self.schedule is None):
            raise ValueError(f"speedup, schedule: give exactly one of them, got {self.speedup!r} and {self.schedule!r}")
        if self.speedup is not None and (not is_number(self.speedup) or self.speedup < 1):
            raise ValueError(f"speedup: got {self.speedup!r}, expected a number from 1 on")
        if self.costs is not None and self.speedup is None:
            raise ValueError("costs: are what a speedup is in, got them with a schedule")
        if not isinstance(self.costs, Costs | None):
            raise TypeError(f"costs: got {type(self.costs).__name__}, expected measured Seconds")
        if self.on_mismatch not in MISMATCH:
            raise ValueError(f"on_mismatch: got {self.on_mismatch!r}, expected one of {MISMATCH}")
        if self.threshold is not None and (self.schedule is None or isinstance(self.schedule, Schedule)):
            raise ValueError("threshold: is a router's, got it with " + (
                "a speedup" if self.schedule is None else "a schedule, which has been decided already"))

    @classmethod
    def of(cls, wanted) -> "HarmoniCaConfig":
        """The configuration in `enable_cache`'s second argument."""
        if isinstance(wanted, cls):
            return wanted
        if isinstance(wanted, (int, float)) and not isinstance(wanted, bool):
            return cls(speedup=wanted)
        if isinstance(wanted, (str, os.PathLike, Router, Schedule)):
            return cls(schedule=wanted)
        raise TypeError(f"config: got {type(wanted).__name__}, expected a speedup, a HarmoniCaConfig, a Schedule, a "
                        "Router or a file of one")

    @property
    def source(self) -> str:
        """Where the schedule comes from, to begin error messages with."""
        return f"{self.schedule}: " if isinstance(self.schedule, (str, os.PathLike)) else "schedule: "

    @cached_property
    def loaded(self) -> Schedule | None:
        """The schedule; None if a speedup is wanted.

        Raises:
            FileNotFoundError: there is no such file. ValueError: it holds something else, or τ is out of range.
        """
        return None if self.schedule is None else schedule_of(self.schedule, self.threshold)
