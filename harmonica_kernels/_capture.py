"""Recording CUDA graphs through PyTorch, such that one that fails leaves the device as it was."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch


@contextmanager
def recording(graph: torch.cuda.CUDAGraph, pool: Any) -> Iterator[None]:
    """Records into `graph` what is launched inside on the current stream; other threads may go on using the device.

    pool: of the memory that is allocated meanwhile, from `torch.cuda.graph_pool_handle`.
    """
    graph.capture_begin(pool=pool, capture_error_mode="thread_local")
    try:
        yield
        graph.capture_end()
    except BaseException:
        _abandon(graph, pool)
        raise


def _abandon(graph: torch.cuda.CUDAGraph, pool: Any) -> None:
    """Ends a recording that failed, such that the device can be used as before."""
    try:
        graph.capture_end()
    except RuntimeError:  # CUDA has ended it already; PyTorch then leaves its allocators recording
        with suppress(RuntimeError):  # not those that ended as they should
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
            torch._C._cuda_releasePool(torch.cuda.current_device(), pool)
        ABANDONED.append(graph)
    graph.reset()


ABANDONED: list = []  # graphs that failed: PyTorch's allocator of pinned memory goes on asking them what they record
