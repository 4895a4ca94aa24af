"""How a recording begins and ends, by the rules of PyTorch and CUDA, on a stand-in for both; see TestOnAGpu of
test_graph for the real ones."""

import pytest
import torch

from harmonica_kernels import _capture
from harmonica_kernels._capture import recording


class Device:
    """What one device and PyTorch's allocator know; a recording that is invalid cannot be ended as it should."""

    def __init__(self):
        self.invalid, self.current, self.to_pool, self.pools = False, None, [], []

    def end_to_pool(self, device, pool):
        if pool not in self.to_pool:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.to_pool.remove(pool)

    def graph(self):
        return Graph(self)


class Graph:
    def __init__(self, device):
        self.device, self.ended = device, False

    def capture_begin(self, pool, capture_error_mode):
        assert self.device.current is None and capture_error_mode == "thread_local"
        self.device.current, self.pool, self.device.invalid = self, pool, False
        self.device.to_pool.append(pool)
        self.device.pools.append(pool)

    def capture_end(self):
        was, self.device.current = self.device.current, None
        if was is not self or self.device.invalid:
            raise RuntimeError("operation failed due to a previous error during capture")
        self.device.to_pool.remove(self.pool)
        self.ended = True

    def reset(self):
        if self.ended:
            self.device.pools.remove(self.pool)
        self.ended = False


@pytest.fixture
def device(monkeypatch):
    device = Device()
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", device.end_to_pool, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda _, pool: device.pools.remove(pool), raising=False)
    monkeypatch.setattr(_capture, "ABANDONED", [])
    return device


def test_a_recording_ends(device):
    graph = device.graph()
    with recording(graph, "pool"):
        assert device.current is graph
    assert graph.ended and device.current is None and device.pools == ["pool"] and not device.to_pool


@pytest.mark.parametrize("invalid, kind", [(False, KeyError), (True, RuntimeError), (True, KeyboardInterrupt)])
def test_one_that_fails_leaves_nothing_behind(device, invalid, kind):
    """Nor does it take another graph's pool away."""
    with recording(device.graph(), "pool"):
        pass
    with pytest.raises(kind, match="why"), recording(device.graph(), "pool"):
        device.invalid = invalid
        raise kind("why")
    assert device.current is None and device.pools == ["pool"] and not device.to_pool
    assert len(_capture.ABANDONED) == invalid


def test_one_whose_failure_shows_at_its_end(device):
    """A function may swallow the error."""
    with pytest.raises(RuntimeError, match="previous error"), recording(device.graph(), "pool"):
        device.invalid = True
    assert device.current is None and not device.pools and not device.to_pool
