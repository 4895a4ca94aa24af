"""SmoothCache: attention, or feed-forward, of all blocks is reused where its outputs changed little in calibration."""

from collections.abc import Sequence

import torch
from torch import Tensor

import harmonica_kernels as hk
from harmonica_dit.costs import Costs
from harmonica_dit.flops import count_flops, runs_by_its_loop
from harmonica_dit.sample import Trajectory, image_noise
from harmonica_dit.sample.trajectory import FIRST_IMAGE
from harmonica_dit.schedule import Schedule
from harmonica_dit.validate import check_one, check_speedup, check_whole, is_number
from harmonica_kernels.cache import HISTORY

from .calibration import calibration_labels
from .spacing import costs_of


def smoothcache(net, steps: int, alpha: float | None = None, *, speedup: float | None = None,
                costs: Costs | None = None, longest: int = 3, images: int = 10, guidance: float | None = None,
                scheduler=None, seed: int = 0) -> Schedule:
    """Decides for all branches of a type together: reused where their calibrated error since they were computed is ≤ α.

    A branch's type is the last part of its name. The error between a step and an earlier one is the L1 norm of the
    outputs' difference over that of the later output, averaged over the type's branches and the calibration images.
    From step 0 on, a type is reused at a step if the error since its last computed step is at most α and that step is
    no further back than `longest`; else it is computed.

    Args:
        net: a denoiser. It is sampled, uncached, to calibrate; one image after the other, so that the memory is that of
            longest + 1 outputs of each branch.
        steps: T.
        alpha, speedup: exactly one. alpha: α ≥ 0. speedup: the least α for at least this speedup; of the calibrated
            errors, for between two of them nothing changes. costs: what it is in: None is FLOPs; measured seconds, see
            `harmonica_dit.measure_costs`.
        longest: steps in a row that a type is reused at most, 1 to 3.
        images: to calibrate on, ≥ 1; they start from noise that no sampled image has.
        guidance, scheduler, seed: of the calibration; as in `harmonica_dit.sample`.

    Raises:
        TypeError: net is no denoiser. ValueError: an argument is out of range; the message names it.

    Source: SmoothCache (Liu et al., 2024, arXiv 2411.10510), whose rule this is. Its published code instead takes the
    longest pause whose last error is at most α, whatever lies between, and always computes the last step.
    """
    check_whole("steps", steps, 1)
    check_one(alpha=alpha, speedup=speedup)
    if alpha is not None and (not is_number(alpha) or alpha < 0):
        raise ValueError(f"alpha: got {alpha!r}, expected a finite number ≥ 0")
    if speedup is not None:
        check_speedup(speedup)
    if check_whole("longest", longest, 1) >= HISTORY:
        raise ValueError(f"longest: got {longest}, expected at most {HISTORY - 1}")
    labels, flops = calibration_labels(net, images, seed), count_flops(net)
    costs = costs_of(flops, costs)
    labels = labels.to(next(net.parameters()).device)
    errors = torch.zeros(steps, longest, len(net.branch_names), dtype=torch.float64)
    for i, noise in enumerate(image_noise(seed, FIRST_IMAGE, images, net.sample_shape)):
        trajectory = Trajectory(net, labels[i : i + 1], steps=steps, guidance=guidance, scheduler=scheduler, seed=seed,
                                first=FIRST_IMAGE + i)
        errors += branch_errors(trajectory, noise[None].to(labels.device), longest)
    types = [name.rpartition(".")[2] for name in net.branch_names]
    of_type = {kind: errors[..., [k for k, other in enumerate(types) if other == kind]].mean(-1) / images
               for kind in dict.fromkeys(types)}

    def make(alpha: float) -> Schedule:
        computed = {kind: decide(of_type[kind].tolist(), alpha) for kind in of_type}
        return Schedule(torch.tensor([computed[kind] for kind in types]).T, net.branch_names, flops, model=net.name,
                        timesteps=tuple(trajectory.timesteps), guidance=float(trajectory.model.scale),
                        origin=f"SmoothCache, α = {alpha:.4g}, at most {longest} steps in a row, {images} images")

    if alpha is not None:
        return make(alpha)
    within = [e[s, : min(s, longest)] for e in of_type.values() for s in range(1, steps)]  # there are no others
    for alpha in torch.cat([torch.zeros(1, dtype=torch.float64), *within]).unique().tolist():
        made = make(alpha)
        if made.speedup_by(costs) >= speedup * (1 - 1e-9):  # costs are sums of floats
            return made
    raise ValueError(f"speedup: got {speedup}, expected at most {made.speedup_by(costs):.4g}, which is that of "
                     f"{longest} steps reused for each that is computed")


@torch.no_grad()
def branch_errors(trajectory: Trajectory, noise: Tensor, longest: int) -> Tensor:
    """Relative L1 errors, float64 [T, longest, K]: entry [s, j - 1, k] between branch k's outputs at steps s and s - j.

    Of an uncached trajectory, averaged over its batch, the unconditional half included; 0 where j > s.
    """
    if runs_by_its_loop(trajectory.net):
        raise ValueError(f"net: {trajectory.net.name} is run by its pipeline's loop, whose branches' outputs are not "
                         "compared; use step_search, which takes any denoiser")
    K = len(trajectory.net.branch_names)
    errors = torch.zeros(trajectory.steps, longest, K, dtype=torch.float64)
    cache, x = hk.FeatureCache(longest + 1), trajectory.start(noise)
    for s in range(trajectory.steps):
        x = trajectory.step(x, s, cache=cache)
        for k in range(K):
            now, *before = (o.flatten(1).float() for o in cache.outputs(k))
            size = now.abs().sum(1)
            for j, o in enumerate(before):
                errors[s, j, k] = ((now - o).abs().sum(1) / size).mean()
    return errors


def decide(errors: Sequence[Sequence[float]], alpha: float) -> list[bool]:
    """Whether a type is computed at each step. errors: [T][longest], as of `branch_errors`."""
    computed, latest = [], 0
    for s, since in enumerate(errors):
        pause = s - latest
        if s == 0 or pause > len(since) or not since[pause - 1] <= alpha:
            latest = s
        computed.append(latest == s)
    return computed
