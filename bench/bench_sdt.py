"""Training a router: time and peak memory of a trajectory of SDT, ours beside the same loop in plain PyTorch.

    OMP_NUM_THREADS=1 python -m pytest bench/bench_sdt.py [-k float32] [--steps 4] [--rounds 5] [--benchmark-json=FILE]

The loops are sdt_loops.py's. That all of them do the same work is checked: equal losses. Seconds are the processor's
where one thread runs, which a busy machine disturbs less, else those of a clock on the wall. Peak memory is that of a
process of its own for each loop, weights included: the growth of its resident set over what it had before the model was
made.
"""

import multiprocessing
import re
from pathlib import Path
from statistics import median

import pytest
import torch

from bench.record import cell
from bench.replay import Measured
from bench.sdt_loops import LOOPS, Problem
from harmonica_dit.timing import interleave, medians, steady_clock

TOLERANCES = {"float32": 1e-2, "bfloat16": 0.5}  # relative, of losses that are little more than roundings in bfloat16
TINY = dict(model="DiT-S/8", images=1, steps=2, depth=1, rounds=1, warmup=0)
COLUMNS = {
    "loop": cell("loop"),
    "dtype": cell("dtype"),
    "rows": cell("rows"),
    "T": cell("steps"),
    "seconds": cell("seconds", "{:.2f}"),
    "time / ours": cell("time_over_ours", "{:.3f}"),
    "peak, GiB": cell("peak_gib", "{:.2f}"),
    "ours / peak": cell("ours_over_peak", "{:.3f}"),
}
CAPTION = "time / ours: median of the rounds' ratios. ours / peak: our loop's peak memory over this one's."


@pytest.fixture(scope="module", params=TOLERANCES)
def measured(request, settings):
    return measure(request.param, **settings(TINY, model="DiT-S/2", images=4, steps=4, depth=None, rounds=5, warmup=1))


@pytest.mark.parametrize("candidate", LOOPS)
def test_sdt(measured, replay, candidate):
    replay(measured, candidate)


def measure(dtype: str, model: str, images: int, steps: int, depth: int | None, rounds: int, warmup: int) -> Measured:
    made = dict(model=model, images=images, steps=steps, depth=depth, dtype=dtype, device="cpu")
    peaks = dict(zip(LOOPS, peaks_of([(loop, made) for loop in LOOPS])))
    problem, losses = Problem(**made), {}

    def run(loop: str):
        def call() -> None:
            losses[loop] = torch.tensor(problem.run(loop))
        return call

    seconds = interleave({loop: run(loop) for loop in LOOPS}, rounds, warmup=warmup, clock=steady_clock())
    for loop in LOOPS:
        torch.testing.assert_close(losses[loop], losses["ours"], rtol=TOLERANCES[dtype], atol=0)
    rows = {loop: dict(loop=loop, dtype=dtype, rows=2 * images, steps=steps, seconds=medians(seconds)[loop],
                       time_over_ours=median(own / ours for own, ours in zip(seconds[loop], seconds["ours"])),
                       peak_gib=peaks[loop] / 2**30, ours_over_peak=peaks["ours"] / peaks[loop]) for loop in LOOPS}
    return Measured(f"{model}, {dtype}", seconds, rows)


def peaks_of(runs: list[tuple[str, dict]]) -> list[int]:
    """`peak` of each, one after the other."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # imports once, before each process counts its own memory
    with context.Pool(1, maxtasksperchild=1) as pool:
        return pool.starmap(peak, runs, chunksize=1)


def peak(loop: str, made: dict) -> int:
    """Bytes that one trajectory takes at most, weights included; to be called in a new process."""
    before = resident()
    Problem(**made).run(loop)
    return resident() - before


def resident() -> int:
    """Bytes of this process's largest resident set so far; that of `resource` counts the parent's as well."""
    return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])
