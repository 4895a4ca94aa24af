"""Which steps are computed, where all branches of a step are computed or none: every n-th, or as a speedup asks."""

from collections.abc import Callable

from harmonica_dit.flops import Flops
from harmonica_dit.schedule import Schedule
from harmonica_dit.validate import check_one, check_speedup, check_whole


def space(steps: int, flops: Flops, make: Callable[[list[bool], str], Schedule], *, every: int | None,
          speedup: float | None) -> Schedule:
    """The schedule that `make(computed, which)` makes of the steps that are asked for.

    Args:
        steps: T. flops: of a forward of batch 1.
        make: computed says of each step whether it is computed, which says the same in words.
        every, speedup: exactly one. every: n ≥ 1, the steps 0, n, 2n, … are computed. speedup: as few steps as it takes
            for at least this speedup in FLOPs, as evenly spaced as they can be.

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
    least = speedup * (1 - 1e-9)  # FLOPs are sums of floats
    for computed in range(steps, 0, -1):
        # without what forecasts cost, for which `make` would have to make them
        if computed > 1 and steps * flops.total < least * (steps * flops.fixed + computed * sum(flops.branches)):
            continue
        made = make(spread(steps, computed), f"{computed} of {steps} steps")
        if made.speedup >= least:
            return made
    raise ValueError(f"speedup: got {speedup}, expected at most {made.speedup:.4g}, which is that of {steps} steps of "
                     "which only the first is computed")


def spread(steps: int, computed: int) -> list[bool]:
    """Which of T steps are computed, the first of them and others as evenly spaced as they can be."""
    chosen = {i * steps // computed for i in range(computed)}
    return [s in chosen for s in range(steps)]
