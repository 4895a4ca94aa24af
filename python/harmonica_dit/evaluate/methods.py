"""Ways to spend less on a trajectory, named so that tables and plots know which belong together."""

from dataclasses import dataclass
from pathlib import Path

from harmonica_dit.files import load_tensors
from harmonica_dit.router import Router
from harmonica_dit.schedule import Schedule
from harmonica_dit.schedules import fora


@dataclass(frozen=True)
class Method:
    """One way to sample.

    Args:
        name: of this setting, such as "FORA n=2"; family: of the method, such as "FORA": a line in a plot.
        steps: how often the model is called; fewer than the uncached run's where steps are dropped.
        schedule: a `Schedule` for those steps; None computes everything.
    """

    name: str
    family: str
    steps: int
    schedule: Schedule | None = None

    def speedup(self, uncached_steps: int) -> float:
        """FLOPs of the uncached trajectory / FLOPs of this one."""
        return (1.0 if self.schedule is None else self.schedule.speedup) * uncached_steps / self.steps


def fewer_steps(steps: int, speedup: float) -> Method:
    """The baseline that needs no method: as few of `steps` as reach the FLOPs speedup, e.g. 12 of 20 for 1.67."""
    fewer = max(1, round(steps / speedup))
    return Method(f"{fewer} steps", "fewer steps", fewer)


def fora_methods(net, steps: int, every: int) -> list[Method]:
    """FORA at every n-th step, once repeating and once with first-order forecasts (as TaylorSeer's)."""
    return [Method(f"FORA n={every}", "FORA", steps, fora(net, steps, every)),
            Method(f"FORA n={every} + forecast", "FORA + forecast", steps, fora(net, steps, every, 1.0))]


def read_schedule(path: Path, net=None, threshold: float | None = None) -> Schedule:
    """The schedule in a router's or a schedule's file; `threshold` replaces a router's own.

    Raises:
        FileNotFoundError, ValueError: there is no such file, it holds neither, or does not fit `net`.
    """
    if is_router(path):
        return Router.load(path, net).schedule(threshold)
    if threshold is not None:
        raise ValueError(f"threshold: {path} is a frozen schedule; only a router has one")
    return Schedule.load(path)


def from_file(path: Path, net) -> Method:
    """A router's or a schedule's file as a method, named after the file."""
    schedule = read_schedule(path, net)
    family = "router" if is_router(path) else path.stem
    return Method(path.stem, f"{family} + forecast" if schedule.history > 1 else family, schedule.steps, schedule)


def is_router(path: Path) -> bool:
    """Whether the file holds a router, not a schedule."""
    return load_tensors(path)[1].get("kind") == "router"
