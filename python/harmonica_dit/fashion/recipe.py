"""The bundled denoiser's training recipe: a small class-conditional DiT on Fashion-MNIST.

At its end, `python -m harmonica_dit.fashion.recipe train` writes `weights/fashion_dit.safetensors` (the moving average
of the weights, fp16) and the training record `fashion_dit.json` beside it. Until then it keeps a checkpoint there.
After Ctrl-C the same command goes on from the checkpoint and ends with the same bits.
"""

import argparse
import json
import math
import time
from pathlib import Path
from statistics import fmean

import torch

from harmonica_dit.fashion import FASHION, FASHION_WEIGHTS, data
from harmonica_dit.files import load_tensors, optimizer_tensors, replacement, restore_optimizer, save_tensors
from harmonica_dit.models import DiT
from harmonica_dit.progress import progress_bar

LABEL_DROPOUT = 0.1  # share of labels that are hidden: from these the model learns the unconditional output


def alphas_cumprod() -> torch.Tensor:
    """ᾱ_t of the training noise [1000]: linear betas 1e-4..0.02 (Ho et al., 2020)."""
    return torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0).float()


def initialise(net: DiT) -> None:
    """DiT's initialisation (Peebles & Xie, 2023, section 3.2): Xavier linears, zero modulations and zero head."""
    for module in net.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.xavier_uniform_(module.weight)
            torch.nn.init.zeros_(module.bias)
    torch.nn.init.xavier_uniform_(net.x_embedder.proj.weight.flatten(1))
    torch.nn.init.zeros_(net.x_embedder.proj.bias)
    for weight in (net.y_embedder.embedding_table.weight, net.t_embedder.mlp[0].weight, net.t_embedder.mlp[2].weight):
        torch.nn.init.normal_(weight, std=0.02)
    for layer in (*(b.adaLN_modulation[1] for b in net.blocks), net.final_layer.adaLN_modulation[1],
                  net.final_layer.linear):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    net.pos_embed.data.copy_(position_embedding(net.pos_embed.shape[-1], math.isqrt(net.pos_embed.shape[1])))


def position_embedding(width: int, grid: int) -> torch.Tensor:
    """The fixed sine-cosine embedding [1, grid², width] of facebookresearch/DiT: first the column, then the row."""
    frequencies = 1 / 10000 ** (torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], 1)  # [grid, width/2]
    return torch.cat([axis.repeat(grid, 1), axis.repeat_interleave(grid, 0)], 1).float()[None]


def train(net: DiT, folder=data.FOLDER, out: Path = FASHION_WEIGHTS, steps: int = 4000, batch: int = 128,
          lr: float = 1.5e-3, warmup: int = 200, ema: float = 0.999, seed: int = 0, save_every: int = 250) -> None:
    """Initialises `net`, trains it to predict the noise, and writes its averaged weights to `out`.

    AdamW without weight decay, linear warm-up and cosine decay to 0, gradient norm clipped to 1, EMA of the weights.
    """
    images, labels = data.load("train", folder)
    abar, generator = alphas_cumprod(), torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    initialise(net)
    parameters = {name: p for name, p in net.named_parameters() if p.requires_grad}
    average = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer = torch.optim.AdamW(parameters.values(), lr, betas=(0.9, 0.99), weight_decay=0)
    checkpoint, first, log = out.with_suffix(".checkpoint"), 0, []
    if checkpoint.exists():
        tensors, state = load_tensors(checkpoint)
        if state["steps"] != steps:
            raise SystemExit(f"{checkpoint} is of a training of {state['steps']} steps, this one has {steps}; give "
                             "another --out, or remove it to start again")
        first, log = state["step"], state["log"]
        for name, p in parameters.items():
            p.data.copy_(tensors[f"net.{name}"])
            average[name].copy_(tensors[f"average.{name}"])
        restore_optimizer(optimizer, tensors)
        generator.set_state(tensors["generator"])

    start, losses = time.monotonic(), []
    with progress_bar() as progress:
        bar = progress.add_task("training", total=steps, completed=first)
        step = first
        try:
            for step in range(first, steps):
                rate = min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)))
                optimizer.param_groups[0]["lr"] = lr * rate
                chosen = torch.randint(len(images), (batch,), generator=generator)
                t = torch.randint(1000, (batch,), generator=generator)
                noise = torch.randn(batch, 1, 28, 28, generator=generator)
                hidden = torch.rand(batch, generator=generator) < LABEL_DROPOUT
                y = torch.where(hidden, net.num_classes, labels[chosen])
                a = abar[t].view(-1, 1, 1, 1)
                loss = (net(a.sqrt() * images[chosen] + (1 - a).sqrt() * noise, t, y) - noise).square().mean()
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
                optimizer.step()
                decay = min(ema, (1 + step) / (10 + step))
                torch._foreach_lerp_(list(average.values()), [p.detach() for p in parameters.values()], 1 - decay)
                losses.append(loss.item())
                if (step + 1) % save_every == 0:
                    log.append([step + 1, round(fmean(losses), 5)])
                    progress.update(bar, description=f"loss {fmean(losses):.4f}")
                    losses.clear()
                    save_tensors(checkpoint, {**{f"net.{n}": p for n, p in parameters.items()},
                                              **{f"average.{n}": p for n, p in average.items()},
                                              **optimizer_tensors(optimizer), "generator": generator.get_state()},
                                 {"step": step + 1, "steps": steps, "log": log})
                progress.advance(bar)
        except KeyboardInterrupt:
            raise SystemExit(f"stopped after {step} of {steps} steps; the same command goes on from step "
                             f"{step - step % save_every}") from None
    save_tensors(out, {n: p.half() for n, p in average.items()} | {"pos_embed": net.pos_embed.half()},
                 {"config": FASHION, "steps": steps})
    with replacement(out.with_suffix(".json")) as path:
        path.write_text(json.dumps(dict(
            config=FASHION, parameters=sum(p.numel() for p in parameters.values()), steps=steps, batch=batch, lr=lr,
            warmup=warmup, ema=ema, seed=seed, label_dropout=LABEL_DROPOUT, torch=torch.__version__,
            minutes_of_this_run=round((time.monotonic() - start) / 60, 1), loss=log)) + "\n")
    checkpoint.unlink(missing_ok=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("command", choices=["train"])
    parser.add_argument("--folder", default=data.FOLDER, help="folder of the four idx files")
    parser.add_argument("--out", type=Path, default=FASHION_WEIGHTS, help="file for the weights")
    parser.add_argument("--steps", type=int, default=4000)
    given = parser.parse_args()
    train(DiT(**FASHION), given.folder, given.out, given.steps)
