"""How a recording begins and ends, by the rules of PyTorch and CUDA, on a stand-in for both; test_captured_gpu
has the real ones."""

import gc

import pytest
import torch

from harmonica_kernels.graphs import recording
from harmonica_kernels.graphs.recording import record_into, stream_of

EMPTY = torch.empty  # of the CPU


class Device:
    """What one device, PyTorch's allocator and its generator know; a recording that is invalid cannot be ended as it
    should."""

    def __init__(self):
        self.invalid, self.current, self.to_pool, self.pools, self.random = False, None, [], [], "ready"
        self.offsets = None  # the tensor of all recordings, see _begin

    def end_to_pool(self, device, pool):
        if pool not in self.to_pool:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.to_pool.remove(pool)

    def graph(self):
        return Graph(self)

    def is_ready(self, pools):
        """For random numbers and the next recording; `pools` are held by graphs that are alive."""
        assert (self.current, self.to_pool, self.pools, self.random) == (None, [], pools, "ready")


class Graph:
    def __init__(self, device):
        self.device, self.ended = device, False

    def register_generator_state(self, generator):
        assert generator == "generator 0"
        if self.device.offsets is None:
            self.device.offsets = EMPTY(1)

    def capture_begin(self, pool="its own", capture_error_mode="global"):
        self.register_generator_state("generator 0")
        self.device.offsets.fill_(0)
        assert self.device.current is None and capture_error_mode == "thread_local"
        self.device.random = "recording"
        self.device.current, self.pool, self.device.invalid = self, pool, False
        self.device.to_pool.append(pool)
        self.device.pools.append(pool)

    def capture_end(self):
        was, self.device.current = self.device.current, None
        if was is not self or self.device.invalid:
            raise RuntimeError("operation failed due to a previous error during capture")
        self.device.to_pool.remove(self.pool)
        self.device.random, self.ended = "ready", True

    def __del__(self):
        self.reset()

    def reset(self):
        if self.ended:
            self.device.pools.remove(self.pool)
        self.ended = False


@pytest.fixture
def device(monkeypatch):
    device = Device()
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", device.graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "its own")
    monkeypatch.setattr(torch.cuda, "default_generators", ["generator 0"])
    monkeypatch.setattr(torch, "empty", lambda *shape, device: EMPTY(*shape))
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", device.end_to_pool, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda _, pool: device.pools.remove(pool), raising=False)
    monkeypatch.setattr(recording, "ABANDONED", [])
    return device


def test_a_recording_ends(device):
    graph = device.graph()
    with record_into(graph, "pool"):
        assert device.current is graph and not gc.isenabled()
    assert graph.ended and gc.isenabled()
    device.is_ready(["pool"])


@pytest.mark.parametrize("invalid, kind", [(False, KeyError), (True, RuntimeError), (True, KeyboardInterrupt)])
def test_one_that_fails_leaves_nothing_behind(device, invalid, kind):
    """Nor does it take another graph's pool away."""
    other = device.graph()
    with record_into(other, "pool"):
        pass
    with pytest.raises(kind, match="why"), record_into(device.graph(), "pool"):
        device.invalid = invalid
        raise kind("why")
    device.is_ready(["pool"])
    assert gc.isenabled()
    assert len(recording.ABANDONED) == invalid


def test_one_whose_failure_shows_at_its_end(device):
    """A function may swallow the error."""
    with pytest.raises(RuntimeError, match="previous error"), record_into(device.graph(), "pool"):
        device.invalid = True
    device.is_ready([])


@pytest.mark.parametrize("ours_first", [False, True])
@pytest.mark.parametrize("first, then", [(True, False), (False, True)])
def test_any_mode_after_any_other(device, first, then, ours_first):
    """Inference mode or not, after ours or another's recording in inference mode or not."""
    with torch.inference_mode(first):
        if ours_first:
            with record_into(device.graph(), "first"):
                pass
        else:
            device.graph().capture_begin("first", "thread_local")
            device.current.capture_end()
    with torch.inference_mode(then), record_into(device.graph(), "pool"):
        pass
    if ours_first:  # and nor does ours stand in another's way
        device.graph().capture_begin("third", "thread_local")


def test_streams_have_one_owner_at_a_time(monkeypatch):
    class Owner:
        pass

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: object())
    monkeypatch.setattr(recording, "FREE", {})
    one, two = Owner(), Owner()
    streams = [stream_of(owner, device) for owner in (one, two) for device in ("cuda:0", "cuda:1")]
    assert len(set(map(id, streams))) == 4
    for _ in range(3):
        del two
        two = Owner()
        assert stream_of(two, "cuda:1") is streams[3] and stream_of(two, "cuda:0") is streams[2]
