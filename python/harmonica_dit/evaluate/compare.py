"""Methods side by side: the same noise, the same sampler, the same judges."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median

from torch import Tensor

from harmonica_dit.sample import Trajectory, check_labels, sample
from harmonica_dit.sample.sampling import own_timesteps
from harmonica_dit.validate import check_whole

from .metrics import Judge, psnr, rmse
from .named_methods import Method, check_names


@dataclass
class Tally:
    """Sums up one method's samples, batch by batch."""

    judge: Judge | None
    errors: list[float] = field(default_factory=list)
    accurate_errors: list[float] = field(default_factory=list)

    def update(self, images: Tensor, uncached: Tensor, labels: Tensor, accurate: Tensor | None = None) -> None:
        """Adds a batch [n, C, H, W]. uncached, accurate: the images from the same noise. labels: [n], those asked for.
        """
        self.errors += rmse(images, uncached).tolist()
        if accurate is not None:
            self.accurate_errors += rmse(images, accurate).tolist()
        if self.judge is not None:
            self.judge.update(images, labels)

    def row(self, method: Method, steps: int, wall_speedup: float | None, seed: int) -> dict:
        """The method's row of `compare`. steps: of the uncached trajectory."""
        error = fmean(self.errors)
        return dict(
            name=method.name, family=method.family, steps=method.steps, seed=seed, samples=len(self.errors),
            cur=0.0 if method.schedule is None else method.schedule.cur, flops_speedup=method.speedup(steps),
            wall_speedup=wall_speedup, error=error, psnr=psnr(error) if error else None,
            accurate_error=fmean(self.accurate_errors) if self.accurate_errors else None,
            label_accuracy=None if self.judge is None else self.judge.label_accuracy,
            frechet=None if self.judge is None else self.judge.frechet_distance)


def compare(net, methods: Sequence[Method], labels, *, steps: int, guidance: float = 1.5, seed: int = 0,
            batch: int = 64, scheduler="ddim", accurate: Method | None = None,
            judge: Callable[[], Judge] | None = None,
            progress: Callable[[int], None] | None = None) -> list[dict]:
    """Runs the uncached trajectory and every method on the same noise, in turn within each batch.

    Args:
        net: a denoiser, see `harmonica_dit.load`.
        methods: the methods to compare; the uncached run is added as the first.
        labels: [n] whole numbers, one for each image.
        steps: T of the uncached trajectory.
        guidance, seed, batch, scheduler: as in `harmonica_dit.sample`; the scheduler calls the model once a step.
        accurate: makes a more accurate solution from the same noise; its row is the second.
        judge: makes a judge for each method. None leaves out label accuracy and Fréchet distance.
        progress: called with the number of images done so far, over all methods: with 0 once the arguments are
            checked, then after each batch of each method.

    Returns:
        One plain dict per method, ready for JSON: name, family, steps, seed, samples, cur, flops_speedup, wall_speedup
        (uncached time / this method's, run one after the other; median over batches), error (mean RMSE against the
        uncached images, on the scale [-1, 1]), psnr (of that error, in dB; None if it is 0), accurate_error (the error
        against the accurate solution, or None), label_accuracy, frechet (None below `metrics.MIN_FRECHET` samples).

    Raises:
        ValueError: as in `harmonica_dit.sample`; or two methods have the same name, or the scheduler calls the model
            more than once a step. Nothing has been sampled then.
    """
    check_whole("batch", batch, 1)
    labels = check_labels(labels, net.num_classes)
    methods = [Method("uncached", "uncached", steps), *([] if accurate is None else [accurate]), *methods]
    check_names(methods)
    for method in methods:
        used = method.scheduler or scheduler
        trajectory = Trajectory(net, labels[:1], steps=method.steps, scheduler=used, guidance=guidance,
                                timesteps=own_timesteps(method.schedule))
        if trajectory.steps != method.steps:
            raise ValueError(f"scheduler: {used!r} calls the model {trajectory.steps} times in {method.steps} "
                             "steps; a comparison needs a scheduler of one call a step")
        if method.schedule is not None:
            method.schedule.check(net, trajectory)
    if progress is not None:
        progress(0)
    tallies = [Tally(None if judge is None else judge()) for _ in methods]
    ratios: list[list[float]] = [[] for _ in methods]
    done = 0
    options = dict(guidance=guidance, seed=seed, batch=batch, scheduler=scheduler)
    sample(net, labels[:batch], steps=1, **options)  # warms up
    for first in range(0, len(labels), batch):
        part, made = labels[first : first + batch], []
        for method, ratio in zip(methods, ratios):
            images, seconds = time_sample(net, part, method, first=first, **options)
            if not made:
                uncached_seconds = seconds
            made.append(images)
            ratio.append(uncached_seconds / seconds)
            done += len(part)
            if progress is not None:
                progress(done)
        for images, tally in zip(made, tallies):
            tally.update(images, made[0], part, None if accurate is None else made[1])
    return [tally.row(method, steps, median(ratio), seed) for method, tally, ratio in zip(methods, tallies, ratios)]


def time_sample(net, labels: Tensor, method: Method, **options) -> tuple[Tensor, float]:
    """The images of `method` on the CPU, and the seconds that it took to get them there."""
    start = time.perf_counter()
    options["scheduler"] = method.scheduler or options.get("scheduler")
    images = sample(net, labels, steps=method.steps, schedule=method.schedule, **options).cpu()
    return images, time.perf_counter() - start
