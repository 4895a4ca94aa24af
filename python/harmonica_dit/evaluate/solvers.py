"""The yardstick of every way to skip work: a better solver in as many steps as the work allows."""

import inspect
from dataclasses import replace

from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

from harmonica_dit.forecaster import taylor
from harmonica_dit.methods import uncached
from harmonica_dit.sample.schedulers import NOISE, make_scheduler
from harmonica_dit.schedule import Schedule

from .named_methods import Method

EVENLY = "evenly"  # of the uncached trajectory's timesteps, from its first to its last one above 0
SPACINGS = {"trailing": dict(timestep_spacing="trailing"), "linspace": dict(timestep_spacing="linspace"),
            "karras": dict(use_karras_sigmas=True), "lu": dict(use_lu_lambdas=True), EVENLY: {}}
SOLVERS = {"DPM-Solver++": DPMSolverMultistepScheduler, "UniPC": UniPCMultistepScheduler}
# order and spacing with the smallest Fréchet distance on the bundled model (bench/results/solvers-cpu.json), from so
# many steps on
BEST = {"DPM-Solver++": {5: (3, EVENLY), 1: (2, EVENLY)},
        "UniPC": {5: (3, EVENLY), 1: (2, EVENLY)}}


def solver(net, name: str, steps: int, order: int, spacing: str, uncached_steps: int) -> Method | None:
    """A solver of diffusers in so many steps; None if it has no such spacing.

    Args:
        name: of SOLVERS. order: 2 or 3, lower at the first steps. spacing: of SPACINGS.
        uncached_steps: of the trajectory whose timesteps the spacing "evenly" takes.
    """
    wanted = NOISE | SPACINGS[spacing]
    if not wanted.keys() <= inspect.signature(SOLVERS[name]).parameters.keys():
        return None
    schedule = evenly_spaced(net, steps, uncached_steps) if spacing == EVENLY else None
    return Method(f"{name}, {steps} steps", name, steps, schedule, SOLVERS[name](**wanted, solver_order=order))


def best_solver(net, name: str, steps: int, uncached_steps: int) -> Method:
    """`solver` at its best order and spacing, as found on the bundled model."""
    order, spacing = next(setting for least, setting in BEST[name].items() if steps >= least)
    return solver(net, name, steps, order, spacing, uncached_steps)


def evenly_spaced(net, steps: int, uncached_steps: int, adams: bool = False, scheduler="ddim") -> Schedule:
    """So many of the uncached trajectory's timesteps, from its first to its last one above 0, as evenly as they can be.

    All are computed; adams: and corrected. Fréchet distances depend much on how near 0 the last one lies.
    """
    times = make_scheduler(scheduler, uncached_steps, net).timesteps.tolist()
    last = max(s for s, t in enumerate(times) if t > 0)
    if steps <= last + 1:
        times = [times[(i * last + (steps - 1) // 2) // max(1, steps - 1)] for i in range(steps)]
    forecaster = taylor([True] * steps, int(adams), net.tokens * net.width, adams)
    return replace(uncached(net, steps), timesteps=tuple(times[:steps]), forecaster=forecaster)
