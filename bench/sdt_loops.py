"""The loops of a router's training that are compared: SDT as it is here, and in plain PyTorch.

plain: an eager loop as one would write it: frozen model, teacher without grad, blending and cache by tensor operations.
published: the same as HarmoniCa's code has it: model not frozen, teacher with grad.
ours: `train_trajectory`, on CUDA replayed from graphs that the rounds share, as in a training. ours, eager: without
graphs. ours, checkpointing: with each body recomputed in the backward.
"""

from contextlib import nullcontext

import torch

import harmonica_kernels as hk
from harmonica_dit.flops import count_flops
from harmonica_dit.models import CONFIGS, DiT
from harmonica_dit.router import Router
from harmonica_dit.sample import Trajectory, image_noise
from harmonica_dit.sample.trajectory import run_eagerly
from harmonica_dit.train.frozen_model import checkpoint_bodies
from harmonica_dit.train.sdt import train_trajectory
from harmonica_dit.train.student import Student, new_executor
from support.plain_dit import PlainDiT, modulate

LOOPS = ("plain", "published", "ours", "ours, eager", "ours, checkpointing")
THRESHOLD, BETA = 0.5, 1e-9  # so small that the losses compared are the errors


class Problem:
    """One model with random weights, one batch of noise, one set of scores, for every loop alike.

    images: the model sees twice as many rows. steps: T. depth: blocks, None for the model's own. dtype: "bfloat16" is
    autocast. device: "cpu" or "cuda".
    """

    def __init__(self, model: str, images: int, steps: int, depth: int | None, dtype: str, device: str):
        config = CONFIGS[model] | dict(input_size=32, in_channels=4) | ({} if depth is None else dict(depth=depth))
        self.steps, self.autocast, self.device = steps, None if dtype == "float32" else dtype, torch.device(device)
        torch.manual_seed(0)
        with self.device:
            self.net = DiT(**config, name=model).eval().requires_grad_(False)
        for p in self.net.parameters():
            p.normal_(std=p.shape[-1] ** -0.5)
        with torch.device("meta"):
            self.plain = PlainDiT(**config).eval()
        self.plain.load_state_dict(self.net.state_dict(), assign=True)  # one set of weights
        self.flops = count_flops(self.net)
        self.labels = (torch.arange(images) % self.net.num_classes).to(self.device)
        self.noise = image_noise(0, 0, images, self.net.sample_shape).to(self.device)
        generator = torch.Generator().manual_seed(0)
        self.logits = torch.randn(steps, len(self.net.branches), generator=generator)
        # of each loop, for graphs know the bodies that they were recorded with, and the cache
        self.executors = {loop: run_eagerly if "eager" in loop else new_executor(self.net, steps) for loop in LOOPS}
        self.cache = hk.FeatureCache()

    def run(self, loop: str) -> list[float]:
        """One trajectory; the losses of its iterations."""
        trajectory = Trajectory(self.net, self.labels, steps=self.steps, autocast=self.autocast)
        if not loop.startswith("ours"):
            return self.plain_loop(trajectory, published=loop == "published")
        router = Router(self.logits, self.net.branch_names, self.flops, tuple(trajectory.timesteps),
                        threshold=THRESHOLD).to(self.device)
        optimizer = torch.optim.AdamW(router.parameters(), 1e-2, weight_decay=0)
        ones = torch.ones(max(self.logits.shape), device=self.device)
        trajectory.executor = self.executors[loop]
        with checkpoint_bodies(self.net) if "checkpointing" in loop else nullcontext():
            seen = train_trajectory(router, Student(router, trajectory, self.noise, cache=self.cache), optimizer,
                                    ones[: len(self.logits)], ones[: self.logits.shape[1]], BETA)
        return seen.losses.tolist()

    def plain_loop(self, trajectory: Trajectory, published: bool) -> list[float]:
        rows = [torch.nn.Parameter(row.clone().to(self.device)) for row in self.logits]
        optimizer = torch.optim.AdamW(rows, 1e-2, weight_decay=0)
        weights = [p for name, p in self.plain.named_parameters() if name != "pos_embed"]
        for p in weights:
            p.requires_grad_(published)
        cache, losses = [None] * self.logits.shape[1], []
        with torch.no_grad():
            x = trajectory.advance(self.predict(trajectory, self.noise, 0, None, cache), 0, self.noise)
        for s in range(1, trajectory.steps):
            with torch.set_grad_enabled(published):
                target = self.predict(trajectory, x, s)
            r = rows[s].sigmoid()
            output = self.predict(trajectory, x, s, r, cache)
            loss = (output - target).square().mean() + BETA * r.sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            with torch.no_grad():
                rows[s].clamp_(-5, 5)
            x = trajectory.advance(output, s, x)
            losses.append(loss.item())
        for p in weights:
            p.requires_grad_(False)
            p.grad = None
        return losses

    def predict(self, trajectory, x, s, r=None, cache=None):
        """The guided output on the first three channels, as the trajectory's own."""
        y = torch.cat([self.labels, torch.full_like(self.labels, self.net.num_classes)])
        t = trajectory.scheduler.timesteps[s].to(self.device).expand(len(y))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast is not None):
            out = self.forward(torch.cat([x, x]), t, y, r, cache).float()
        conditional, unconditional = out.chunk(2)
        guided = unconditional[:, :3] + trajectory.model.scale * (conditional[:, :3] - unconditional[:, :3])
        return torch.cat([guided, conditional[:, 3:]], 1)

    def forward(self, x, t, y, r, cache):
        """The plain model's; with a cache, each branch's output is blended with the cached one by r and stored."""
        model = self.plain
        if cache is None:
            return model(x, t, y)
        renewed = [True] * len(cache) if r is None else (r.detach() > THRESHOLD).tolist()
        x, c = model.x_embedder(x) + model.pos_embed, model.t_embedder(t) + model.y_embedder(y)
        for i, block in enumerate(model.blocks):
            rows = block.adaLN_modulation(c).chunk(6, 1)
            for j, (norm, body) in enumerate(((block.norm1, block.attn), (block.norm2, block.mlp))):
                k, (shift, scale, gate) = 2 * i + j, rows[3 * j : 3 * j + 3]
                o = body(modulate(norm(x), shift, scale))
                if r is not None:
                    o = r[k] * o + (1 - r[k]) * cache[k]
                x = x + gate[:, None] * o
                if renewed[k]:
                    cache[k] = o.detach()
        x = model.final_layer(x, c)
        B, g, p = x.shape[0], model.grid, model.patch
        return x.reshape(B, g, g, p, p, model.out).permute(0, 5, 1, 3, 2, 4).reshape(B, model.out, g * p, g * p)
