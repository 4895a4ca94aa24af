"""How far images are from others in the eyes of the model itself: a perceptual loss that needs no other network."""

import torch
from torch import Tensor

from harmonica_dit import ranks
from harmonica_dit.flops import replace_bodies, runs_by_its_loop
from harmonica_dit.sample.trajectory import Trajectory


def feature_error(trajectory: Trajectory, images: Tensor, targets: Tensor, count: int | None = None) -> Tensor:
    """The relative squared difference of what enters the model's branches, their mean; differentiable in the images.

    The model is given finished images [n, C, H, W] at the trajectory's last timestep that is not 0, with their labels
    and without guidance; with it where a pipeline's own loop guides. The difference is that of these images, what it is
    relative to is taken over all ranks: so the mean of their errors is the error of all images.

    count: how many of the images count in that mean; None is all.

    Source: Lin & Yang, "Diffusion Model with Perceptual Loss", 2024 (arXiv 2401.00110), who take the hidden features of
    the model that is trained; here it is frozen.
    """
    with torch.no_grad():
        wanted = _entering(trajectory, targets)
    found = _entering(trajectory, images)
    squares = ranks.mean([t.float().square().mean() for t in wanted], len(images) if count is None else count)
    errors = [(h.float() - t.float()).square().mean() / square
              for h, t, square in zip(found, wanted, squares, strict=True)]
    return torch.stack(errors).mean()


def _entering(trajectory: Trajectory, images: Tensor) -> list[Tensor]:
    """What enters each branch [n, N, D]."""
    last = max(s for s, t in enumerate(trajectory.timesteps) if t > 0 or s == 0)
    scaled, t, _ = trajectory.inputs(images, last)
    found: list[Tensor] = []
    if runs_by_its_loop(trajectory.net):
        with trajectory.net.adapter.watching(found.append):
            trajectory.model.outputs(scaled, t, trajectory.labels)
        return found

    def watch(k, body):
        def run(h, context):
            found.append(h if torch.is_grad_enabled() else h.clone())  # the next input takes its memory
            return body(h, context)
        return run

    with replace_bodies(trajectory.net, watch):
        trajectory.model.outputs(scaled, t, trajectory.labels)
    return found
