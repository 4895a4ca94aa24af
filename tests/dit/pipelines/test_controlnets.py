"""A ControlNet runs at every step; what it adds between the transformer's blocks is seen at the steps that run them."""

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxTransformer2DModel,
    SD3ControlNetModel,
    SD3Transformer2DModel,
    StableDiffusion3ControlNetPipeline,
)

import harmonica_dit
from support.flux_pipes import TRUE_GUIDANCE, shifting_scheduler
from support.pipes import random_weights
from support.small_pipe import image_vae, one_call, small_transformer, two_calls
from support.trunk_by_hooks import trunk_by_hooks

STEPS, COMPUTED = 6, 3


def make_sd3():
    transformer = small_transformer(SD3Transformer2DModel)
    net = SD3ControlNetModel.from_transformer(transformer, num_layers=1, num_extra_conditioning_channels=0)
    return StableDiffusion3ControlNetPipeline(transformer, FlowMatchEulerDiscreteScheduler(), image_vae(4), None, None,
                                              None, None, None, None, random_weights(net, 0.05))


def make_flux():
    transformer = small_transformer(FluxTransformer2DModel, guidance_embeds=True)
    shape = {name: transformer.config[name] for name in ("attention_head_dim", "num_attention_heads")}
    net = FluxControlNetModel.from_transformer(transformer, num_layers=1, num_single_layers=1, **shape)
    return FluxControlNetPipeline(shifting_scheduler(), image_vae(1), None, None, None, None, transformer,
                                  random_weights(net, 0.05))


def arguments(batch, draw):
    return dict(height=16, width=24, control_image=draw(batch, 3, 16, 24).sigmoid()) | draw.prompts(batch, 5, 16,
                                                                                                    pooled=12)


PIPES = {"sd3": one_call(make_sd3, arguments, copies=None), "flux": two_calls(make_flux, arguments, **TRUE_GUIDANCE)}


@pytest.mark.parametrize("kind", PIPES)
def test_computed_steps_see_the_control_and_what_is_forecast_comes_from_them(kind):
    entry = PIPES[kind]
    pipe = entry.pipe()
    runs = []
    pipe.controlnet.register_forward_hook(lambda *_: runs.append(1))

    def call(**changes):
        torch.manual_seed(0)  # SD3's draws the control image's latents from the global generator
        return entry.call(pipe, **changes)

    with trunk_by_hooks(pipe.transformer, entry.calls, STEPS, COMPUTED):
        expected = call()
    runs.clear()
    harmonica_dit.enable_cache(pipe, 1.7)
    assert torch.equal(call(), expected) and harmonica_dit.summary(pipe).cur == 0.5
    assert len(runs) == STEPS and not torch.equal(call(controlnet_conditioning_scale=0.0), expected)
