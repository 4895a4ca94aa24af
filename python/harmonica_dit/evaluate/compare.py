"""Methods side by side: the same noise, the same sampler, the same judges."""

import multiprocessing
import os
import secrets
import signal
import tempfile
import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from harmonica_dit import ranks
from harmonica_dit.sample import Trajectory, check_labels, decode, sample
from harmonica_dit.sample.decoding import makes_images
from harmonica_dit.sample.sampling import own_timesteps
from harmonica_dit.validate import check_denoiser, check_whole

from .metrics import Judge
from .named_methods import Method, check_names
from .samples import Samples
from .tally import Made, Tally, add_intervals


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
        judge: makes a judge for each method and seed, see `judge_of`. None takes errors alone.
        folder: keeps the samples. The same call goes on where it stopped, and others take from it what is the same;
            None keeps nothing. The ranks of a torch.distributed group share the work in it, and rank 0 judges.
        processes: sample at once, each with its own model; then nothing is timed, as with several ranks.
        load: makes the net in another process, a function that can be pickled such as
            `functools.partial(harmonica_dit.load, "fashion-dit")`; needed where processes > 1.
        progress: called with the number of samples done so far, over all methods and seeds: with 0 once the arguments
            are checked, then after each batch.

    Returns:
        One plain dict per seed and method, ready for JSON: name, family, steps, seed, samples, cur, flops_speedup;
        wall_speedup (uncached time / this method's, made one after the other, median over batches; None where the
        samples were not made by this call alone); what `Judge.result` has (error: mean RMSE against the uncached
        images, on the scale [-1, 1]; latent_error, unclipped; frechet and more); accurate_error and
        accurate_latent_error, against the accurate solution; and intervals, see `add_intervals`.

    Raises:
        ValueError: as in `harmonica_dit.sample`; or two methods have the same name, or the scheduler calls the model
            more than once a step. Nothing has been sampled then.
        KeyboardInterrupt: Ctrl-C. ConnectionError: another rank has ended. The message says how much is kept.
    """
    check_denoiser(net)
    for name, value in (("batch", batch), ("processes", processes)):
        check_whole(name, value, 1)
    for seed in seeds:
        check_whole("seeds", seed, 0)
    if ranks.world() > 1 and (processes > 1 or folder is None):
        raise ValueError(f"processes, folder: got {processes} and {folder}; {ranks.world()} ranks are processes "
                         "already, and need a folder that all see")
    if processes > 1 and load is None:
        raise ValueError(f"processes: got {processes}; more than one need load")
    labels = check_labels(labels, net.num_classes)
    methods = [Method("uncached", "uncached", steps), *([] if accurate is None else [accurate]), *methods]
    check_methods(net, methods, scheduler, guidance)
    if judge is not None and not makes_images(net):
        raise ValueError(f"judge: {net.name} makes latents, and no VAE decodes them; load it with vae=")
    if makes_images(net) and hasattr(net, "decode"):  # by its pipeline, which may make anything
        image = decode(net, torch.zeros(1, *net.sample_shape, device=next(net.parameters()).device))
        if image.ndim != 4:
            raise ValueError(f"net: {net.name} makes videos, {tuple(image.shape[1:])}; only images can be compared")
    options = dict(guidance=guidance, batch=batch, scheduler=scheduler)
    report = progress or (lambda done: None)
    report(0)
    with tempfile.TemporaryDirectory() if folder is None else nullcontext(folder) as place:
        run = secrets.token_hex(8) if processes == ranks.world() == 1 else ""  # others would disturb its times
        samples = Samples(net, labels, Path(place), run=run, **options)
        try:
            with _others(processes, load, labels, place, options, methods, seeds):
                if run:
                    sample(net, labels[:batch], steps=1, **options)  # warms up
                samples.make(methods, seeds, report)
        except (KeyboardInterrupt, ConnectionError) as error:
            kept = "nothing is kept" if folder is None else f"what is done is in {folder}, the same call goes on there"
            raise type(error)(f"{str(error) or 'stopped'}; {kept}") from None
        return ranks.on_main(lambda: [row for seed in seeds
                                      for row in _rows(samples, methods, seed, steps, accurate, judge)])


def check_methods(net, methods: Sequence[Method], scheduler, guidance: float) -> None:
    """Refuses methods that cannot be compared, before anything is sampled.

    Raises:
        ValueError: as in `compare`.
    """
    check_names(methods)
    for method in methods:
        used, own = method.scheduler or scheduler, method.model(net)
        trajectory = Trajectory(own, torch.zeros(1, dtype=torch.long), steps=method.steps, scheduler=used,
                                guidance=guidance, timesteps=own_timesteps(method.schedule))
        if trajectory.steps != method.steps:
            raise ValueError(f"scheduler: {used!r} calls the model {trajectory.steps} times in {method.steps} "
                             "steps; a comparison needs a scheduler of one call a step")
        if method.schedule is not None:
            method.schedule.check(own, trajectory)


def _rows(samples: Samples, methods: Sequence[Method], seed: int, steps: int, accurate: Method | None,
          judge: Callable[[], Judge] | None) -> list[dict]:
    """A seed's rows, one a method; the first method is the uncached run."""
    images, prompts = makes_images(samples.net), getattr(samples.net, "prompts", None)
    tallies = [Tally((judge or Judge)() if images else None, samples.net.sample_shape[0] not in (1, 3),
                     None if prompts is None else prompts.texts) for _ in methods]

    def made(method: Method, first: int) -> Made:
        found, _ = samples.read(method, seed, first)
        return Made(found, decode(samples.net, found).cpu() if images else None)

    for first in samples.firsts:
        uncached, exact = made(methods[0], first), None if accurate is None else made(accurate, first)
        for method, tally in zip(methods, tallies):
            try:
                tally.update(made(method, first), samples.labels_of(first), uncached, exact)
            except ValueError as error:  # values that are not finite, for example
                raise ValueError(f"{method.name}: {error}") from None
    rows = [tally.row(samples.as_run(method, seed), steps, _wall_speedup(samples, methods[0], method, seed), seed)
            for method, tally in zip(methods, tallies)]
    add_intervals(rows, tallies)
    return rows


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
