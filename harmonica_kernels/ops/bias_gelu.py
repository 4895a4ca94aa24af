"""The feed-forward's bias and GELU, fused and in place: inference, no autograd."""

import torch
from torch import Tensor

from . import reference
from ._arguments import Arguments, Dense, Pointers, refusal
from ._library import kernels, library


def bias_gelu(x: Tensor, bias: Tensor, approximate: str = "none") -> Tensor:
    """`x ← GELU(x + bias)` (Hendrycks & Gimpel, 2016), in place; returns x. Computed in float32 (float64 where x is).

    x: [..., D] contiguous. bias: [D]. approximate: "none" (exact) or "tanh", as in torch.nn.functional.gelu.
    On the CPU the exact form is plain torch.

    Raises ValueError (shapes, layout, overlap, devices, approximate), TypeError (dtypes), NotImplementedError (neither
    CPU nor CUDA), and RuntimeError if a gradient is asked for: torch.nn.functional.gelu is differentiable.
    """
    if approximate not in ("none", "tanh"):
        raise ValueError(f'bias_gelu: approximate must be "none" or "tanh", got {approximate!r}')
    if torch.is_grad_enabled() and (x.requires_grad or bias.requires_grad):
        raise RuntimeError("bias_gelu is for inference and gives no gradients: call it under torch.no_grad(), or use "
                           "torch.nn.functional.gelu")
    if x.dim() == 0 or bias.shape != x.shape[-1:]:
        raise ValueError(f"bias_gelu: bias must be [D] for x [..., D], got {list(bias.shape)} for {list(x.shape)}")
    if not x.is_contiguous():
        raise ValueError(f"bias_gelu: x is written to and must be contiguous, got strides {x.stride()}")
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    torch.ops.harmonica.bias_gelu.default(x.view(1, rows, x.shape[-1]), bias.unsqueeze(0), approximate == "none")
    return x


library.define("bias_gelu(Tensor(a!) x, Tensor bias, bool exact) -> ()")


def _pack(kind: type[Arguments], x, bias) -> tuple:
    pack = kind("bias_gelu", x)
    return pack, pack.activation(x, "x", out=True), pack.rows(bias, "bias")


def _cpu(x, bias, exact) -> None:
    _pack(Dense, x, bias)[0].refuse_overlap()
    if exact:
        x.copy_(reference.bias_gelu(x, bias, exact))
        return
    pack, x_, bias_ = _pack(Pointers, x, bias)
    kernels.bias_gelu(tuple(x.shape), x_, bias_, torch.get_num_threads())
    torch.autograd.graph.increment_version(x)


def _cuda(x, bias, exact) -> None:
    from .. import triton_kernels

    pack, x_, (bias_, _) = _pack(Dense, x, bias)
    pack.refuse_overlap()
    triton_kernels.bias_gelu(x_, bias_, exact)
    torch.autograd.graph.increment_version(x)


def _fake(x, bias, exact) -> None:
    _pack(Arguments, x, bias)


library.impl("bias_gelu", _cpu, "CPU")
library.impl("bias_gelu", _cuda, "CUDA")
library.impl("bias_gelu", refusal("bias_gelu"), "CompositeExplicitAutograd")
torch.library.register_fake("harmonica::bias_gelu", _fake, lib=library)
