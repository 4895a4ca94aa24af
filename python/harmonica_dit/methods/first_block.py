"""First-block caching: the first block is computed at every step, and the others where its output has changed."""

from harmonica_dit.adaptive import AdaptiveSchedule
from harmonica_dit.costs import Costs
from harmonica_dit.flops import count_flops
from harmonica_dit.sample import sample
from harmonica_dit.sample.trajectory import FIRST_IMAGE
from harmonica_dit.validate import check_one, check_speedup, check_whole

from .blocks import block_sizes
from .calibration import calibration_labels
from .spacing import costs_of

HALVINGS = 8  # of the interval in which a threshold lies


def first_block(net, steps: int, threshold: float | None = None, *, speedup: float | None = None,
                costs: Costs | None = None, images: int = 16, guidance: float | None = None, scheduler=None,
                seed: int = 0) -> AdaptiveSchedule:
    """Computes the first block at every step, and the others if what it adds has changed by more than the threshold.

    The change, which decides for a batch as a whole, is that of `AdaptiveSchedule`, which is given to `sample` in place
    of a schedule and then says what was computed.

    Args:
        net: a denoiser, or (with a threshold) a traced adapter.
        steps: T.
        threshold, speedup: exactly one. threshold: ≥ 0. speedup: the least threshold, found by bisection, that gives at
            least this speedup on calibration images; on others it is near it. costs: what it is in: None is FLOPs;
            measured seconds, in which the runs' own passes and the decisions are not.
        images: to calibrate on, in one batch; they start from noise that no sampled image has.
        guidance, scheduler, seed: of the calibration; as in `harmonica_dit.sample`.

    Raises:
        TypeError: net is none that the method can take. ValueError: an argument is out of range, the adapter has not
            been traced, or the first block has one branch only; the message names it.

    Source: First Block Cache of ParaAttention and diffusers (`FirstBlockCacheConfig`), after TeaCache (Liu et al.,
    2024, arXiv 2411.19108).
    """
    check_whole("steps", steps, 1)
    check_one(threshold=threshold, speedup=speedup)
    flops, first = count_flops(net), block_sizes(net.branch_names)[0]

    def make(threshold: float) -> AdaptiveSchedule:
        return AdaptiveSchedule(steps, net.branch_names, flops, first, threshold, model=net.name,
                                origin=f"first block, change above {threshold}")

    if threshold is not None:
        return make(threshold)
    check_speedup(speedup)
    costs = costs_of(flops, costs)
    labels, least = calibration_labels(net, images, seed), speedup * (1 - 1e-9)  # costs are sums of floats

    def reaches(threshold: float) -> bool:
        trial = make(threshold)
        sample(net, labels, steps=steps, schedule=trial, guidance=guidance, scheduler=scheduler, seed=seed,
               first=FIRST_IMAGE, batch=images, latents=True)
        return trial.speedup_by(costs) >= least

    alone = make(0.0)
    alone.ran = [[(False, 1)] * (steps - 1)]
    most = alone.speedup_by(costs)
    if most < least:
        raise ValueError(f"speedup: got {speedup}, expected at most {most:.4g}, which is that of the first block alone "
                         "from step 1 on")
    low, high = 0.0, 1.0
    while not reaches(high) and high < 1 << 20:
        low, high = high, 2 * high
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if reaches(middle) else (middle, high)
    return make(high)
