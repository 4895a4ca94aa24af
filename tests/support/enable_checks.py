"""What several tests of `enable_cache` do: run, compare with hooks, see that nothing is left behind."""

import copy
from contextlib import contextmanager

import pytest
import torch

import harmonica_dit
from harmonica_dit import Router
from harmonica_dit.flops import Flops
from support.pipes import HookedCache, names_of, run


def run_with_hooks(pipe, schedule, **call):
    """What `run` gives where hooks, instead of `enable_cache`, replace the outputs that the schedule reuses."""
    with HookedCache(pipe.transformer, schedule):
        return run(pipe, **call)


def steps_of(scheduler, steps):
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(steps)
    return tuple(scheduler.timesteps.tolist())


def random_router(pipe, steps=6, **settings):
    names = names_of(pipe.transformer)
    logits = torch.randn(steps, len(names), generator=torch.Generator().manual_seed(1)) * 2
    settings = dict(timesteps=steps_of(pipe.scheduler, steps), guidance=3.0) | settings
    return Router(logits, names, Flops((1.0,) * len(names), 1.0), **settings)


@contextmanager
def schedule_on(pipe, *args, **kwargs):
    """The cache is enabled inside the `with`, and disabled after it."""
    harmonica_dit.enable_cache(pipe, *args, **kwargs)
    yield
    harmonica_dit.disable_cache(pipe)


def last_output(pipe):
    """The transformer's output at the last step: unlike a decoded image it is not clamped."""
    kept = []
    handle = pipe.transformer.register_forward_hook(
        lambda module, args, output: kept.append(output[0] if isinstance(output, tuple) else output.sample))
    run(pipe)
    handle.remove()
    return kept[-1].float()


def pipeline_state(pipe):
    """What `disable_cache` has to give back: class and attributes of pipeline, transformer and all its modules."""
    modules = [(module, type(module), dict(vars(module))) for module in pipe.transformer.modules()]
    return type(pipe), {name: id(value) for name, value in vars(pipe).items()}, modules


def check_refusal(pipe, error, message, *args, **kwargs):
    """`enable_cache` with these arguments raises, and leaves the pipeline as it was."""
    before = pipeline_state(pipe) if "transformer" in vars(pipe) else None
    with pytest.raises(error, match=message):
        harmonica_dit.enable_cache(pipe, *args, **kwargs)
    if before is not None:
        assert pipeline_state(pipe) == before
