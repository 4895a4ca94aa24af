"""`enable_cache` and `disable_cache`: what is left behind, also by a call that raised, and what a copy keeps."""

import copy
import gc
import inspect
import pickle
import weakref

import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline, DPMSolverMultistepScheduler, PixArtSigmaPipeline

import harmonica_dit
from harmonica_dit.pipelines import cached_pipeline
from harmonica_dit.pipelines.adapters.replace_forwards import dispatch_of
from harmonica_kernels import FeatureCache
from support.enable_checks import check_refusal, pipeline_state, run_with_hooks, steps_of
from support.pipes import make_pipe, random_schedule, run, small_dit
from support.tolerance import assert_close


def test_disabling_restores_the_pipeline_to_the_bit(pipe):
    plain, before = run(pipe), pipeline_state(pipe)
    weights = copy.deepcopy(pipe.transformer.state_dict())
    enabled = harmonica_dit.enable_cache(pipe, random_schedule(pipe.transformer))
    assert not torch.equal(run(pipe), plain)
    enabled.disable()
    assert pipeline_state(pipe) == before
    assert all(torch.equal(value, weights[name]) for name, value in pipe.transformer.state_dict().items())
    assert torch.equal(run(pipe), plain)
    harmonica_dit.disable_cache(pipe)  # nothing happens
    enabled.disable()
    with pytest.raises(ValueError, match="no cache is enabled"):
        harmonica_dit.summary(pipe)
    harmonica_dit.enable_cache(pipe, random_schedule(pipe.transformer))  # and it can be enabled again
    harmonica_dit.disable_cache(pipe)
    assert pipeline_state(pipe) == before


def test_the_pipeline_stays_what_it_is(pipe, tmp_path):
    cls, transformer, call = type(pipe), pipe.transformer, inspect.signature(pipe.__call__)
    harmonica_dit.enable_cache(pipe, random_schedule(transformer))
    assert isinstance(pipe, cls) and type(pipe).__name__ == cls.__name__
    assert inspect.signature(pipe.__call__) == call
    assert pipe.transformer is transformer and pipe.components["transformer"] is transformer
    if cls is DiTPipeline:  # whose components can all be saved
        pipe.save_pretrained(tmp_path)
        loaded = DiTPipeline.from_pretrained(tmp_path)
        assert type(loaded) is cls
        assert torch.equal(loaded.transformer.proj_out_2.weight, transformer.proj_out_2.weight)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))])
def test_a_copy_is_a_plain_pipeline_and_says_so(sigma, copied):
    plain, schedule = run(sigma), random_schedule(sigma.transformer)
    enabled = harmonica_dit.enable_cache(sigma, schedule)
    expected = run(sigma)
    with pytest.warns(UserWarning, match="its copy has no cache; call harmonica_dit.enable_cache on the copy"):
        other = copied(sigma)
    other.set_progress_bar_config(disable=True)
    assert type(other) is PixArtSigmaPipeline and torch.equal(run(other), plain)
    harmonica_dit.disable_cache(other)
    enabled_there = harmonica_dit.enable_cache(other, schedule)
    assert torch.equal(run(other), expected) and torch.equal(run(sigma), expected)
    enabled.disable()
    assert torch.equal(run(other), expected) and torch.equal(run(sigma), plain)
    enabled_there.disable()
    assert torch.equal(run(other), plain)


@torch.no_grad()
def test_a_copy_of_a_transformer_is_plain(dit):
    x = torch.randn(2, 4, 8, 8), torch.tensor([900, 900]), torch.tensor([1, 1000])
    schedule = random_schedule(dit.transformer)
    harmonica_dit.enable_cache(dit.transformer, schedule, timesteps=[900, 700, 500, 300, 200, 100])
    other = copy.deepcopy(dit.transformer)
    dit.transformer(*x)
    with pytest.raises(TypeError, match="cannot be pickled while a cache is enabled"):
        pickle.dumps(dit.transformer)
    harmonica_dit.disable_cache(other)
    for p in dit.transformer.parameters():
        p.zero_()
    assert other(*x).sample.any() and not dit.transformer(*x).sample.any()
    with pytest.raises(ValueError, match="transformer: no cache is enabled"):
        harmonica_dit.summary(other)
    harmonica_dit.disable_cache(dit.transformer)
    pickle.dumps(dit.transformer)


def test_a_subclass_is_supported():
    class Mine(DiTPipeline):
        pass

    made = make_pipe("dit")
    pipe = Mine(**made.components)
    pipe.set_progress_bar_config(disable=True)
    schedule = random_schedule(pipe.transformer)
    expected = run_with_hooks(pipe, schedule)
    harmonica_dit.enable_cache(pipe, schedule)
    assert_close(run(pipe), expected)
    harmonica_dit.disable_cache(pipe)
    assert type(pipe) is Mine


def test_enabling_again_replaces_and_an_old_handle_does_nothing(dit):
    plain = run(dit)
    old = harmonica_dit.enable_cache(dit, random_schedule(dit.transformer))
    first = run(dit)
    new = harmonica_dit.enable_cache(dit, random_schedule(dit.transformer, seed=1))
    second = run(dit)
    assert not torch.equal(first, second)
    old.disable()
    assert torch.equal(run(dit), second)
    check_refusal(dit, ValueError, "for 16 branches", "fashion-dit-2.0x")  # what is refused replaces nothing
    assert torch.equal(run(dit), second)
    new.disable()
    assert torch.equal(run(dit), plain) and type(dit) is DiTPipeline


def test_parts_changed_after_enabling(dit):
    """They are used, or refused."""
    schedule = random_schedule(dit.transformer, timesteps=steps_of(dit.scheduler, 6))
    harmonica_dit.enable_cache(dit, schedule)
    expected, scheduler, transformer = run(dit), dit.scheduler, dit.transformer
    str(dit.scheduler)  # which adds to the scheduler's configuration
    assert torch.equal(run(dit), expected)
    dit.scheduler = DDIMScheduler.from_config(scheduler.config, timestep_spacing="trailing")
    with pytest.warns(UserWarning, match="timesteps: this call's are"):
        run(dit)
    dit.scheduler = DPMSolverMultistepScheduler.from_config(scheduler.config)
    changed = run(dit)
    harmonica_dit.disable_cache(dit)
    assert_close(changed, run_with_hooks(dit, schedule))
    harmonica_dit.enable_cache(dit, schedule)
    dit.scheduler = scheduler
    dit.transformer = small_dit(num_layers=3)
    with pytest.raises(ValueError, match="for 4 branches .* has 6"):
        run(dit)
    dit.transformer = transformer
    transformer.transformer_blocks[1].ff = small_dit().transformer_blocks[0].ff
    swapped = run(dit)
    harmonica_dit.disable_cache(dit)
    assert_close(swapped, run_with_hooks(dit, schedule))


def test_compiled_after_enabling(dit):
    schedule = random_schedule(dit.transformer)
    harmonica_dit.enable_cache(dit, schedule)
    dit.transformer.transformer_blocks[1].compile(backend="eager")
    with pytest.raises(ValueError, match="transformer_blocks.1: has been compiled.*ff.compile|attn1.compile"):
        run(dit)
    dit.transformer.transformer_blocks[1]._compiled_call_impl = None
    dit.transformer.compile(backend="eager")
    with pytest.raises(ValueError, match="transformer: has been compiled"):
        run(dit)


class Stop(Exception):
    pass


@pytest.mark.parametrize("at", [0, 1, 4])
def test_a_call_that_raised_leaves_nothing_behind(pipe, at):
    schedule = random_schedule(pipe.transformer)
    ff = schedule.branches.index("transformer_blocks.0.ff")
    schedule.compute[:, ff] = True
    harmonica_dit.enable_cache(pipe, schedule)
    expected = run(pipe)
    count = iter(range(100))

    def stop(*_):
        if next(count) == at:
            raise Stop

    handle = pipe.transformer.transformer_blocks[0].ff.net[0].register_forward_hook(stop)
    with pytest.raises(Stop):
        run(pipe)
    handle.remove()
    assert dispatch_of(pipe.transformer) is None and not cached_pipeline._users
    assert torch.equal(run(pipe), expected)


def test_the_cache_is_freed_with_the_call(dit, monkeypatch):
    """At once, not when the garbage collector comes."""
    made, new = [], FeatureCache.__init__
    monkeypatch.setattr(FeatureCache, "__init__", lambda self, *a: made.append(weakref.ref(self)) or new(self, *a))
    harmonica_dit.enable_cache(dit, random_schedule(dit.transformer))
    gc.collect()
    gc.disable()
    try:
        run(dit)
        assert len(made) == 1 and made[0]() is None
    finally:
        gc.enable()


def test_outside_a_call_the_transformer_computes_everything(dit):
    x = torch.randn(2, 4, 8, 8), torch.tensor([5, 900]), torch.tensor([1, 1000])
    with torch.no_grad():
        expected = dit.transformer(*x).sample
        harmonica_dit.enable_cache(dit, random_schedule(dit.transformer))
        run(dit)
        assert torch.equal(dit.transformer(*x).sample, expected)
