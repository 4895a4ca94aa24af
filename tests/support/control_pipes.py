"""Pipelines with a ControlNet, small and random."""

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

from support.flux_pipes import TRUE_GUIDANCE, shifting_scheduler
from support.pipes import random_weights
from support.small_pipe import SmallPipe, image_vae, one_call, small_transformer, two_calls


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


CONTROL_PIPES = {"sd3": one_call(make_sd3, arguments, copies=None),
                 "flux": two_calls(make_flux, arguments, **TRUE_GUIDANCE)}


def controlled(entry: SmallPipe, pipe, **changes):
    """A call's output; the control image's latents are the same in each."""
    torch.manual_seed(0)  # SD3's draws them from the global generator
    return entry.call(pipe, **changes)
