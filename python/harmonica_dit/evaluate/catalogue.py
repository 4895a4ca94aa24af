"""Ways to skip work by name, each at a FLOPs speedup: what `harmonica compare` can compare without a file."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

from harmonica_dit.methods import delta_dit, first_block, fora, smoothcache, step_search, trunk_forecast
from harmonica_dit.schedule import Schedule

from .named_methods import Method, fewer_steps
from .solvers import SOLVERS, best_solver


def _scheduled(name: str, make: Callable[..., Schedule], **settings) -> Callable[..., Method]:
    """The method that a function makes as a schedule, `make(net, steps, speedup=…, **settings)`."""
    return lambda net, steps, speedup, options: Method(name, name, steps, make(net, steps, speedup=speedup, **settings))


def _calibrated(name: str, make: Callable[..., Schedule]) -> Callable[..., Method]:
    """The same of a function that samples, with the comparison's guidance and scheduler."""
    return lambda net, steps, speedup, options: Method(name, name, steps, make(net, steps, speedup=speedup, **options))


def _solver(name: str, net, steps: int, speedup: float, options: dict) -> Method:
    return best_solver(net, name, fewer_steps(steps, speedup).steps, steps)


# name -> function(net, steps of the uncached trajectory, speedup, dict of guidance and scheduler) -> Method
CATALOGUE: dict[str, Callable[..., Method]] = {
    "fora": _scheduled("FORA", fora),
    "taylorseer-1": _scheduled("TaylorSeer-1", fora, order=1),
    "taylorseer-2": _scheduled("TaylorSeer-2", fora, order=2),
    "taylorseer-3": _scheduled("TaylorSeer-3", fora, order=3),
    "trunk": _scheduled("trunk forecast", trunk_forecast),
    "adams": _scheduled("Adams forecast", trunk_forecast, adams=True),
    "step-search": _calibrated("steps searched", step_search),
    "smoothcache": _calibrated("SmoothCache", smoothcache),
    "delta-dit": _scheduled("Δ-DiT", delta_dit),
    "first-block": _calibrated("first block", first_block),
    "fewer-steps": lambda net, steps, speedup, options: fewer_steps(steps, speedup),
    **{name.lower(): partial(_solver, name) for name in SOLVERS},
}
RIVALS = ("fora", "taylorseer-1", "fewer-steps", "dpm-solver++")  # compared where nothing else is asked for


def make_methods(net, names: Iterable[str], speedups: Iterable[float], steps: int, *, guidance: float = 1.5,
                 scheduler="ddim") -> list[Method]:
    """Each of the methods at each of the speedups, named after both.

    Args:
        names: of CATALOGUE. steps: of the uncached trajectory. speedups: in FLOPs; a method has the nearest that it can
            reach and that is not below.
        guidance, scheduler: of the comparison, for methods that sample to calibrate; they do so now.

    Raises:
        ValueError: there is no such method, or it cannot reach such a speedup; the message names it.
    """
    made = []
    for name in names:
        if name not in CATALOGUE:
            raise ValueError(f"method: got {name!r}, expected one of {', '.join(CATALOGUE)}")
        for speedup in speedups:
            try:
                method = CATALOGUE[name](net, steps, speedup, dict(guidance=guidance, scheduler=scheduler))
            except ValueError as error:
                raise ValueError(f"method: {name} at {speedup:g}×: {error}") from None
            made.append(replace(method, name=f"{method.family} {speedup:g}×"))
    return made
