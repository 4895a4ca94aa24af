"""From labels to images."""

import os
from collections import deque
from collections.abc import Callable, Iterator

import torch
from diffusers import SchedulerMixin
from torch import Tensor

import harmonica_kernels as hk
from harmonica_dit.adaptive import AdaptiveSchedule
from harmonica_dit.memory import check_fits_memory
from harmonica_dit.models.plain_modules import is_steady
from harmonica_dit.router import Router, schedule_of
from harmonica_dit.schedule import Schedule
from harmonica_dit.validate import check_denoiser, check_whole

from .decoding import decode
from .schedulers import from_record
from .trajectory import Trajectory, check_labels, image_noise


@torch.no_grad()
def sample(net, labels, *, steps: int | None = None,
           schedule: str | os.PathLike | Router | Schedule | AdaptiveSchedule | None = None,
           guidance: float | None = None, guidance_channels: int | None = None, seed: int = 0, first: int = 0,
           scheduler=None, batch: int = 64, executor=None, latents: bool = False,
           progress: Callable[[int], None] | None = None) -> Tensor:
    """Samples one image for each label.

    Args:
        net: a denoiser, see `harmonica_dit.load`.
        labels: [n] whole numbers: classes or, of a text model, the numbers of its prompts.
        steps: T, the scheduler's steps; None is the schedule's number, or 20.
        schedule: for this model and T, or a router, or a file or the bundled name of either; None computes every branch
            at every step. An adaptive one decides for a batch.
        guidance, guidance_channels: classifier-free guidance (Ho & Salimans, 2022), see `Trajectory`; None is the
            model's own.
        seed, first: image i starts from noise number `first` + i of the seed, whatever the batch size.
        scheduler: "ddim" (the reference's), the name of a diffusers scheduler, or an instance of one; None is that of
            the schedule's forecaster, with its settings, or the model's own.
        batch: images at a time.
        executor: "eager" runs every batch as it is. "captured" records the second one as a CUDA graph and replays it
            for the batches after. An executor `harmonica_kernels.compile(harmonica_dit.denoise)` also keeps its graphs
            for the next call. On the CPU all three run alike. None is "captured" from three whole batches on, where
            they surely run alike (no hook, LoRA or module of one's own, nor a scheduler that may draw noise); else
            "eager".
        latents: whether a latent model's samples are left as they are, not decoded by its VAE.
        progress: called with the number of images done after each batch.

    Returns:
        [n, C, H, W] float32, unclipped. Images lie in about [-1, 1]; the samples of a latent model are images if it
        has a VAE, see `harmonica_dit.load`, and latents otherwise.

    Raises:
        TypeError, ValueError: an argument is not as above, or the schedule is for another model or another T, or a
            batch cannot fit in memory. FileNotFoundError: there is no such file.
        RuntimeError: the trajectory cannot be captured, for example because the scheduler draws noise; the message says
            why.
    """
    check_denoiser(net)
    labels = check_labels(labels, net.num_classes)
    if isinstance(schedule, (str, os.PathLike, Router)):
        schedule = schedule_of(schedule)
    if schedule is not None and not isinstance(schedule, (Schedule, AdaptiveSchedule)):
        raise TypeError(f"schedule: got {type(schedule).__name__}, expected a Schedule, a Router or a file of one")
    for name, value, least in (("batch", batch, 1), ("seed", seed, 0), ("first", first, 0)):
        check_whole(name, value, least)
    if steps is None:
        steps = 20 if schedule is None else schedule.steps
    if scheduler is None:
        scheduler = own_scheduler(schedule)
    run = None if executor is None else _runner(executor)
    device = next(net.parameters()).device
    images = []
    for start in range(0, len(labels), batch):
        part = labels[start : start + batch].to(device)
        trajectory = Trajectory(net, part, steps=steps, scheduler=scheduler, guidance=guidance,
                                guidance_channels=guidance_channels, seed=seed, first=first + start,
                                timesteps=own_timesteps(schedule))
        if start == 0:
            check_fits_memory(net, len(part), trajectory.model.scale)
        if run is None:
            alike = trajectory.can_be_recorded and not isinstance(schedule, AdaptiveSchedule) and is_steady(net)
            run = _runner("captured" if alike and len(labels) >= 3 * batch else "eager")
        if schedule is not None:
            schedule.check(net, trajectory)
        noise = image_noise(seed, first + start, len(part), net.sample_shape)
        try:
            made = run(trajectory, noise.to(device), schedule)
        except torch.OutOfMemoryError:
            if executor is not None or run is denoise:
                raise
            run.reset()  # nobody asked for its graphs, and the error still holds them
            run = denoise
            made = run(trajectory, noise.to(device), schedule)
        images.append(made if latents else decode(net, made))
        if progress is not None:
            progress(start + len(part))
    return torch.cat(images)


@torch.no_grad()
def denoise(trajectory: Trajectory, noise: Tensor, schedule: Schedule | AdaptiveSchedule | None = None) -> Tensor:
    """Runs one trajectory from its noise [n, C, H, W] to images.

    `harmonica_kernels.compile(denoise)` makes an executor that runs the whole trajectory as one CUDA graph.
    """
    (images,) = deque(walk(trajectory, noise, schedule), maxlen=1)
    return images


@torch.no_grad()
def walk(trajectory: Trajectory, noise: Tensor,
         schedule: Schedule | AdaptiveSchedule | None = None) -> Iterator[Tensor]:
    """Yields x_1, …, x_T [n, C, H, W] of a trajectory from its noise."""
    cache = None if schedule is None else schedule.new_cache(trajectory.net)
    rows = [None] * trajectory.steps if schedule is None else schedule.rows
    weights = None if schedule is None else schedule.forecast_weights_on(noise.device)
    condition = None if schedule is None else schedule.condition_on(noise.device)
    x = trajectory.start(noise)
    every = rows if schedule is None else schedule.branch_rows
    for s, precomputed in enumerate(trajectory.hoist(every, condition)):
        row = {} if schedule is None else dict(row=rows[s], forecast_weights=weights[s], cache=cache)
        x = trajectory.step(x, s, **row, **precomputed)
        yield x


def own_timesteps(schedule: Schedule | AdaptiveSchedule | None) -> tuple[float, ...] | None:
    """The timesteps that a trajectory has to take: a forecaster's weights belong to those of its schedule."""
    return None if schedule is None or schedule.unit == "branch" else schedule.timesteps


def own_scheduler(schedule: Schedule | AdaptiveSchedule | None) -> str | SchedulerMixin | None:
    """The scheduler of a schedule's forecaster, with its settings; None if it has none."""
    if schedule is None or schedule.unit == "branch":
        return None
    return from_record(schedule.scheduler, schedule.scheduler_config)


def _runner(executor) -> Callable[..., Tensor]:
    """`denoise` or its executor."""
    if isinstance(executor, str) and executor == "eager":
        return denoise
    if isinstance(executor, str) and executor == "captured":
        return hk.compile(denoise)
    if getattr(executor, "function", None) is not denoise:
        raise ValueError(f'executor: got {executor!r}, expected "eager", "captured", or an executor from '
                         "harmonica_kernels.compile(harmonica_dit.denoise)")
    return executor
