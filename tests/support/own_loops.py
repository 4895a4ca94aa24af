"""Pipelines whose loops are not diffusers': a small Flux, called in the ways that people's own pipelines do."""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

from support.flux_pipes import make_flux

TOKENS, WIDTH, TEXT, POOLED = 6, 4, 16, 12


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
