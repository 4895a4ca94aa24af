"""SDT iterations of a DiT-XL/2 with random weights: time and peak memory of a trajectory, by loop.

plain, published and ours are sdt_loops's: a sane eager loop in bfloat16, the published one as it is (float32 with
TF32, the model not frozen, the teacher with grad), and `train_trajectory` in bfloat16, replayed from graphs. Where one
of them does not fit into the GPU at 64 rows, all are timed at half as many too, and so on. Peak memory is what was
allocated, weights included, with nothing else on the GPU; T steps hold T - 1 iterations.
"""

import gc
from collections.abc import Callable

import torch

from bench.sdt_loops import Problem
from bench.timing import relative_error

from . import models
from .record import Record
from .reference_way import tf32

LOOPS = {"plain": "bfloat16", "published": "float32", "ours": "bfloat16", "ours, checkpointing": "bfloat16"}
ROUNDS, WARMUP = 3, 2  # graphs are recorded in the warm-up, but for the forward that fills the cache: in one round of 3
TOLERANCE = {"float32": 0.2, "bfloat16": 0.5}  # of losses: teacher and student differ little more than roundings


def run(record: Record) -> None:
    for images in (1,) if record.tiny else (32, 16, 8):
        with record.attempt(f"{2 * images} rows"):
            if measure(record, images):
                return


def measure(record: Record, images: int) -> bool:
    """Whether every loop fitted."""
    rows, steps = 2 * images, 2 if record.tiny else 4
    peaks, fits = {}, {}
    for loop in LOOPS:
        record.stage(f"{rows} rows, {loop}: peak memory")
        fits[loop] = True
        try:
            peaks[loop] = peak(record, loop, images, steps)
        except torch.OutOfMemoryError:
            fits[loop] = False
            record.row(rows=rows, loop=loop, **{"peak, GiB": "out of memory"})
    record.note(f"{rows} rows, peak bytes", peaks)
    seconds = {}
    # the published one by itself: it leaves no room beside it
    for together in (("plain", "ours", "ours, checkpointing"), ("published",)):
        together = [loop for loop in together if fits[loop]]
        record.stage(f"{rows} rows, timing {', '.join(together)}")
        clean(record)
        problems = {dtype: problem(record, dtype, images, steps) for dtype in {LOOPS[loop] for loop in together}}
        candidates = {loop: runner(problems[LOOPS[loop]], loop) for loop in together}
        seconds |= record.time(f"{rows} rows, T = {steps}", candidates, ROUNDS, warmup=WARMUP)
        del problems, candidates
    for loop, value in seconds.items():
        record.row(rows=rows, loop=loop, **{"ms an iteration": value / (steps - 1) * 1e3,
                                            "peak, GiB": peaks[loop] / 2**30})
    for loop, time, memory in (("plain", 1.2, 0.7), ("published", 3.0, 0.5)):
        if fits[loop] and fits["ours"]:
            name = {"plain": "a sane eager bf16 loop", "published": "the published loop"}[loop]
            record.ratio(f"{rows} rows, SDT: {name} / ours", seconds[loop] / seconds["ours"], time)
            record.ratio(f"{rows} rows, SDT memory: ours / {name}", peaks["ours"] / peaks[loop], memory, at_most=True)
    return all(fits.values())


def problem(record: Record, dtype: str, images: int, steps: int) -> Problem:
    model, depth = ("DiT-S/8", 1) if record.tiny else ("DiT-XL/2", None)
    attention = models.attention(record.path.parent) if dtype == "bfloat16" else "sdpa"  # most take no float32
    return Problem(model, images, steps, depth, dtype, record.device.type, attention)


def runner(problem: Problem, loop: str) -> Callable[[], list[float]]:
    return tf32(lambda: problem.run(loop))


def peak(record: Record, loop: str, images: int, steps: int) -> int:
    """Bytes allocated at most (1 in a dry run on the CPU), of a loop whose losses are those of ours in its dtype."""
    clean(record)
    made = problem(record, LOOPS[loop], images, steps)
    losses = torch.tensor(runner(made, loop)())
    found = 1 if record.tiny else torch.cuda.max_memory_allocated()
    if loop != "ours":
        clean(record)
        record.check(f"{2 * images} rows: the losses of {loop}, beside ours in {LOOPS[loop]}",
                     relative_error(losses, torch.tensor(runner(made, "ours")())), TOLERANCE[LOOPS[loop]])
    return found


def clean(record: Record) -> None:
    gc.collect()
    if not record.tiny:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
