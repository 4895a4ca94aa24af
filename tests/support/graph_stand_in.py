"""A stand-in for CUDA that executes the gated graph: graphs are lists, kernels and memory are the CPU's."""

import ctypes
import random

import torch

import harmonica_kernels as hk
from harmonica_kernels.graphs.gated import executor, on_cuda
from harmonica_kernels.ops._library import kernels
from support.loops import Trajectory


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
