"""`scheduled`: pipelines and loops that follow a schedule, and those that it refuses."""

from contextlib import contextmanager
from dataclasses import replace

import diffusers
import pytest
import torch
from accelerate import cpu_offload_with_hook
from accelerate.hooks import remove_hook_from_module
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from harmonica_dit import Schedule, scheduled
from harmonica_dit.flops import Flops
from harmonica_dit.pipelines.adapters.generic import GenericAdapter
from support.generic_models import make, random_row, state


def schedule_of(adapter, T, history=2):
    K = len(adapter.branch_names)
    compute = torch.tensor([(True,) * K, *(random_row(K, s) for s in range(1, T))])
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

    def run_by_hand():
        caches = [adapter.new_cache(2), adapter.new_cache(2)]
        return loop(lambda s, i, step: adapter(**step, row=schedule.rows[s],
                                               forecast_weights=schedule.forecast_weights[s], cache=caches[i]).sample)

    plain = loop(lambda s, i, step: transformer(**step).sample)
    with scheduled(transformer, schedule, calls=2):
        images = [loop(lambda s, i, step: transformer(**step).sample) for _ in range(2)]
    assert all(torch.equal(image, run_by_hand()) for image in images) and not torch.equal(images[0], plain)
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
def run_by_hooks(transformer, schedule, calls):
    """The same as `scheduled` for one trajectory that repeats, by hooks that put old outputs in place of new ones."""
    latest, count = {}, 0

    def count_call(*_):
        nonlocal count
        count += 1

    def hook(k):
        def put(module, args, output):
            s, call = divmod(count, calls)
            if schedule.rows[s][k]:
                latest[k, call] = output
            return latest[k, call]
        return put

    handles = [transformer.register_forward_hook(count_call)]
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
    with run_by_hooks(transformer, schedule, calls):
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
    with run_by_hooks(transformer, schedule, 1):
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


@pytest.mark.parametrize("name, calls, trajectories", [
    ("Wan", 1, [{}]), ("Wan", 1, [dict(steps=2)]),  # guidance: two calls a step
    ("Wan", 2, [dict(guidance_scale=1.0)] * 2), ("Wan", 2, [dict(guidance_scale=1.0, steps=8)]),  # none: one
    ("Flux", 1, [dict(steps=2)] * 2), ("Flux", 1, [dict(steps=8)]), ("Flux", 1, [{}, dict(steps=2), dict(steps=2)])])
def test_calls_that_are_no_whole_trajectories_are_refused(name, calls, trajectories):
    """Also where their number is a multiple of that of a trajectory."""
    pipe, run = pipeline(name)
    schedule = schedule_of(GenericAdapter(pipe.transformer), 4, history=1)
    with pytest.raises(RuntimeError, match=f"called at the timesteps .* 4 steps .* {calls} calls a step.*calls=2"):
        with scheduled(pipe.transformer, schedule, calls=calls):
            for changes in trajectories:
                run(**changes)
    assert "forward" not in vars(pipe.transformer)


class Timed(nn.Module):
    """A transformer that does nothing with its timestep."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"ff": nn.Sequential(nn.Linear(2, 2))}) for _ in range(2))

    def forward(self, x, t=None):
        return self.blocks[1]["ff"](self.blocks[0]["ff"](x))


def follow(timesteps, T, calls, named):
    """Calls a transformer at these, which are given by name or not."""
    transformer, x = Timed(), torch.zeros(1, 2)
    with scheduled(transformer, schedule_of(GenericAdapter(transformer), T, history=1), calls=calls):
        for t in timesteps:
            transformer(x, t=t) if named else transformer(x, t)


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("timesteps, T, calls", [
    ([1000, 996, 996, 992, 500] * 2, 5, 1),  # the noisy end in bfloat16
    ([0.0, 0.3, 0.7, 0.9] * 2, 4, 1), ([9, 9, 5, 5, 0, 0], 3, 2), ([9, 9, 9], 1, 1), ([None] * 6, 3, 1),
    ([900, 500, 100, 400, 200, 50], 3, 1),  # the second from an image
    ([torch.tensor([[0.0, t, t], [0.0, 0.0, t]]) for t in (900, 500, 100)], 3, 1)])
def test_timesteps_of_whole_trajectories(timesteps, T, calls, named):
    follow(timesteps, T, calls, named)


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("timesteps, T, calls", [
    ([500] * 3, 3, 1), ([9, 9, 5, 5, 0, 0], 6, 1), ([9, 9, 5, 5, 0, 0], 3, 1), ([9, 5, 7], 3, 1), ([9, 8, 5, 5], 2, 2),
    ([9, 5, 3, 0], 2, 1), ([0.0, 0.3, 0.7, 0.9], 2, 1), ([9, 5, 0, 9, 5, 0], 6, 1),
    ([torch.tensor(t) for t in (9, 9, 5, 5)], 4, 1)])
def test_timesteps_of_others(timesteps, T, calls, named):
    with pytest.raises(RuntimeError, match="called at the timesteps"):
        follow(timesteps, T, calls, named)


def test_what_is_refused_is_over():
    """Who goes on after an error begins a trajectory."""
    transformer, x = Timed(), torch.zeros(1, 2)
    schedule = schedule_of(GenericAdapter(transformer), 3, history=1)
    with scheduled(transformer, schedule):
        for t in (9, 5, 5):
            transformer(x, t)
        with pytest.raises(RuntimeError, match=r"timesteps \[9.0, 5.0, 5.0\];"):
            transformer(x, 0)
        for t in (9, 5, 0):
            transformer(x, t)


def test_timesteps_are_read_when_the_trajectory_is_over():
    """And as they were at the call, though the loop may count in one tensor."""
    reads = []

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._local_scalar_dense.default:
                reads.append(func)
            return func(*args, **kwargs or {})

    transformer, x, t = Timed(), torch.zeros(1, 2), torch.tensor([8])
    schedule = schedule_of(GenericAdapter(transformer), 4, history=1)
    with Reads(), scheduled(transformer, schedule):
        reads.clear()  # of the schedule's own tables
        for _ in range(4):
            transformer(x, t)
            t -= 2
        assert not reads
    assert len(reads) == 4


def test_a_forward_that_is_replaced_inside_is_noticed():
    transformer, _ = make("WanTransformer3DModel")
    schedule = schedule_of(GenericAdapter(transformer), 4)
    with pytest.raises(RuntimeError, match="something else .* has replaced its forward"):
        with scheduled(transformer, schedule):
            transformer.forward = lambda **arguments: None
