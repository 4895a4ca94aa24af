"""The start of a training (router, optimiser and budget), and its trajectories by their numbers."""

from collections.abc import Callable

import numpy as np
import torch

from harmonica_dit.flops import count_flops
from harmonica_dit.router import LIMIT, Router
from harmonica_dit.sample.schedulers import scheduler_name
from harmonica_dit.sample.trajectory import FIRST_IMAGE, Trajectory, image_noise, run_eagerly

from .budget import Budget, Steering
from .checkpoint import Training
from .settings import Settings


def start_training(net, settings: Settings) -> tuple[Training, Budget | None]:
    """The state before the first trajectory, and the budget, which is None if there is no target."""
    first = make_trajectory(net, settings, 0)
    T, flops = first.steps, count_flops(net)
    K = len(flops.branches)
    if settings.costs == "flops" and min(flops.branches) == 0:
        free = net.branch_names[flops.branches.index(0)]
        raise ValueError(f'costs: got "flops", but the branch {free!r} costs nothing; use "ones", the same for every '
                         "branch")
    device = next(net.parameters()).device
    generator = torch.Generator().manual_seed(settings.seed)
    logits = torch.randn(T, K, generator=generator).clamp(-LIMIT, LIMIT)
    learned = settings.extrapolation == "learned"
    extrapolation = None
    if settings.extrapolation is not None:
        extrapolation = torch.full((T, K), 0.0 if learned else float(settings.extrapolation))
    router = Router(logits, net.branch_names, flops, tuple(first.timesteps), extrapolation=extrapolation,
                    learn_extrapolation=learned, threshold=settings.threshold, model=net.name,
                    scheduler=scheduler_name(settings.scheduler), guidance=settings.guidance, seed=settings.seed,
                    resolution=net.sample_shape[1:], architecture=getattr(net, "architecture", None)).to(device)
    # the gradients are as small as β·c, so AdamW's default eps of 1e-8 would slow the rows down
    optimizer = torch.optim.AdamW([p for p in router.parameters() if p.requires_grad], settings.lr, eps=1e-16,
                                  weight_decay=0)
    budget = steering = None
    if settings.beta is None:
        budget = Budget(flops, T, speedup=settings.target_speedup, cur=settings.target_cur)
        steering = Steering(budget, T, K, device)
    return Training(router, optimizer, torch.ones(T, device=device), steering, settings.beta), budget


def make_trajectory(net, settings: Settings, n: int, executor: Callable = run_eagerly) -> Trajectory:
    """Trajectory number n at its start; its labels depend on the seed and n alone."""
    labels = np.random.default_rng((settings.seed, n, 2)).integers(net.num_classes, size=settings.batch)
    trajectory = Trajectory(net, torch.from_numpy(labels).to(next(net.parameters()).device), steps=settings.steps,
                            scheduler=settings.scheduler, guidance=settings.guidance, seed=settings.seed,
                            guidance_channels=settings.guidance_channels, first=FIRST_IMAGE + n * settings.batch,
                            autocast=settings.autocast)
    trajectory.executor = executor
    return trajectory


def make_noise(net, settings: Settings, n: int) -> torch.Tensor:
    """The noise [batch, C, H, W] of trajectory number n; it depends on the seed and n alone."""
    return image_noise(settings.seed, FIRST_IMAGE + n * settings.batch, settings.batch, net.sample_shape)
