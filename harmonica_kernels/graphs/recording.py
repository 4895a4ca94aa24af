"""Records CUDA graphs through PyTorch; a recording that fails leaves the device as it was."""

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch


def stream_of(owner: Any, device: torch.device) -> torch.cuda.Stream:
    """A stream to record on. It belongs to `owner` alone until the owner is gone; then the next owner gets it.

    A matrix product allocates a cuBLAS workspace for its stream (32 MiB on an H100), and graphs hold its address.
    PyTorch 2.11 never frees the workspace, so a new stream for each owner would leak memory. Newer versions free it as
    soon as one graph that was recorded on the stream is reset, and graphs that run at the same time must not share it.
    So owners do not share streams.
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
    """Records into `graph` what the block launches on the current stream; other threads may go on using the device.

    pool: from `torch.cuda.graph_pool_handle`; memory that the block allocates comes from it.
    """
    collects = gc.isenabled()
    gc.disable()  # it might destroy other graphs, for example, which CUDA may refuse during a recording
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
    """Begins a recording, in inference mode or not.

    PyTorch 2.11 has two tensors for the random numbers of all recordings on a device. The first recording makes them,
    and every recording writes to them. If they were made in inference mode, they cannot be written to outside it.
    """
    with torch.inference_mode(False):  # the first recording makes them, writable in both modes
        graph.register_generator_state(torch.cuda.default_generators[torch.cuda.current_device()])
    with torch.inference_mode():  # may write to them, whichever mode made them
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")


def _abandon(graph: torch.cuda.CUDAGraph, pool: Any) -> None:
    """Ends a recording that failed, so that the device can be used as before."""
    try:
        graph.capture_end()
    except RuntimeError:  # CUDA has ended the recording; PyTorch's allocators and generator believe that it still runs
        with suppress(RuntimeError):  # the allocator may have ended properly
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
            torch._C._cuda_releasePool(torch.cuda.current_device(), pool)
        ABANDONED.append(graph)
        with suppress(RuntimeError):  # the first error is the one to report
            _capture_one_kernel()
    graph.reset()


def _capture_one_kernel() -> None:
    """Captures one kernel successfully.

    After a failed capture, PyTorch 2.11's generator believes that one is still running, and refuses random numbers; a
    successful capture resets it. PyTorch 2.13's generator has a state for each capture and does not need this.
    """
    graph, target = torch.cuda.CUDAGraph(), torch.empty(1, device="cuda")
    _begin(graph, torch.cuda.graph_pool_handle())
    target.zero_()
    graph.capture_end()


FREE: dict[torch.device, list[torch.cuda.Stream]] = {}  # streams whose owners are gone
ABANDONED: list = []  # failed graphs: PyTorch's pinned-memory allocator keeps asking them what they record
