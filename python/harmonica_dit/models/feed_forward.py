"""The first half of a feed-forward, whose hidden values are the widest tensor of a transformer."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harmonica_kernels import ops


def linear_gelu(linear: nn.Linear, h: Tensor) -> Tensor:
    """GELU(linear(h)) in its tanh form, for a linear layer with bias.

    Where there is a kernel for it and no gradient is wanted, bias and GELU are one pass over the bare product, in
    place; float32 in between, so that a half precision is rounded once less.
    """
    if h.device.type in ops.FUSED and not torch.is_grad_enabled():
        return ops.bias_gelu(F.linear(h, linear.weight), linear.bias, "tanh")
    return F.gelu(linear(h), approximate="tanh")
