"""residual_norm beside the chain of PyTorch ops that it replaces, and beside a copy's memory bandwidth.

    python bench/bench_residual_norm.py [--threads 2] [--rotate 256] [--rounds 15]

Each round times every candidate once, in turn, so that a busy machine slows all of them alike; the table has ratios of
medians. Buffers rotate over at least `--rotate` MB, so that nothing is still in a cache from its last use. Bytes are
those that have to move: each argument read once, x and h written once (the floor of docs/design.md). For the bandwidth
the op is given its h, as the copy is given its target; `ours` and `eager` allocate their results, as in use.
"""

import argparse
import time
from statistics import median

import torch
from torch.nn.functional import layer_norm

from harmonica_kernels.ops import Term, residual_norm

# B, N, D, run length, dtype
CASES = [
    (32, 256, 1152, 0, torch.float32), (32, 256, 1152, 1, torch.float32), (32, 256, 1152, 2, torch.float32),
    (32, 256, 1152, 8, torch.float32), (32, 256, 1152, 1, torch.bfloat16), (32, 256, 1152, 8, torch.bfloat16),
    (32, 49, 128, 1, torch.float32), (32, 49, 128, 4, torch.float32), (2, 256, 1152, 1, torch.float32),
    (1, 1, 1152, 1, torch.float32),
]


class Case:
    """One shape: as many sets of buffers as fill `rotate` bytes, and the candidates that work on a set."""

    def __init__(self, b, n, d, run, dtype, rotate):
        self.values, self.size = b * n * d, torch.empty(0, dtype=dtype).element_size()
        sets = max(2, -(-rotate // (self.values * self.size * (run + 2))))
        self.x = [torch.randn(b, n, d, dtype=dtype) for _ in range(sets)]
        # Outputs small enough that x, which the ops keep adding to, does not overflow.
        self.o = [[torch.randn(b, n, d, dtype=dtype) * 1e-3 for _ in range(run)] for _ in range(sets)]
        rows = torch.randn(run + 2, b, d, dtype=dtype)
        self.shift, self.scale, self.gates = rows[0], rows[1], rows[2:]
        self.h = [torch.empty_like(x) for x in self.x]
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

    def __init__(self, rotate):
        self.x = [torch.randn(32, 256, 1152) for _ in range(max(4, rotate // (32 * 256 * 1152 * 4)))]
        self.bytes = 2 * self.x[0].nbytes

    def run(self, i):
        self.x[i].copy_(self.x[i - 1])


def timed(f, sets, start, repeats):
    begin = time.perf_counter()
    for i in range(repeats):
        f((start + i) % sets)
    return (time.perf_counter() - begin) / repeats


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rotate", type=int, default=256, help="MB of buffers to rotate over")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rotate = args.rotate << 20

    print(f"{args.threads} threads; times are medians of {args.rounds} interleaved rounds")
    print(f"{'B, N, D':>14} {'dtype':>8} {'R':>2} {'ours us':>9} {'eager/ours':>10} {'GB/s':>6} {'copy GB/s':>9} "
          f"{'ours/copy':>9}")
    with torch.inference_mode():
        copy = Copy(rotate)
        for b, n, d, run, dtype in CASES:
            case = Case(b, n, d, run, dtype, rotate)
            repeats = max(1, (1 << 24) // case.bytes)
            rounds = []
            for round in range(args.rounds + 2):
                rounds.append([timed(f, len(case.x), round * repeats, repeats) for f in (case.ours, case.eager)]
                              + [timed(copy.run, len(copy.x), round, 1)])
            ours, eager, copied = (median(times) for times in zip(*rounds[2:]))
            speed, copy_speed = case.bytes / ours / 1e9, copy.bytes / copied / 1e9
            print(f"{f'{b}, {n}, {d}':>14} {str(dtype)[6:]:>8} {run:>2} {ours * 1e6:>9.1f} {eager / ours:>10.2f} "
                  f"{speed:>6.1f} {copy_speed:>9.1f} {speed / copy_speed:>9.2f}", flush=True)


if __name__ == "__main__":
    main()
