"""The first half of a feed-forward. Its hidden values are the widest tensor of a transformer."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harmonica_kernels import ops

from .plain_modules import is_plain_linear

# Where PyTorch's matrix product adds the bias and takes the GELU, in its tanh form, before it writes; on the CPU the
# same function takes the exact GELU. Only of these types: cuBLASLt has no such product in float64.
EPILOGUE, OF_TYPES = ("cuda",), (torch.float32, torch.bfloat16, torch.float16)


def linear_gelu(linear: nn.Module, h: Tensor) -> Tensor:
    """GELU(linear(h)) in its tanh form.

    Where no gradient is wanted, a plain linear layer's bias and GELU cost no pass of their own on a device whose matrix
    product takes both, and elsewhere, as under autocast, one pass over the product, in place, if there is a kernel for
    it. Both compute in float32, so a half-precision result is rounded once less.
    """
    device = h.device.type
    if not torch.is_grad_enabled() and is_plain_linear(linear) and linear.bias is not None:
        weight, bias = linear.weight, linear.bias
        if device in EPILOGUE and h.dtype in OF_TYPES and not torch.is_autocast_enabled(device):
            flat = torch._addmm_activation(bias, h.flatten(0, -2), weight.t(), use_gelu=True)
            return flat.unflatten(0, h.shape[:-1])
        if device in ops.FUSED:
            return ops.bias_gelu(F.linear(h, weight), bias, "tanh")
    return F.gelu(linear(h), approximate="tanh")
