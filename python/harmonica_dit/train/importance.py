"""λ_s: what reuse at step s costs the final image (the image error proxy of IEPO)."""

import torch
from torch import Tensor

from harmonica_dit import ranks
from harmonica_dit.router import Router
from harmonica_dit.sample.trajectory import Trajectory

from .student import Student


@torch.no_grad()
def measure_importance(router: Router, trajectory: Trajectory, noise: Tensor, *, kind: str = "paper",
                       rows: str = "soft", cache=None) -> Tensor:
    """Measures λ [T]. λ_0 is 0, because row 0 computes everything.

    "paper": λ_s = mean((x_final - x_final^(s))²). x_final comes from the router's rows at every step; for x_final^(s)
    row s computes everything (leave-one-out; HarmoniCa, section 3.3, with the mean for the squared norm).

    "reference", the published code: it starts with all rows computing everything and turns the router's rows on one
    after another, from the noisiest step on. λ_s is the mean squared change of the final image that row s makes.

    "gain": the paper's λ_s divided by mean((ε_s - ε_s^(s))²), the error that row s makes in its own step's output. The
    paper's λ_s already grows with this error. So λ_s·error counts it twice, and rows that make a small error early seem
    harmless. The quotient is the effect on the image of one unit of error at step s; gain·error is the image's error.

    "none": 1 for every row that learns, which is SDT alone; nothing is run.

    Each of the T-1 other trajectories shares its first steps with the router's own and is forked from it. So it takes
    T + T(T-1)/2 guided forwards instead of T². On a CPU the result is the same to the last bit.

    Args:
        router: gives rows, threshold and extrapolation. trajectory: at its start. If its `executor` records graphs, one
            graph serves every soft row of every refresh, and each hard row has its own. noise: [n, C, H, W], standard
            normal.
        kind: "paper", "reference", "gain" or "none". rows: "soft" blends, as published; "hard" thresholds, as inference
            does.
        cache: the one to work in, see `Student`.
    """
    T, one_by_one = router.steps, kind == "reference"
    if kind == "none":
        return (torch.arange(T, device=noise.device) > 0).float()
    student = Student(router, trajectory, noise, hard=rows == "hard", cache=cache)
    kept = trajectory.new_cache(router.history)  # holds the cache's contents while the fork works in the cache
    images, errors = [], []  # for s = 1, 2, …: of the trajectory that is forked at step s
    student.advance(student.predict())
    for s in range(1, T):
        other = student.fork(cached=not one_by_one)  # a fork that computes everything needs no cache
        if not one_by_one:
            kept.copy_(student.cache)
        all_computed = other.predict()
        other.advance(all_computed)
        while other.s < T:
            other.advance(other.predict(None if one_by_one else router.score(other.s)))
        images.append(other.x)
        if not one_by_one:
            student.cache.copy_(kept)
        output = student.predict(router.score(s))
        errors.append(_mean_square((output - all_computed)[:, : noise.shape[1]]))  # the channels that reach the image
        student.advance(output)
    with_row = [*images[1:], student.x] if one_by_one else [student.x] * len(images)
    changes = [_mean_square(a - b) for a, b in zip(with_row, images, strict=True)]
    found = torch.stack([torch.zeros_like(changes[0]), *changes])
    if kind == "gain":
        found[1:] /= torch.stack(errors).clamp_min(torch.finfo(found.dtype).tiny)
    return found


def _mean_square(difference: Tensor) -> Tensor:
    """Over the images of all ranks."""
    return ranks.mean([difference.float().square().mean()], len(difference))[0]


def normalise(importance: Tensor) -> Tensor:
    """Scales λ [T] to mean 1 over the rows that learn, s ≥ 1. If λ is 0 for all of them, it becomes all ones.

    The scale does not change the loss's balance between steps. It gives β a meaning that carries over between models
    and step counts: at a step of average λ, computing a branch of average cost pays if it lowers the guided output's
    mean squared error by more than β. With the raw λ, β times the mean of the raw λ gives the same router.
    """
    mean = importance[1:].mean()
    return importance / mean if mean > 0 else torch.ones_like(importance)
