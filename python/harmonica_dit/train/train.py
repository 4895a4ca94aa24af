"""Training a router: HarmoniCa's SDT and IEPO, without images."""

import inspect
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from diffusers import SchedulerMixin
from torch import Tensor

from harmonica_dit import ranks
from harmonica_dit.costs import Costs
from harmonica_dit.memory import check_fits_memory
from harmonica_dit.router import Router
from harmonica_dit.sample.trajectory import run_eagerly
from harmonica_dit.validate import check_denoiser

from .budget import Budget
from .checkpoint import Training
from .frozen_model import checkpoint_bodies, freeze
from .importance import measure_importance, normalise
from .loop import run_training
from .recipes import complete
from .sdt import train_trajectory
from .settings import Settings, check_weights
from .start import find_costs, last_refresh, make_noise, make_trajectory, start_training
from .student import Student, new_executor


def train_router(net, *, recipe: str = "recommended", steps: int = 20, target_speedup: float | None = None,
                 target_cur: float | None = None, beta: float | None = None, trajectories: int | None = None,
                 batch: int | None = None, lr: float | None = None, eps: float | None = None,
                 threshold: float | None = None, importance: str | None = None, importance_rows: str | None = None,
                 importance_scale: str | None = None, refresh: int | None = None, reseed: bool | None = None,
                 extrapolation: float | str | None = None, costs: str | Costs | None = None, compare: str | None = None,
                 halves: str | None = None, guidance: float | None = None, guidance_channels: int | None = None,
                 scheduler: str | SchedulerMixin | None = None, autocast: str | None = None,
                 checkpointing: bool = False, executor: str = "captured", seed: int = 0,
                 out: str | os.PathLike | None = None, progress: bool = True) -> Router:
    """Learns which branches of `net` to compute at which step. The model is frozen; no images are needed.

    Args:
        net: a denoiser, see `harmonica_dit.load`.
        recipe: gives the settings from `trajectories` to `halves` that are None (`RECIPES`): "recommended", what gave
            the best routers on the bundled model (docs/comparison.md); or "paper", HarmoniCa as published, which also
            has a β for trainings without any goal. The router says what differs from its recipe (`Router.recipe`).
        steps: T, at least 2.
        target_speedup, target_cur, beta: exactly one of them. A target is the speedup (see costs) or the cache
            utilization ratio that the frozen schedule should have; the training finds β and τ for it. beta is β itself,
            the weight of the cost: where λ has mean 1, in units of the guided output's mean squared error.
        trajectories: how many are run; each updates every row once. With a target at least 2, because the first only
            measures, to find β.
        batch: images per trajectory, of all ranks together; with guidance the model's batch is twice as large.
        lr, eps: AdamW's learning rate, and what it adds to the root of the second moment. The gradients are as small as
            β·c, so an eps of 1e-8 (PyTorch's) slows the rows down, 1e-16 does not.
        threshold: τ during training, 0.1 in the paper; with a target, another τ is chosen at the end. A branch with
            score r > τ renews the cache with its blended output, of which the share r is fresh; in inference such an
            output is entirely fresh. So training with 0.5 is nearer to inference, and on the bundled model it gave
            much better routers (docs/comparison.md).
        importance: how λ is measured, "paper", "reference", "gain" or "none" (SDT alone), see `train.importance`.
            importance_rows: whether with "soft" or "hard" rows. importance_scale: "normalised" to mean 1, or "raw" as
            published. The raw mean falls as a router trains, and the weight of the error falls with it (the log has
            it).
        refresh: C; λ is measured again every C denoising steps.
        reseed: whether noise and labels begin anew whenever λ is measured, as published: then every λ is measured on
            the same images, and as many trajectories as lie between two measurements come again and again.
        extrapolation: 0 repeats cached outputs; another number is the coefficient a of the forecasts; "learned" learns
            one for each entry.
        costs: c_k, scaled to mean 1, and what the target speedup is in. "flops": every branch must have some. "time":
            measured seconds (`measure_costs`) of sampling `batch` images on this device, kept in `out/costs.json`; or
            what `measure_costs` found for another batch or device. "ones": all alike, and the target is in FLOPs. A
            target is met as nearly from above as whole entries of the table can.
        compare: the output channels in the loss: "all", the learned variance's too (published code), or "noise" alone.
        halves: over what loss and λ are averaged: "one", the guided output, or "both", its unconditional half too
            (published code). They differ in the channels that are not guided.
        guidance, guidance_channels, scheduler: of the trajectories, as in `Trajectory`; None is the model's own. If the
            scheduler is an instance, the router keeps only the name of its class: pass the instance again to sample.
        autocast: "bfloat16" runs the model under autocast in it; None runs it in its weights' dtype.
        checkpointing: whether the backward pass recomputes the branches' bodies: less memory, more time.
        executor: "captured" records teacher, student with its backward, and λ's forwards as CUDA graphs that serve the
            whole training; "eager" runs them as they are. On the CPU both run alike.
        seed: decides the initial logits, the noise and the labels.
        out: folder for checkpoint, logs, the router and its picture. The same call with the same folder goes on after
            an interruption and ends with the same bits; with more trajectories it extends a training.
        progress: whether a progress bar is shown.

    The ranks of a torch.distributed group share the images of each trajectory; rank 0 writes. The router is the same to
    rounding for every number of ranks, and a training may go on with another.

    Returns:
        The router; if there is a target, its τ is chosen to meet it. It is also in `out/router.safetensors`.

    Raises:
        ValueError: an argument is out of range, or the checkpoint in `out` is of other settings; the message names it.
        OSError: `out` cannot be written to.
        FloatingPointError: the loss is not finite; the last good checkpoint stays.
        ConnectionError: another rank has ended. KeyboardInterrupt: Ctrl-C. The message says how to go on.

    Source: HarmoniCa (Huang et al., ICML 2025, arXiv 2410.01723), section 3; targets and forecasts are ours.
    """
    check_denoiser(net)
    completed, said = complete(recipe, dict(
        steps=steps, target_speedup=target_speedup, target_cur=target_cur, beta=beta, trajectories=trajectories,
        batch=batch, lr=lr, eps=eps, threshold=threshold, importance=importance, importance_rows=importance_rows,
        importance_scale=importance_scale, refresh=refresh, reseed=reseed, extrapolation=extrapolation, costs=costs,
        compare=compare, halves=halves, guidance=net.guidance if guidance is None else guidance,
        guidance_channels=net.guidance_channels if guidance_channels is None else guidance_channels,
        scheduler=net.scheduler if scheduler is None else scheduler, autocast=autocast, seed=seed))
    settings = Settings(**completed)
    check_weights(next(net.parameters()).dtype)
    if executor not in ("captured", "eager"):
        raise ValueError(f'executor: got {executor!r}, expected "captured" or "eager"')
    ranks.check_split("batch", settings.batch)
    check_fits_memory(net, len(ranks.split(settings.batch)), settings.guidance, kept=len(net.branch_names))
    out = None if out is None else Path(out)
    costs = ranks.on_main(find_costs, net, settings, out)
    training, budget = start_training(net, settings, costs)
    training.router.recipe = said
    run = new_executor(net, training.router.steps) if executor == "captured" else run_eagerly
    # one for all trajectories: recorded graphs use its memory
    cache = make_trajectory(net, settings, 0).new_cache(training.router.history)
    recomputation = checkpoint_bodies(net) if checkpointing else nullcontext()
    with freeze(net), recomputation:
        return run_training(training, settings.trajectories,
                            lambda: _train_one(net, settings, costs, training, run, cache, budget),
                            out=out, record=settings.record(net), budget=budget, progress=progress)


def check_arguments(*, recipe: str = "recommended", dtype: str | torch.dtype = torch.float32, **arguments) -> str:
    """Refuses, before a model is loaded, arguments of `train_router` and a dtype that are wrong for every model.

    Returns:
        What the router will say of its recipe.

    Raises:
        ValueError: an argument is out of range; the message names it.
    """
    check_weights(dtype)
    defaults = {name: parameter.default for name, parameter in inspect.signature(train_router).parameters.items()}
    settings, said = complete(recipe, defaults | arguments)
    Settings(**{name: value for name, value in settings.items() if name in Settings.__annotations__})
    return said


def _train_one(net, settings: Settings, costs: Costs, training: Training, executor: Callable,
               cache, budget: Budget | None) -> dict[str, float]:
    """Measures λ if it is due, runs the next trajectory, and returns the values to log.

    costs: what a target speedup is in. executor: runs the model, see `Trajectory`. cache: the one to work in, see
    `Student`. budget: of the target; what is logged of the schedule is what it would be if the training ended here.
    """
    begun, n, router = time.monotonic(), training.trajectory, training.router
    refreshed = last_refresh(n, router.steps, settings.refresh)
    drawn = n - refreshed if settings.reseed else n  # the number of the noise and the labels
    noise = make_noise(net, settings, drawn).to(training.importance.device)
    if n == refreshed:
        found = measure_importance(router, make_trajectory(net, settings, drawn, executor), noise,
                                   kind=settings.importance, rows=settings.importance_rows, cache=cache)
        training.importance = _check_finite(found, "λ", n)
    raw = settings.importance_scale == "raw"
    importance = training.importance if raw else normalise(training.importance)
    c = torch.tensor([1.0] * len(router.branches) if settings.costs == "ones" else costs.branches)
    c = (c / c.mean()).to(noise.device)
    beta = training.beta
    student = Student(router, make_trajectory(net, settings, drawn, executor), noise, cache=cache)
    measurements = train_trajectory(router, student, training.optimizer, importance, c, beta,
                                    threshold=settings.threshold,
                                    channels=net.sample_shape[0] if settings.compare == "noise" else None)
    _check_finite(measurements.losses, "the loss", n)
    _check_finite(torch.stack([p.detach() for p in router.parameters()]), "the router", n)
    if training.steering is not None:
        training.beta = training.steering.observe(measurements.values)
    training.trajectory += 1
    threshold = router.threshold if budget is None else budget.threshold(router)
    schedule = router.schedule(threshold)
    return dict(trajectory=n, seconds=time.monotonic() - begun, loss=measurements.losses.mean().item(),
                error=measurements.errors.mean().item(), importance=training.importance[1:].mean().item(),
                beta=beta or 0.0, threshold=threshold, cur=schedule.cur, speedup=schedule.speedup_by(costs))


def _check_finite(values: Tensor, what: str, n: int) -> Tensor:
    if not values.isfinite().all():
        raise FloatingPointError(f"{what} is not finite in trajectory {n}; the last checkpoint is the one before it")
    return values
