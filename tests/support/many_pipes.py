"""Small pipelines of many real classes, with random weights."""

from functools import wraps

import torch

from harmonica_dit.flops import Flops
from harmonica_dit.pipelines.adapters import adapt
from harmonica_dit.pipelines.conditions import moved
from harmonica_dit.schedule import Schedule
from support.flux_pipes import FLUX_PIPES
from support.image_pipes import IMAGE_PIPES
from support.pipes import make_pipe, run
from support.small_pipe import FOUR_TIMESTEPS, SmallPipe
from support.video_pipes import VIDEO_PIPES


class FromPipes(SmallPipe):
    def call(self, pipe, *, steps=6, batch=1, seed=0, **changes) -> torch.Tensor:
        return run(pipe, steps, seed, images=batch, **changes)


def from_pipes(kind: str, **flags) -> SmallPipe:
    return FromPipes(lambda: make_pipe(kind), None, calls=1, rows=2, **flags)


PIXART = dict(other_size=dict(height=16, width=16), callback=None, own_steps=FOUR_TIMESTEPS)

PIPES: dict[str, SmallPipe] = {
    "dit": from_pipes("dit", copies=None, other_size={}, own_steps={}, callback=None),
    "pixart-alpha": from_pipes("alpha", **PIXART),
    "pixart-alpha-1024": from_pipes("alpha-1024", **PIXART),
    "pixart-sigma": from_pipes("sigma", **PIXART),
    **FLUX_PIPES, **IMAGE_PIPES, **VIDEO_PIPES,
}


def every_second(pipe, steps: int) -> Schedule:
    """Forecasts every branch to first order at every second step."""
    names = adapt(pipe.transformer).branch_names
    return Schedule((torch.arange(steps) % 2 == 0)[:, None].repeat(1, len(names)), names,
                    Flops((1.0,) * len(names), 1.0), torch.full((steps, len(names)), 0.5))


def move_arguments(monkeypatch, pipe) -> None:
    """Until the test ends the pipeline's calls find their embeddings and masks on its device."""
    original = type(pipe).__call__

    @wraps(original)
    def call(self, *args, **kwargs):
        return original(self, *args, **moved(kwargs, self.device))

    monkeypatch.setattr(type(pipe), "__call__", call)
