"""Pipelines whose loops are not diffusers': a small Flux, called in the ways that people's own pipelines do."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

import harmonica_dit
from support.flux_pipes import make_flux
from support.trunk_by_hooks import trunk_by_hooks

TOKENS, WIDTH, TEXT, POOLED = 6, 4, 16, 12
SPEEDUP = 1.7


class OwnLoop(FluxPipeline):
    """A loop of guided steps; subclasses change its parts. prompts: how many a step is called with, 2 for guidance."""

    prompts = 2

    @torch.no_grad()
    def __call__(self, steps=8, seed=0, **options):
        self.options = options
        draw = torch.Generator().manual_seed(seed)
        randn = lambda *shape: torch.randn(*shape, generator=draw)
        self.texts = [dict(encoder_hidden_states=randn(1, 3, TEXT), pooled_projections=randn(1, POOLED))
                      for _ in range(self.prompts)]
        self.about = dict(img_ids=randn(TOKENS, 3), txt_ids=torch.zeros(3, 3), guidance=torch.ones(1))
        x = self.start(randn)
        self.scheduler.set_timesteps(steps)
        for i, t in enumerate(self.steps()):
            x = self.advance(self.predict(x, t, i), t, x)
        return x

    def start(self, randn):
        return randn(1, TOKENS, WIDTH)

    def steps(self):
        return self.progress_bar(self.scheduler.timesteps)

    def forward(self, x, t, text, **changes):
        """A call of the transformer."""
        return self.transformer(**dict(hidden_states=x, timestep=t[None] / 1000, return_dict=False) | self.about | text
                                | changes)[0]

    def predict(self, x, t, i):
        without, with_prompt = (self.forward(x, t, text) for text in self.texts)
        return without + 2 * (with_prompt - without)

    def advance(self, output, t, x):
        return self.scheduler.step(output, t, x, return_dict=False)[0]


def make_own(cls: type[OwnLoop] = OwnLoop, scheduler=None) -> OwnLoop:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts = make_flux().components
    pipe = cls(**parts | dict(scheduler=scheduler or FlowMatchEulerDiscreteScheduler(shift=3.0)))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def with_cache(pipe, **call):
    """The output with a cache, and the summary."""
    harmonica_dit.enable_cache(pipe, SPEEDUP)
    try:
        return pipe(**call), harmonica_dit.summary(pipe)
    finally:
        harmonica_dit.disable_cache(pipe)


def by_hooks(pipe, calls, **call):
    """The output where every second of 8 steps is computed, each call of a step with states of its own."""
    with trunk_by_hooks(pipe.transformer, calls, 8, 4):
        return pipe(**call)


def check_computed(pipe, **call):
    """Nothing is reused, which is said: the output is the plain one to the bit."""
    plain = pipe(**call)
    with pytest.warns(UserWarning, match="the cache reused nothing in this call"):
        found, summary = with_cache(pipe, **call)
    assert torch.equal(found, plain) and summary.cur == 0
    return summary


def check_reused(pipe, calls=2, **call):
    """Each of a step's calls is reused from its own."""
    found, summary = with_cache(pipe, **call)
    torch.testing.assert_close(found, by_hooks(pipe, calls, **call))
    assert [stream.steps for stream in summary.streams] == [8] * calls and summary.cur == 0.5
    return summary
