"""Which trajectory, step and stream a transformer's call belongs to, in pipelines of every kind."""

import warnings

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchHeunDiscreteScheduler, HeunDiscreteScheduler

import harmonica_dit
from harmonica_dit import HarmoniCaConfig
from support.many_pipes import PIPES
from support.small_pipe import SmallPipe
from support.trunk_by_hooks import trunk_by_hooks

SPEEDUP = 1.7
WITHOUT_INTERRUPT = {"dit", "pixart-alpha", "pixart-alpha-1024", "pixart-sigma", "aura-flow", "lumina2", "prx"}
# of a few steps
pytestmark = pytest.mark.filterwarnings("ignore:forecasts to order 0, not 1")


@pytest.fixture(scope="module", params=PIPES)
def entry(request) -> tuple[SmallPipe, object]:
    return PIPES[request.param], PIPES[request.param].pipe()


@pytest.fixture(autouse=True)
def leave_no_cache(request):
    yield
    if "entry" in request.fixturenames:
        harmonica_dit.disable_cache(request.getfixturevalue("entry")[1])


def cached(entry, pipe, **call):
    """A call with a cache, which has been enabled anew."""
    harmonica_dit.enable_cache(pipe, SPEEDUP)
    return entry.call(pipe, **call)


def test_computing_everything_is_the_plain_pipeline(entry):
    entry, pipe = entry
    plain = entry.call(pipe, steps=3)
    harmonica_dit.enable_cache(pipe, 1.0)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = entry.call(pipe, steps=3)
    assert ["reuses nothing: every branch is computed at every step"] == [
        str(warning.message) for warning in said if issubclass(warning.category, UserWarning)
        and "autocast" not in str(warning.message)][: 1]
    summary = harmonica_dit.summary(pipe)
    assert torch.equal(found, plain)
    assert summary.speedup == 1 and summary.cur == 0 and summary.nbytes == 0  # nothing is kept that nobody reuses
    assert sum(stream.steps for stream in summary.streams) == entry.calls * entry.steps_run(3)
    harmonica_dit.disable_cache(pipe)
    assert torch.equal(entry.call(pipe, steps=3), plain)


def test_the_trunk_is_forecast_as_hooks_would(entry):
    """An independent cache of the last block's output, one for each call of a step."""
    entry, pipe = entry
    plain, found = entry.call(pipe, steps=8), cached(entry, pipe, steps=8)
    summary = harmonica_dit.summary(pipe)
    harmonica_dit.disable_cache(pipe)
    assert summary.unit == "trunk" and summary.speedup >= SPEEDUP and not torch.equal(found, plain)
    assert len(summary.streams) == entry.calls * len(entry.transformers)
    assert all(stream.forecast and not stream.fallbacks for stream in summary.streams)
    assert summary.nbytes == sum(stream.nbytes for stream in summary.streams) > 0
    if len(entry.transformers) == 1:
        steps, one = entry.steps_run(8), summary.streams[0]
        with trunk_by_hooks(pipe.transformer, entry.calls, steps, one.computed * steps // (one.computed + one.reused)):
            expected = entry.call(pipe, steps=8)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def test_a_call_leaves_nothing_for_the_next(entry):
    """Whatever the calls before were: other steps, another batch, size, guidance, number of images, prompts."""
    entry, pipe = entry
    expected = cached(entry, pipe, steps=6)
    changes = [dict(steps=9), dict(steps=4), dict(seed=1), entry.unguided, entry.other_size, entry.own_steps]
    changes += [dict(batch=2)] if entry.batches else []
    changes += [{entry.copies: 2}] if entry.copies else []
    if entry.strength is not None:
        changes.append(dict(strength=0.9))
    alone = [cached(entry, pipe, **change) for change in changes]
    assert torch.equal(cached(entry, pipe, steps=6), expected)
    for change, wanted in zip(changes, alone):
        assert torch.equal(entry.call(pipe, **change), wanted), change
        assert harmonica_dit.summary(pipe).speedup >= SPEEDUP, change
        assert torch.equal(entry.call(pipe, steps=6), expected), change


class Stop(Exception):
    pass


def check_that_nothing_is_left_after(error, entry, pipe):
    """For the calls after one that `error` ended."""
    expected, after = cached(entry, pipe, steps=10), cached(entry, pipe, steps=7)
    count = iter(range(1000))

    def stop(*_):
        if next(count) == 3 * entry.calls:
            raise error

    handle = getattr(pipe, entry.transformers[0]).register_forward_pre_hook(stop)
    with pytest.raises(error):
        entry.call(pipe, steps=10)
    handle.remove()
    assert torch.equal(entry.call(pipe, steps=7), after)
    assert torch.equal(entry.call(pipe, steps=10), expected)


def test_an_interrupted_call_leaves_nothing_for_the_next(entry):
    check_that_nothing_is_left_after(KeyboardInterrupt, *entry)


@pytest.mark.parametrize("entry", ["dit", "flux", "wan-of-two"], indirect=True)
def test_a_call_that_fails_leaves_nothing_for_the_next(entry):
    check_that_nothing_is_left_after(Stop, *entry)


def test_which_pipelines_cannot_be_interrupted():
    assert WITHOUT_INTERRUPT == {name for name, entry in PIPES.items() if entry.callback != "callback_on_step_end"
                                 or not hasattr(type(entry.pipe()), "interrupt")}


@pytest.mark.parametrize("entry", [name for name in PIPES if name not in WITHOUT_INTERRUPT], indirect=True)
def test_interrupting_from_a_callback(entry):
    """`pipe._interrupt`: the loop goes on and does nothing."""
    entry, pipe = entry
    expected = cached(entry, pipe, steps=6)

    def interrupt(pipe, step, timestep, arguments):
        pipe._interrupt = step == 2
        return arguments

    entry.call(pipe, steps=8, callback_on_step_end=interrupt)
    assert harmonica_dit.summary(pipe).streams[0].steps == 3
    assert torch.equal(entry.call(pipe, steps=6), expected)


def test_guidance_that_ends_in_the_middle():
    """Lumina2 leaves the call without prompt out from some step on: the other call goes on with its own cache."""
    entry = PIPES["lumina2"]
    pipe = entry.pipe()
    plain = entry.call(pipe, steps=8, cfg_trunc_ratio=0.5)
    harmonica_dit.enable_cache(pipe, SPEEDUP)
    found = entry.call(pipe, steps=8, cfg_trunc_ratio=0.5)
    assert [stream.steps for stream in harmonica_dit.summary(pipe).streams] == [8, 4]
    assert not any(stream.fallbacks for stream in harmonica_dit.summary(pipe).streams)
    assert 0 < (found - plain).norm() < 0.2 * plain.norm()


def test_rows_that_leave_the_batch_in_the_middle():
    """A call of another shape is computed, and reused from then on."""
    entry = PIPES["z-image"]
    pipe = entry.pipe()
    harmonica_dit.enable_cache(pipe, SPEEDUP)
    entry.call(pipe, steps=10, cfg_normalization=False, cfg_truncation=0.5)
    both, one = harmonica_dit.summary(pipe).streams
    assert both.steps + one.steps == 10 and one.steps > 1 and one.reused
    assert dict(one.fallbacks) == {"there was nothing to reuse yet": 1}


def test_two_transformers_each_reach_the_speedup():
    entry = PIPES["wan-of-two"]
    pipe = entry.pipe()
    harmonica_dit.enable_cache(pipe, SPEEDUP)
    entry.call(pipe, steps=12)
    streams = harmonica_dit.summary(pipe).streams
    assert [stream.transformer for stream in streams] == ["transformer"] * 2 + ["transformer_2"] * 2
    assert sum(stream.steps for stream in streams) == 24
    assert all(stream.plain_flops / stream.flops > 1.4 for stream in streams)


def test_a_second_transformer_with_too_few_steps_computes_them():
    """An error would come when the image is half made."""
    entry = PIPES["wan-of-two"]
    pipe = entry.pipe()
    pipe.register_to_config(boundary_ratio=0.5)  # two steps are left
    harmonica_dit.enable_cache(pipe, 5)
    with pytest.warns(UserWarning, match="reuses nothing: every branch"):
        entry.call(pipe, steps=12)
    first, _, second = harmonica_dit.summary(pipe).streams
    assert first.steps == 10 and first.plain_flops / first.flops >= 5
    assert second.transformer == "transformer_2" and second.steps == 2 * 2 and not second.reused


def test_a_transformer_that_begins_in_the_middle_of_a_schedule():
    """It computes its first step, and forecasts with weights for the steps that it has computed itself."""
    entry = PIPES["wan-of-two"]
    pipe = entry.pipe()
    adapter = harmonica_dit.pipelines.plans.GenericAdapter(pipe.transformer)
    K = len(adapter.branch_names)
    compute = (torch.arange(12) % 3 == 0)[:, None].repeat(1, K)
    schedule = harmonica_dit.Schedule(compute, adapter.branch_names, harmonica_dit.flops.Flops((1.0,) * K, 1.0),
                                      torch.ones(12, K))
    harmonica_dit.enable_cache(pipe, schedule)
    entry.call(pipe, steps=12)
    first, _, second, _ = harmonica_dit.summary(pipe).streams
    assert not first.fallbacks and first.steps + second.steps == 12
    assert second.reused and sum(second.fallbacks.values()) <= 1


@pytest.mark.parametrize("scheduler", [HeunDiscreteScheduler, FlowMatchHeunDiscreteScheduler])
def test_schedulers_of_two_evaluations_a_step_are_refused_before_denoising(scheduler):
    entry = PIPES["pixart-sigma" if scheduler is HeunDiscreteScheduler else "flux"]
    pipe = entry.pipe()
    pipe.scheduler = scheduler()
    calls = []
    pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    harmonica_dit.enable_cache(pipe, SPEEDUP)
    with pytest.raises(ValueError, match=f"{scheduler.__name__} takes 2 evaluations a step.*disable_cache"):
        entry.call(pipe)
    assert not calls


def test_skip_layer_guidance_is_refused_before_denoising():
    entry = PIPES["sd3"]
    pipe = entry.pipe()
    harmonica_dit.enable_cache(pipe, SPEEDUP)
    with pytest.raises(ValueError, match="skip_guidance_layers: .*disable_cache"):
        entry.call(pipe, skip_guidance_layers=[0])


def test_timesteps_that_the_scheduler_does_not_take():
    """diffusers' own words."""
    entry = PIPES["pixart-sigma"]
    pipe = entry.pipe()
    pipe.scheduler = DPMSolverMultistepScheduler()
    harmonica_dit.enable_cache(pipe, SPEEDUP)
    with pytest.raises(ValueError, match="does not support custom sigmas"):
        entry.call(pipe, sigmas=[1.0, 0.5])


def test_what_gains_nothing_is_said_once_a_call():
    entry = PIPES["flux"]
    pipe = entry.pipe()
    harmonica_dit.enable_cache(pipe, SPEEDUP)
    with pytest.warns(UserWarning, match="reuses nothing: every branch is computed at every step"):
        entry.call(pipe, steps=1)
    with pytest.raises(ValueError, match=r"speedup: got 9.0, expected at most 1\.\d+, which is that of 2 steps"):
        harmonica_dit.enable_cache(pipe, HarmoniCaConfig(speedup=9.0))
        entry.call(pipe, steps=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        harmonica_dit.enable_cache(pipe, SPEEDUP)
        entry.call(pipe, steps=8)
