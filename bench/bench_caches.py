"""Other caches of diffusers pipelines beside ours, the work skipped made equal, on one small `DiTPipeline`.

    OMP_NUM_THREADS=2 python -m pytest bench/bench_caches.py [--steps 10] [--rounds 5] [--heads 2] [--layers 28]
                                       [--benchmark-json=FILE]

What each method of other_caches.py skips is observed, and ours is given a schedule that skips just that. The pipeline
is a DiT-XL/2 256 of fewer heads with random weights, one image with guidance. Every candidate runs in every round, so
-k chooses what is shown, not what is run.
"""

import copy
import logging
from collections.abc import Callable
from contextlib import contextmanager
from statistics import median
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline
from torch import Tensor, nn

from bench import other_caches
from bench.diffusers_models import MODELS
from bench.other_caches import METHODS, count_lines
from bench.record import cell, installed_version
from bench.replay import Measured
from bench.timing import branch_seconds, forward_clocks, quartiles, relative_error
from harmonica_dit.flops import Flops, count_call
from harmonica_dit.pipelines.adapters import adapt
from harmonica_dit.schedule import Schedule
from harmonica_dit.timing import interleave, medians

TINY = dict(steps=6, rounds=1, warmup=0, heads=1, layers=3)
COLUMNS = {
    "method": cell("method"),
    "CUR": cell("cur", "{:.1%}"),
    "lines": cell("lines"),
    "speedup": cell("speedup", "{:.2f}×"),
    "ours": cell("our_speedup", "{:.2f}×"),
    "overhead, ms a step": cell("overhead_ms", "{:+.2f}"),
    "ours ": cell("our_overhead_ms", "{:+.2f}"),
    "error": cell("error", "{:.3g}"),
    "ours  ": cell("our_error", "{:.3g}"),
}
CAPTION = """ours: harmonica_dit.enable_cache with a schedule that skips the same branches at the same steps (2 lines).
speedup: over the plain pipeline. overhead: a step's time outside the computed branches, minus that of the uncached run.
error: of the final latents, root mean square relative to the uncached ones."""

@pytest.fixture(scope="module")
def measured(settings):
    return measure(**settings(TINY, steps=10, rounds=5, warmup=1, heads=None, layers=None))


@pytest.mark.parametrize("candidate", ["uncached", "clocked", *(f"{method}{of}" for method in METHODS
                                                                for of in ("", ": ours"))])
def test_cache(measured, replay, candidate):
    replay(measured, candidate)


def measure(steps: int, rounds: int, warmup: int, heads: int | None,
            layers: int | None) -> Measured:
    """heads, layers: instead of the model's own.

    Raises:
        ValueError: steps or layers are so few that these caches have nothing to skip.
    """
    for name, value in (("steps", steps), ("layers", layers)):
        if value == 1:
            raise ValueError(f"{name}: got 1, expected at least 2, for these caches to have something to skip")
    transformer, arguments = MODELS["dit-xl-2-256"].build(heads, layers)
    adapter = adapt(transformer)
    branches = adapter.branch_names
    flops = count_call(adapter, lambda: adapter(**arguments, timestep=torch.zeros(2)))
    pairs, rows = {}, {}
    own_times: list[list[float]] = []

    def run_clocked() -> None:
        own_times.append([0.0] * len(branches))
        modules = [[plain.pipe.transformer.get_submodule(name)] for name in branches]
        with forward_clocks(modules, own_times[-1]):
            plain.run()

    with silence():
        plain = Candidate(transformer, steps, other_caches.nothing)
        plain.run()
        for name, (method, note) in METHODS.items():
            rows[name] = dict(method=name, lines=count_lines(method), note=note)
            if method is other_caches.cache_dit and installed_version("cache-dit") is None:
                rows[name]["note"] = "not installed (pip install cache-dit)"
            elif found := watch(transformer, steps, method, rows[name], branches, flops):
                pairs[name] = found
        candidates = {"uncached": plain.run, "clocked": run_clocked}
        for name, (theirs, ours, _) in pairs.items():
            candidates |= {name: theirs.run, f"{name}: ours": ours.run}
        seconds = interleave(candidates, rounds, warmup=warmup)
    middle = medians(seconds)
    body = [median(values) / steps for values in zip(*own_times[-rounds:])]
    rest = middle["clocked"] - steps * sum(body)

    def overhead(name: str, schedule: Schedule) -> float:
        return 1000 * (middle[name] - branch_seconds(schedule.rows, body) - rest) / steps

    for name, (theirs, ours, schedule) in pairs.items():
        of_ours = f"{name}: ours"
        rows[name] |= dict(
            cur=schedule.cur, flops_speedup=schedule.speedup, our_lines=count_lines(other_caches.ours),
            computed=[sum(row) for row in schedule.rows], seconds=quartiles(seconds[name]),
            our_seconds=quartiles(seconds[of_ours]), speedup=middle["uncached"] / middle[name],
            our_speedup=middle["uncached"] / middle[of_ours], overhead_ms=overhead(name, schedule),
            our_overhead_ms=overhead(of_ours, schedule), error=relative_error(theirs.latents, plain.latents),
            our_error=relative_error(ours.latents, plain.latents))
    uncached = dict(method="uncached", cur=0.0, lines=0, speedup=1.0, seconds=quartiles(seconds["uncached"]), error=0.0,
                    note=f"{1000 * sum(body):.1f} ms a step in branches, {1000 * rest / steps:.1f} ms in all the rest")
    return Measured("DiTPipeline", seconds, {"uncached": uncached, **rows})


class Candidate:
    """A pipeline of its own with one method on it."""

    def __init__(self, transformer: nn.Module, steps: int, method: Callable):
        scheduler = DDIMScheduler(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, clip_sample=False)
        self.steps, self.vae = steps, Latents()
        shared = {id(parameter): parameter for parameter in transformer.parameters()}
        own = type("DiTPipeline", (DiTPipeline,), {})  # cache-dit replaces the __call__ of a pipeline's class
        self.pipe = own(copy.deepcopy(transformer, shared), self.vae, scheduler)
        self.pipe.set_progress_bar_config(disable=True)
        self.call = method(self.pipe, steps)

    def run(self) -> None:
        self.call(class_labels=[207], guidance_scale=4.0, num_inference_steps=self.steps, output_type="pt",
                  generator=torch.Generator().manual_seed(0))

    @property
    def latents(self) -> Tensor:
        """The last run's, final."""
        return self.vae.seen


class Latents(nn.Module):
    """In the VAE's place: keeps the latents."""

    config = SimpleNamespace(scaling_factor=1.0, block_out_channels=(1,))
    device, dtype = torch.device("cpu"), torch.float32

    def decode(self, latents: Tensor) -> SimpleNamespace:
        self.seen = latents
        return SimpleNamespace(sample=latents[:, :3])


def watch(transformer: nn.Module, steps: int, method: Callable, row: dict, branches: tuple[str, ...],
          flops: Flops) -> tuple[Candidate, Candidate, Schedule] | None:
    """The method's candidate, ours with the same work skipped, and that schedule; None where there is nothing to
    compare, which the row then says."""
    try:
        theirs = Candidate(transformer, steps, method)
        with observe_branches(theirs.pipe.transformer, branches) as ran:
            theirs.run()
    except Exception as error:  # whatever their code raises is the finding
        row["note"] = f"{type(error).__name__}: {error} ({row['note']})"
        return None
    compute = torch.tensor([[name in step for name in branches] for step in ran])
    row["cur"] = 1 - compute.double().mean().item()
    if compute.all():
        row["note"] = f"skips nothing: {row['note']}"
        return None
    forecast = torch.ones(compute.shape) if method is other_caches.taylorseer else None
    schedule = Schedule(compute, branches, flops, forecast, origin=row["method"])
    return theirs, Candidate(transformer, steps, lambda pipe, steps: other_caches.ours(pipe, schedule)), schedule


@contextmanager
def observe_branches(transformer: nn.Module, branches: tuple[str, ...]):
    """Yields a list that gets, for each step run within the block, the set of the branches that did their work.

    A branch did where its last linear ran: caches replace the forwards of blocks and of attention.
    """
    ran: list[set[str]] = []
    handles = [transformer.pos_embed.register_forward_hook(lambda *_: ran.append(set()))]
    for name in branches:
        module = transformer.get_submodule(name)
        last = module.net[-1] if name.endswith(".ff") else module.to_out[0]
        handles.append(last.register_forward_hook(lambda *_, name=name: ran[-1].add(name)))
    try:
        yield ran
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def silence():
    """Keeps what the libraries log out of the terminal; errors are told."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
