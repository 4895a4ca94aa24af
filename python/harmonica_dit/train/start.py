"""The start of a training (router, optimiser and budget), and its trajectories by their numbers."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from harmonica_dit import ranks
from harmonica_dit.costs import Costs, Seconds
from harmonica_dit.files import check_file
from harmonica_dit.flops import count_flops
from harmonica_dit.router import LIMIT, Router
from harmonica_dit.sample.measure import measure_costs
from harmonica_dit.sample.schedulers import scheduler_name
from harmonica_dit.sample.trajectory import FIRST_IMAGE, Trajectory, image_noise, run_eagerly
from harmonica_dit.validate import check_costs

from .budget import Budget, Steering
from .checkpoint import Training
from .settings import Settings


def start_training(net, settings: Settings, costs: Costs) -> tuple[Training, Budget | None]:
    """The state before the first trajectory, and the budget, which is None if there is no target.

    costs: what a target speedup is in.
    """
    first = make_trajectory(net, settings, 0)
    T, flops = first.steps, count_flops(net)
    K = len(flops.branches)
    if settings.costs != "ones" and min(costs.branches) == 0:
        free = net.branch_names[costs.branches.index(0)]
        raise ValueError(f'costs: the branch {free!r} costs nothing; use "ones", the same for every branch')
    device = next(net.parameters()).device
    generator = torch.Generator().manual_seed(settings.seed)
    logits = torch.randn(T, K, generator=generator).clamp(-LIMIT, LIMIT)
    learned = settings.extrapolation == "learned"
    extrapolation = None  # repeats, and needs no second output in the cache
    if settings.extrapolation != 0:
        extrapolation = torch.full((T, K), 0.0 if learned else float(settings.extrapolation))
    router = Router(logits, net.branch_names, flops, tuple(first.timesteps), extrapolation=extrapolation,
                    learn_extrapolation=learned, threshold=settings.threshold, model=net.name,
                    scheduler=scheduler_name(settings.scheduler), guidance=settings.guidance, seed=settings.seed,
                    resolution=resolution_of(net), architecture=getattr(net, "architecture", None)).to(device)
    optimizer = torch.optim.AdamW([p for p in router.parameters() if p.requires_grad], settings.lr, eps=settings.eps,
                                  weight_decay=0)
    budget = steering = None
    if settings.beta is None:
        budget = Budget(costs, T, speedup=settings.target_speedup, cur=settings.target_cur,
                        forecasts=extrapolation is not None)
        steering = Steering(budget, T, K, device)
    return Training(router, optimizer, torch.ones(T, device=device), steering, settings.beta), budget


def find_costs(net, settings: Settings, folder: Path | None) -> Costs:
    """What a target speedup is in, by `settings.costs`.

    folder: keeps what is measured, for the same training's next call; None keeps it in the user's cache folder alone.
    """
    costs = settings.costs
    if costs in ("flops", "ones"):
        return count_flops(net)
    if costs == "time":
        kept = folder and folder / "costs.json"
        if kept and kept.exists():  # measured when this training began, on another machine perhaps
            costs = Seconds.load(kept)
        else:
            if kept:
                check_file(kept)
            costs = measure_costs(net, batch=settings.batch, guidance=settings.guidance, scheduler=settings.scheduler)
            if kept:
                costs.save(kept)
    check_costs("costs", costs, len(net.branch_names))
    return costs


def last_refresh(n: int, steps: int, refresh: int) -> int:
    """The trajectory, at most n, before which λ was last measured.

    It is measured before trajectory n where n is 0 or where, since the trajectory before began, the denoising steps
    that have been run, `steps` a trajectory, have reached another multiple of `refresh`.
    """
    return -(-(n * steps // refresh * refresh) // steps)


def resolution_of(net) -> tuple[int, int]:
    """Height and width of what the transformer is given; for packed latents tokens and channels."""
    return tuple(getattr(net, "resolution", net.sample_shape[1:]))


def make_trajectory(net, settings: Settings, n: int, executor: Callable = run_eagerly) -> Trajectory:
    """This rank's share of trajectory number n at its start; its labels depend on the seed and n alone."""
    mine = ranks.split(settings.batch)
    labels = np.random.default_rng((settings.seed, n, 2)).integers(net.num_classes, size=settings.batch)[mine]
    trajectory = Trajectory(net, torch.from_numpy(labels).to(next(net.parameters()).device), steps=settings.steps,
                            scheduler=settings.scheduler, guidance=settings.guidance, seed=settings.seed,
                            guidance_channels=settings.guidance_channels,
                            first=FIRST_IMAGE + n * settings.batch + mine.start, autocast=settings.autocast,
                            halves=settings.halves)
    trajectory.executor = executor
    return trajectory


def make_noise(net, settings: Settings, n: int) -> torch.Tensor:
    """This rank's share of the noise [batch, C, H, W] of trajectory number n; it depends on the seed and n alone."""
    mine = ranks.split(settings.batch)
    return image_noise(settings.seed, FIRST_IMAGE + n * settings.batch + mine.start, len(mine), net.sample_shape)
