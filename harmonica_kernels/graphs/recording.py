"""Recording CUDA graphs through PyTorch, such that one that fails leaves the device as it was."""

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch


def stream_of(owner: Any, device: torch.device) -> torch.cuda.Stream:
    """A stream to record on: its owner's alone as long as that lives, then the next one's.

    A matrix product leaves cuBLAS a workspace for its stream (32 MiB on an H100), which graphs have the address of.
    PyTorch 2.11 never frees it, so a new stream for each owner would leak; newer ones free it as soon as one graph that
    was recorded on the stream is reset, and graphs that run at once must not share it: so owners do not share streams.
    """
    free = FREE.setdefault(device, [])
    try:
        stream = free.pop()
    except IndexError:
        stream = torch.cuda.Stream(device)
    weakref.finalize(owner, free.append, stream).atexit = False
    return stream


@contextmanager
def record_into(graph: torch.cuda.CUDAGraph, pool: Any) -> Iterator[None]:
    """Records into `graph` what is launched inside on the current stream; other threads may go on using the device.

    pool: of the memory that is allocated meanwhile, from `torch.cuda.graph_pool_handle`.
    """
    collects = gc.isenabled()
    gc.disable()  # what it might destroy, such as other graphs, CUDA may not let go while it records
    try:
        _begin(graph, pool)
        try:
            yield
            graph.capture_end()
        except BaseException:
            _abandon(graph, pool)
            raise
    finally:
        if collects:
            gc.enable()


def _begin(graph: torch.cuda.CUDAGraph, pool: Any) -> None:
    """Begins a recording in any mode.

    PyTorch 2.11 has two tensors for the random numbers of all recordings on a device: the first one makes them in its
    mode, each writes to them in its own, and outside of inference mode those of inference mode cannot be written to.
    """
    with torch.inference_mode(False):  # makes them for any mode, if this is the first
        graph.register_generator_state(torch.cuda.default_generators[torch.cuda.current_device()])
    with torch.inference_mode():  # writes to them, whoever made them
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")


def _abandon(graph: torch.cuda.CUDAGraph, pool: Any) -> None:
    """Ends a recording that failed, such that the device can be used as before."""
    try:
        graph.capture_end()
    except RuntimeError:  # CUDA has ended it already; PyTorch then leaves its allocators and generators recording
        with suppress(RuntimeError):  # not those that ended as they should
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
            torch._C._cuda_releasePool(torch.cuda.current_device(), pool)
        ABANDONED.append(graph)
        with suppress(RuntimeError):  # what went wrong first is what is said
            _end_well()
    graph.reset()


def _end_well() -> None:
    """Records one kernel. PyTorch 2.11's generator learns from nothing but a recording that ends well that none runs,
    and refuses random numbers until then; 2.13's has a state for each recording."""
    graph, target = torch.cuda.CUDAGraph(), torch.empty(1, device="cuda")
    _begin(graph, torch.cuda.graph_pool_handle())
    target.zero_()
    graph.capture_end()


FREE: dict[torch.device, list[torch.cuda.Stream]] = {}  # streams whose owners are gone
ABANDONED: list = []  # graphs that failed: PyTorch's allocator of pinned memory goes on asking them what they record
