"""Which steps are computed whole: a search at a fixed number of them, judged by the final image."""

from collections.abc import Callable, Iterator
from itertools import pairwise

from harmonica_dit.costs import Costs
from harmonica_dit.flops import trunk_costs
from harmonica_dit.sample import sample
from harmonica_dit.sample.trajectory import FIRST_IMAGE
from harmonica_dit.schedule import Schedule
from harmonica_dit.validate import check_one, check_whole

from .calibration import calibration_labels
from .spacing import spread
from .trunk import forecast_between, whole_steps


def step_search(net, steps: int, computed: int | None = None, *, speedup: float | None = None,
                costs: Costs | None = None, order: int = 1, images: int = 16, guidance: float | None = None,
                scheduler=None, seed: int = 0) -> Schedule:
    """Computes some steps whole and forecasts the trunk at the others; a search on calibration images says which.

    It begins with evenly spaced steps, and goes from one choice to a neighbour whose final images are nearer to the
    uncached ones of the same noise (mean RMSE; of a latent model the latents'), until none is. In a neighbour one
    computed step, or all from one on, lie a step earlier or later. It samples the images some dozens of times.

    Args:
        net: a denoiser.
        steps: T.
        computed, speedup: exactly one. computed: how many steps, 1 to T. speedup: as many as `trunk_forecast` computes
            for it. costs: what it is in, as there.
        order: of the forecast, 0 to 3, as in `trunk_forecast`.
        images: to calibrate on, in one batch; they start from noise that no sampled image has.
        guidance, scheduler, seed: of the calibration; as in `harmonica_dit.sample`.

    Raises:
        TypeError: net is no denoiser. ValueError: an argument is out of range; the message names it.

    Source: hill climbing; between the steps TaylorSeer's forecast (Liu et al., 2025, arXiv 2503.06923), of the trunk.
    Dynamic programming over the errors of single pauses was tried and is worse: `bench/step_search.py`.
    """
    check_whole("steps", steps, 1)
    check_one(computed=computed, speedup=speedup)
    labels, (flops, size) = calibration_labels(net, images, seed), trunk_costs(net)
    if speedup is not None:
        evenly = whole_steps(steps, flops, size, speedup=speedup, costs=costs, order=order, names=net.branch_names)
        computed = int(evenly.compute[:, 0].sum())
    elif check_whole("computed", computed, 1) > steps:
        raise ValueError(f"computed: got {computed}, expected at most {steps}, the number of steps")

    def make(chosen: tuple[int, ...]) -> Schedule:
        return forecast_between([s in chosen for s in range(steps)], which, flops=flops, size=size, order=order,
                                names=net.branch_names, model=net.name)

    def draw(schedule: Schedule | None):
        return sample(net, labels, steps=steps, schedule=schedule, guidance=guidance, scheduler=scheduler, seed=seed,
                      first=FIRST_IMAGE, batch=images, latents=True)

    def error(chosen: tuple[int, ...]) -> float:
        return (draw(make(chosen)) - uncached).square().flatten(1).mean(1).sqrt().mean().item()

    which, uncached = f"{computed} of {steps} steps, searched on {images} images", draw(None)
    return make(climb(tuple(s for s, whole in enumerate(spread(steps, computed)) if whole), steps, error))


def climb(start: tuple[int, ...], steps: int, error: Callable[[tuple[int, ...]], float]) -> tuple[int, ...]:
    """From a choice of computed steps to one whose neighbours are all no better. No choice is looked at twice."""
    best, least, seen = start, error(start), {start}
    while True:
        for chosen in neighbours(best, steps):
            if chosen in seen:
                continue
            seen.add(chosen)
            found = error(chosen)
            if found < least:
                best, least = chosen, found
                break
        else:
            return best


def neighbours(chosen: tuple[int, ...], steps: int) -> Iterator[tuple[int, ...]]:
    """Choices in which one computed step, or all from one on, lie a step earlier or later; the first step stays."""
    for i in range(1, len(chosen)):
        for by in (-1, 1):
            for end in dict.fromkeys((i + 1, len(chosen))):
                moved = (*chosen[:i], *(s + by for s in chosen[i:end]), *chosen[end:])
                if moved[-1] < steps and all(a < b for a, b in pairwise(moved)):
                    yield moved
