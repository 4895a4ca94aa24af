"""Methods side by side: the same noise, the same sampler, the same judges."""

import multiprocessing
import os
import secrets
import signal
import tempfile
import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median

import torch
from torch import Tensor

from harmonica_dit.sample import Trajectory, check_labels, decode, sample
from harmonica_dit.sample.decoding import makes_images, vae_of
from harmonica_dit.sample.sampling import own_timesteps
from harmonica_dit.validate import check_whole

from .metrics import Judge, psnr, rmse
from .named_methods import Method, check_names
from .samples import Samples


@dataclass(frozen=True)
class Made:
    """A batch of a method: the sampler's values, and the images that they are or are decoded to."""

    samples: Tensor
    images: Tensor


@dataclass
class Tally:
    """Sums up one method's samples, batch by batch.

    images, latents: whether the samples are, or become, images; and whether they are latents. Errors of latents are of
    unclipped values.
    """

    judge: Judge | None
    images: bool = True
    latents: bool = False
    errors: dict[str, list[float]] = field(default_factory=dict)  # column -> one value an image
    count: int = 0

    def update(self, made: Made, labels: Tensor, references: dict[str, Made]) -> None:
        """Adds a batch. labels: [n], those asked for. references: "" and "accurate_", from the same noise."""
        self.count += len(labels)
        for prefix, reference in references.items():
            if self.images:
                self._add(f"{prefix}error", rmse(made.images, reference.images))
            if self.latents:
                self._add(f"{prefix}latent_error", rmse(made.samples, reference.samples, clip=False))
        if self.judge is not None:
            self.judge.update(made.images, labels)

    def _add(self, column: str, errors: Tensor) -> None:
        self.errors.setdefault(column, []).extend(errors.tolist())

    def row(self, method: Method, steps: int, wall_speedup: float | None, seed: int) -> dict:
        """The method's row of `compare`. steps: of the uncached trajectory."""
        means = {column: fmean(values) for column, values in self.errors.items()}
        return dict(
            name=method.name, family=method.family, steps=method.steps, seed=seed, samples=self.count,
            cur=0.0 if method.schedule is None else method.schedule.cur, flops_speedup=method.speedup(steps),
            wall_speedup=wall_speedup, **means, psnr=psnr(means["error"]) if means.get("error") else None,
            label_accuracy=None if self.judge is None else self.judge.label_accuracy,
            frechet=None if self.judge is None else self.judge.frechet_distance)


def compare(net, methods: Sequence[Method], labels, *, steps: int, guidance: float = 1.5, seeds: Sequence[int] = (0,),
            batch: int = 64, scheduler="ddim", accurate: Method | None = None,
            judge: Callable[[], Judge] | None = None, folder: str | os.PathLike | None = None,
            processes: int = 1, load: Callable[[], object] | None = None,
            progress: Callable[[int], None] | None = None) -> list[dict]:
    """Runs the uncached trajectory and every method on the same noise.

    Args:
        net: a denoiser, see `harmonica_dit.load`. A latent model's samples are decoded by its VAE; without one only
            latents are compared.
        methods: the methods to compare; the uncached run is added as the first.
        labels: [n] whole numbers, one for each image.
        steps: T of the uncached trajectory.
        guidance, batch, scheduler: as in `harmonica_dit.sample`; the scheduler calls the model once a step.
        seeds: of the noise; the comparison is made for each.
        accurate: makes a more accurate solution from the same noise; its row is the second.
        judge: makes a judge for each method and seed. None leaves out label accuracy and Fréchet distance.
        folder: keeps the samples. The same call goes on where it stopped, and others take from it what is the same;
            None keeps nothing.
        processes: sample at once, each with its own model; then nothing is timed.
        load: makes the net in another process, a function that can be pickled such as
            `functools.partial(harmonica_dit.load, "fashion-dit")`; needed where processes > 1.
        progress: called with the number of samples done so far, over all methods and seeds: with 0 once the arguments
            are checked, then after each batch.

    Returns:
        One plain dict per seed and method, ready for JSON: name, family, steps, seed, samples, cur, flops_speedup;
        wall_speedup (uncached time / this method's, made one after the other, median over batches; None where the
        samples were not made by this call alone); error (mean RMSE against the uncached images, on the scale [-1, 1]);
        psnr (of that error, in dB; None if it is 0); accurate_error (against the accurate solution); latent_error,
        accurate_latent_error (of latents, unclipped); label_accuracy; frechet (None below `metrics.MIN_FRECHET`
        samples). What cannot be measured is left out.

    Raises:
        ValueError: as in `harmonica_dit.sample`; or two methods have the same name, or the scheduler calls the model
            more than once a step. Nothing has been sampled then.
        KeyboardInterrupt: Ctrl-C; the message says how much is kept.
    """
    for name, value in (("batch", batch), ("processes", processes)):
        check_whole(name, value, 1)
    for seed in seeds:
        check_whole("seeds", seed, 0)
    if processes > 1 and load is None:
        raise ValueError(f"processes: got {processes}; more than one need load")
    labels = check_labels(labels, net.num_classes)
    methods = [Method("uncached", "uncached", steps), *([] if accurate is None else [accurate]), *methods]
    check_methods(net, methods, scheduler, guidance)
    images = makes_images(net)
    if judge is not None and not images:
        raise ValueError(f"judge: {net.name} makes latents, and no VAE decodes them; load it with vae=")
    options = dict(guidance=guidance, batch=batch, scheduler=scheduler)
    report = progress or (lambda done: None)
    report(0)
    with tempfile.TemporaryDirectory() if folder is None else nullcontext(folder) as place:
        run = secrets.token_hex(8) if processes == 1 else ""  # others would disturb its times
        samples = Samples(net, labels, Path(place), run=run, **options)
        try:
            with _others(processes, load, labels, place, options, methods, seeds):
                if run:
                    sample(net, labels[:batch], steps=1, **options)  # warms up
                samples.make(methods, seeds, report)
        except KeyboardInterrupt:
            kept = "nothing is kept" if folder is None else f"what is done is in {folder}, the same call goes on there"
            raise KeyboardInterrupt(f"stopped; {kept}") from None
        return [row for seed in seeds for row in _rows(samples, methods, seed, steps, accurate, judge, images)]


def check_methods(net, methods: Sequence[Method], scheduler, guidance: float) -> None:
    """Refuses methods that cannot be compared, before anything is sampled.

    Raises:
        ValueError: as in `compare`.
    """
    check_names(methods)
    for method in methods:
        used = method.scheduler or scheduler
        trajectory = Trajectory(net, torch.zeros(1, dtype=torch.long), steps=method.steps, scheduler=used,
                                guidance=guidance, timesteps=own_timesteps(method.schedule))
        if trajectory.steps != method.steps:
            raise ValueError(f"scheduler: {used!r} calls the model {trajectory.steps} times in {method.steps} "
                             "steps; a comparison needs a scheduler of one call a step")
        if method.schedule is not None:
            method.schedule.check(net, trajectory)


def _rows(samples: Samples, methods: Sequence[Method], seed: int, steps: int, accurate: Method | None,
          judge: Callable[[], Judge] | None, images: bool) -> list[dict]:
    """A seed's rows, one a method; the first method is the uncached run."""
    latents = vae_of(samples.net) is not None or not images
    tallies = [Tally(None if judge is None else judge(), images, latents) for _ in methods]
    for first in samples.firsts:
        references = {prefix: _made(samples, method, seed, first, images)
                      for prefix, method in (("", methods[0]), ("accurate_", accurate)) if method is not None}
        for method, tally in zip(methods, tallies):
            tally.update(_made(samples, method, seed, first, images), samples.labels_of(first), references)
    return [tally.row(samples.as_run(method, seed), steps, _wall_speedup(samples, methods[0], method, seed), seed)
            for method, tally in zip(methods, tallies)]


def _made(samples: Samples, method: Method, seed: int, first: int, images: bool) -> Made:
    found, _ = samples.read(method, seed, first)
    return Made(found, decode(samples.net, found).cpu() if images else found)


def _wall_speedup(samples: Samples, uncached: Method, method: Method, seed: int) -> float | None:
    """Median over batches of the uncached run's time / this method's; None where they were not made in this run."""
    whole, mine = samples.seconds(uncached, seed), samples.seconds(method, seed)
    return median(whole[first] / mine[first] for first in whole) if whole and whole.keys() == mine.keys() else None


@contextmanager
def _others(processes: int, load, *work):
    """Lets other processes make samples too until the block ends; their threads, and this one's, share the cores."""
    threads, before = max(1, (os.cpu_count() or 1) // processes), torch.get_num_threads()
    spawn = multiprocessing.get_context("spawn")
    others = [spawn.Process(target=_make_samples, args=(load, threads, *work)) for _ in range(processes - 1)]
    if others:
        torch.set_num_threads(threads)
    for other in others:
        other.start()
    try:
        yield
    except BaseException:
        for other in others:
            other.terminate()
        raise
    finally:
        torch.set_num_threads(before)
        for other in others:
            other.join()
    failed = sum(other.exitcode != 0 for other in others)
    if failed:
        warnings.warn(f"processes: {failed} of {processes} failed, and the others did their work", stacklevel=3)


def _make_samples(load: Callable[[], object], threads: int, labels: Tensor, place: Path, options: dict,
                  methods: Sequence[Method], seeds: Sequence[int]) -> None:
    """What another process does."""
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # after Ctrl-C the first process ends this one
    Samples(load(), labels, Path(place), **options).make(methods, seeds, lambda done: None)
