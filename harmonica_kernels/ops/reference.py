"""Every op in plain torch, for the tests to compare to. Differentiable, in the dtype of its arguments.

Shapes: batch B, tokens N, width D. Modulation rows (gate, shift, scale) are [B or 1, D], or None.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm

from .run import Term


def forecast(term: Term, e: float | Tensor) -> Tensor:
    """A branch's output [B, N, D], forecast to first order from the last two computed; e = 0 repeats the latest."""
    return term.latest if term.previous is None else (1 + e) * term.latest - e * term.previous


def norm_modulate(x: Tensor, shift: Tensor | None, scale: Tensor | None, norm: bool, eps: float) -> Tensor:
    """`LN(x)·(1 + scale) + shift` (norm=False: without the LN), adaLN of Peebles & Xie, 2023."""
    h = layer_norm(x, x.shape[-1:], eps=eps) if norm else x
    if scale is not None:
        h = h * (1 + scale.unsqueeze(1))
    return h if shift is None else h + shift.unsqueeze(1)


def residual_norm(x: Tensor, run: Sequence[Term], e: Sequence[float | Tensor], shift: Tensor | None,
                  scale: Tensor | None, norm: bool = True, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """(x', h): `x' = x + Σ gate·o` over the run, `h` the modulated norm of x'."""
    for term, weight in zip(run, e, strict=True):
        o = forecast(term, weight)
        x = x + (o if term.gate is None else term.gate.unsqueeze(1) * o)
    return x, norm_modulate(x, shift, scale, norm, eps)


def blend_residual_norm(x: Tensor, run: Sequence[Term], e: Sequence[float | Tensor], shift: Tensor | None,
                        scale: Tensor | None, fresh: Tensor, r: Tensor, norm: bool = True,
                        eps: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    """(x', h, o): like `residual_norm` for a run whose first output is blended, `o = r·fresh + (1 - r)·reuse`."""
    o = r * fresh + (1 - r) * forecast(run[0], e[0])
    blended = [Term(o, None, run[0].gate), *run[1:]]
    x, h = residual_norm(x, blended, [0.0, *e[1:]], shift, scale, norm, eps)
    return x, h, o


def cache_commit(latest: Tensor, previous: Tensor | None, o: Tensor, r: Tensor,
                 threshold: float) -> tuple[Tensor, Tensor | None]:
    """(latest', previous'): (o, latest) if r > threshold, else unchanged."""
    return (o, None if previous is None else latest) if r.item() > threshold else (latest, previous)


def bias_gelu(x: Tensor, bias: Tensor, exact: bool) -> Tensor:
    """`GELU(x + bias)`, computed in float32 at least; x [..., D], bias [D]."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return gelu(x.to(wide) + bias, approximate="none" if exact else "tanh")


def guided_step(x: Tensor, conditional: Tensor, unconditional: Tensor | None, guidance: float, channels: int, a: float,
                b: float, table: Tensor | None, step: Tensor | None) -> Tensor:
    """`a·x + b·ε`, ε guided on the first channels; all [B, C, ...]. With a table [T, 2], its row `step` is (a, b)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    eps = conditional.to(wide)
    if unconditional is not None:
        guided = unconditional.to(wide)[:, :channels].lerp(eps[:, :channels], guidance)
        eps = torch.cat([guided, eps[:, channels:]], 1)
    if table is not None:
        row = 0 if step is None else step.item()
        a, b = table[row].to(wide) if 0 <= row < len(table) else (torch.nan, torch.nan)
    return a * x.to(wide) + b * eps
