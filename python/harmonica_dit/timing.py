"""Clocks: calls timed in turn, and the name of what they are timed on."""

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median

import torch

CPU = torch.device("cpu")


def interleave(candidates: Mapping[str, Callable[[], object]], rounds: int, *, warmup: int = 1,
               device: torch.device = CPU, clock: Callable[[], float] = time.perf_counter) -> dict[str, list[float]]:
    """Seconds of every candidate's call in each of the rounds, after `warmup` rounds that do not count.

    A round calls every candidate once: whatever slows the machine slows all of them alike.

    On a GPU the time is that between two events, with nothing in flight before them: a call's launches count as far as
    the GPU waits for them. clock: in seconds, of calls on the CPU.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(warmup + rounds):
        for name, candidate in candidates.items():
            taken = time_call(candidate, device, clock)
            if number >= warmup:
                seconds[name].append(taken)
    return seconds


def time_call(call: Callable[[], object], device: torch.device, clock: Callable[[], float]) -> float:
    """Seconds of one call."""
    if device.type == "cpu":
        start = clock()
        call()
        return clock() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def steady_clock() -> Callable[[], float]:
    """For work on the CPU: the processor's seconds where one thread runs, which other work disturbs less, else those on
    the wall."""
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def medians(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: median(values) for name, values in seconds.items()}


def device_name(device: torch.device) -> str:
    """A GPU's name, or the processor's."""
    return processor() if device.type == "cpu" else torch.cuda.get_device_name(device)


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
