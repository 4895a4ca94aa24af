"""Forecasters of diffusers pipelines: from a folder in the real format to a pipeline that runs them."""

import pytest
import torch
from diffusers import DiTPipeline, PixArtAlphaPipeline

import harmonica_dit
from harmonica_dit.sample import Trajectory, denoise, image_noise, sample
from harmonica_dit.schedule import Schedule
from harmonica_dit.train import train_forecaster
from support.tolerance import assert_close

SMALL = dict(steps=4, iterations=2, images=2, held_out=1, batch=2, progress=False)


@pytest.mark.parametrize("target", ["accurate", "uncached"])
@pytest.mark.parametrize("kind", ["dit", "pixart"])
def test_train_save_apply_sample(kind, target, request, tmp_path):
    """The pipeline's latents are the sampler's, by weights and conditions that have been learned."""
    folder = request.getfixturevalue(kind)
    cls, prompts = (DiTPipeline, [3, 700]) if kind == "dit" else (PixArtAlphaPipeline, ["a cat", "dogs"])
    net = harmonica_dit.load(str(folder), prompts=None if kind == "dit" else prompts)
    schedule = train_forecaster(net, 1.5, target=target, out=tmp_path, **SMALL)
    assert schedule.forecaster.condition is not None and schedule.forecaster.own is not None
    assert schedule.speedup > 1.5 and schedule.architecture == net.architecture
    labels = torch.tensor([3, 700] if kind == "dit" else [0, 1])
    found = Schedule.load(tmp_path / "forecast.safetensors")
    expected = sample(net, labels, schedule=found, seed=1, latents=True)
    pipe = cls.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    harmonica_dit.enable_cache(pipe, tmp_path / "forecast.safetensors")
    noise = image_noise(1, 0, 2, net.sample_shape)
    size = dict(height=64, width=64, use_resolution_binning=False) if kind == "pixart" else {}
    if kind == "pixart":
        latents = pipe(prompts, num_inference_steps=4, latents=noise, output_type="latent", **size).images
        assert_close(latents, expected, tolerance=1e-4)
    else:
        generator = torch.Generator().manual_seed(0)
        expected = sample_from(net, labels, found, torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)))
        images = pipe([3, 700], num_inference_steps=4, generator=generator, output_type="np").images
        with torch.no_grad():
            decoded = pipe.vae.decode(expected / pipe.vae.config.scaling_factor).sample
        wanted = (decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
        torch.testing.assert_close(torch.from_numpy(images), wanted, rtol=0, atol=1e-3)
    with pytest.raises(ValueError, match="5 steps, the schedule is for T = 4"):
        pipe(prompts, num_inference_steps=5, **size)


def sample_from(net, labels, schedule, noise):
    trajectory = Trajectory(net, labels, steps=4, scheduler=schedule.scheduler, timesteps=schedule.timesteps)
    return denoise(trajectory, noise, schedule)
