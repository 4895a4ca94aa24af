"""`enable_cache` on a transformer that a loop calls: the timesteps that it is given tell the steps."""

import copy
import threading
import weakref

import diffusers
import pytest
import torch
from torch import nn

import harmonica_dit
from harmonica_dit import Schedule
from harmonica_dit.flops import Flops
from harmonica_dit.pipelines.adapters.generic import GenericAdapter
from harmonica_dit.pipelines.adapters.generic_cache import GenericTrunkCache
from support.generic_models import make, random_row, state
from support.pipes import HookedCache, random_schedule, small_dit
from support.tolerance import assert_close

pytestmark = pytest.mark.filterwarnings("ignore:forecasts to order 0, not 1", "ignore:reuses nothing")  # of a few steps


def schedule_of(adapter, T, history=2):
    K = len(adapter.branch_names)
    compute = torch.tensor([(True,) * K, *(random_row(K, s) for s in range(1, T))])
    return Schedule(compute, adapter.branch_names, Flops((1.0,) * K, 1.0), torch.full((T, K), 0.5 * (history - 1)))


class Loop:
    """A denoising loop of two calls a step, with the prompt and without."""

    def __init__(self, steps=5):
        self.transformer, self.arguments = make("WanTransformer3DModel")
        self.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        self.scheduler.set_timesteps(steps)
        self.timesteps = self.scheduler.timesteps.tolist()
        self.empty = {"encoder_hidden_states": torch.randn(1, 3, 12)}

    @torch.no_grad()
    def __call__(self, call=None, first=0, stop=None):
        call = call or (lambda s, i, step: self.transformer(**step).sample)
        self.scheduler.set_timesteps(len(self.timesteps))
        self.scheduler.set_begin_index(first)
        x = self.arguments["hidden_states"]
        for s, t in list(enumerate(self.scheduler.timesteps))[first:stop]:
            step = self.arguments | dict(hidden_states=x, timestep=t[None])
            with_prompt, without = call(s, 0, step), call(s, 1, step | self.empty)
            x = self.scheduler.step(without + 3 * (with_prompt - without), t, x).prev_sample
        return x


def test_a_loop_follows_a_schedule():
    """Two trajectories of two calls a step; the second begins where the timesteps go back."""
    loop = Loop()
    transformer = loop.transformer
    adapter, before = GenericAdapter(transformer), state(transformer)
    schedule = schedule_of(adapter, 5)

    def run_by_hand():
        caches = [adapter.new_cache(2), adapter.new_cache(2)]
        return loop(lambda s, i, step: adapter(**step, row=schedule.rows[s],
                                               forecast_weights=schedule.forecast_weights[s], cache=caches[i]).sample)

    plain, expected = loop(), run_by_hand()
    enabled = harmonica_dit.enable_cache(transformer, schedule, timesteps=loop.timesteps)
    images = [loop() for _ in range(2)]
    summary = harmonica_dit.summary(transformer)
    assert [stream.steps for stream in summary.streams] == [5, 5] and summary.steps == 5
    loop(stop=2)
    enabled.reset()
    assert all(torch.equal(image, expected) for image in [*images, loop()])
    assert not torch.equal(images[0], plain)
    harmonica_dit.disable_cache(transformer)
    assert state(transformer) == before and torch.equal(loop(), plain)


def test_a_speedup_for_a_loop():
    loop = Loop(10)
    plain = loop()
    harmonica_dit.enable_cache(loop.transformer, 1.8, timesteps=loop.scheduler.timesteps)
    found, again = loop(), loop()
    summary = harmonica_dit.summary(loop.transformer)
    assert torch.equal(found, again) and 0 < (found - plain).norm() < 0.2 * plain.norm()
    assert summary.speedup >= 1.8 and summary.unit == "trunk" and len(summary.streams) == 2
    loop(first=4)  # from an image
    assert [stream.steps for stream in harmonica_dit.summary(loop.transformer).streams] == [6, 6]
    assert torch.equal(loop(), found)


def test_an_error_ends_the_trajectory():
    loop = Loop()
    transformer = loop.transformer
    harmonica_dit.enable_cache(transformer, 1.5, timesteps=loop.timesteps)
    expected = loop()
    loop(stop=3)
    with pytest.raises(TypeError):
        transformer(**loop.arguments | dict(timestep=torch.tensor(loop.timesteps[3:4])), nonsense=1)
    late = loop(first=3)  # begins with nothing to reuse, though its timesteps go on
    harmonica_dit.enable_cache(transformer, 1.5, timesteps=loop.timesteps)
    assert torch.equal(late, loop(first=3)) and torch.equal(loop(), expected)


def test_other_conditioning_is_another_stream():
    """The next user's prompt, where the trajectory before was left in the middle."""
    loop, other = Loop(), Loop()
    other.transformer = loop.transformer
    other.arguments = loop.arguments | {"encoder_hidden_states": torch.randn(1, 3, 12)}
    other.empty = {"encoder_hidden_states": torch.randn(1, 3, 12)}
    plain = other(first=3, stop=4)
    harmonica_dit.enable_cache(loop.transformer, 2.0, timesteps=loop.timesteps)
    loop(stop=3)
    assert torch.equal(other(first=3, stop=4), plain)


class Timed(nn.Module):
    """A transformer that does nothing with its timestep."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"ff": nn.Sequential(nn.Linear(2, 2))}) for _ in range(2))

    def forward(self, x, t=None):
        return self.blocks[1]["ff"](self.blocks[0]["ff"](x))


def timed(T, timesteps):
    transformer = Timed()
    harmonica_dit.enable_cache(transformer, schedule_of(GenericAdapter(transformer), T, history=1), timesteps=timesteps)
    return transformer


@torch.no_grad()
@pytest.mark.parametrize("timesteps", [[1000, 996, 992, 500, 3], [0.0, 0.3, 0.7, 0.9], [9], [900.5, 500, 100]])
@pytest.mark.parametrize("as_given", [float, lambda t: torch.tensor([t]), lambda t: torch.tensor([[0.0, t], [t, t]]),
                                      lambda t: torch.tensor([t], dtype=torch.bfloat16)])
def test_steps_are_found_by_timestep(timesteps, as_given):
    transformer, x = timed(len(timesteps), timesteps), torch.zeros(1, 2)
    for _ in range(2):
        for t in timesteps:
            transformer(x, as_given(float(t)))
    assert [stream.steps for stream in harmonica_dit.summary(transformer).streams] == [len(timesteps)]
    for t in timesteps:
        transformer(x, t=as_given(float(t)))
        transformer(x + 1, t=as_given(float(t)))
    steps = [stream.steps for stream in harmonica_dit.summary(transformer).streams]
    assert steps[0] + sum(steps[1:]) >= len(timesteps)


def test_timesteps_that_it_was_not_enabled_for_are_refused():
    transformer, x = timed(3, [900, 500, 100]), torch.zeros(1, 2)
    transformer(x, 900)
    for t in (0.9, 700, torch.tensor(501.0)):
        with pytest.raises(ValueError, match=r"timestep: the transformer was called at .*enabled for \(900.0, 500.0"):
            transformer(x, t)
    with pytest.raises(ValueError, match="transformer: was called without timestep or timesteps or t"):
        transformer(x)


@pytest.mark.parametrize("timesteps", [[], [0, 0, 0.125, 0.125], [9, 5, 9]])
def test_lists_of_timesteps_that_are_refused(timesteps):
    transformer = Timed()
    with pytest.raises(ValueError, match="timesteps: got .*, expected one or more, all different: one for each step"):
        harmonica_dit.enable_cache(transformer, 2.0, timesteps=timesteps)
    with pytest.raises(ValueError, match="timesteps: expected"):
        harmonica_dit.enable_cache(transformer, 2.0, timesteps=[float("nan")])
    assert "forward" not in vars(transformer)


def test_a_schedule_for_another_number_of_steps_is_refused():
    transformer = Timed()
    schedule = schedule_of(GenericAdapter(transformer), 3, history=1)
    harmonica_dit.enable_cache(transformer, schedule, timesteps=[9, 5])
    with pytest.raises(ValueError, match="this call has 2 steps, the schedule is for T = 3"):
        transformer(torch.zeros(1, 2), 9)


def test_a_step_that_is_left_out_begins_a_trajectory():
    """Such as an image that begins where another was left, not from noise: nothing of the other is reused."""
    loop = Loop(8)
    plain = loop(first=5, stop=6)
    harmonica_dit.enable_cache(loop.transformer, 1.7, timesteps=loop.timesteps)
    loop(stop=4)
    assert torch.equal(loop(first=5, stop=6), plain)
    assert [stream.steps for stream in harmonica_dit.summary(loop.transformer).streams] == [1, 1]


def test_the_same_call_twice_at_a_step():
    """Tiles of one image, or another image of the same prompt: nothing tells which cache is whose."""
    loop = Loop(8)
    transformer, arguments = loop.transformer, loop.arguments

    @torch.no_grad()
    def tiles():
        x = torch.cat([arguments["hidden_states"], arguments["hidden_states"] + 1])
        for t in loop.timesteps:
            x = torch.cat([tile - transformer(**arguments | dict(hidden_states=tile, timestep=torch.tensor([t]))).sample
                           / 8 for tile in x.split(1)])
        return x

    plain = tiles()
    harmonica_dit.enable_cache(transformer, 1.7, timesteps=loop.timesteps)
    assert torch.equal(tiles(), plain)
    fallbacks = harmonica_dit.summary(transformer).streams[-1].fallbacks
    assert fallbacks["nothing tells the calls of a step apart"] == 15


def test_each_thread_has_a_trajectory_of_its_own():
    loops = [Loop(6) for _ in range(3)]
    for i, loop in enumerate(loops):
        loop.transformer = loops[0].transformer
        loop.arguments = loops[0].arguments | dict(hidden_states=loop.arguments["hidden_states"] + i)
        loop.empty = loops[0].empty  # so that only the latents tell the threads apart
    expected = []
    for loop in loops:
        enabled = harmonica_dit.enable_cache(loop.transformer, 1.7, timesteps=loop.timesteps)
        expected.append(loop())
    enabled.reset()
    found, turns = [None] * 3, threading.Barrier(3)

    def work(i):
        def call(s, k, step):
            turns.wait()  # all at the same step
            return loops[i].transformer(**step).sample
        found[i] = loops[i](call)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(image, other) for image, other in zip(found, expected))


@torch.no_grad()
def test_images_at_different_timesteps_in_one_call():
    """What the fused path computes ahead is for one timestep; such calls do without."""
    transformer, labels = small_dit(), torch.tensor([3, 7])
    schedule, x = random_schedule(transformer, 3), torch.randn(3, 2, 4, 8, 8)
    times = torch.tensor([[900, 900], [500, 450], [100, 100]])
    with HookedCache(transformer, schedule):
        expected = [transformer(x[s], times[s], labels).sample for s in range(3)]
    harmonica_dit.enable_cache(transformer, schedule, timesteps=[900, 500, 100])
    for s in range(3):
        assert_close(transformer(x[s], times[s], labels).sample, expected[s])


def test_a_loop_in_every_mode():
    """The tables of a plan that was made in inference mode serve a later trajectory with gradients."""
    transformer, x = small_dit(), torch.randn(1, 4, 8, 8)
    harmonica_dit.enable_cache(transformer, 1.5, timesteps=[900, 700, 500, 300])

    def run():
        return [transformer(x, torch.tensor([t]), torch.tensor([3])).sample for t in (900, 700, 500, 300)]

    with torch.inference_mode():
        expected = run()
    with torch.no_grad():
        assert all(map(torch.equal, run(), expected))
    x.requires_grad_(True)
    outputs = run()
    outputs[-1].sum().backward()
    assert all(map(torch.equal, outputs, expected)) and x.grad.any()


def test_a_disabled_loop_keeps_no_cache(monkeypatch):
    loop, made, new = Loop(6), [], GenericTrunkCache.__init__
    monkeypatch.setattr(GenericTrunkCache, "__init__",
                        lambda self, *a: made.append(weakref.ref(self)) or new(self, *a))
    handle = harmonica_dit.enable_cache(loop.transformer, 1.7, timesteps=loop.timesteps)
    loop()
    assert any(cache() is not None for cache in made)  # of the trajectory, which the next one will replace
    harmonica_dit.disable_cache(loop.transformer)
    assert made and not any(cache() is not None for cache in made) and handle.summary().speedup >= 1.7


def test_a_deep_copy_names_its_own_calls():
    transformer, _ = make("FluxTransformer2DModel")
    harmonica_dit.enable_cache(transformer, 1.5, timesteps=[1.0, 0.5])
    other = copy.deepcopy(transformer)
    with other.cache_context("cond"):
        pass
    assert other.cache_context.__self__ is other and transformer.cache_context is not other.cache_context


@torch.no_grad()
def test_timesteps_in_low_precision_are_those_nearby():
    """How far away depends on the timestep itself, not on the largest."""
    transformer, x = timed(3, [900.0, 10.0, 1.0]), torch.zeros(1, 2)
    for t in (torch.tensor(900.0, dtype=torch.bfloat16), torch.tensor(10.03125, dtype=torch.bfloat16)):
        transformer(x, t)
    with pytest.raises(ValueError, match="the transformer was called at 5, the cache was enabled for"):
        transformer(x, torch.tensor(5.0, dtype=torch.bfloat16))
