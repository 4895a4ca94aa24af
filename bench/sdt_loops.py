"""The loops of a router's training that are compared: SDT as it is here, and in plain PyTorch.

plain: an eager loop as one would write it: frozen model, teacher without grad, blending and cache by tensor operations.
published: the same as HarmoniCa's code has it: model not frozen, teacher with grad.
Learning-to-Cache: that paper's own, as its code has it (Ma et al., 2024; model not frozen, teacher with grad). Each
iteration noises training images, here random ones, to a step, runs it to fill the cache and to advance, and compares
the blended output at the next step with the plain one. No guidance: as many rows are as many images.
ours: `train_trajectory`, on CUDA replayed from graphs that the rounds share, as in a training. ours, eager: without
graphs. ours, checkpointing: with each body recomputed in the backward.
"""

from contextlib import contextmanager, nullcontext

import torch

import harmonica_kernels as hk
from harmonica_dit.flops import count_flops
from harmonica_dit.router import Router
from harmonica_dit.sample import Trajectory, image_noise
from harmonica_dit.sample.trajectory import run_eagerly
from harmonica_dit.train.frozen_model import checkpoint_bodies
from harmonica_dit.train.sdt import train_trajectory
from harmonica_dit.train.student import Student, new_executor

from .sdt_models import Blend, build, take

LEARNING_TO_CACHE = "Learning-to-Cache"  # another method, so its losses are others
LOOPS = ("plain", "published", "ours", "ours, eager", "ours, checkpointing")
THRESHOLD, BETA = 0.5, 1e-9  # so small that the losses compared are the errors


class Problem:
    """One model with random weights, one batch of noise, one set of scores, for every loop alike.

    model, depth: as in `build`. images: the model sees twice as many rows. steps: T. dtype: "bfloat16" is
    autocast. device: "cpu" or "cuda". attention: of a DiT's own loops, its back end.
    """

    def __init__(self, model: str, images: int, steps: int, depth: int | None, dtype: str, device: str,
                 attention: str = "sdpa"):
        self.steps, self.autocast, self.device = steps, None if dtype == "float32" else dtype, torch.device(device)
        torch.manual_seed(0)
        with self.device:
            self.net, self.plain = build(model, depth, attention)
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
        if loop == LEARNING_TO_CACHE:
            return self.learning_to_cache(trajectory)
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
        cache, losses = [None] * self.logits.shape[1], []
        with self.training(trainable=published) as update:
            with torch.no_grad():
                x = trajectory.advance(self.guided(trajectory, self.noise, 0, Blend(cache)), 0, self.noise)
            for s in range(1, trajectory.steps):
                with torch.set_grad_enabled(published):
                    target = self.guided(trajectory, x, s)
                r = update.rows[s].sigmoid()
                output = self.guided(trajectory, x, s, Blend(cache, r, (r.detach() > THRESHOLD).tolist()))
                losses.append(update(s, (output - target).square().mean() + BETA * r.sum()))
                x = trajectory.advance(output.detach(), s, x)
        return losses

    def learning_to_cache(self, trajectory: Trajectory) -> list[float]:
        labels, losses = torch.cat([self.labels, self.labels]), []
        images, noise = torch.cat([self.noise, self.noise]), torch.cat([self.noise, self.noise]).flip(0)
        with self.training(trainable=True) as update:
            for s in range(1, trajectory.steps):
                cache = [None] * self.logits.shape[1]
                with torch.no_grad():
                    x = trajectory.scheduler.add_noise(images, noise, trajectory.scheduler.timesteps[s - 1 : s])
                    x = trajectory.advance(self.predict(trajectory, x, s - 1, labels, Blend(cache)), s - 1, x)
                target = self.predict(trajectory, x, s, labels)
                r = update.rows[s].sigmoid()
                output = self.predict(trajectory, x, s, labels, Blend(cache, r, [False] * len(cache)))
                losses.append(update(s, (output - target).square().mean() + BETA * r.sum()))
        return losses

    @contextmanager
    def training(self, trainable: bool):
        """Yields what updates a row. trainable: whether the plain model's weights get gradients, too."""
        weights = [p for name, p in self.plain.named_parameters() if name != "pos_embed"]
        for p in weights:
            p.requires_grad_(trainable)
        yield Update([torch.nn.Parameter(row.clone().to(self.device)) for row in self.logits])
        for p in weights:
            p.requires_grad_(False)
            p.grad = None

    def guided(self, trajectory, x, s, blend=take):
        """The guided output on the leading channels, as the trajectory's own."""
        y, guided = torch.cat([self.labels, torch.full_like(self.labels, self.net.num_classes)]), trajectory.model
        conditional, unconditional = self.predict(trajectory, torch.cat([x, x]), s, y, blend).chunk(2)
        scaled = unconditional + guided.scale * (conditional - unconditional)
        return torch.cat([scaled[:, : guided.channels], conditional[:, guided.channels :]], 1)

    def predict(self, trajectory, x, s, y, blend=take):
        t = trajectory.scheduler.timesteps[s].to(self.device).expand(len(y))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast is not None):
            return self.plain(x, t, y, blend).float()


class Update:
    """One step of AdamW on a row of logits."""

    def __init__(self, rows: list[torch.nn.Parameter]):
        self.rows, self.optimizer = rows, torch.optim.AdamW(rows, 1e-2, weight_decay=0)

    def __call__(self, s: int, loss: torch.Tensor) -> float:
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            self.rows[s].clamp_(-5, 5)
        return loss.item()
