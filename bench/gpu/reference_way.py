"""The published way of sampling with a schedule, written from its description (docs/design.md, section 11).

Eager blocks; per block four membership tests of a Python int in a CPU index tensor; one `t[0].item()` a step, which
waits for the GPU; adaLN evaluated for skipped branches too. Sampler and guidance are ours, as for every candidate.
"""

import torch
from torch import Tensor, nn

from bench.problems import Plain
from harmonica_dit.schedule import Schedule
from support.plain_dit import modulate


class ReferenceWay(nn.Module):
    """The plain model under a schedule; a denoiser that keeps its own cache and finds the step by its timestep."""

    guidance, guidance_channels, name = Plain.guidance, Plain.guidance_channels, "reference"

    def __init__(self, plain: Plain, schedule: Schedule, timesteps: list[int]):
        super().__init__()
        self.plain, self.sample_shape, self.num_classes = plain, plain.sample_shape, plain.num_classes
        self.rows = {}
        for t, compute in zip(timesteps, schedule.compute, strict=True):
            attention, feed_forward = compute[0::2], compute[1::2]
            self.rows[t] = tuple(which.nonzero().flatten() for which in (
                attention, ~attention, feed_forward, ~feed_forward))
        self.cache: dict[tuple[int, int], Tensor] = {}

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        compute_attn, reuse_attn, compute_mlp, reuse_mlp = self.rows[t[0].item()]
        net = self.plain.net
        x = net.x_embedder(x.to(self.plain.dtype)) + net.pos_embed
        c = net.t_embedder(t) + net.y_embedder(y)
        for i, block in enumerate(net.blocks):
            shift1, scale1, gate1, shift2, scale2, gate2 = block.adaLN_modulation(c).chunk(6, dim=1)
            if i in compute_attn:
                o = self.cache[i, 0] = block.attn(modulate(block.norm1(x), shift1, scale1))
            if i in reuse_attn:
                o = self.cache[i, 0]
            x = x + gate1.unsqueeze(1) * o
            if i in compute_mlp:
                o = self.cache[i, 1] = block.mlp(modulate(block.norm2(x), shift2, scale2))
            if i in reuse_mlp:
                o = self.cache[i, 1]
            x = x + gate2.unsqueeze(1) * o
        x = net.final_layer(x, c)
        B, g, p = x.shape[0], net.grid, net.patch
        return x.reshape(B, g, g, p, p, net.out).permute(0, 5, 1, 3, 2, 4).reshape(B, net.out, g * p, g * p)


def tf32(call):
    """call() with float32 matrix products in TF32, as published."""
    def run():
        before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        try:
            return call()
        finally:
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
    return run
