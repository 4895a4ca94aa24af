"""The models whose routers the loops of sdt_loops.py train: a denoiser, and the same weights in plain PyTorch.

A plain model is called with x, timesteps and labels, and with a `Blend` that is given each branch's output.
"""

from collections.abc import Callable

import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor, nn

from harmonica_dit.models import CONFIGS, DiT
from harmonica_dit.pipelines.denoiser import PipelineDenoiser
from harmonica_dit.pipelines.prompts import Prompts
from support.plain_dit import PlainDiT, modulate

PIXART = "PixArt-α 256"
DEPTH = 28  # of it and of DiT-XL/2
HEADS = 16  # of PixArt-α, each 72 wide
TOKENS, TEXT = 120, 4096  # of a prompt, and their width
DITS = dict(input_size=32, in_channels=4)


class Blend:
    """Blends each branch's output with the cached one by the scores r [K], and stores it where `renewed` says.

    cache: a list of K. r: None takes every output as it is.
    """

    def __init__(self, cache: list[Tensor | None], r: Tensor | None = None, renewed: list[bool] | None = None):
        self.cache, self.r, self.renewed = cache, r, renewed or [True] * len(cache)

    def __call__(self, k: int, o: Tensor) -> Tensor:
        if self.r is not None:
            o = self.r[k] * o + (1 - self.r[k]) * self.cache[k]
        if self.renewed[k]:
            self.cache[k] = o.detach()
        return o


def take(k: int, o: Tensor) -> Tensor:
    return o


def build(model: str, depth: int | None, attention: str = "sdpa") -> tuple[nn.Module, nn.Module]:
    """The denoiser and the plain model, with random weights that they share.

    model: PIXART or a DiT's configuration. depth: blocks, None for the model's own. attention: a DiT's back end; the
    plain model has PyTorch's choice.
    """
    if model == PIXART:
        net = pixart(DEPTH if depth is None else depth)
        plain: nn.Module = BlendingPixArt(net)
    else:
        config = CONFIGS[model] | DITS | ({} if depth is None else dict(depth=depth))
        net = DiT(**config, name=model, attention=attention)
        with torch.device("meta"):
            plain = BlendingDiT(**config)
    net, plain = net.eval().requires_grad_(False), plain.eval()
    for p in net.parameters():
        p.normal_(std=p.shape[-1] ** -0.5)
    if model != PIXART:
        plain.load_state_dict(net.state_dict(), assign=True)
    return net, plain


def pixart(depth: int, prompts: int = 4) -> PipelineDenoiser:
    transformer = PixArtTransformer2DModel(
        num_attention_heads=HEADS, attention_head_dim=72, in_channels=4, out_channels=8, num_layers=depth,
        sample_size=32, cross_attention_dim=72 * HEADS, caption_channels=TEXT, use_additional_conditions=False)
    mask = torch.ones(prompts + 1, TOKENS, dtype=torch.long)
    mask[:, TOKENS // 4 :] = mask[-1, 1:] = 0  # prompts of a quarter of the tokens, and the empty one
    texts = Prompts(tuple(map(str, range(prompts))), PIXART, torch.randn(prompts + 1, TOKENS, TEXT), mask)
    return PipelineDenoiser(transformer, "ddim", name=PIXART, guidance=4.5, prompts=texts)


class BlendingDiT(PlainDiT):
    def forward(self, x, t, y, blend: Callable[[int, Tensor], Tensor] = take):
        x, c = self.x_embedder(x) + self.pos_embed, self.t_embedder(t) + self.y_embedder(y)
        for i, block in enumerate(self.blocks):
            rows = block.adaLN_modulation(c).chunk(6, 1)
            for j, (norm, body) in enumerate(((block.norm1, block.attn), (block.norm2, block.mlp))):
                shift, scale, gate = rows[3 * j : 3 * j + 3]
                x = x + gate[:, None] * blend(2 * i + j, body(modulate(norm(x), shift, scale)))
        return unpatchify(self.final_layer(x, c), self.grid, self.patch)


class BlendingPixArt(nn.Module):
    """diffusers' transformer, its blocks taken apart as its own forward runs them."""

    def __init__(self, net: PipelineDenoiser):
        super().__init__()
        self.transformer, self.prompts = net.transformer, net.prompts

    def forward(self, x, t, y, blend: Callable[[int, Tensor], Tensor] = take):
        model, B = self.transformer, len(x)
        given = self.prompts.conditions(y, x.dtype)
        bias = ((1 - given["encoder_attention_mask"].to(x.dtype)) * -10000.0)[:, None]
        x = model.pos_embed(x)
        nothing = dict(resolution=None, aspect_ratio=None)
        shared, embedded = model.adaln_single(t, nothing, batch_size=B, hidden_dtype=x.dtype)
        text = model.caption_projection(given["encoder_hidden_states"])
        for i, block in enumerate(model.transformer_blocks):
            shift, scale, gate, shift2, scale2, gate2 = (block.scale_shift_table + shared.view(B, 6, -1)).unbind(1)
            x = x + gate[:, None] * blend(3 * i, block.attn1(modulate(block.norm1(x), shift, scale)))
            x = x + blend(3 * i + 1, block.attn2(x, encoder_hidden_states=text, attention_mask=bias))
            x = x + gate2[:, None] * blend(3 * i + 2, block.ff(modulate(block.norm2(x), shift2, scale2)))
        shift, scale = (model.scale_shift_table + embedded[:, None]).unbind(1)
        x = model.proj_out(modulate(model.norm_out(x), shift, scale))
        return unpatchify(x, model.config.sample_size // model.config.patch_size, model.config.patch_size)


def unpatchify(x: Tensor, grid: int, patch: int) -> Tensor:
    """[B, N, p·p·C] -> [B, C, H, W]."""
    x = x.reshape(len(x), grid, grid, patch, patch, -1).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(len(x), -1, grid * patch, grid * patch)
