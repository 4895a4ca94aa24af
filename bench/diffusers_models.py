"""diffusers' transformers as the suites run them: real configurations with fewer heads, and a forward's arguments."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from bench.problems import random_weights


@dataclass(frozen=True)
class Model:
    """A configuration of diffusers' class `cls`: depth, width of a head and numbers of tokens are the real ones.

    make(heads, layers): the configuration, and the arguments of a forward but the timestep.
    heads: as many as a CPU can bear. layers: the real depth, of each list of blocks.
    """

    cls: str
    make: Callable[[int, list[int]], tuple[dict[str, Any], dict[str, Any]]]
    heads: int
    layers: tuple[int, ...]
    timestep: Callable[[float], Tensor] = lambda t: torch.tensor([t])

    def build(self, heads: int | None = None, layers: int | None = None) -> tuple[nn.Module, dict[str, Any]]:
        """The model with random weights, and the arguments; heads and layers replace its own."""
        depths = list(self.layers) if layers is None else [layers] * len(self.layers)
        config, arguments = self.make(self.heads if heads is None else heads, depths)
        return random_weights(getattr(diffusers, self.cls)(**config)), arguments


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def dit(heads: int, layers: list[int]):
    config = dict(num_attention_heads=heads, attention_head_dim=72, in_channels=4, out_channels=8,
                  num_layers=layers[0], sample_size=32)
    return config, dict(hidden_states=normal(2, 4, 32, 32), class_labels=torch.tensor([207, 1000]))


def pixart(side: int, text: int, micro_conditions: bool = False):
    """side: of the latent; text: tokens; micro_conditions: PixArt-α's at 1024 pixels."""

    def make(heads: int, layers: list[int]):
        config = dict(num_attention_heads=heads, attention_head_dim=72, in_channels=4, out_channels=8,
                      num_layers=layers[0], sample_size=side, cross_attention_dim=72 * heads, caption_channels=4096,
                      use_additional_conditions=micro_conditions)
        mask = torch.ones(2, text, dtype=torch.long)
        mask[0, text // 4 :] = mask[1, 1:] = 0  # a prompt, and the empty one
        sizes = dict(resolution=None, aspect_ratio=None)
        if micro_conditions:
            sizes = dict(resolution=torch.full((2, 2), 8.0 * side), aspect_ratio=torch.ones(2, 1))
        return config, dict(hidden_states=normal(2, 4, side, side), encoder_hidden_states=normal(2, text, 4096),
                            encoder_attention_mask=mask, added_cond_kwargs=sizes)

    return make


def sd3(heads: int, layers: list[int]):
    config = dict(sample_size=128, patch_size=2, in_channels=16, num_layers=layers[0], attention_head_dim=64,
                  num_attention_heads=heads, joint_attention_dim=4096, caption_projection_dim=64 * heads,
                  pooled_projection_dim=2048, out_channels=16, pos_embed_max_size=192)
    return config, dict(hidden_states=normal(1, 16, 64, 64), encoder_hidden_states=normal(1, 333, 4096),
                        pooled_projections=normal(1, 2048))


def flux(heads: int, layers: list[int]):
    config = dict(patch_size=1, in_channels=64, num_layers=layers[0], num_single_layers=layers[1],
                  attention_head_dim=128, num_attention_heads=heads, joint_attention_dim=4096,
                  pooled_projection_dim=768, guidance_embeds=True, axes_dims_rope=(16, 56, 56))
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(16.0), torch.arange(16.0))
    return config, dict(hidden_states=normal(1, 256, 64), encoder_hidden_states=normal(1, 512, 4096),
                        pooled_projections=normal(1, 768), img_ids=ids, txt_ids=torch.zeros(512, 3),
                        guidance=torch.tensor([3.5]))


def sana(heads: int, layers: list[int]):
    config = dict(in_channels=32, out_channels=32, num_attention_heads=heads, attention_head_dim=32,
                  num_layers=layers[0], num_cross_attention_heads=heads, cross_attention_head_dim=32,
                  cross_attention_dim=32 * heads, caption_channels=2304, sample_size=32)
    return config, dict(hidden_states=normal(1, 32, 32, 32), encoder_hidden_states=normal(1, 300, 2304))


def cogvideox(heads: int, layers: list[int]):
    config = dict(num_attention_heads=heads, attention_head_dim=64, in_channels=16, out_channels=16,
                  time_embed_dim=512, text_embed_dim=4096, num_layers=layers[0], sample_width=90, sample_height=60,
                  sample_frames=1, max_text_seq_length=226)
    return config, dict(hidden_states=normal(1, 1, 16, 60, 90), encoder_hidden_states=normal(1, 226, 4096))


def wan(heads: int, layers: list[int]):
    config = dict(num_attention_heads=heads, attention_head_dim=128, in_channels=16, out_channels=16, text_dim=4096,
                  freq_dim=256, ffn_dim=128 * heads * 35 // 6, num_layers=layers[0])
    return config, dict(hidden_states=normal(1, 16, 1, 60, 104), encoder_hidden_states=normal(1, 512, 4096))


def hunyuan_dit(heads: int, layers: list[int]):
    config = dict(num_attention_heads=heads, attention_head_dim=88, in_channels=4, patch_size=2, sample_size=64,
                  hidden_size=88 * heads, num_layers=layers[0], cross_attention_dim=1024, cross_attention_dim_t5=2048,
                  pooled_projection_dim=1024, text_len=77, text_len_t5=256, use_style_cond_and_image_meta_size=False)
    angles = normal(1024, 88)
    return config, dict(hidden_states=normal(1, 4, 64, 64), encoder_hidden_states=normal(1, 77, 1024),
                        text_embedding_mask=torch.ones(1, 77), encoder_hidden_states_t5=normal(1, 256, 2048),
                        text_embedding_mask_t5=torch.ones(1, 256), image_rotary_emb=(angles.cos(), angles.sin()))


def both_rows(t: float) -> Tensor:
    return torch.tensor([t, t])


# DiT and PixArt have two rows, for guidance. The others have one; the pipelines of SD3, Sana, CogVideoX and HunyuanDiT
# run two in one forward as well, so with guidance theirs has twice the batch of here.
MODELS = {
    "dit-xl-2-256": Model("DiTTransformer2DModel", dit, 2, (28,), both_rows),
    "pixart-alpha-256": Model("PixArtTransformer2DModel", pixart(32, 120), 2, (28,), both_rows),
    "pixart-alpha-512": Model("PixArtTransformer2DModel", pixart(64, 120), 1, (28,), both_rows),
    "pixart-alpha-1024": Model("PixArtTransformer2DModel", pixart(128, 120, True), 1, (28,), both_rows),
    "pixart-sigma-512": Model("PixArtTransformer2DModel", pixart(64, 300), 1, (28,), both_rows),
    "sd3-512": Model("SD3Transformer2DModel", sd3, 2, (24,)),
    "flux-256": Model("FluxTransformer2DModel", flux, 1, (19, 38), lambda t: torch.tensor([t / 1000])),
    "sana-1024": Model("SanaTransformer2DModel", sana, 4, (20,)),
    "cogvideox-1-frame": Model("CogVideoXTransformer3DModel", cogvideox, 1, (30,)),
    "wan-1-frame": Model("WanTransformer3DModel", wan, 1, (30,)),
    "hunyuan-dit-512": Model("HunyuanDiT2DModel", hunyuan_dit, 1, (40,)),
}
