"""`scheduled`: pipelines and loops that follow a schedule, and those that it refuses."""

from contextlib import contextmanager
from dataclasses import replace

import diffusers
import pytest
import torch
from accelerate import cpu_offload_with_hook
from accelerate.hooks import remove_hook_from_module
from generic_models import make, row, state

from harmonica_dit import Schedule, scheduled
from harmonica_dit.models import Flops
from harmonica_dit.models.adapters.generic import GenericAdapter


def schedule_of(adapter, T, history=2):
    K = len(adapter.branch_names)
    compute = torch.tensor([(True,) * K, *(row(K, s) for s in range(1, T))])
    return Schedule(compute, adapter.branch_names, Flops((1.0,) * K, 1.0), torch.full((T, K), 0.5 * (history - 1)))


@torch.no_grad()
def test_a_denoising_loop_follows_a_schedule():
    """Two trajectories of two calls a step, as of a pipeline that runs the empty prompt by itself."""
    transformer, arguments = make("WanTransformer3DModel")
    adapter, before = GenericAdapter(transformer), state(transformer)
    schedule = schedule_of(adapter, 5)
    empty = {"encoder_hidden_states": torch.randn(1, 3, 12)}

    def loop(call):
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(5)
        x = arguments["hidden_states"]
        for s, t in enumerate(scheduler.timesteps):
            step = arguments | dict(hidden_states=x, timestep=t[None])
            with_prompt, without = call(s, 0, step), call(s, 1, step | empty)
            x = scheduler.step(without + 3 * (with_prompt - without), t, x).prev_sample
        return x

    def by_hand():
        caches = [adapter.new_cache(2), adapter.new_cache(2)]
        return loop(lambda s, i, step: adapter(**step, gate=schedule.rows[s], extrapolate=schedule.forecasts[s],
                                               cache=caches[i]).sample)

    plain = loop(lambda s, i, step: transformer(**step).sample)
    with scheduled(transformer, schedule, calls=2):
        images = [loop(lambda s, i, step: transformer(**step).sample) for _ in range(2)]
    assert all(torch.equal(image, by_hand()) for image in images) and not torch.equal(images[0], plain)
    assert state(transformer) == before and torch.equal(loop(lambda s, i, step: transformer(**step).sample), plain)

    with pytest.raises(RuntimeError, match="called 10 times.*5 steps of 4"), scheduled(transformer, schedule, calls=4):
        loop(lambda s, i, step: transformer(**step).sample)
    with pytest.raises(ValueError, match="cache: holds a forward"), scheduled(transformer, schedule, calls=2):
        transformer(**arguments), transformer(**arguments)
        transformer(**arguments | {"encoder_hidden_states": torch.randn(1, 2, 12)})
    with pytest.raises(ZeroDivisionError), scheduled(transformer, schedule):
        transformer(**arguments)
        raise ZeroDivisionError
    with scheduled(transformer, schedule, calls=2):
        transformer(**arguments)
        with pytest.raises(TypeError):
            transformer(**arguments, nonsense=1)
        again = loop(lambda s, i, step: transformer(**step).sample)
    assert torch.equal(again, images[0])
    other = replace(schedule, architecture={"class": "Other"})
    with pytest.raises(ValueError, match="for the architecture"), scheduled(transformer, other):
        pass
    assert state(transformer) == before
    for calls, bad in ((0, schedule), (True, schedule), (1, "router.safetensors")):
        with pytest.raises((ValueError, TypeError), match="calls: got|schedule: got"), scheduled(transformer, bad,
                                                                                                  calls=calls):
            pass


@contextmanager
def by_hooks(transformer, schedule, calls):
    """The same as `scheduled` for one trajectory that repeats, by hooks that put old outputs in place of new ones."""
    latest, count = {}, 0

    def counted(*_):
        nonlocal count
        count += 1

    def hook(k):
        def put(module, args, output):
            s, call = divmod(count, calls)
            if schedule.rows[s][k]:
                latest[k, call] = output
            return latest[k, call]
        return put

    handles = [transformer.register_forward_hook(counted)]
    handles += [transformer.get_submodule(name).register_forward_hook(hook(k))
                for k, name in enumerate(schedule.branches)]
    yield
    for handle in handles:
        handle.remove()


def pipeline(name):
    """A real pipeline without text encoder and VAE, and a call of it. Wan's guidance is a call of its own."""
    transformer, _ = make(f"{name}Transformer{'3D' if name == 'Wan' else '2D'}Model")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    if name == "Flux":
        pipe = diffusers.FluxPipeline(scheduler, None, None, None, None, None, transformer)
        arguments = dict(prompt_embeds=torch.randn(1, 3, 16), pooled_prompt_embeds=torch.randn(1, 12))
    else:
        pipe = diffusers.WanPipeline(None, None, None, scheduler, transformer)
        arguments = dict(prompt_embeds=torch.randn(1, 3, 12), negative_prompt_embeds=torch.randn(1, 3, 12),
                         num_frames=5)
    pipe.set_progress_bar_config(disable=True)

    def run(steps=4, **changes):
        return pipe(height=32, width=48, num_inference_steps=steps, output_type="latent",
                    generator=torch.Generator().manual_seed(0), **arguments | changes)[0]

    return pipe, run


@pytest.mark.parametrize("name, calls", [("Flux", 1), ("Wan", 2)])
def test_pipelines_follow_a_schedule(name, calls):
    pipe, run = pipeline(name)
    transformer = pipe.transformer
    plain, schedule = run(), schedule_of(GenericAdapter(transformer), 4, history=1)
    with by_hooks(transformer, schedule, calls):
        expected = run()
    with scheduled(transformer, schedule, calls=calls):
        images = run(), run()
    assert all(torch.equal(image, expected) for image in images) and not torch.equal(expected, plain)
    assert torch.equal(run(), plain)


@pytest.mark.parametrize("when", ["before", "inside", "before, removed inside"])
def test_the_hooks_of_offloading_are_set_anew_inside(when, monkeypatch):
    """As diffusers does at the end of each call of a pipeline that offloads its models."""
    pipe, run = pipeline("Flux")
    transformer = pipe.transformer
    plain, schedule = run(), schedule_of(GenericAdapter(transformer), 4, history=1)
    with by_hooks(transformer, schedule, 1):
        expected = run()
    runs = []

    def offload(pipe):
        remove_hook_from_module(transformer, recurse=True)
        _, hook = cpu_offload_with_hook(transformer, "cpu")
        pre_forward = hook.hook.pre_forward
        hook.hook.pre_forward = lambda *args, **kwargs: runs.append(1) or pre_forward(*args, **kwargs)

    if when != "inside":
        offload(pipe)
    monkeypatch.setattr(diffusers.FluxPipeline, "maybe_free_model_hooks", offload)
    with scheduled(transformer, schedule):
        images = [run() for _ in range(3)]
        if "removed" in when:
            remove_hook_from_module(transformer)
    assert all(torch.equal(image, expected) for image in images) and not torch.equal(expected, plain)
    assert len(runs) == 4 * (2 if when == "inside" else 3)
    assert torch.equal(run(), plain) and torch.equal(run(), plain)
    remove_hook_from_module(transformer, recurse=True)
    assert transformer.forward.__func__ is type(transformer).forward


def test_a_forward_that_is_replaced_inside_is_noticed():
    transformer, _ = make("WanTransformer3DModel")
    schedule = schedule_of(GenericAdapter(transformer), 4)
    with pytest.raises(RuntimeError, match="something else .* has replaced its forward"):
        with scheduled(transformer, schedule):
            transformer.forward = lambda **arguments: None
