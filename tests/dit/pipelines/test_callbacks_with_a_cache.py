"""What callbacks do in the middle of a call with a cache: other prompts, batches, transformers, calls of their own."""

import copy

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers.callbacks import SD3CFGCutoffCallback

import harmonica_dit
from support.cached_calls import COMPUTED, STEPS, with_cache
from support.many_pipes import PIPES
from support.trunk_by_hooks import trunk_by_hooks


@pytest.fixture
def flux():
    return PIPES["flux"], PIPES["flux"].pipe()


def after(step, do):
    """A callback that does something after a step."""
    def callback(pipe, now, timestep, given):
        if now == step:
            do(pipe, given)
        return given
    return dict(callback_on_step_end=callback)


def run(entry, pipe, **call):
    """A call with the cache that is enabled, and its streams' (steps, times computed whole)."""
    image = entry.call(pipe, **dict(steps=STEPS) | call)
    streams = harmonica_dit.summary(pipe).streams
    return image, [(stream.steps, sum(stream.fallbacks.values())) for stream in streams]


@pytest.mark.parametrize("how", ["another tensor", "in place"])
def test_another_prompt_from_a_step_on(flux, how):
    """Nothing of the old one's is reused; the stream without prompt goes on."""
    entry, pipe = flux

    def exchange(pipe, given):
        if how == "in place":
            given["prompt_embeds"].neg_()
        else:
            given["prompt_embeds"] = -given["prompt_embeds"]

    calls, computed = [], []
    pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    pipe.transformer.transformer_blocks[0].ff.register_forward_pre_hook(lambda *_: computed.append(len(calls) - 1))
    harmonica_dit.enable_cache(pipe, 1.7)
    entry.call(pipe, steps=STEPS)  # is traced
    # at every second step both; step 3 begins anew, step 4 would anyway
    for step, steps, expected in ((2, [3, 8, 5], [0, 1, 4, 5, 6, 8, 9, 12, 13]),
                                  (3, [4, 8, 4], [0, 1, 4, 5, 8, 9, 12, 13])):
        calls.clear(), computed.clear()
        _, streams = run(entry, pipe, callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
                         **after(step, exchange))
        assert streams == [(steps[0], 0), (steps[1], 0), (steps[2], 1)] and computed == expected


def test_guidance_that_is_switched_off(flux):
    """By diffusers' own callback, which halves the batch; and by one that doubles it again later."""
    entry, pipe = PIPES["sd3"], PIPES["sd3"].pipe()
    call = dict(callback_on_step_end=SD3CFGCutoffCallback(cutoff_step_ratio=0.4), steps=10,
                callback_on_step_end_tensor_inputs=SD3CFGCutoffCallback.tensor_inputs)
    plain = entry.call(pipe, **call)
    harmonica_dit.enable_cache(pipe, 1.7)
    found, streams = run(entry, pipe, **call)
    assert streams == [(5, 0), (5, 1)] and (found - plain).norm() < 0.1 * plain.norm()
    kept = {}

    def off_and_on(pipe, step, timestep, given):
        if step == 2:
            pipe._guidance_scale = 0.0
            for name in ("prompt_embeds", "pooled_prompt_embeds"):
                kept[name], given[name] = given[name], given[name][1:]
        if step == 6:
            pipe._guidance_scale = 3.0
            given.update(kept)
        return given

    _, streams = run(entry, pipe, **call | dict(callback_on_step_end=off_and_on))
    assert streams == [(6, 1), (4, 1)]  # what was computed 5 steps before is too old to be forecast from


def test_calls_of_the_callbacks_own_with_the_prompts_of_the_pipeline(flux):
    """They cannot be told from the pipeline's; so from then on all of these are computed."""
    entry, pipe = flux
    seen = []
    pipe.transformer.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    draw = torch.Generator()

    def call_both(pipe, given):
        noise = torch.randn(given["latents"].shape, generator=draw.manual_seed(5))
        for kwargs, name in zip(seen[-2:], ("cond", "uncond")):
            with pipe.transformer.cache_context(name):
                pipe.transformer(**kwargs | dict(hidden_states=noise))

    hooks = trunk_by_hooks(pipe.transformer, 2, STEPS, COMPUTED)
    hooks.__enter__()
    expected = entry.call(pipe, steps=STEPS, **after(2, lambda *_: hooks.__exit__(None, None, None)))
    assert not torch.equal(expected, entry.call(pipe, steps=STEPS))
    harmonica_dit.enable_cache(pipe, 1.7)
    found, streams = run(entry, pipe, **after(2, call_both))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
    assert streams == [(4, 0), (4, 0), (10, 10)]
    assert torch.equal(entry.call(pipe, steps=STEPS), with_cache(entry, entry.pipe()))


def test_another_transformer_or_scheduler_in_the_middle(flux):
    """They are used, without a cache until the next call."""
    entry, pipe = flux
    own, other = (pipe.transformer, pipe.scheduler), entry.pipe(seed=1).transformer

    def scheduler(pipe):
        made = FlowMatchEulerDiscreteScheduler.from_config(own[1].config)
        vars(made).update({name: copy.copy(value) for name, value in vars(pipe.scheduler).items()})
        return made

    for name, make in (("transformer", lambda pipe: other), ("scheduler", scheduler)):
        exchange = lambda pipe, name=name, make=make: setattr(pipe, name, make(pipe))
        hooks = trunk_by_hooks(pipe.transformer, 2, STEPS, COMPUTED)
        hooks.__enter__()
        expected = entry.call(pipe, steps=STEPS, **after(3, lambda pipe, _, hooks=hooks, exchange=exchange: (
            hooks.__exit__(None, None, None), exchange(pipe))))
        pipe.transformer, pipe.scheduler = own
        harmonica_dit.enable_cache(pipe, 1.7)
        found, _ = run(entry, pipe, **after(3, lambda pipe, _, exchange=exchange: exchange(pipe)))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
        next_one = entry.call(pipe, steps=STEPS)
        harmonica_dit.disable_cache(pipe)
        assert torch.equal(next_one, with_cache(entry, pipe))
        pipe.transformer, pipe.scheduler = own


def test_enabling_and_disabling_in_the_middle(flux):
    """Is for the next call."""
    entry, pipe = flux
    plain, half, third = entry.call(pipe, steps=STEPS), with_cache(entry, pipe), with_cache(entry, pipe, 3.0)
    on = after(2, lambda pipe, _: harmonica_dit.enable_cache(pipe, 3.0))
    assert torch.equal(entry.call(pipe, steps=STEPS, **on), plain)
    assert torch.equal(entry.call(pipe, steps=STEPS), third)
    harmonica_dit.enable_cache(pipe, 1.7)
    assert torch.equal(entry.call(pipe, steps=STEPS, **on), half)
    assert torch.equal(entry.call(pipe, steps=STEPS), third)
    harmonica_dit.enable_cache(pipe, 1.7)
    off = after(2, lambda pipe, _: harmonica_dit.disable_cache(pipe))
    assert torch.equal(entry.call(pipe, steps=STEPS, **off), half)
    assert type(pipe) is FluxPipeline and type(pipe.scheduler) is FlowMatchEulerDiscreteScheduler
    assert torch.equal(entry.call(pipe, steps=STEPS), plain)
