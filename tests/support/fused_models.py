"""Arguments of one forward of small DiTs and PixArts, and a processor of attention that is not diffusers' own."""

import torch
from diffusers.models.attention_processor import AttnProcessor


def dit_inputs(model, B=3):
    side = model.config.sample_size
    return dict(hidden_states=torch.randn(B, 4, side, side), timestep=torch.randint(0, 1000, (B,)),
                class_labels=torch.tensor([1000, 3, 17])[:B])


def pixart_inputs(model, B=3, height=10, width=6, tokens=9):
    inputs = dict(hidden_states=torch.randn(B, 4, height, width), timestep=torch.randint(0, 1000, (B,)),
                  encoder_attention_mask=(torch.arange(tokens) < torch.tensor([[1], [4], [tokens]])[:B]).long(),
                  encoder_hidden_states=torch.randn(B, tokens, model.config.caption_channels or 20))
    if model.use_additional_conditions:
        size = torch.tensor([[512.0, 768.0]])
        inputs["added_cond_kwargs"] = dict(resolution=size.repeat(B, 1), aspect_ratio=torch.full((B, 1), 2 / 3))
    return inputs


class LoudProcessor(AttnProcessor):
    def __call__(self, *args, **kwargs):
        return 3 * super().__call__(*args, **kwargs)
