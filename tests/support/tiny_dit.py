"""The smallest DiT that a training has something to choose on."""

import torch

from harmonica_dit.models.dit import DiT


def tiny() -> DiT:
    """Random weights throughout, so that every branch matters; a learned variance, so that the loss has a choice."""
    torch.manual_seed(0)
    net = DiT(input_size=8, patch_size=4, in_channels=1, hidden_size=16, depth=2, num_heads=2, num_classes=4,
              name="tiny")
    with torch.no_grad():
        for p in net.parameters():
            if p.dim() > 1:
                p.normal_(0, p.shape[-1] ** -0.5)
    return net.eval()
