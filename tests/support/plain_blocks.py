"""A trajectory whose blocks a test walks through itself: the yardstick of methods that leave blocks out."""

import torch

from harmonica_dit.models import DiT
from harmonica_dit.sample import make_scheduler
from support.plain_dit import PlainDiT

SIZES = dict(input_size=8, patch_size=4, in_channels=1, hidden_size=16, depth=4, num_heads=2, num_classes=4,
             learn_sigma=False)


def four_blocks() -> DiT:
    """A small model with random weights, gates among them."""
    torch.manual_seed(0)
    net = DiT(**SIZES, name="four").eval().requires_grad_(False)
    for p in net.parameters():
        p.normal_(std=0.2)
    return net


@torch.no_grad()
def denoise_by_blocks(net: DiT, labels, noise, steps: int, guidance: float, walk) -> torch.Tensor:
    """Images of a `four_blocks` in plain torch. walk(s, blocks, x, c): what x is after all blocks at step s."""
    plain, scheduler = PlainDiT(**SIZES), make_scheduler("ddim", steps)
    plain.load_state_dict(net.state_dict())
    blocks = plain.blocks
    del plain.blocks
    both, x = torch.cat([labels, torch.full_like(labels, 4)]), noise
    for s, t in enumerate(scheduler.timesteps):
        plain.blocks = [lambda tokens, c, s=s: walk(s, blocks, tokens, c)]
        given, none = plain(torch.cat([x, x]), t.expand(len(both)), both).chunk(2)
        x = scheduler.step(none + guidance * (given - none), t, x).prev_sample
    return x
