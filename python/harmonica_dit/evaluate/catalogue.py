"""Ways to skip work by name, each at a FLOPs speedup: what `harmonica compare` can compare without a file."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from harmonica_dit import methods

if TYPE_CHECKING:  # the command line names the methods in its help, which should not wait for all of this
    from .named_methods import Method


def _make(name: str, net, steps: int, speedup: float, *, function: str, **settings) -> "Method":
    """The method that a function of `harmonica_dit.methods` makes as a schedule."""
    from .named_methods import Method

    return Method(name, name, steps, getattr(methods, function)(net, steps, speedup=speedup, **settings))


def _scheduled(name: str, function: str, **settings) -> Callable[..., "Method"]:
    return lambda net, steps, speedup, options: _make(name, net, steps, speedup, function=function, **settings)


def _calibrated(name: str, function: str) -> Callable[..., "Method"]:
    """The same of a function that samples, with the comparison's guidance and scheduler."""
    return lambda net, steps, speedup, options: _make(name, net, steps, speedup, function=function, **options)


def _fewer_steps(net, steps: int, speedup: float, options: dict) -> "Method":
    from .named_methods import fewer_steps

    return fewer_steps(steps, speedup)


def _solver(name: str, net, steps: int, speedup: float, options: dict) -> "Method":
    from .solvers import best_solver

    return best_solver(net, name, _fewer_steps(net, steps, speedup, options).steps, steps)


# name -> function(net, steps of the uncached trajectory, speedup, dict of guidance and scheduler) -> Method
CATALOGUE: dict[str, Callable[..., "Method"]] = {
    "fora": _scheduled("FORA", "fora"),
    "taylorseer-1": _scheduled("TaylorSeer-1", "fora", order=1),
    "taylorseer-2": _scheduled("TaylorSeer-2", "fora", order=2),
    "taylorseer-3": _scheduled("TaylorSeer-3", "fora", order=3),
    "trunk": _scheduled("trunk forecast", "trunk_forecast"),
    "adams": _scheduled("Adams forecast", "trunk_forecast", adams=True),
    "step-search": _calibrated("steps searched", "step_search"),
    "smoothcache": _calibrated("SmoothCache", "smoothcache"),
    "delta-dit": _scheduled("Δ-DiT", "delta_dit"),
    "first-block": _calibrated("first block", "first_block"),
    "fewer-steps": _fewer_steps,
    "dpm-solver++": partial(_solver, "DPM-Solver++"),
    "unipc": partial(_solver, "UniPC"),
}
RIVALS = ("fora", "taylorseer-1", "fewer-steps", "dpm-solver++")  # compared where nothing else is asked for


def make_methods(net, names: Iterable[str], speedups: Iterable[float], steps: int, *, guidance: float = 1.5,
                 scheduler="ddim") -> list["Method"]:
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
