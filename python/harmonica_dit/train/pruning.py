"""Structured width pruning in Diff-Pruning's manner: whole feed-forward channels and attention heads are removed."""

import copy
import math

import torch
from torch import Tensor, nn

from harmonica_dit.flops import Flops, count_flops
from harmonica_dit.models import DiT
from harmonica_dit.progress import progress_bar
from harmonica_dit.sample import check_labels, image_noise, sample
from harmonica_dit.sample.schedulers import ReferenceDDIM
from harmonica_dit.validate import check_whole, describe, is_number

from .learning_to_cache import LABEL_DROPOUT
from .settings import check_weights
from .start import FIRST_IMAGE

OWN_SAMPLES = 64


def prune(net: DiT, speedup: float, images: Tensor | None = None, labels=None, *, timesteps: int = 1000,
          threshold: float = 0.05, iterations: int = 0, batch: int = 128, lr: float = 2e-4, seed: int = 0,
          progress: bool = True) -> DiT:
    """A narrower copy of a DiT, in which each block has the same number of heads and hidden channels, fewer than now.

    What is removed has the least importance in its block: with the gradients of the diffusion loss summed over the
    timesteps, Σ |weight·gradient| over the weights that go with it (a head's rows of qkv and columns of proj, a
    channel's row of fc1 and column of fc2). Timesteps are walked from the least noise on, as long as their loss is at
    least `threshold` of the largest so far; those after it add little and disturb (the paper's pruned timesteps). All
    timesteps have the same images and noise.

    The published results have retraining after this, of a tenth to a fifth of the model's own training. Without it
    (iterations=0) images are far from the model's.

    Args:
        net: a DiT whose `attn` and `mlp` are plain; it stays as it is.
        speedup: of a forward, in FLOPs; it is met or just exceeded. Of heads and of channels about the same share is
            kept.
        images: [N, C, H, W] floating-point training images, of a latent model the scaled latents; the first `batch` of
            them make the importance. None takes 64 of the model's own samples.
        labels: [N] their classes; None with images hides all labels.
        timesteps: how many of the 1000 the loss is taken at, evenly spaced; the paper takes all.
        threshold: of the loss, see above; 0 takes all timesteps, which is plain Taylor pruning.
        batch: images a forward, here and in the retraining.
        iterations, lr: of the retraining, by AdamW on the diffusion loss, the rate falling along a cosine. It needs
            images.
        seed: decides the noise, and the order of the retraining.
        progress: whether a progress bar is shown.

    Returns:
        A DiT, which `sample`, `count_flops` and methods take as any other. Its name says that it is pruned.

    Raises:
        TypeError, ValueError: an argument is not as above, or no width reaches the speedup; the message names it.
        FloatingPointError: the loss is not finite.

    Source: Diff-Pruning (Fang et al., NeurIPS 2023, arXiv 2305.10924) and its published code, which prunes the
    convolutions of U-Nets; heads and hidden channels as groups are ours.
    """
    if not isinstance(net, DiT) or any(type(module) is not nn.Linear or type(module.weight) is not nn.Parameter
                                       for block in net.blocks for module in _linears(block)):
        raise TypeError(f"net: got {type(net).__name__}, expected a DiT whose blocks have plain linear layers")
    for name, value, least in (("timesteps", timesteps, 1), ("iterations", iterations, 0), ("batch", batch, 1),
                               ("seed", seed, 0)):
        check_whole(name, value, least)
    if timesteps > 1000:
        raise ValueError(f"timesteps: got {timesteps}, expected at most 1000")
    for name, value in (("threshold", threshold), ("lr", lr)):
        if not is_number(value) or value < 0:
            raise ValueError(f"{name}: got {value!r}, expected a number from 0 on")
    check_weights(net.pos_embed.dtype)
    heads, channels = _width(net, count_flops(net), speedup)
    if images is None:
        if iterations:
            raise ValueError("iterations: a retraining needs images; samples of its own would teach the model nothing")
        labels = torch.arange(OWN_SAMPLES) % net.num_classes if labels is None else labels
        images = sample(net, labels, first=FIRST_IMAGE, seed=seed).to(net.pos_embed.dtype)
    elif not isinstance(images, Tensor) or not images.is_floating_point() or images.shape[1:] != net.sample_shape:
        raise TypeError(f"images: got {describe(images)}, expected floating-point images [N, "
                        f"{', '.join(map(str, net.sample_shape))}]")
    labels = torch.full((len(images),), net.num_classes) if labels is None else check_labels(labels, net.num_classes)
    if len(labels) != len(images):
        raise ValueError(f"labels: got {len(labels)}, expected one for each of the {len(images)} images")
    pruned = copy.deepcopy(net)
    found = importance(pruned, images[:batch], labels[:batch], timesteps, threshold, seed)
    for block, (of_heads, of_channels) in zip(pruned.blocks, found, strict=True):
        _keep_heads(block.attn, of_heads.topk(heads).indices.sort().values)
        _keep_channels(block.mlp, of_channels.topk(channels).indices.sort().values)
    pruned.name = f"{net.name}, pruned to {heads} heads and {channels} channels"
    _retrain(pruned, images, labels, iterations, batch, lr, seed, progress)
    return pruned.eval().requires_grad_(False)


def importance(net: DiT, images: Tensor, labels: Tensor, timesteps: int, threshold: float,
               seed: int) -> list[tuple[Tensor, Tensor]]:
    """For each block, the importance of its heads [heads] and of its hidden channels [channels]; see `prune`."""
    weights = [linear.weight.requires_grad_() for block in net.blocks for linear in _linears(block)]
    gradients, largest = [torch.zeros_like(weight) for weight in weights], 0.0
    noise = image_noise(seed, FIRST_IMAGE, len(images), net.sample_shape).to(images)
    with torch.enable_grad():
        for t in torch.linspace(0, 999, timesteps).round().long():
            loss = diffusion_loss(net, images, labels, t.expand(len(images)), noise)
            if not loss.isfinite():
                raise FloatingPointError(f"the diffusion loss is not finite at timestep {t}")
            largest = max(largest, loss.item())
            if loss.item() < threshold * largest:
                break
            torch._foreach_add_(gradients, torch.autograd.grad(loss, weights))
    scores = iter([(weight * gradient).detach().abs() for weight, gradient in zip(weights, gradients, strict=True)])
    found = []
    for block, qkv, proj, fc1, fc2 in zip(net.blocks, scores, scores, scores, scores):
        H = block.attn.heads
        of_heads = qkv.view(3, H, -1).sum((0, 2)) + proj.view(len(proj), H, -1).sum((0, 2))
        found.append((of_heads, fc1.sum(1) + fc2.sum(0)))
    return found


def diffusion_loss(net, images: Tensor, labels: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """The mean squared error of the noise that the model finds in the noised images (Ho et al., 2020, eq. 14)."""
    device = next(net.parameters()).device
    x, noise = ReferenceDDIM().add_noise(images, noise, t).to(device), noise.to(device)
    output = net(x, t.to(device), labels.to(device))
    return (output[:, : noise.shape[1]].to(noise.dtype) - noise).square().mean()


def _linears(block: nn.Module) -> tuple[nn.Module, ...]:
    """The linears that are narrowed; the importance of a block is made from them in this order."""
    return block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2


def _width(net: DiT, flops: Flops, speedup: float) -> tuple[int, int]:
    """The heads and hidden channels of a block: for each number of heads the most channels that reach the speedup, and
    of these pairs the one that keeps most nearly the same share of both.
    """
    if not is_number(speedup) or speedup < 1:
        raise ValueError(f"speedup: got {speedup!r}, expected a number from 1 on")
    H, M = net.blocks[0].attn.heads, net.blocks[0].mlp.fc1.out_features
    head, channel = sum(flops.branches[::2]) / H, sum(flops.branches[1::2]) / M  # what one costs in all blocks
    pairs = []
    for heads in range(H, 0, -1):
        channels = min(M, math.floor((flops.total / speedup - flops.fixed - heads * head) / channel + 1e-6))
        if channels > 0:
            pairs.append((heads, channels))
    if not pairs:
        most = flops.total / (flops.fixed + head + channel)
        raise ValueError(f"speedup: got {speedup}, expected at most {most:.4g}, with one head and one channel left")
    return min(pairs, key=lambda pair: abs(pair[0] / H - pair[1] / M))


def _keep_heads(attention: nn.Module, heads: Tensor) -> None:
    H, width = attention.heads, attention.proj.in_features // attention.heads
    every = torch.arange(3 * H * width, device=heads.device).view(3, H, width)
    attention.qkv = _part(attention.qkv, rows=every[:, heads].flatten())
    attention.proj = _part(attention.proj, columns=every[0, heads].flatten())
    attention.heads = len(heads)


def _keep_channels(mlp: nn.Module, channels: Tensor) -> None:
    mlp.fc1, mlp.fc2 = _part(mlp.fc1, rows=channels), _part(mlp.fc2, columns=channels)


@torch.no_grad()
def _part(linear: nn.Linear, rows: Tensor | slice = slice(None), columns: Tensor | slice = slice(None)) -> nn.Linear:
    weight = linear.weight[rows][:, columns]
    made = nn.Linear(weight.shape[1], len(weight), bias=linear.bias is not None, device="meta")
    made.weight = nn.Parameter(weight.clone())
    if linear.bias is not None:
        made.bias = nn.Parameter(linear.bias[rows].clone())
    return made


def _retrain(net: DiT, images: Tensor, labels: Tensor, iterations: int, batch: int, lr: float, seed: int,
             progress: bool) -> None:
    """Trains all weights but the position embedding on the diffusion loss."""
    parameters = [p.requires_grad_() for p in net.parameters() if p is not net.pos_embed]
    optimizer = torch.optim.AdamW(parameters, lr, weight_decay=0)
    generator = torch.Generator().manual_seed(seed)
    with progress_bar(shown=progress and iterations > 0) as bar, torch.enable_grad():
        task = bar.add_task("retraining", total=iterations)
        for n in range(iterations):
            optimizer.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * n / iterations))
            chosen = torch.randint(len(images), (batch,), generator=generator)
            t = torch.randint(1000, (batch,), generator=generator)
            noise = torch.randn(batch, *net.sample_shape, generator=generator).to(images)
            y = labels[chosen].masked_fill(torch.rand(batch, generator=generator) < LABEL_DROPOUT, net.num_classes)
            loss = diffusion_loss(net, images[chosen.to(images.device)], y, t, noise)
            if not loss.isfinite():
                raise FloatingPointError(f"the loss is not finite in iteration {n}; try a smaller lr than {lr:g}")
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            bar.update(task, advance=1, description=f"loss {loss.item():.4f}")
