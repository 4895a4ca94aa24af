"""Learning-to-Cache: a router trained on pairs of steps, on noised training images."""

import os
import time
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import harmonica_kernels as hk
from harmonica_dit.flops import count_flops
from harmonica_dit.methods import fora
from harmonica_dit.router import ALWAYS, LIMIT, Router
from harmonica_dit.sample.schedulers import make_scheduler
from harmonica_dit.sample.trajectory import FIRST_IMAGE, Guided, check_labels, conditions_of, image_noise
from harmonica_dit.validate import check_threshold, check_whole, describe, is_number

from .budget import Budget
from .checkpoint import Training
from .frozen_model import freeze
from .loop import run_training
from .settings import check_weights, record_of
from .student import new_executor, student_step

LABEL_DROPOUT = 0.1  # share of labels that are hidden, so that the router serves guidance's unconditional half too


def train_learning_to_cache(net, images: Tensor, labels, *, steps: int = 20, beta: float = 5e-6,
                            target_speedup: float | None = None, target_cur: float | None = None,
                            iterations: int = 20_000, batch: int = 64, lr: float = 1e-3, threshold: float = 0.1,
                            seed: int = 0, out: str | os.PathLike | None = None, progress: bool = True) -> Router:
    """Learns by Learning-to-Cache which branches of `net` every second step of DDIM computes. The model is frozen.

    The steps s = 0, 2, … compute everything; the rows s + 1 are learned. An iteration takes one such pair of steps:

        x = √ᾱ_s·x_0 + √(1-ᾱ_s)·noise                 the image, noised to step s's timestep
        ε = the full model's output at x and step s, which fills the cache
        x' = DDIM's step from x with ε
        loss = mean((ε_r - ε*)²) + β·Σ_k r[s+1, k]     at x' and step s + 1: ε* of the full model, and ε_r, in which
                                                       each branch is r·computed + (1 - r)·cached

    The outputs are conditional, without guidance; a tenth of the labels are hidden, the same ones in all three
    forwards. The mean is over all output channels, the learned variance's too. After the update the logits are clamped
    to ±5. All this is what the published code does; it flips images at random, which is left to the caller.

    Args:
        net: a denoiser that predicts noise, see `harmonica_dit.load`.
        images: [N, C, H, W] floating-point training images as the model was trained on, of a latent model the scaled
            latents. labels: [N] their classes.
        steps: T of DDIM ("ddim"), even.
        beta: the paper's λ, in units of the output's mean squared error. The default is the published one of DiT-XL/2
            at 20 steps (1e-6 at 10 and 50). The paper tunes it by hand until the speedup is as wished.
        target_speedup, target_cur: at most one, which is ours: a FLOPs speedup or cache utilization ratio for which the
            threshold is chosen at the end. Neither keeps the threshold. Above that of repeating every second step
            nothing can be reached.
        iterations: pairs of steps, each an update of one row. The log counts them as trajectories.
        batch: images an iteration. lr: AdamW's learning rate; no weight decay.
        threshold: τ of the router, the paper's θ; it has no part in the training.
        seed: decides the initial logits, noise, pairs, hidden labels and the order of the images.
        out, progress: as in `train_router`: the same call with the same folder goes on after an interruption.

    Returns:
        The router; rows 0, 2, … compute at every threshold below 1. It is also in `out/router.safetensors`.

    Raises:
        TypeError, ValueError: an argument is not as above, or the checkpoint in `out` is of other settings; the message
            names it.
        OSError: `out` cannot be written to.
        FloatingPointError: the loss is not finite; the last good checkpoint stays.
        KeyboardInterrupt: Ctrl-C; the message says how to go on.

    Source: Learning-to-Cache (Ma et al., NeurIPS 2024, arXiv 2406.01733), and its published code.
    """
    check_settings(steps=steps, beta=beta, target_speedup=target_speedup, target_cur=target_cur, iterations=iterations,
                   batch=batch, lr=lr, threshold=threshold, seed=seed)
    check_weights(next(net.parameters()).dtype)
    pairs = Pairs(net, images, labels, steps, batch, seed)
    budget = _make_budget(net, steps, target_speedup, target_cur)
    logits = torch.randn(steps, len(net.branch_names), generator=torch.Generator().manual_seed(seed))
    logits = logits.clamp(-LIMIT, LIMIT)
    logits[::2] = ALWAYS
    device = next(net.parameters()).device
    router = Router(logits, net.branch_names, count_flops(net), tuple(pairs.scheduler.timesteps.tolist()),
                    threshold=threshold, model=net.name, guidance=None, seed=seed,
                    resolution=net.sample_shape[1:], architecture=getattr(net, "architecture", None)).to(device)
    optimizer = torch.optim.AdamW(list(router.logits)[::2], lr, weight_decay=0)  # logits[0] is row 1's
    training = Training(router, optimizer, torch.ones(steps, device=device), None, float(beta))
    record = record_of(net, dict(
        method="learning-to-cache", steps=steps, target_speedup=target_speedup, target_cur=target_cur, beta=beta,
        iterations=iterations, batch=batch, lr=lr, threshold=threshold, scheduler="ddim", seed=seed,
        images=_checksum(images), labels=zlib.crc32(pairs.labels.numpy().tobytes())))
    executor, cache = new_executor(net, 0), hk.FeatureCache()
    with freeze(net):
        return run_training(training, iterations, lambda: _train_pair(net, pairs, training, executor, cache),
                            out=None if out is None else Path(out), record=record, budget=budget, progress=progress,
                            of="iterations")


def check_settings(*, steps: int = 20, beta: float = 0.0, target_speedup: float | None = None,
                   target_cur: float | None = None, iterations: int = 1, batch: int = 1, lr: float = 1.0,
                   threshold: float = 0.1, seed: int = 0) -> None:
    """Refuses arguments of `train_learning_to_cache` that are wrong for every model, before images are read.

    Raises:
        TypeError, ValueError: an argument is out of range; the message names it.
    """
    for name, value, least in (("steps", steps, 2), ("iterations", iterations, 1), ("batch", batch, 1),
                               ("seed", seed, 0)):
        check_whole(name, value, least)
    if steps % 2:
        raise ValueError(f"steps: got {steps}, expected an even number: every second step is learned")
    if not is_number(beta) or beta < 0:
        raise ValueError(f"beta: got {beta!r}, expected a number ≥ 0")
    if not is_number(lr) or lr <= 0:
        raise ValueError(f"lr: got {lr!r}, expected a number above 0")
    check_threshold(threshold)
    if target_speedup is not None and target_cur is not None:
        raise ValueError(f"target_speedup, target_cur: give at most one of them, got {target_speedup!r} and "
                         f"{target_cur!r}")


class Pairs:
    """The iterations' pairs of steps on noised images; those of iteration n depend on the seed and n alone.

    Args: `train_learning_to_cache`'s.
    """

    def __init__(self, net, images: Tensor, labels, steps: int, batch: int, seed: int):
        wanted = tuple(net.sample_shape)
        if not isinstance(images, Tensor) or not images.is_floating_point() or images.shape[1:] != wanted:
            raise TypeError(f"images: got {describe(images)}, expected floating-point images [N, "
                            f"{', '.join(map(str, wanted))}]")
        if batch > len(images):
            raise ValueError(f"batch: got {batch}, expected at most the {len(images)} images")
        self.labels = check_labels(labels, net.num_classes).cpu()
        if len(self.labels) != len(images):
            raise ValueError(f"labels: got {len(self.labels)}, expected one for each of the {len(images)} images")
        self.images, self.batch, self.seed, self.hidden = images, batch, seed, net.num_classes
        self.scheduler = make_scheduler("ddim", steps, net)

    def draw(self, n: int) -> tuple[int, Tensor, Tensor]:
        """Iteration n's first step s, the images noised to it [batch, C, H, W], and their labels [batch]."""
        epoch, i = divmod(n, len(self.images) // self.batch)
        order = np.random.default_rng((self.seed, epoch, 6)).permutation(len(self.images))
        chosen = torch.from_numpy(order[i * self.batch : (i + 1) * self.batch])
        rng = np.random.default_rng((self.seed, n, 5))
        s = 2 * int(rng.integers(len(self.scheduler.timesteps) // 2))
        labels = self.labels[chosen]
        labels[torch.from_numpy(rng.random(self.batch) < LABEL_DROPOUT)] = self.hidden
        clean = self.images[chosen.to(self.images.device)].cpu()
        noise = image_noise(self.seed, FIRST_IMAGE + n * self.batch, self.batch, clean.shape[1:]).to(clean.dtype)
        return s, self.scheduler.add_noise(clean, noise, self.scheduler.timesteps[s : s + 1]), labels


def _make_budget(net, steps: int, speedup: float | None, cur: float | None) -> Budget | None:
    """The target's budget, None without a target."""
    if speedup is None and cur is None:
        return None
    most = fora(net, steps, 2)  # reuses everything that is learned
    for name, value, limit in (("target_speedup", speedup, most.speedup), ("target_cur", cur, most.cur)):
        if value is not None and is_number(value) and value > limit * (1 + 1e-9):
            raise ValueError(f"{name}: got {value}, expected at most {limit:.4g}, where every second step reuses "
                             "everything")
    return Budget(count_flops(net), steps, speedup=speedup, cur=cur)


@torch.no_grad()
def _train_pair(net, pairs: Pairs, training: Training, executor, cache: hk.FeatureCache) -> dict[str, float]:
    """Runs the next iteration and returns the values to log."""
    begun, n, router, device = time.monotonic(), training.trajectory, training.router, training.importance.device
    s, x, y = pairs.draw(n)
    x, y, t = x.to(device), y.to(device), pairs.scheduler.timesteps.to(device)
    model, C, conditions = Guided(net, 1.0, net.sample_shape[0]), x.shape[1], conditions_of(net, y)
    cache.rewind()
    output = executor(model, x, t[s], y, cache=cache, **conditions)
    x = pairs.scheduler.step(output[:, :C], pairs.scheduler.timesteps[s], x).prev_sample
    target = executor(model, x, t[s + 1], y, **conditions)
    with torch.enable_grad():
        r = router.score(s + 1)
    _, error, gradient = executor(student_step, model, x, t[s + 1], y, target, r.detach(), None, x.new_ones(()), cache,
                                  router.threshold, None, False, **conditions)
    loss = error + training.beta * r.detach().sum()
    if not loss.isfinite():
        raise FloatingPointError(f"the loss is not finite in iteration {n}; the last checkpoint is the one before it")
    r.backward(gradient + training.beta)
    training.optimizer.step()
    training.optimizer.zero_grad()
    router.clamp_(s + 1)
    training.trajectory += 1
    schedule = router.schedule()
    return dict(trajectory=n, seconds=time.monotonic() - begun, loss=loss.item(), error=error.item(),
                importance=1.0, beta=training.beta, threshold=router.threshold, cur=schedule.cur,
                speedup=schedule.speedup)


def _checksum(images: Tensor) -> int:
    """Of some 64 of the images, and of how many there are."""
    some = images[:: max(1, len(images) // 64)].float().cpu().contiguous()
    return zlib.crc32(some.numpy().tobytes(), len(images))
