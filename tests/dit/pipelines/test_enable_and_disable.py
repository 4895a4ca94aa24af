"""`enable_cache` and `remove`: what is left behind, also by a call that raised, and what a copy keeps."""

import copy
import gc
import inspect
import weakref

import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline, DPMSolverMultistepScheduler

import harmonica_dit
from harmonica_kernels import FeatureCache
from support.enable_checks import check_refusal, pipeline_state, run_with_hooks
from support.pipes import make_pipe, random_schedule, run, small_dit
from support.tolerance import assert_close


def test_remove_restores_the_pipeline_to_the_bit(pipe):
    plain, before = run(pipe), pipeline_state(pipe)
    weights = copy.deepcopy(pipe.transformer.state_dict())
    applied = harmonica_dit.enable_cache(pipe, random_schedule(pipe.transformer))
    assert not torch.equal(run(pipe), plain)
    applied.remove()
    assert pipeline_state(pipe) == before
    assert all(torch.equal(value, weights[name]) for name, value in pipe.transformer.state_dict().items())
    assert torch.equal(run(pipe), plain)
    with pytest.raises(ValueError, match="no schedule is applied"):
        harmonica_dit.disable_cache(pipe)
    harmonica_dit.enable_cache(pipe, random_schedule(pipe.transformer))  # and it can be applied again
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


def test_a_copy_of_the_pipeline_stands_alone(sigma):
    schedule = random_schedule(sigma.transformer)
    harmonica_dit.enable_cache(sigma, schedule)
    expected = run(sigma)
    other = copy.deepcopy(sigma)
    for p in sigma.transformer.parameters():
        p.data.zero_()
    assert torch.equal(run(other), expected)
    harmonica_dit.disable_cache(other)
    with pytest.raises(ValueError, match="applied already"):
        harmonica_dit.enable_cache(sigma, schedule)


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


def test_a_second_apply(dit):
    schedule = random_schedule(dit.transformer)
    harmonica_dit.enable_cache(dit, schedule)
    expected = run(dit)
    check_refusal(dit, ValueError, "applied already .*remove", random_schedule(dit.transformer, seed=1))
    assert torch.equal(run(dit), expected)


def test_parts_changed_after_apply(dit):
    harmonica_dit.enable_cache(dit, random_schedule(dit.transformer))
    expected, scheduler, transformer = run(dit), dit.scheduler, dit.transformer
    dit.scheduler = DPMSolverMultistepScheduler.from_config(scheduler.config)
    with pytest.raises(ValueError, match="was a DDIMScheduler when .* is a DPMSolverMultistepScheduler now.*remove"):
        run(dit)
    dit.scheduler = DDIMScheduler.from_config(scheduler.config, timestep_spacing="trailing")
    with pytest.raises(ValueError, match="DDIMScheduler .* is one of another configuration now"):
        run(dit)
    dit.scheduler = DDIMScheduler.from_config(scheduler.config)
    assert torch.equal(run(dit), expected)
    dit.transformer = small_dit()
    with pytest.raises(ValueError, match="pipe.transformer: is another module"):
        run(dit)
    dit.transformer = transformer
    transformer.transformer_blocks[1].compile(backend="eager")
    with pytest.raises(ValueError, match="transformer_blocks.1: has been compiled"):
        run(dit)
    transformer.transformer_blocks[1]._compiled_call_impl = None
    transformer.compile(backend="eager")
    with pytest.raises(ValueError, match="transformer: has been compiled"):
        run(dit)
    transformer._compiled_call_impl = None
    assert torch.equal(run(dit), expected)


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
    assert not pipe._harmonica._trajectories
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
