"""Classifier-free guidance fused with the scheduler's linear update: sampling, no autograd."""

import torch
from torch import Tensor

from . import reference
from ._arguments import Arguments, Dense, refusal
from ._library import library


def guided_step(x: Tensor, conditional: Tensor, unconditional: Tensor | None = None, *, guidance: float = 1.0,
                channels: int | None = None, a: float = 1.0, b: float = 1.0, table: Tensor | None = None,
                step: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """`x' = a·x + b·ε`, with `ε = uncond + guidance·(cond - uncond)` on the first `channels` channels (Ho & Salimans,
    2022; the reference guides 3 of 4) and `ε = cond` on the others. Computed in float32 (float64 where x is).

    x: [B, C, ...] latents. conditional, unconditional: [B, C', ...] model outputs, C' >= C; channels beyond C (a
    learned variance) are not read. Without unconditional, ε = cond. channels: 0 to C', None for all.
    a, b: the update's coefficients. table: a float tensor [T, 2] of (a, b) on x's device, which replaces them. step:
    the row of the table, an int32 or int64 tensor of one element, read on the device (None: row 0). A step outside
    the table makes the result NaN.
    out: [B, C, ...] contiguous, receives x' and is returned; may be x itself; None makes a new one.
    On the CPU this is plain torch.

    Raises ValueError (shapes, layout, overlap, devices), TypeError (dtypes), NotImplementedError (neither CPU nor
    CUDA), and RuntimeError if a gradient is asked for.
    """
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, conditional, unconditional)):
        raise RuntimeError("guided_step is for sampling and gives no gradients: call it under torch.no_grad()")
    if x.dim() < 3:
        raise ValueError(f"guided_step: x must be [B, C, ...], got {list(x.shape)}")
    C = x.shape[1]
    if not 0 <= (channels := C if channels is None else channels):
        raise ValueError(f"guided_step: channels must be at least 0, got {channels}")
    out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    torch.ops.harmonica.guided_step.default(
        None if out is x else x, out, conditional[:, :C], None if unconditional is None else unconditional[:, :C],
        guidance, min(channels, C), a, b, table, step)
    return out


# x = None: in place.
library.define(
    "guided_step(Tensor? x, Tensor(a!) out, Tensor conditional, Tensor? unconditional, float guidance, int channels, "
    "float a, float b, Tensor? table, Tensor? step) -> ()")


class _Entries(Dense):
    """Also takes tensors that are dense only within each batch entry: cutting channels beyond C off leaves gaps."""

    def is_dense(self, t: Tensor) -> bool:
        return t.shape[0] == 0 or t[0].is_contiguous()


def _pack(kind: type[Arguments], x, out, conditional, unconditional, guidance, channels, a, b, table, step) -> tuple:
    like = out if x is None else x
    pack = kind("guided_step", like.flatten(2))

    def latents(t: Tensor | None, name: str, is_out: bool = False):
        if t is not None and t.shape != like.shape:
            raise ValueError(f"guided_step: {name} must be [B, C, ...] = {list(like.shape)} like x"
                             f"{'' if is_out else ', or have more channels'}, got {list(t.shape)}")
        return None if t is None else pack.activation(t.flatten(2), name, out=is_out)

    if table is not None and (table.dim() != 2 or table.shape[1] != 2 or not table.is_floating_point()):
        raise ValueError(f"guided_step: table must be a float tensor [T, 2], got {list(table.shape)} of {table.dtype}")
    if step is not None and (table is None or step.numel() != 1 or step.dtype not in (torch.int32, torch.int64)):
        raise ValueError("guided_step: step must be an int32 or int64 tensor of one element, and comes with a table; "
                         f"got {list(step.shape)} of {step.dtype}" + ("" if table is not None else " without one"))
    for name, t in (("table", table), ("step", step)):
        if t is not None and t.device != like.device:
            raise ValueError(f"guided_step: {name} is on {t.device}, expected {like.device} like x")
    if not out.is_contiguous():
        raise ValueError(f"guided_step: out must be contiguous, got strides {out.stride()}")
    out_ = latents(out, "out", True)
    return pack, (out_ if x is None else latents(x, "x"), out_, latents(conditional, "conditional"),
                  latents(unconditional, "unconditional"), guidance, channels, a, b,
                  None if table is None else table.contiguous(), step)


def _cpu(x, out, *rest) -> None:
    _pack(Arguments, x, out, *rest)
    out.copy_(reference.guided_step(out if x is None else x, *rest))


def _cuda(x, out, *rest) -> None:
    from .. import triton_kernels

    pack, packed = _pack(_Entries, x, out, *rest)
    pack.refuse_overlap()
    triton_kernels.guided_step(*packed)
    torch.autograd.graph.increment_version(out)


def _fake(*arguments) -> None:
    _pack(Arguments, *arguments)


library.impl("guided_step", _cpu, "CPU")
library.impl("guided_step", _cuda, "CUDA")
library.impl("guided_step", refusal("guided_step"), "CompositeExplicitAutograd")
torch.library.register_fake("harmonica::guided_step", _fake, lib=library)
