"""The first half of a feed-forward. Its hidden values are the widest tensor of a transformer."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harmonica_kernels import ops


def linear_gelu(linear: nn.Linear, h: Tensor) -> Tensor:
    """GELU(linear(h)) in its tanh form, for a linear layer with bias.

    If the device has the kernel and no gradient is wanted, bias and GELU take one pass over the product, in place. The
    kernel computes in float32, so a half-precision result is rounded once less.
    """
    if h.device.type in ops.FUSED and not torch.is_grad_enabled():
        return ops.bias_gelu(F.linear(h, linear.weight), linear.bias, "tanh")
    return F.gelu(linear(h), approximate="tanh")
