"""The first half of a feed-forward. Its hidden values are the widest tensor of a transformer."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harmonica_kernels import ops

from .plain_modules import is_plain_linear

# Where PyTorch's matrix product adds the bias and takes the GELU, in its tanh form, before it writes; on the CPU the
# same function takes the exact GELU. Only of these types: cuBLASLt has no such product in float64.
EPILOGUE, OF_TYPES = ("cuda",), (torch.float32, torch.bfloat16, torch.float16)
SLOW = ("cpu",)  # where PyTorch's GELU is slower than the kernel and a copy


def linear_gelu(linear: nn.Module, h: Tensor) -> Tensor:
    """GELU(linear(h)) in its tanh form.

    Where no gradient is wanted, a plain linear layer's bias and GELU cost no pass of their own on a device whose matrix
    product takes both, and elsewhere, as under autocast, one pass over the product, in place, by `ops.bias_gelu`. Both
    compute in float32, so a half-precision result is rounded once less. On the CPU the result is the same where a
    gradient is wanted, so that a forward has the same bits in training, recomputed, and in use.
    """
    device, grad = h.device.type, torch.is_grad_enabled()
    if is_plain_linear(linear) and linear.bias is not None and (not grad or device in SLOW):
        weight, bias = linear.weight, linear.bias
        if device in EPILOGUE and h.dtype in OF_TYPES and not torch.is_autocast_enabled(device):
            flat = torch._addmm_activation(bias, h.flatten(0, -2), weight.t(), use_gelu=True)
            return flat.unflatten(0, h.shape[:-1])
        product = F.linear(h, weight)
        return BiasGelu.apply(product, bias) if grad else ops.bias_gelu(product, bias, "tanh")
    return F.gelu(linear(h), approximate="tanh")


class BiasGelu(torch.autograd.Function):
    """`ops.bias_gelu` in its tanh form, differentiable; what it is given is kept, and so not written into."""

    @staticmethod
    def forward(ctx, x: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, bias)
        return ops.bias_gelu(x.clone(), bias, "tanh")

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        x, bias = ctx.saved_tensors
        inner = x + bias
        dx = torch.ops.aten.gelu_backward(grad, inner, approximate="tanh")
        dbias = dx.flatten(0, -2).sum(0).to(bias.dtype) if ctx.needs_input_grad[1] else None
        return dx.to(x.dtype), dbias
