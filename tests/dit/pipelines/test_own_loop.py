"""A pipeline as a denoiser: its own loop makes each step's guided output. What cannot be run so is refused."""

import functools
from contextlib import nullcontext
from functools import cache

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    Flux2KleinPipeline,
    FluxPipeline,
    HeunDiscreteScheduler,
    PNDMScheduler,
)

import harmonica_dit
from harmonica_dit.pipelines.denoiser import PipelineDenoiser
from harmonica_dit.sample import denoise, sample
from harmonica_dit.sample.trajectory import Trajectory, image_noise
from harmonica_dit.train.frozen_model import checkpoint_bodies, freeze
from harmonica_dit.train.own_features import feature_error
from support.many_pipes import PIPES
from support.pipes import make_pipe, run

# guided by two calls, by one doubled batch, embedded; with packed latents, videos, lists, a learned variance
NAMES = ("flux", "sd3", "qwen", "wan", "z-image", "sana", "chroma", "lumina2", "hunyuan-dit", "ltx", "mochi")


@cache
def made(name):
    pipe = PIPES[name].pipe()
    return pipe, harmonica_dit.load(pipe, **PIPES[name].to_train_on())


def ordinary_call(pipe, net, labels, steps, noise, **changes):
    """Its latents, and what its scheduler was handed."""
    handed, real = [], pipe.scheduler.step

    def step(output, *args, **options):
        handed.append(output.clone())
        return real(output, *args, **options)

    pipe.scheduler.step = step
    try:
        return pipe(**net.arguments(labels, steps) | changes, latents=noise)[0], handed
    finally:
        del pipe.scheduler.step


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_steps_output_is_what_the_pipelines_own_scheduler_is_handed(name):
    """To the bit, in any order of the steps, and so are the final latents; the pipeline is what it was."""
    pipe, net = made(name)
    labels, noise = torch.tensor([1, 0]), image_noise(0, 0, 2, net.sample_shape)
    expected, handed = ordinary_call(pipe, net, labels, 3, noise)
    before = dict(vars(pipe))
    trajectory, xs = Trajectory(net, labels, steps=3), [noise]
    for s in range(3):
        xs.append(trajectory.advance(trajectory.predict(xs[s], s), s, xs[s]))
    assert torch.equal(xs[-1], expected)
    again = Trajectory(net, labels, steps=3)
    for s in (2, 0, 1):
        assert torch.equal(again.predict(xs[s], s), handed[s])
    assert vars(pipe).keys() == before.keys() and all(vars(pipe)[part] is before[part] for part in before)
    assert not torch.equal(denoise(Trajectory(net, labels.flip(0), steps=3), noise), expected)


@torch.no_grad()
def test_a_call_that_takes_its_latents_in_another_form():
    """Flux 2 packs what it is given; and nobody else's random numbers are used up."""
    pipe, net = made("flux2-klein")
    assert net.sample_shape == (24, 4)
    labels, noise = torch.tensor([1, 0]), image_noise(0, 0, 2, net.sample_shape)
    unpacked = noise.transpose(1, 2).reshape(2, 4, 4, 6)
    _, handed = ordinary_call(pipe, net, labels, 3, unpacked)
    torch.manual_seed(5)
    trajectory, x = Trajectory(net, labels, steps=3), noise
    for s, expected in enumerate(handed):
        output = trajectory.predict(x, s)
        assert torch.equal(output, expected)
        x = trajectory.advance(output, s, x)
    drawn = torch.randn(1)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.randn(1))


@torch.no_grad()
def test_only_the_wanted_step_runs_the_transformer():
    pipe, net = made("qwen")
    counted, noise = [], image_noise(0, 0, 2, net.sample_shape)
    trajectory = Trajectory(net, torch.tensor([0, 1]), steps=4)
    trajectory.predict(noise, 0)
    handle = pipe.transformer.transformer_blocks[1].register_forward_hook(lambda *_: counted.append(1))
    trajectory.predict(noise, 3)
    handle.remove()
    assert len(counted) == 2  # with the prompt and without


@torch.no_grad()
def test_guidance_size_and_scheduler_of_ones_own():
    entry, pipe = PIPES["sd3"], PIPES["sd3"].pipe()
    given = entry.to_train_on()
    net = harmonica_dit.load(pipe, prompts=given["prompts"], call=dict(guidance_scale=5.0), image_size=48)
    assert (net.guidance, net.sample_shape, net.num_classes) == (5.0, (4, 6, 6), 2)
    labels, noise = torch.tensor([0]), image_noise(0, 0, 1, net.sample_shape)
    for guidance in (1.0, 5.0, 7.0):
        expected, _ = ordinary_call(pipe, net, labels, 3, noise, guidance_scale=guidance)
        assert torch.equal(denoise(Trajectory(net, labels, steps=3, guidance=guidance), noise), expected)
    other = type(pipe.scheduler)(shift=3.0)
    found = denoise(Trajectory(net, labels, steps=3, scheduler=other), noise)
    pipe.scheduler = other
    assert torch.equal(found, ordinary_call(pipe, net, labels, 3, noise)[0])


@torch.no_grad()
def test_timesteps_of_ones_own():
    """Are what the transformer is given, whatever the call would set."""
    pipe, net = made("hunyuan-dit")
    given, scheduler = [], DPMSolverMultistepScheduler(prediction_type="v_prediction")
    trajectory = Trajectory(net, torch.tensor([0]), steps=3, scheduler=scheduler, timesteps=[900, 500, 100])
    handle = pipe.transformer.register_forward_pre_hook(lambda _, args: given.append(args[1].flatten()[0].item()))
    x = trajectory.predict(image_noise(0, 0, 1, net.sample_shape), 2)
    handle.remove()
    assert given == [900, 500, 100] and x.isfinite().all()


def test_a_scheduler_that_scales_the_models_input():
    """And the noise, which this pipeline does itself."""
    entry = PIPES["hunyuan-dit"]
    pipe = entry.pipe()
    pipe.scheduler = EulerDiscreteScheduler(prediction_type="v_prediction")
    net = harmonica_dit.load(pipe, **entry.to_train_on())
    noise = image_noise(0, 0, 2, net.sample_shape)
    trajectory = Trajectory(net, torch.tensor([0, 1]), steps=3)
    assert trajectory.start(noise).std() > 5
    found = denoise(trajectory, noise)
    expected, _ = ordinary_call(pipe, net, torch.tensor([0, 1]), 3, noise)
    assert torch.equal(found, expected)


def test_branches_that_are_computed_again_keep_only_what_enters_them():
    _, net = made("flux")
    trajectory, noise = Trajectory(net, torch.tensor([0]), steps=2), image_noise(0, 0, 1, net.sample_shape)
    saved, rows = {}, torch.full((len(net.branch_names),), 0.5, requires_grad=True)
    for again in (False, True):
        cache = net.new_cache()
        with torch.no_grad():
            trajectory.predict(noise, 0, cache=cache)

        def pack(t, again=again):
            saved[again] = saved.get(again, 0) + t.nbytes
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), checkpoint_bodies(net) if again else (
                nullcontext()), freeze(net):
            trajectory.predict(noise, 1, row=rows, cache=cache)
    assert saved[True] < 0.6 * saved[False]


def test_the_error_in_the_models_own_features():
    """What enters each branch at the last timestep, in every call of that step; differentiable in the images."""
    pipe, net = made("qwen")
    trajectory, entered = Trajectory(net, torch.tensor([0, 1]), steps=3), []
    images, targets = (image_noise(0, i, 2, net.sample_shape).requires_grad_() for i in (0, 2))
    net._loop._forms.clear()  # then the transformer runs once to see what it returns, which is no call of that step
    error = feature_error(trajectory, images, targets.detach())
    branches = [pipe.transformer.get_submodule(name) for name in net.branch_names]
    handles = [branch.register_forward_pre_hook(lambda _, args, kwargs: entered.append(
        next(iter((*args, *kwargs.values())))), with_kwargs=True) for branch in branches]
    with torch.no_grad():
        for x in (images, targets):
            trajectory.predict(x, 2)
    for handle in handles:
        handle.remove()
    found, wanted = entered[: len(entered) // 2], entered[len(entered) // 2 :]
    assert len(found) == 2 * len(branches)
    expected = torch.stack([(a - b).square().mean() / b.square().mean() for a, b in zip(found, wanted)]).mean()
    torch.testing.assert_close(error, expected)
    error.backward()
    assert images.grad.abs().max() > 0 and targets.grad is None


def test_pipelines_in_memory_with_a_fused_adapter():
    """They stay on the fused path, under the name that `enable_cache` has for them."""
    pipe, texts = make_pipe("dit"), make_pipe("alpha")
    net = harmonica_dit.load(pipe)
    made = harmonica_dit.methods.fora(net, 3, every=2)
    assert isinstance(net, PipelineDenoiser) and sample(net, [3], schedule=made).shape == (1, 3, 16, 16)
    harmonica_dit.enable_cache(pipe, made)
    run(pipe, 3)
    with pytest.raises(ValueError, match="call: .* is a DiTPipeline, for which"):
        harmonica_dit.load(make_pipe("dit"), call=dict(guidance_scale=3.0))
    with pytest.raises(ValueError, match="prompts: PixArtTransformer2DModel is conditioned on text"):
        harmonica_dit.load(texts)


def pipe_with(name, **parts):
    pipe = PIPES[name].pipe()
    for part, value in parts.items():
        setattr(pipe, part, value)
    return pipe


def offloaded():
    pipe = PIPES["sd3"].pipe()
    pipe.enable_model_cpu_offload(device="cpu")
    return pipe


class ChangesLatents(FluxPipeline):
    @functools.wraps(FluxPipeline.__call__)
    def __call__(self, *args, **kwargs):
        return FluxPipeline.__call__.__wrapped__(self, *args, **kwargs, callback_on_step_end=lambda pipe, s, t, given: (
            dict(latents=given["latents"] + 1)))


class TurnsGradOff(FluxPipeline):
    @functools.wraps(FluxPipeline.__call__)
    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs)


class TakesNoLatents(FluxPipeline):
    def __call__(self, prompt=None, output_type="pil", return_dict=True):
        raise AssertionError("not reached")


class BeginsWithMore(Flux2KleinPipeline):
    """Its latents are no noise, and it takes them in another form: nothing could stand in their place."""

    def prepare_latents(self, *args, **kwargs):
        latents, ids = super().prepare_latents(*args, **kwargs)
        return latents + 1, ids


def of_class(cls, name="flux"):
    pipe = PIPES[name].pipe()
    pipe.__class__ = cls
    return pipe


@pytest.mark.parametrize("name,make,change,words", [
    ("wan-of-two", None, {}, "WanPipeline has transformer and transformer_2, expected one"),
    ("sd3", offloaded, {}, "its transformer is offloaded, .* pipe.remove_all_hooks"),
    ("flux2-klein", lambda: of_class(BeginsWithMore, "flux2-klein"), {}, "not enough values to unpack"),
    ("sd3-img2img", None, {}, "makes 1 steps, its scheduler has 2"),
    ("flux", lambda: of_class(TakesNoLatents), {}, "TakesNoLatents's call takes no latents"),
    ("flux", lambda: of_class(ChangesLatents), {}, "changes the latents between two of the scheduler's steps"),
    ("flux", lambda: of_class(TurnsGradOff), {}, "TurnsGradOff turns grad off in its loop"),
    ("sd3", lambda: pipe_with("sd3", scheduler=FlowMatchHeunDiscreteScheduler()), {}, "several times a step"),
    ("hunyuan-dit", lambda: pipe_with("hunyuan-dit", scheduler=HeunDiscreteScheduler()), {}, "several times a step"),
    ("hunyuan-dit", lambda: pipe_with("hunyuan-dit", scheduler=PNDMScheduler(skip_prk_steps=True)), {},
     "several times a step"),
    ("lumina2", None, dict(cfg_trunc_ratio=0.5), "calls its transformer otherwise at step 1 than at step 0"),
    ("flux", None, dict(num_inference_steps=5), "call: got num_inference_steps=5"),
    ("flux", None, dict(num_images_per_prompt=2), "call: got num_images_per_prompt=2"),
    ("flux", None, dict(colour="red"), "call: FluxPipeline takes no colour"),
])
def test_pipelines_that_cannot_be_trained_on(name, make, change, words):
    pipe = PIPES[name].pipe() if make is None else make()
    given = PIPES[name].to_train_on()
    with pytest.raises(ValueError, match=words):
        harmonica_dit.load(pipe, prompts=given["prompts"], call=given["call"] | change)


def test_other_arguments_that_are_refused():
    pipe, net = made("qwen")
    given = PIPES["qwen"].to_train_on()
    with pytest.raises(TypeError, match="name: got int, expected a name, or a diffusers pipeline"):
        harmonica_dit.load(5)
    with pytest.raises(ValueError, match="prompts: QwenImageTransformer2DModel is a QwenImagePipeline; give some"):
        harmonica_dit.load(pipe)
    with pytest.raises(ValueError, match="call: fashion-dit is no pipeline"):
        harmonica_dit.load("fashion-dit", call={})
    with pytest.raises(ValueError, match="vae: .* is a QwenImagePipeline, which has its own"):
        harmonica_dit.load(pipe, vae="some", **given)
    harmonica_dit.enable_cache(pipe, 1.5)
    with pytest.raises(ValueError, match="disable_cache"):
        harmonica_dit.load(pipe, **given)
    harmonica_dit.disable_cache(pipe)
    with pytest.raises(TypeError, match="is run by its pipeline's loop"):
        net(torch.zeros(1), torch.zeros(1), torch.zeros(1))
    with pytest.raises(ValueError, match="guidance: got 3.0, but QwenImagePipeline is called without guidance_scale"):
        Trajectory(net, torch.tensor([0]), steps=2, guidance=3.0)
    with pytest.raises(ValueError, match="guidance_channels: got 2"):
        Trajectory(net, torch.tensor([0]), steps=2, guidance_channels=2)
    with pytest.raises(ValueError, match="schedule: decides on runs of branches"):
        sample(net, [0], schedule=harmonica_dit.methods.delta_dit(net, 4, every=2, blocks=1))
    with pytest.raises(ValueError, match="schedule: decides on runs of branches"):
        sample(net, [0], schedule=harmonica_dit.methods.first_block(net, 4, 0.1))
    with pytest.raises(ValueError, match="is run by its pipeline's loop, whose branches' outputs"):
        harmonica_dit.methods.smoothcache(net, 4, 0.1, images=1)
