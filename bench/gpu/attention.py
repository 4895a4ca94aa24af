"""Attention back ends at DiT-XL/2's shape: 16 heads of 72, 256 tokens, bfloat16; each in a CUDA graph.

The fastest at 2 rows of those that a DiT can be given is the one that the parts after this one use.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.timing import capture, relative_error, side_stream

from .kernels import LAUNCHES
from .record import Record

ROUNDS, TOLERANCE = 25, 1e-2
BACK_ENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION,
             "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH}

OFFERED = {"PyTorch's choice": "sdpa", "flash": "flash", "cuDNN": "cudnn", "xformers": "xformers"}  # to a DiT


def run(record: Record) -> None:
    N, heads, d = (8, 2, 8) if record.tiny else (256, 16, 72)
    for rows in (2, 16):
        with record.attempt(f"{rows} rows"), side_stream(record.device), torch.inference_mode():
            measure(record, rows, N, heads, d)


def measure(record: Record, rows: int, N: int, heads: int, d: int) -> None:
    # as the model has them: views of one projection's output, a set of its own for each launch
    launches = 2 if record.tiny else LAUNCHES
    qkv = [torch.randn(rows, N, 3, heads, d, device=record.device).bfloat16() for _ in range(launches)]
    exact = sdpa(*(t.double() for t in qkv[0].unbind(2)))
    candidates, wrong = {}, set()
    for name, attention in back_ends(record.tiny).items():
        try:
            found = attention(*qkv[0].unbind(2))
        except (ImportError, RuntimeError) as reason:  # not installed, or not for this shape and device
            record.row(rows=rows, back_end=name, refused=str(reason)[:200])
            continue
        with record.attempt(f"{rows} rows, {name}"):
            if not record.check(f"{rows} rows, {name}", relative_error(found, exact), TOLERANCE):
                wrong.add(name)
            candidates[name] = capture(lambda f=attention: [f(*t.unbind(2)) for t in qkv], record.device)
    seconds = record.time(f"{rows} rows", candidates, ROUNDS, launches=launches)
    offered = [name for name in seconds if name in OFFERED and name not in wrong]
    if rows == 2 and offered:
        record.note("fastest", OFFERED[min(offered, key=seconds.get)])
    for name, value in sorted(seconds.items(), key=lambda item: item[1]):
        record.row(rows=rows, back_end=name, **{"µs": value * 1e6, "TFLOP/s": 4e-12 * rows * heads * N * N * d / value},
                   **(dict(valid=False) if name in wrong else {}))


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q, k, v [B, N, heads, d], and the like back."""
    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


def back_ends(tiny: bool) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """PyTorch's own choice, each of its back ends, and xformers; a CPU has but the choice and the plain one."""
    def only(back_end: SDPBackend) -> Callable[..., Tensor]:
        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(back_end):
                return sdpa(q, k, v)
        return attention

    def xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from xformers.ops import memory_efficient_attention
        return memory_efficient_attention(q, k, v)

    found = {"PyTorch's choice": sdpa} | {name: only(one) for name, one in BACK_ENDS.items()} | {"xformers": xformers}
    return {name: found[name] for name in ("PyTorch's choice", "math")} if tiny else found
