"""torch.compile(mode="max-autotune") of the plain model beside our captured trajectory, uncached, T = 20.

A part for each number of rows, compiled2 and compiled16, since compiling may take longer than all the rest.
"""

import time

import torch

import harmonica_kernels as hk
from bench.problems import Plain
from bench.timing import relative_error
from harmonica_dit.sample import denoise

from . import models
from .record import Record


class Compiled(Plain):
    """The plain model compiled, each call the next iteration of its CUDA graphs."""

    def __init__(self, net, tiny: bool):
        super().__init__(net, torch.bfloat16, models.config(tiny))
        how = dict(backend="eager") if tiny else dict(mode="max-autotune")
        self.compiled = torch.compile(self.net, fullgraph=True, dynamic=False, **how)

    def forward(self, x, t, y):
        torch.compiler.cudagraph_mark_step_begin()
        return self.compiled(x.to(self.dtype), t, y)


def run(record: Record) -> None:
    net = models.model(record.tiny, record.device, models.attention(record.path.parent))
    compiled, plain = Compiled(net, record.tiny), Plain(net, torch.bfloat16, models.config(record.tiny))
    images, rounds = {"compiled2": (1, 15), "compiled16": (8, 9)}[record.part]
    with torch.inference_mode(), record.attempt(f"{2 * images} rows, compiling"):
        measure(record, net, compiled, plain, images, rounds)


def measure(record: Record, net, compiled: Compiled, plain: Plain, images: int, rounds: int) -> None:
    device, steps, rows = record.device, models.steps(record.tiny), 2 * images
    noise, executor = models.noise(net, images, device), hk.compile(denoise)
    ours, theirs, eager = (models.trajectory(m, images, device, steps) for m in (net, compiled, plain))
    began = time.monotonic()
    found = denoise(theirs, noise)
    record.note(f"{rows} rows, seconds until the first compiled trajectory", time.monotonic() - began)
    record.stage(f"{rows} rows, timing")
    record.check(f"{rows} rows: compiled beside eager", relative_error(found, denoise(eager, noise)), 0.1)
    for _ in range(3):  # runs, records, replays
        executor(ours, noise)
    seconds = record.time(f"{rows} rows", {"compiled": lambda: denoise(theirs, noise),
                                           "ours": lambda: executor(ours, noise)}, rounds)
    record.row(rows=rows, **{f"{name}, ms": value * 1e3 for name, value in seconds.items()})
    record.ratio(f"{rows} rows, uncached: torch.compile(max-autotune) / ours", seconds["compiled"] / seconds["ours"],
                 1.0)
