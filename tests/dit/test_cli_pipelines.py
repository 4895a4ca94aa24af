"""The command on a pipeline that runs by its own loop: train, sample, and the pipeline with what was trained."""

from functools import partial

import matplotlib.image
import pytest
import torch
from diffusers import FluxPipeline
from typer.testing import CliRunner

import harmonica_dit
import harmonica_dit.cli
from harmonica_dit.cli_options import parse_call
from harmonica_dit.files import load_tensors
from harmonica_dit.sample.trajectory import image_noise
from harmonica_dit.train import train_forecaster
from support.pipeline_folders import save_flux


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flux")
    (folder / "prompts.txt").write_text("a cat\ntwo dogs in a park\n")
    save_flux(folder / "small-flux")
    return folder


def run(*words, codes=(0,)):
    result = CliRunner().invoke(harmonica_dit.cli.app, list(map(str, words)))
    assert result.exit_code in codes, result.output
    return result.output


@pytest.mark.filterwarnings("ignore:target_speedup", "ignore:forecasts to order 0")
@pytest.mark.parametrize("kind", ["router", "forecast"])
def test_train_sample_enable_call(flux, kind, tmp_path, monkeypatch):
    monkeypatch.setattr(harmonica_dit.train, "train_forecaster", partial(train_forecaster, images=2, held_out=1))
    model = ("--model", flux / "small-flux", "--prompts", flux / "prompts.txt", "--image-size", 64)
    settings = ("--forecast", "uncached", "--iterations", 1) if kind == "forecast" else ("--trajectories", 2)
    out = tmp_path / "out"
    assert "FLOPs speedup" in run("train", *model, *settings, "--steps", 3, "--batch", 2, "--target-speedup", 1.3,
                                  "--out", out, codes=(0, 1))  # so few trajectories miss their target
    made = out / f"{kind}.safetensors"
    assert (out / "prompts.safetensors").exists()
    run("sample", *model, "--schedule", made, "--out", tmp_path / "latents.safetensors")
    run("sample", *model, "--schedule", made, "--out", tmp_path / "images.png")
    assert matplotlib.image.imread(tmp_path / "images.png").std() > 0.01
    latents = load_tensors(tmp_path / "latents.safetensors")[0]["samples"]
    pipe = FluxPipeline.from_pretrained(flux / "small-flux")
    pipe.set_progress_bar_config(disable=True)
    harmonica_dit.enable_cache(pipe, made)
    found = pipe(["a cat", "two dogs in a park"], height=64, width=64, num_inference_steps=3,
                 latents=image_noise(0, 0, 2, latents.shape[1:]), output_type="latent").images
    assert torch.equal(found, latents) and harmonica_dit.summary(pipe).cur > 0


def test_further_arguments_of_the_call(flux, tmp_path):
    model = ("--model", flux / "small-flux", "--prompts", flux / "prompts.txt")
    further = ("--call", "height=64", "--call", "width=64", "--call", "guidance_scale=2.5")
    run("sample", *model, *further, "--steps", 2, "--out", tmp_path / "latents.safetensors")
    net = harmonica_dit.load(str(flux / "small-flux"), prompts=["a cat", "two dogs in a park"],
                             call=dict(height=64, width=64, guidance_scale=2.5))
    expected = harmonica_dit.sample(net, [0, 1], steps=2, latents=True)
    assert torch.equal(load_tensors(tmp_path / "latents.safetensors")[0]["samples"], expected)
    words = ["a=[1, 2]", "b=blurry, dark", 'c="7"', "d=null"]
    assert parse_call(words) == dict(a=[1, 2], b="blurry, dark", c="7", d=None)


@pytest.mark.parametrize("call", [["height"], ["height=64", "height=32"], ["=3"], ["a b=3"]])
def test_calls_that_are_none(call):
    with pytest.raises(ValueError, match=f"--call: got '{call[-1]}', expected NAME=VALUE, each name once"):
        parse_call(call)
