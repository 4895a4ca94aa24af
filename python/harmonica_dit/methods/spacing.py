"""Which steps are computed, where all branches of a step are computed or none: every n-th, or as a speedup asks."""

from collections.abc import Callable

from harmonica_dit.costs import Costs
from harmonica_dit.flops import Flops
from harmonica_dit.schedule import Schedule
from harmonica_dit.validate import check_costs, check_one, check_speedup, check_whole


def costs_of(flops: Flops, costs: Costs | None) -> Costs:
    """What a speedup is in: the costs that were given, of as many branches, or FLOPs where none were."""
    if costs is None:
        return flops
    check_costs("costs", costs, len(flops.branches))
    return costs


def space(steps: int, costs: Costs, make: Callable[[list[bool], str], Schedule], *, every: int | None,
          speedup: float | None) -> Schedule:
    """The schedule that `make(computed, which)` makes of the steps that are asked for.

    Args:
        steps: T. costs: what the speedup is in.
        make: computed says of each step whether it is computed, which says the same in words.
        every, speedup: exactly one. every: n ≥ 1, the steps 0, n, 2n, … are computed. speedup: as few steps as it takes
            for at least this speedup, as evenly spaced as they can be.

    Raises:
        ValueError: an argument is out of range; the message names it.
    """
    for name, value in (("steps", steps), ("every", every)):
        if name == "steps" or value is not None:
            check_whole(name, value, 1)
    check_one(every=every, speedup=speedup)
    if every is not None:
        return make([s % every == 0 for s in range(steps)], f"every {every}")
    check_speedup(speedup)
    least = speedup * (1 - 1e-9)  # costs are sums of floats
    for computed in range(steps, 0, -1):
        # not what forecasts cost, for which `make` would have to make them, but the least that they may
        takes = computed * costs.total + (steps - computed) * costs.least
        if computed > 1 and steps * costs.uncached < least * takes:
            continue
        made = make(spread(steps, computed), f"{computed} of {steps} steps")
        if made.speedup_by(costs) >= least:
            return made
    raise ValueError(f"speedup: got {speedup}, expected at most {made.speedup_by(costs):.4g}, which is that of {steps} "
                     "steps of which only the first is computed")


def spread(steps: int, computed: int) -> list[bool]:
    """Which of T steps are computed: the first and others, as evenly spaced as they can be, and then as late.

    So 7 of 20 are every third. Details are made in the end: where the last ones come earlier, Fréchet distances are
    larger (docs/comparison.md).
    """
    chosen = {-(-i * steps // computed) for i in range(computed)}
    return [s in chosen for s in range(steps)]
