"""Clocks: candidates timed in turn, and work recorded as a CUDA graph so that no launch is waited for."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from harmonica_kernels.graphs.recording import record_into

WARMUP = 2


def interleaved(candidates: dict[str, Callable[[], object]], rounds: int, device: torch.device,
                warmup: int = WARMUP) -> dict[str, list[float]]:
    """Calls every candidate once a round, so that what slows the machine slows all alike; seconds of each call.

    On a GPU, between two events with nothing in flight before them: a call's launches count as far as the GPU waits.
    On a CPU, which makes it a dry run, one round has to do.
    """
    if device.type == "cpu":
        warmup, rounds = 0, 1
    seconds = defaultdict(list)
    for number in range(warmup + rounds):
        for name, candidate in candidates.items():
            taken = timed(candidate, device)
            if number >= warmup:
                seconds[name].append(taken)
    return dict(seconds)


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call."""
    if device.type == "cpu":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


@contextmanager
def side_stream(device: torch.device) -> Iterator[None]:
    """A stream that can be recorded; what `captured` records, and what that needs, has to run inside."""
    if device.type == "cpu":
        yield
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def captured(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """A replay of what call() launches (call itself on a CPU). To be used inside `side_stream`."""
    if device.type == "cpu":
        return call
    for _ in range(2):  # compiles, tunes
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with record_into(graph, torch.cuda.graph_pool_handle()):
        call()
    return Replay(graph, call)


class Replay(NamedTuple):
    """A recorded graph, and what it has the addresses of."""

    graph: torch.cuda.CUDAGraph
    keeps: Callable[[], object]

    def __call__(self) -> None:
        self.graph.replay()


def error(out: Tensor, exact: Tensor) -> float:
    """‖out - exact‖ / ‖exact‖ in float64; NaN where out has one."""
    out, exact = out.double(), exact.double()
    return ((out - exact).norm() / exact.norm()).item()
