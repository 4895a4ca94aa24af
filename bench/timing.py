"""Clocks around calls, and work recorded as a CUDA graph so that no launch is waited for."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import quantiles
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


def quartiles(values: Sequence[float]) -> list[float]:
    """The lower quartile, the median and the upper quartile; of a single value three times that."""
    return quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3


def add_time(call: Callable[..., Any], seconds: list[float], k: int) -> Callable[..., Any]:
    """The same function, whose calls add the time that they take to seconds[k]."""
    def run(*arguments):
        start = time.perf_counter()
        result = call(*arguments)
        seconds[k] += time.perf_counter() - start
        return result
    return run


@contextmanager
def forward_clocks(modules: Sequence[Sequence[nn.Module]], seconds: list[float]) -> Iterator[None]:
    """Adds to seconds[k] the time spent in calls of modules[k], until the block ends."""
    started: list[float] = []

    def start(*_) -> None:
        started.append(time.perf_counter())

    def stop(k: int) -> None:
        seconds[k] += time.perf_counter() - started.pop()

    handles = [handle for k, group in enumerate(modules) for module in group
               for handle in (module.register_forward_pre_hook(start),
                              module.register_forward_hook(lambda *_, k=k: stop(k)))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def branch_seconds(rows: Sequence[Sequence[bool]], body: Sequence[float]) -> float:
    """What the computed branches of a schedule's rows take, where body[k] is the time that branch k takes once."""
    return sum(seconds for row in rows for seconds, computed in zip(body, row) if computed)


@contextmanager
def side_stream(device: torch.device) -> Iterator[None]:
    """A stream that can be recorded; what `capture` records, and what that needs, has to run inside."""
    if device.type == "cpu":
        yield
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def capture(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """A replay of what call() launches (call itself on a CPU). To be used inside `side_stream`."""
    if device.type == "cpu":
        return call
    from harmonica_kernels.graphs.recording import record_into  # not needed by who builds the kernels that it needs

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


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """‖found - wanted‖ / ‖wanted‖ in float64; NaN where `found` has one."""
    found, wanted = found.double(), wanted.double()
    return ((found - wanted).norm() / wanted.norm()).item()
