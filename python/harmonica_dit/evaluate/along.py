"""Errors along the trajectory: where between noise and image a method leaves the uncached one."""

from collections.abc import Sequence

import torch

from harmonica_dit.sample import Trajectory, check_labels, image_noise
from harmonica_dit.sample.sampling import own_timesteps, walk

from .metrics import rmse
from .named_methods import Method


@torch.no_grad()
def errors_along(net, methods: Sequence[Method], labels, *, steps: int, guidance: float = 1.5, seed: int = 0,
                 scheduler="ddim") -> dict[str, list[float]]:
    """Mean RMSE [T] of x_1, …, x_T, unclipped, against the uncached trajectory's from the same noise.

    Args:
        labels: [n], all sampled at once. steps, guidance, seed, scheduler: as in `compare`.

    Returns:
        A method's name -> its errors. Methods that take other timesteps, or another scheduler, are left out: their x_s
        is at another noise level.
    """
    labels = check_labels(labels, net.num_classes).to(next(net.parameters()).device)
    noise = image_noise(seed, 0, len(labels), net.sample_shape).to(labels.device)

    def trajectory(method: Method) -> Trajectory:
        return Trajectory(method.model(net), labels, steps=method.steps, scheduler=method.scheduler or scheduler,
                          guidance=guidance, seed=seed, timesteps=own_timesteps(method.schedule))

    whole = trajectory(Method("uncached", "uncached", steps))
    comparable = [method for method in methods if (own := trajectory(method)).timesteps == whole.timesteps
                  and own.scheduler_name == whole.scheduler_name]
    uncached = list(walk(whole, noise))
    return {method.name: [rmse(x, wanted, clip=False).mean().item() for x, wanted in
                          zip(walk(trajectory(method), noise, method.schedule), uncached)] for method in comparable}
