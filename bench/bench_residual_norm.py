"""residual_norm beside the chain of PyTorch ops that it replaces, and beside a copy's memory bandwidth.

    OMP_NUM_THREADS=2 python -m pytest bench/bench_residual_norm.py

Buffers rotate over at least 256 MB, so that nothing is still in a cache from its last use. Bytes are those that have to
move: each argument read once, x and h written once (the floor of docs/design.md). Ours is given its h, as by
`cached_forward` and as the copy is given its target; PyTorch's chain allocates its results, as in use.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from bench.record import cell
from bench.replay import Measured
from harmonica_dit.timing import interleave, medians
from harmonica_kernels.ops import Term, residual_norm


class Shape(NamedTuple):
    """x is [B, N, D]; R branches are accumulated."""

    B: int
    N: int
    D: int
    R: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"[{self.B}, {self.N}, {self.D}] {str(self.dtype)[6:]} R={self.R}"


F32, BF16 = torch.float32, torch.bfloat16
CASES = [
    Shape(32, 256, 1152, 0, F32), Shape(32, 256, 1152, 1, F32), Shape(32, 256, 1152, 2, F32),
    Shape(32, 256, 1152, 8, F32), Shape(32, 256, 1152, 1, BF16), Shape(32, 256, 1152, 8, BF16),
    Shape(32, 49, 128, 1, F32), Shape(32, 49, 128, 4, F32), Shape(2, 256, 1152, 1, F32), Shape(1, 1, 1152, 1, F32),
]
ROTATE = 256 << 20
AT_ONCE = 16 << 20  # bytes of short calls that are timed together
T = TypeVar("T")
TINY = dict(rows=1, rotate=1, rounds=1, warmup=0)
COLUMNS = {
    "shape": cell("shape"),
    "ours, µs": cell("ours_us", "{:.3g}"),
    "eager / ours": cell("eager_over_ours", "{:.2f}"),
    "ours, GB/s": cell("ours_gb_s", "{:.3g}"),
    "copy, GB/s": cell("copy_gb_s", "{:.3g}"),
    "ours / copy": cell("ours_over_copy", "{:.3f}"),
}
CAPTION = "eager: PyTorch's chain. ours / copy: in bytes per second."


def chain(x: Tensor, outputs: Sequence[Tensor], gates: Sequence[Tensor], shift: Tensor,
          scale: Tensor) -> tuple[Tensor, Tensor]:
    """x' and h, op by op."""
    for o, gate in zip(outputs, gates):
        x = x + gate.unsqueeze(1) * o
    return x, layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class Case:
    """One shape: as many sets of buffers as fill `rotate` bytes, and the candidates that work on a set."""

    def __init__(self, shape: Shape, rotate: int):
        b, n, d, run, dtype = shape
        self.values, self.size = b * n * d, torch.empty(0, dtype=dtype).element_size()
        sets = max(2, -(-rotate // (self.values * self.size * (run + 2))))
        self.x = [torch.randn(b, n, d, dtype=dtype) for _ in range(sets)]
        # Outputs small enough that x, which the ops keep adding to, does not overflow.
        self.o = [[torch.randn(b, n, d, dtype=dtype) * 1e-3 for _ in range(run)] for _ in range(sets)]
        rows = torch.randn(run + 2, b, d, dtype=dtype)
        self.shift, self.scale, self.gates = rows[0], rows[1], rows[2:]
        self.h = [torch.ones_like(x) for x in self.x]  # pages that are there already, as a body's input has
        self.runs = [[Term(o, None, gate) for o, gate in zip(outputs, self.gates)] for outputs in self.o]
        self.bytes = self.values * self.size * (run + (3 if run else 2))

    def ours(self, i) -> tuple[Tensor, Tensor]:
        """x' and h, x' in x's place."""
        h = residual_norm(self.x[i], self.runs[i], self.shift, self.scale, x_out=self.x[i] if self.o[i] else None,
                          h_out=self.h[i])  # as cached_forward calls it: the bodies share one input buffer
        return self.x[i], h

    def eager(self, i, chain=chain) -> tuple[Tensor, Tensor]:
        return chain(self.x[i], self.o[i], self.gates, self.shift, self.scale)

    def repeats(self, most: int) -> int:
        """How many calls are timed together so that they move about so many bytes, where one moves few."""
        return max(1, most // self.bytes)



def in_turn(call: Callable[[int], T], sets: int, times: int = 1) -> Callable[[], T]:
    """A function that calls `times` times, with the numbers of the sets in turn, and returns the last result."""
    numbers = itertools.cycle(range(sets))

    def run() -> T:
        for i in itertools.islice(numbers, times):
            result = call(i)
        return result
    return run


class Copy:
    """`copy_` between buffers of [rows, 256, 1152] float32 that fill `rotate` bytes, one read and one write."""

    def __init__(self, rows: int, rotate: int):
        self.x = [torch.randn(rows, 256, 1152) for _ in range(max(2, rotate // (rows * 256 * 1152 * 4)))]
        self.bytes = 2 * self.x[0].nbytes

    def run(self, i):
        self.x[i].copy_(self.x[i - 1])


@pytest.fixture(scope="module")
def copy(settings) -> Copy:
    return Copy(**settings(dict(rows=1, rotate=1), rows=32, rotate=ROTATE))


@pytest.fixture(scope="module", params=CASES, ids=str)
def measured(request, settings, copy):
    return measure(request.param, copy, **settings(TINY, rows=None, rotate=ROTATE, rounds=15, warmup=2))


@pytest.mark.parametrize("candidate", ["ours", "eager", "copy"])
def test_residual_norm(measured, replay, candidate):
    replay(measured, candidate)


@torch.inference_mode()
def measure(shape: Shape, copy: Copy, rows: int | None, rotate: int, rounds: int, warmup: int) -> Measured:
    """rows: at most so many, B."""
    timed = shape if rows is None else shape._replace(B=min(rows, shape.B))
    case = Case(timed, rotate)
    repeats = case.repeats(min(rotate, AT_ONCE))
    seconds = interleave({"ours": in_turn(case.ours, len(case.x), repeats),
                          "eager": in_turn(case.eager, len(case.x), repeats),
                          "copy": in_turn(copy.run, len(copy.x))}, rounds, warmup=warmup)
    for name in ("ours", "eager"):
        seconds[name] = [value / repeats for value in seconds[name]]
    middle = medians(seconds)
    speed, copy_speed = case.bytes / middle["ours"], copy.bytes / middle["copy"]
    row = dict(shape=str(timed), ours_us=middle["ours"] * 1e6, eager_over_ours=middle["eager"] / middle["ours"],
               ours_gb_s=speed / 1e9, copy_gb_s=copy_speed / 1e9, ours_over_copy=speed / copy_speed)
    return Measured(str(shape), seconds, {"ours": row})
