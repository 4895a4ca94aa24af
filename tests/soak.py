"""Ten thousand forwards with a cache, trajectory after trajectory: memory must not grow. `make soak`.

    PYTHONPATH=tests python tests/soak.py [FORWARDS]
"""

import os
import resource
import sys
from pathlib import Path

import torch

import harmonica_kernels as hk
from support.naive_forward import K, Toy

STEPS = 10
MOST = 2 << 20  # bytes that the process may grow by after the first tenth


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def trajectories(toy: Toy, forwards: int) -> tuple[int, set[int]]:
    """Runs so many forwards; bytes resident afterwards, and what the caches held at the end of each trajectory."""
    held = set()
    for n in range(forwards // STEPS):
        soft = n % 4 == 3
        toy.calls.clear()
        cache = hk.FeatureCache(1 + n % 2) if n % 5 else hk.TrunkCache(2)
        for s in range(STEPS):
            row = None if s == 0 or not n % 5 else torch.rand(K, requires_grad=True) if soft else tuple(
                (k + s) % 2 == 0 for k in range(K))
            with torch.set_grad_enabled(soft):
                y = toy(toy.x, row=row, cache=cache)
            if soft and y.requires_grad:
                y.sum().backward()
        held.add(cache.nbytes)
    return resident(), held


def main() -> int:
    forwards = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    torch.manual_seed(0)
    toy = Toy(2, 16, 64, torch.float32)
    first, held = trajectories(toy, forwards // 10)
    last, held_later = trajectories(toy, forwards - forwards // 10)
    print(f"{forwards:,} forwards in process {os.getpid()}, {torch.get_num_threads()} threads: resident "
          f"{first / 2**20:.1f} MB after a tenth, {last / 2**20:.1f} MB at the end; caches hold "
          f"{sorted(held | held_later)} bytes")
    return int(last - first > MOST or held != held_later)


if __name__ == "__main__":
    sys.exit(main())
