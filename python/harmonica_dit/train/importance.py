"""λ_s: what reuse at step s costs the final image (the image error proxy of IEPO)."""

import torch
from torch import Tensor

import harmonica_kernels as hk
from harmonica_dit.router import Router
from harmonica_dit.sample.trajectory import Trajectory

from .walk import Walk


@torch.no_grad()
def importance(router: Router, trajectory: Trajectory, noise: Tensor, *, kind: str = "paper",
               rows: str = "soft") -> Tensor:
    """λ [T], in units of a mean squared pixel; λ_0 is 0, for row 0 computes everything anyway.

    "paper": λ_s = mean((x_final - x_final^(s))²), x_final from the router at every step and x_final^(s) with row s
    all computed (leave-one-out; HarmoniCa, section 3.3, with the mean for the squared norm). "reference", the
    published code: start from all computed and turn the router's rows on one after another from the noisiest step on;
    λ_s is the mean squared change that row s makes.

    Each of the T-1 other trajectories shares its first steps with the router's own and is forked from it, so that T +
    T(T-1)/2 guided forwards are run instead of T²; on a CPU the result is the same to the last bit.

    Args:
        router: its rows, threshold and extrapolation. trajectory: a fresh one. noise: [n, C, H, W], standard normal.
        kind: "paper" or "reference". rows: "soft" blends, as published; "hard" thresholds, as inference does.
    """
    walk = Walk(router, trajectory, noise, hard=rows == "hard")
    spare = hk.FeatureCache(router.history) if kind == "paper" else None  # what is all computed needs no cache
    finals = []  # the image of the trajectory that leaves the router's at step s = 1, 2, …
    for s in range(router.steps):
        if s > 0:
            other = walk.fork(spare)
            while other.s < router.steps:
                routed = kind == "paper" and other.s > s
                other.advance(other.predict(router.score(other.s) if routed else None))
            finals.append(other.x)
        walk.advance(walk.predict(router.score(s) if s else None))
    after = [walk.x] * len(finals) if kind == "paper" else [*finals[1:], walk.x]
    changes = [(a.float() - b.float()).square().mean() for a, b in zip(after, finals, strict=True)]
    return torch.stack([torch.zeros_like(changes[0]), *changes])


def normalised(importance: Tensor) -> Tensor:
    """λ [T] with mean 1 over the rows that learn.

    It leaves the loss's balance between steps as it is and gives β one meaning for every model and step count: the
    mean squared error of the guided output that skipping a branch of average cost is worth. The paper's β, for its
    raw λ, is this one times the raw mean. All ones where no row matters.
    """
    mean = importance[1:].mean()
    return importance / mean if mean > 0 else torch.ones_like(importance)
