"""Training a forecaster of the trunk on the final image, through the whole trajectory."""

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from diffusers import SchedulerMixin
from rich.progress import Progress
from torch import Tensor

from harmonica_dit import ranks
from harmonica_dit.files import load_tensors, optimizer_tensors, restore_optimizer, save_tensors
from harmonica_dit.flops import runs_by_its_loop, trunk_costs
from harmonica_dit.forecaster import taylor
from harmonica_dit.memory import check_fits_memory
from harmonica_dit.methods import trunk_forecast
from harmonica_dit.progress import progress_bar
from harmonica_dit.sample.schedulers import config_of, make_scheduler, scheduler_name
from harmonica_dit.sample.trajectory import FIRST_IMAGE, Trajectory, check_labels, image_noise
from harmonica_dit.schedule import Schedule
from harmonica_dit.validate import check_denoiser, check_fits, check_whole, is_number
from harmonica_kernels.cache import check_history

from .checkpoint import check_adam, check_like, check_same_settings
from .frozen_model import freeze
from .loop import is_there
from .own_features import feature_error
from .settings import check_weights, record_of
from .start import resolution_of
from .targets import Target, make_targets
from .unrolled import LearnedForecaster, unroll

EVERY = 25  # iterations between two looks at the held-out images
SLOWER = 1 / 3  # of the rate of w: v and a, which start at 0


def train_forecaster(net, schedule: Schedule | float, *, target: str = "accurate", steps: int = 20,
                     correct: bool = True, history: int = 3, iterations: int = 600, images: int = 1200,
                     held_out: int = 40, batch: int = 10, lr: float = 4e-3, perceptual: float | None = None,
                     labels: Sequence[int] | None = None, guidance: float | None = None,
                     guidance_channels: int | None = None, scheduler: str | SchedulerMixin | None = None,
                     autocast: str | None = None, checkpointing: bool = True, seed: int = 0,
                     out: str | os.PathLike | None = None, progress: bool = True) -> Schedule:
    """Learns how to forecast, and to correct, the trunk of `net` so that the final images meet their targets.

    The loss is the mean squared error of the final image [n, C, H, W], relative to the targets' mean square, and the
    error in the model's own features (`own_features.py`) beside it, see perceptual. Its gradient runs back through
    every step and through the cache. The model is frozen. The iterate with the smallest loss on the held-out images is
    kept; their noise is not trained on, and neither is any sampled image's.

    Args:
        net: a denoiser, see `harmonica_dit.load`.
        schedule: which steps are computed, whole: a schedule; or a FLOPs speedup, for which they are spread evenly.
            With timesteps of its own, a schedule is trained on these.
        target: "uncached": the images of the same trajectory, everything computed. "accurate": a more accurate solution
            from the same noise: for "ddim" 40 steps of DPM-Solver++, else four times the steps of the scheduler,
            and at least 40.
        steps: T, where schedule is a speedup.
        correct: whether computed steps are corrected, beside the forecasts of the others.
        history: states kept, 1 to 4; fewer where fewer steps are computed.
        iterations: of Adam (betas 0.9 and 0.99), whose rate falls from lr to 0 along a cosine.
        images: targets trained on. held_out: targets that decide which iterate is kept. batch: images an iteration, of
            all ranks together, see `train_router`.
        lr: of the weights w and of what is added to the conditions; the others learn at a third of it.
        perceptual: weight of the error in the model's own features; 0 leaves it out. None is 0.5 towards "accurate",
            where images are to look alike, and 0 towards "uncached", where they are to be the same.
        labels: those trained on, equally many images of each; None is all.
        guidance, guidance_channels, scheduler: of the trajectories; None is the model's own.
        autocast: "bfloat16" runs the model under autocast in it; None runs it in its weights' dtype.
        checkpointing: whether each computed step is run again in the backward, so that only one step's activations are
            held. Without it a training saves one forward of each computed step. The result is the same.
        seed: decides noise, labels and their order.
        out: folder for targets, checkpoint and the schedule. The same call with the same folder goes on after an
            interruption and ends with the same bits.
        progress: whether a progress bar is shown.

    Returns:
        The schedule with its forecaster; also in `out/forecast.safetensors`.

    Raises:
        ValueError: an argument is out of range, or what `out` holds is of other settings; the message names it.
        OSError: `out` cannot be written to.
        FloatingPointError: the loss is not finite.
        ConnectionError: another rank has ended. KeyboardInterrupt: Ctrl-C. The message says how to go on.
    """
    check_denoiser(net)
    for name, value, least in (("steps", steps, 2), ("iterations", iterations, 1), ("images", images, 1),
                               ("held_out", held_out, 1), ("batch", batch, 1), ("seed", seed, 0)):
        check_whole(name, value, least)
    check_history(history)
    if target not in ("accurate", "uncached"):
        raise ValueError(f"target: got {target!r}, expected 'accurate' or 'uncached'")
    if not is_number(lr) or lr <= 0:
        raise ValueError(f"lr: got {lr!r}, expected a number above 0")
    if perceptual is None:
        perceptual = 0.5 if target == "accurate" else 0.0
    if not is_number(perceptual) or perceptual < 0:
        raise ValueError(f"perceptual: got {perceptual!r}, expected a number from 0 on")
    if autocast not in (None, "bfloat16"):
        raise ValueError(f"autocast: got {autocast!r}, expected None or 'bfloat16'")
    if labels is not None:
        labels = sorted(set(check_labels(labels, net.num_classes).tolist()))
    check_weights(next(net.parameters()).dtype)
    guidance = net.guidance if guidance is None else guidance
    ranks.check_split("batch", batch)
    check_fits_memory(net, len(ranks.split(batch)), guidance)
    if not isinstance(schedule, Schedule):
        schedule = trunk_forecast(net, steps, speedup=schedule)
    compute = [bool(row.all()) for row in schedule.compute]
    history = min(history, sum(compute))
    scheduler = net.scheduler if scheduler is None else scheduler
    solver = make_scheduler(scheduler, schedule.steps, net)
    first_order = solver.config.get("solver_order", 1) == 1
    if target == "uncached" and schedule.timesteps not in (None, tuple(solver.timesteps.tolist())):
        raise ValueError('schedule: has timesteps of its own, on which there are no uncached images; give target='
                         '"accurate", or a schedule of the scheduler\'s timesteps')
    initial = taylor(compute, min(1, history - 1), adams=target == "accurate" and correct and first_order)
    initial = replace(initial, states=torch.cat([initial.states, torch.zeros(
        len(compute), history - initial.history, 1)], 1))
    schedule = replace(schedule, forecaster=initial, scheduler=scheduler_name(solver),
                       scheduler_config=config_of(solver))  # raises now, not after the training, if it cannot be so
    check_fits("schedule: ", schedule, net)
    learned = LearnedForecaster(compute, initial, net.width, correct, entering=not runs_by_its_loop(net))
    if not any(p.requires_grad and p.numel() for p in learned.parameters()):
        raise ValueError("schedule: computes every step, and correct=False leaves nothing to learn")
    if target == "uncached" and all(compute):
        raise ValueError("schedule: computes every step, so what it makes are the uncached images already; give a "
                         'speedup, or target="accurate"')
    run = _Run(net, schedule, learned, dict(
        target=target, history=history, iterations=iterations, images=images, held_out=held_out, batch=batch, lr=lr,
        perceptual=perceptual, labels=labels, guidance=guidance, guidance_channels=guidance_channels,
        scheduler=scheduler, autocast=autocast, seed=seed), checkpointing, out, progress)
    with freeze(net):
        return run.train()


class _Run:
    """One training: its targets, its parameters and the best of them so far."""

    def __init__(self, net, schedule: Schedule, learned: LearnedForecaster, settings: dict, checkpointing: bool, out,
                 progress: bool):
        self.net, self.schedule, self.settings, self.show = net, schedule, settings, progress
        self.checkpointing = checkpointing
        self.out = None if out is None else Path(out)
        self.device = next(net.parameters()).device
        self.learned = learned.to(self.device)
        w = [p for part in (learned.states, learned.condition) for p in part if p.requires_grad]
        rest = [p for part in (learned.tokens, learned.own) for p in part if p.requires_grad]
        self.optimizer = torch.optim.Adam([dict(params=w, scale=1.0), dict(params=rest, scale=SLOWER)],
                                          settings["lr"], betas=(0.9, 0.99))
        self.done, self.loss, self.error = 0, math.inf, math.inf
        self.best = {n: t.clone() for n, t in learned.state_dict().items()}
        total = settings["images"] + settings["held_out"]
        some = np.arange(net.num_classes) if settings["labels"] is None else np.array(settings["labels"])
        self.labels = torch.from_numpy(np.random.default_rng((settings["seed"], 4)).permutation(
            some[np.arange(total) % len(some)]))
        self.about = record_of(net, settings | dict(compute=learned.compute, correct=learned.correct,
                                                    timesteps=schedule.timesteps))

    def train(self) -> Schedule:
        n, batch, lr = self.settings["iterations"], self.settings["batch"], self.settings["lr"]
        images = self.settings["images"]
        path = None if self.out is None else self.out / "checkpoint.safetensors"
        trajectory = self._trajectory(torch.arange(1))  # refuses now, before the targets, what it cannot take
        if trajectory.steps != self.schedule.steps:
            raise ValueError(f"scheduler: {trajectory.scheduler_name} calls the model {trajectory.steps} times in "
                             f"{self.schedule.steps} steps; a forecaster needs a scheduler of one call a step")
        with progress_bar(shown=self.show) as bar:
            try:
                # Before the targets, which take minutes: the folder may be of another training, or read-only.
                if path is not None:
                    if ranks.on_main(is_there, path):
                        self._restore(path)
                    else:
                        ranks.on_main(self._save, path)
                targets = self._targets(bar)
                task = bar.add_task("training the forecaster", total=n, completed=self.done)
                if self.done == 0:
                    self._look(targets)
                while self.done < n:
                    for group in self.optimizer.param_groups:
                        group["lr"] = lr * group["scale"] * 0.5 * (1 + math.cos(math.pi * self.done / n))
                    chosen = torch.arange(self.done * batch, (self.done + 1) * batch) % images
                    error, loss, count = self._losses(chosen, targets)
                    self.optimizer.zero_grad()
                    loss.backward()
                    learned = [p for p in self.learned.parameters() if p.grad is not None]
                    error, loss, *gradients = ranks.mean([error, loss.detach(), *(p.grad for p in learned)], count)
                    if not loss.isfinite():
                        raise FloatingPointError(f"the loss is not finite in iteration {self.done}; try a smaller lr "
                                                 f"than {lr:g}")
                    for parameter, gradient in zip(learned, gradients):
                        parameter.grad = gradient
                    self.optimizer.step()
                    self.done += 1
                    if self.done % EVERY == 0 or self.done == n:
                        self._look(targets)
                        if path is not None:
                            ranks.on_main(self._save, path)
                    bar.update(task, advance=1, description=f"error {error.item() ** 0.5:.4f}, held out "
                                                            f"{self.error:.4f}")
            except (KeyboardInterrupt, ConnectionError) as stop:
                where = "nothing is kept without out=" if path is None else f"the same call goes on from {self.out}"
                raise type(stop)(f"{str(stop) or 'stopped'} after {self.done} of {n} iterations; {where}") from None
        self.learned.load_state_dict(self.best)
        return self._finish(tuple(trajectory.timesteps))

    def _finish(self, timesteps: tuple[float, ...]) -> Schedule:
        origin = (f"learned towards the {self.settings['target']} images, held-out error {self.error:.4f}, "
                  f"{self.settings['iterations']} iterations of {self.settings['batch']} images")
        forecaster = self.learned.freeze(trunk_costs(self.net)[1], origin)
        labels, guidance = self.settings["labels"], self.settings["guidance"]
        schedule = replace(self.schedule, forecaster=forecaster, guidance=None if guidance is None else float(guidance),
                           timesteps=timesteps, labels=None if labels is None else tuple(labels),
                           architecture=getattr(self.net, "architecture", None),
                           resolution=resolution_of(self.net), origin=f"{self._computed()}, {origin}")
        if self.out is not None:
            ranks.on_main(schedule.save, self.out / "forecast.safetensors")
        return schedule

    def _computed(self) -> str:
        return f"{sum(self.learned.compute)} of {len(self.learned.compute)} steps computed"

    def _targets(self, bar: Progress) -> Tensor:
        task = bar.add_task("making targets", total=len(self.labels))
        settings = self.settings
        about = {name: self.about[name] for name in ("model", "weights", "dtype", "prompts", "scheduler",
                                                     "sample_shape", "call") if name in self.about}
        if settings["target"] == "uncached":
            made = Target(self.schedule.steps, None)
        elif scheduler_name(settings["scheduler"]) == "ddim":
            made = Target(40, "DPMSolverMultistepScheduler")
        else:
            made = Target(max(40, 4 * self.schedule.steps), None)
        return make_targets(self.net, made, self.labels, seed=settings["seed"], first=FIRST_IMAGE,
                            guidance=settings["guidance"], guidance_channels=settings["guidance_channels"],
                            scheduler=settings["scheduler"], batch=len(ranks.split(settings["batch"])), about=about,
                            folder=self.out, progress=lambda n: bar.update(task, completed=n))

    def _trajectory(self, numbers: Tensor) -> Trajectory:
        settings = self.settings
        return Trajectory(self.net, self.labels[numbers].to(self.device), steps=self.schedule.steps,
                          scheduler=settings["scheduler"], guidance=settings["guidance"],
                          guidance_channels=settings["guidance_channels"], timesteps=self.schedule.timesteps,
                          autocast=settings["autocast"])

    def _images(self, numbers: Tensor) -> Tensor:
        """The images of these numbers, by the weights as they are."""
        shape, seed = self.net.sample_shape, self.settings["seed"]
        noise = torch.cat([image_noise(seed, FIRST_IMAGE + i, 1, shape) for i in numbers.tolist()])
        return unroll(self._trajectory(numbers), noise.to(self.device), self.learned, self.checkpointing)

    def _losses(self, numbers: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, int]:
        """Of this rank's share of the images of these numbers: the mean squared error, the loss, and how many count.

        A rank without a share takes an image that does not count.
        """
        mine = ranks.split(len(numbers))
        numbers = numbers[mine.start : mine.stop] if mine else numbers[-1:]
        images, wanted = self._images(numbers), targets[numbers].to(self.device)
        error, weight = (images - wanted).square().mean(), self.settings["perceptual"]
        loss = error / targets.square().mean().to(self.device)
        if weight:
            loss = loss + weight * feature_error(self._trajectory(numbers), images, wanted, len(mine))
        return error.detach(), loss, len(mine)

    @torch.no_grad()
    def _look(self, targets: Tensor) -> None:
        """Keeps the weights if their loss on the held-out images is the smallest so far. The error is an RMSE."""
        first, held, squares, losses = self.settings["images"], self.settings["held_out"], 0.0, 0.0
        for part in torch.arange(first, first + held).split(self.settings["batch"]):
            *found, count = self._losses(part, targets)
            error, loss = ranks.mean(found, count)
            squares, losses = squares + error.item() * len(part), losses + loss.item() * len(part)
        if ranks.on_main(lambda: losses / held < self.loss):
            self.loss, self.error = losses / held, (squares / held) ** 0.5
            self.best = {name: t.detach().clone() for name, t in self.learned.state_dict().items()}

    def _save(self, path: Path) -> None:
        tensors = {f"now.{name}": t for name, t in self.learned.state_dict().items()}
        tensors |= {f"best.{name}": t for name, t in self.best.items()} | optimizer_tensors(self.optimizer)
        save_tensors(path, tensors, dict(kind="forecaster training", settings=self.about, done=self.done,
                                         loss=self.loss, error=self.error))

    def _restore(self, path: Path) -> None:
        tensors, metadata = ranks.on_main(load_tensors, path)
        theirs = metadata.get("settings")
        if metadata.get("kind") != "forecaster training" or not isinstance(theirs, dict):
            raise ValueError(f"{path} is not a checkpoint of a forecaster's training")
        check_same_settings(path, theirs, self.about)
        try:
            now, best = ({name: check_like(f"{which}.{name}", tensors[f"{which}.{name}"], t)
                          for name, t in self.best.items()} for which in ("now", "best"))
            self.learned.load_state_dict(now)
            restore_optimizer(self.optimizer, tensors)
            check_adam(self.optimizer)
            self.best, self.done = best, check_whole("done", metadata["done"], 0)
            self.loss, self.error = float(metadata["loss"]), float(metadata["error"])
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a whole checkpoint: {error}") from None
