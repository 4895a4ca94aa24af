"""residual_norm beside the chain of PyTorch ops that it replaces, and beside a copy's memory bandwidth.

    OMP_NUM_THREADS=2 python -m pytest bench/bench_residual_norm.py

Buffers rotate over at least 256 MB, so that nothing is still in a cache from its last use. Bytes are those that have to
move: each argument read once, x and h written once (the floor of docs/design.md). Ours is given its h, as by
`cached_forward` and as the copy is given its target; PyTorch's chain allocates its results, as in use.
"""

import time

import pytest
import torch
from torch.nn.functional import layer_norm

from harmonica_kernels.ops import Term, residual_norm

ROTATE = 256 << 20
ROUNDS = 15
# B, N, D, run length, dtype
CASES = [
    (32, 256, 1152, 0, torch.float32), (32, 256, 1152, 1, torch.float32), (32, 256, 1152, 2, torch.float32),
    (32, 256, 1152, 8, torch.float32), (32, 256, 1152, 1, torch.bfloat16), (32, 256, 1152, 8, torch.bfloat16),
    (32, 49, 128, 1, torch.float32), (32, 49, 128, 4, torch.float32), (2, 256, 1152, 1, torch.float32),
    (1, 1, 1152, 1, torch.float32),
]


class Case:
    """One shape: as many sets of buffers as fill ROTATE bytes, and the candidates that work on a set."""

    def __init__(self, b, n, d, run, dtype):
        self.values, self.size = b * n * d, torch.empty(0, dtype=dtype).element_size()
        sets = max(2, -(-ROTATE // (self.values * self.size * (run + 2))))
        self.x = [torch.randn(b, n, d, dtype=dtype) for _ in range(sets)]
        # Outputs small enough that x, which the ops keep adding to, does not overflow.
        self.o = [[torch.randn(b, n, d, dtype=dtype) * 1e-3 for _ in range(run)] for _ in range(sets)]
        rows = torch.randn(run + 2, b, d, dtype=dtype)
        self.shift, self.scale, self.gates = rows[0], rows[1], rows[2:]
        self.h = [torch.ones_like(x) for x in self.x]  # pages that are there already, as a body's input has
        self.runs = [[Term(o, None, gate) for o, gate in zip(outputs, self.gates)] for outputs in self.o]
        self.bytes = self.values * self.size * (run + (3 if run else 2))

    def ours(self, i):
        residual_norm(self.x[i], self.runs[i], self.shift, self.scale, x_out=self.x[i] if self.o[i] else None,
                      h_out=self.h[i])  # as cached_forward calls it: the bodies share one input buffer

    def eager(self, i):
        x = self.x[i]
        for o, gate in zip(self.o[i], self.gates):
            x = x + gate.unsqueeze(1) * o
        layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + self.scale.unsqueeze(1)) + self.shift.unsqueeze(1)


class Copy:
    """`copy_` between buffers of [32, 256, 1152] float32, one read and one write."""

    def __init__(self):
        self.x = [torch.randn(32, 256, 1152) for _ in range(ROTATE // (32 * 256 * 1152 * 4))]
        self.bytes = 2 * self.x[0].nbytes

    def run(self, i):
        self.x[i].copy_(self.x[i - 1])


@pytest.fixture(scope="module")
def copy() -> Copy:
    return Copy()


@pytest.mark.parametrize("b, n, d, run, dtype", CASES)
def test_residual_norm(interleaved, report, copy, b, n, d, run, dtype):
    case = Case(b, n, d, run, dtype)
    repeats = max(1, (1 << 24) // case.bytes)  # short calls several at once

    def each(f):
        def timed(number):
            start = time.perf_counter()
            for i in range(repeats):
                f((number * repeats + i) % len(case.x))
            return (time.perf_counter() - start) / repeats
        return timed

    with torch.inference_mode():
        seconds = interleaved({"ours": each(case.ours), "eager": each(case.eager),
                               "copy": lambda number: copy.run(number % len(copy.x))}, ROUNDS)
    speed, copy_speed = case.bytes / seconds["ours"], copy.bytes / seconds["copy"]
    report(shape=f"[{b}, {n}, {d}]", dtype=str(dtype)[6:], R=run, **{
        "ours, µs": seconds["ours"] * 1e6, "eager / ours": seconds["eager"] / seconds["ours"],
        "ours, GB/s": speed / 1e9, "copy, GB/s": copy_speed / 1e9, "ours / copy": speed / copy_speed})
