"""What a router costs beside its model: parameters, FLOPs, and an iteration's time and peak memory in training.

    OMP_NUM_THREADS=1 python -m pytest bench/bench_overhead.py [-k PixArt] [--layers 28] [--rounds 3]
                                       [--benchmark-json=FILE]

SDT as it is here, beside HarmoniCa's published loop and Learning-to-Cache's (sdt_loops.py), on DiT-XL/2 and PixArt-α at
256 pixels, random weights, float32. 28 blocks need more memory and time than two cores have, so models of one block and
of two are measured: a block more adds what the two differ by, 28 blocks 27 times that. --layers measures a model of so
many blocks as it is, scaled by nothing. Seconds and peak memory are bench_sdt.py's. An iteration's seconds are a
trajectory's over T - 1; SDT's have a share of the first forward, which has no update, in them: the less, the larger T.
"""

from statistics import median

import pytest

from bench.bench_sdt import peaks_of
from bench.record import cell
from bench.replay import Measured
from bench.sdt_loops import LEARNING_TO_CACHE, Problem
from bench.sdt_models import DEPTH, PIXART
from harmonica_dit.timing import interleave, steady_clock

MODELS = ("DiT-XL/2", PIXART)
LOOPS = ("ours", "published", LEARNING_TO_CACHE)
STEPS = 20  # T of the router whose size is told
TINY = dict(images=1, steps=2, rounds=1, warmup=0)
COLUMNS = {
    "loop": cell("loop"),
    "model": cell("model"),
    "rows": cell("rows"),
    "seconds an iteration": cell("seconds", "{:.2f}"),
    "time / ours": cell("time_over_ours", "{:.2f}"),
    "peak, GiB": cell("peak_gib", "{:.2f}"),
    "ours / peak": cell("ours_over_peak", "{:.3f}"),
    "router, of parameters": cell("parameters_share", "{:.2e}"),
    "of FLOPs": cell("flops_share", "{:.1e}"),
    "blocks": cell("blocks"),
}
CAPTION = f"""blocks: those measured; where there are two numbers, all else is scaled from these to {DEPTH} blocks.
router, of FLOPs: a sigmoid and a comparison for each branch of a forward of batch 1; a schedule has none."""


@pytest.fixture(scope="module", params=MODELS)
def measured(request, settings):
    return measure(request.param, **settings(TINY, images=2, steps=5, layers=None, rounds=3, warmup=1))


@pytest.mark.parametrize("candidate", LOOPS)
def test_overhead(measured, replay, candidate):
    replay(measured, candidate)


def measure(model: str, images: int, steps: int, rounds: int, warmup: int, layers: int | None = None) -> Measured:
    """layers: blocks, all that is told is theirs; None: of one block and of two, scaled to DEPTH."""
    depths = (1, 2) if layers is None else (layers,)
    whole = to_depth if layers is None else lambda of: of[0]
    made = [dict(model=model, images=images, steps=steps, depth=depth, dtype="float32", device="cpu")
            for depth in depths]
    peaks = {loop: whole(peaks_of([(loop, one) for one in made])) for loop in LOOPS}
    problems = [Problem(**one) for one in made]
    calls = {(loop, i): lambda loop=loop, problem=problem: problem.run(loop)
             for loop in LOOPS for i, problem in enumerate(problems)}
    times = interleave(calls, rounds, warmup=warmup, clock=steady_clock())
    seconds = {loop: [whole(of) / (steps - 1) for of in zip(*(times[loop, i] for i in range(len(made))))]
               for loop in LOOPS}
    parameters, flops, branches = (whole(of) for of in zip(*map(sizes, problems)))
    rows = {loop: dict(
        loop=loop, model=model, rows=2 * images, seconds=median(seconds[loop]),
        time_over_ours=median(own / ours for own, ours in zip(seconds[loop], seconds["ours"])),
        peak_gib=peaks[loop] / 2**30, ours_over_peak=peaks["ours"] / peaks[loop],
        parameters_share=STEPS * branches / parameters, flops_share=2 * branches / flops,
        blocks=" and ".join(map(str, depths)), T=steps) for loop in LOOPS}
    return Measured(model, seconds, rows)


def to_depth(of) -> float:
    """Of DEPTH blocks, from one block's and two blocks'."""
    one, two = of[:2]
    return one + (DEPTH - 1) * (two - one)


def sizes(problem: Problem) -> tuple[int, float, int]:
    """The model's parameters, its FLOPs at batch 1, and its branches."""
    net = problem.net
    return sum(p.numel() for p in net.parameters()), problem.flops.total, len(net.branches)
