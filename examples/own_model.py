"""A transformer of one's own, with random weights: cached_forward in its forward, then rows that are learned.

    python examples/own_model.py
"""

import torch
from torch import nn

import harmonica_dit
import harmonica_kernels as hk
from harmonica_dit.methods import fora

CLASSES, STEPS = 3, 6


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


class Net(nn.Module):
    """A denoiser as `harmonica_dit` calls one: net(x, t, y, **run). x: [B, 1, 8, 8], a token a row of pixels."""

    name, sample_shape, num_classes, tokens, width = "own", (1, 8, 8), CLASSES, 8, 32
    guidance, guidance_channels, scheduler = 1.0, 1, "ddim"

    def __init__(self, depth: int = 4):
        super().__init__()
        D = self.width
        self.embed, self.head = nn.Linear(8, D), nn.Linear(D, 8)
        self.time, self.label = nn.Linear(1, D), nn.Embedding(CLASSES + 1, D)
        self.blocks = nn.ModuleList(Block(D) for _ in range(depth))
        self.modulation = nn.Linear(D, (3 * 2 * depth + 2) * D)
        self.branches, names = [], []
        for i, block in enumerate(self.blocks):
            self.branches += [hk.Branch(lambda h, context, a=block.attention: a(h, h, h, need_weights=False)[0]),
                              hk.Branch(lambda h, context, mlp=block.mlp: mlp(h))]
            names += [f"blocks.{i}.attention", f"blocks.{i}.mlp"]
        self.branch_names = tuple(names)

    def forward(self, x, t, y, *, row=None, forecast_weights=None, cache=None, threshold=0.1):
        condition = self.time(t[:, None] / 1000) + self.label(y)
        rows, K = self.modulation(condition).unflatten(1, (-1, self.width)).unbind(1), len(self.branches)
        modulation = hk.Modulation(shift=rows[: K + 1], scale=rows[K + 1 : 2 * K + 2], gate=rows[2 * K + 2 :])
        z = hk.cached_forward(self.branches, self.embed(x[:, 0]), modulation, row=row,
                              forecast_weights=forecast_weights, cache=cache, threshold=threshold, model=self)
        return self.head(z)[:, None]


if __name__ == "__main__":
    torch.manual_seed(0)
    net = Net().eval().requires_grad_(False)
    router = harmonica_dit.train_router(net, steps=STEPS, target_speedup=1.5, trajectories=20, batch=2, progress=False)
    plain = harmonica_dit.sample(net, [0, 1, 2], steps=STEPS, seed=0)
    for name, schedule in {"evenly spaced steps": fora(net, STEPS, speedup=1.5), "router": router.schedule()}.items():
        images = harmonica_dit.sample(net, [0, 1, 2], steps=STEPS, schedule=schedule, seed=0)
        error = (images - plain).square().mean().sqrt().item()
        print(f"{name}: {schedule.speedup:.2f}x fewer FLOPs, error {error:.3f}")
