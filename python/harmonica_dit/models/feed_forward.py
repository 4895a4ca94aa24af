"""The first half of a feed-forward. Its hidden values are the widest tensor of a transformer."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harmonica_kernels import ops

from .plain_modules import is_plain_linear


def linear_gelu(linear: nn.Module, h: Tensor) -> Tensor:
    """GELU(linear(h)) in its tanh form.

    If the device has the kernel and no gradient is wanted, bias and GELU of a plain linear layer take one pass over the
    product, in place. The kernel computes in float32, so a half-precision result is rounded once less.
    """
    fused = h.device.type in ops.FUSED and not torch.is_grad_enabled()
    if fused and is_plain_linear(linear) and linear.bias is not None:
        return ops.bias_gelu(F.linear(h, linear.weight), linear.bias, "tanh")
    return F.gelu(linear(h), approximate="tanh")
