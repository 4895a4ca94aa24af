"""Δ-DiT: at most steps a run of blocks is left out, and what it added before is added again: first rear, then front."""

import torch

from harmonica_dit.costs import Costs
from harmonica_dit.flops import count_flops
from harmonica_dit.schedule import Schedule
from harmonica_dit.validate import check_one, check_speedup, check_whole

from .blocks import block_sizes
from .spacing import costs_of


def delta_dit(net, steps: int, blocks: int | None = None, *, speedup: float | None = None, costs: Costs | None = None,
              every: int | None = None, boundary: int | None = None) -> Schedule:
    """Computes the steps 0, n, 2n, … whole, and the others without some blocks, whose offset is added again.

    In the outline stage, the steps before `boundary`, the rear blocks are left out; in the detail stage, from there on,
    the front ones. Their offset, what they add to x, is that of the last step that computed them.

    Args:
        net: a denoiser, or a traced adapter of the fused path.
        steps: T.
        blocks, speedup: exactly one. blocks: how many are left out, 1 to all but one. speedup: as few as it takes for
            at least this speedup. costs: what it is in: None is FLOPs; measured seconds, in which the runs' own passes
            are not.
        every: n ≥ 2. None is 2, or with a speedup the least n that allows for it.
        boundary: 0 to T; None is T // 2. The paper tunes it for each model and number of steps.

    Raises:
        TypeError: net is neither. ValueError: an argument is out of range, or the adapter has not been traced; the
            message names it.

    Source: Δ-DiT (Chen et al., 2024, arXiv 2406.01125). Three runs, cut where the front blocks end and where the rear
    ones begin, serve both stages. Where front and rear overlap, the middle run is part of both and its offset is one of
    two that are added, which is the same sum. What differs: all runs are stored at each step that computes them. So if
    the boundary is no whole step, the first steps after it reuse the front blocks' offset of the step before the
    boundary, where the paper's is that of the last whole step.
    """
    check_whole("steps", steps, 1)
    check_one(blocks=blocks, speedup=speedup)
    if every is not None:
        check_whole("every", every, 2)
    boundary = steps // 2 if boundary is None else check_whole("boundary", boundary, 0)
    if boundary > steps:
        raise ValueError(f"boundary: got {boundary}, expected at most {steps}, the number of steps")
    flops, sizes = count_flops(net), block_sizes(net.branch_names)
    N = len(sizes)
    if N < 2:
        raise ValueError(f"net: has {N} block, expected two or more: some are left out and others computed")

    def make(left_out: int, every: int) -> Schedule:
        kept = torch.ones(steps, N, dtype=torch.bool)
        for s in range(steps):
            if s % every:
                kept[s, slice(N - left_out, N) if s < boundary else slice(left_out)] = False
        cuts = sorted({0, left_out, N - left_out, N})
        return Schedule(kept.repeat_interleave(torch.tensor(sizes), 1), net.branch_names, flops, model=net.name,
                        runs=tuple(sum(sizes[a:b]) for a, b in zip(cuts, cuts[1:])),
                        origin=f"Δ-DiT, {left_out} of {N} blocks left out, every {every} computed whole, front ones "
                               f"from step {boundary}")

    if blocks is not None:
        if check_whole("blocks", blocks, 1) >= N:
            raise ValueError(f"blocks: got {blocks}, expected at most {N - 1} of the {N} blocks")
        return make(blocks, every or 2)
    check_speedup(speedup)
    costs = costs_of(flops, costs)
    for n in [every] if every else range(2, max(steps, 2) + 1):
        for left_out in range(1, N):
            made = make(left_out, n)
            if made.speedup_by(costs) >= speedup * (1 - 1e-9):  # costs are sums of floats
                return made
    raise ValueError(f"speedup: got {speedup}, expected at most {made.speedup_by(costs):.4g}, which is that of "
                     f"{N - 1} of {N} blocks left out at all steps but every {n}")
