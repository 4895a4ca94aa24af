"""What is built for CUDA, on a stand-in that executes it: graphs are lists, kernels and memory are the CPU's."""

import ctypes
import random
import re
from types import SimpleNamespace

import pytest
import torch

import harmonica_kernels as hk
from harmonica_kernels import _info
from harmonica_kernels.graphs.gated import executor, on_cuda
from harmonica_kernels.ops._library import kernels
from support.loops import Table, Trajectory


class Graph:
    """GatedGraph of csrc/cuda/graph.h: the same calls, by the rules that CUDA gives."""

    def __init__(self, recorder):
        self.recorder, self.chains, self.handles, self.used = recorder, [[]], {}, set()
        self.ready = False

    def condition(self, initially):
        handle = random.getrandbits(63)
        self.handles[handle] = initially
        return handle

    def _append(self, chain, node):
        assert not self.ready
        self.chains[chain].append(node)

    def fill(self, chain, data, byte, size, name):
        self._append(chain, lambda: memory_at(data, size).fill_(byte))

    def decide(self, chain, memory, first, last, rule, name):
        def run():
            kernels.decide(memory, first, last, rule)
            K = memory["branches"]
            handles = int64_at(memory["conditions"], K + 1)
            for k in range(first, last):
                self.values[handles[k]] = bool(memory_at(memory["compute"] + 4 * k, 4).any())
            if first == 0:
                self.values[handles[K]] = bool(memory_at(memory["again"], 4).any())
        self._append(chain, run)

    def change(self, chain, o, reference, dtype, values, sums, parts, which, name):
        assert dtype == 0

        def run():
            half = memory_at(which, 4).view(torch.int32).item()
            now = memory_at(o, 4 * values).view(torch.float32)
            halves = memory_at(reference, 8 * values).view(torch.float32).view(2, values)
            found = memory_at(sums, 16 * parts).view(torch.float64).view(2, parts).zero_()
            found[0, -1] = (now.double() - halves[half].double()).abs().sum()
            found[1, -1] = halves[half].double().abs().sum()
            halves[1 - half].copy_(now)
        self._append(chain, run)

    def child(self, chain, captured, name):
        call = self.recorder.calls[captured]
        if name == self.recorder.refused:
            raise RuntimeError(f"{name}, node 2 of 5: a host function cannot stand in the body of a conditional node")
        self._append(chain, call)

    def conditional(self, chain, handle, loop, name):
        assert handle in self.handles and handle not in self.used, "one handle for each conditional node"
        assert self.handles[handle] == loop, "a WHILE starts true, an IF is written before it is read"
        self.used.add(handle)
        body = self._body(handle, loop)
        self._append(chain, body)
        self.chains.append([])
        number = len(self.chains) - 1
        body.number = number
        return number

    def _body(self, handle, loop):
        class Body:
            def __call__(body):
                while self.values[handle]:
                    self._run(body.number)
                    if not loop:
                        break
        return Body()

    def _run(self, chain):
        for node in self.chains[chain]:
            node()

    def instantiate(self, stream):
        assert self.used == set(self.handles), "unused handles can fail the instantiation"
        assert all(self.chains), "an empty body can hang"
        self.ready = True

    def launch(self, stream):
        assert self.ready
        self.recorder.launches += 1
        self.values = {handle: True for handle, initially in self.handles.items() if initially}
        self._run(0)


class Recorder:
    """Records what is called; the parts find their memory where it was when they were recorded."""

    refused = None

    def __init__(self, device):
        self.calls, self.launches, self.recording, self.closed = {}, 0, 0, False
        Recorder.last = self

    def graph(self):
        return Graph(self)

    def stream(self):
        return 0

    def warm_up(self, call):
        call()

    def record(self, name, call):
        """A replay writes outputs to where they were when it was recorded, as a graph does."""
        call()
        parts = Recorder.parts
        k = next((op.branch for op in call.args[0].ops if op.kind == "body"), None)
        static = None if k is None else parts.fresh[k]

        def replay():
            call()
            if k is not None:
                out = parts.fresh[k]
                parts.fresh[k] = static if out.data_ptr() == static.data_ptr() else static.copy_(out)

        self.recording += 1
        self.calls[self.recording] = replay
        return self.recording

    def wait(self):
        pass

    def close(self):
        self.closed = True


def memory_at(address, size):
    return torch.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype=torch.uint8)


def int64_at(address, count):
    return memory_at(address, 8 * count).view(torch.int64).tolist()


class Built:
    """`Gated` on the CPU, but built as for CUDA."""

    def __init__(self, monkeypatch, rule="scores"):
        class Loop(on_cuda.GraphLoop):
            def __init__(self, nodes, parts, memory, recorder):
                Recorder.parts = parts
                super().__init__(nodes, parts, memory, recorder)

        monkeypatch.setattr(executor, "builds_graphs", lambda device: True)
        monkeypatch.setattr(executor, "Recorder", Recorder)
        monkeypatch.setattr(executor, "GraphLoop", Loop)
        self.executor = hk.compile(Trajectory.run, mode="gated", rule=rule)


@pytest.mark.parametrize("rule", ["scores", "change"])
def test_the_built_graph_equals_the_walk(monkeypatch, rule):
    for _ in range(20):
        T, K = random.randint(1, 5), random.randint(2, 6)
        trajectory = Trajectory(T, K)
        walked = hk.compile(Trajectory.run, mode="gated", rule=rule)
        with monkeypatch.context() as patch:
            built = Built(patch, rule).executor
            for i in range(6):
                table = Table(torch.rand(T, K), torch.randn(T, K) if i % 2 else None)
                noise, images = torch.randn(trajectory.shape), []
                for ex in (built, walked):
                    ex.load(table)
                    ex.threshold = 0.1 * i
                    with monkeypatch.context() as inner:
                        if ex is walked:
                            inner.setattr(executor, "builds_graphs", lambda device: False)
                        images.append(ex(trajectory, noise))
                assert torch.equal(*images)
                assert torch.equal(built.reused, walked.reused)
            assert Recorder.last.launches == 5, "one a trajectory; the first ran on a graph without forecasts"
            assert Recorder.last.recording == K + 3, "each part is recorded once"


def test_a_refused_node_is_named_and_nothing_is_left(monkeypatch):
    trajectory, built = Trajectory(3, 4), Built(monkeypatch).executor
    monkeypatch.setattr(Recorder, "refused", "branch 2")
    with pytest.raises(RuntimeError, match="branch 2, node 2 of 5: a host function"):
        built(trajectory, torch.randn(trajectory.shape))
    assert Recorder.last.closed and built.graphs == 0


def test_without_a_gpu_the_reason_is_said():
    with pytest.raises(RuntimeError, match='mode="gated" on cuda:0: (the extension|there is no|the driver)'):
        on_cuda.Recorder(torch.device("cuda:0"))


@pytest.mark.parametrize("build, reason", [
    (dict(runtime=0), "built without nvcc"),
    (dict(runtime=13000, needed=13000, driver=0), "no NVIDIA driver"),
    (dict(runtime=13000, needed=13000, driver=12080), "driver is too old: it serves CUDA 12.8, 13.0 is needed .* 13.0"),
    (dict(runtime=12040, needed=12040, driver=12030), "driver is too old: it serves CUDA 12.3, 12.4 is needed"),
    (dict(runtime=13000, needed=13000, driver=13000, devices=0, error="no CUDA-capable device"), "no CUDA-capable"),
    (dict(runtime=12040, needed=12040, driver=13000, devices=1, error=""), "^$"),
])
def test_info_says_what_is_missing(monkeypatch, build, reason):
    monkeypatch.setattr(_info, "kernels", SimpleNamespace(cuda_build=lambda: build))
    assert re.search(reason, _info.why_not_gated())


@pytest.mark.skipif(not kernels.cuda_build()["runtime"], reason="built without nvcc")
def test_the_build_says_what_it_is():
    build = kernels.cuda_build()
    assert "90" in build["architectures"].split() and build["runtime"] >= 12040
    assert build["needed"] == max(build["runtime"] // 1000 * 1000, 12040)


@pytest.mark.skipif(not kernels.cuda_build()["runtime"] or torch.cuda.is_available(), reason="needs nvcc and no GPU")
def test_a_cuda_error_is_an_exception():
    with pytest.raises(RuntimeError, match="asking for the current device: cudaError"):
        kernels.GatedGraph(0)
