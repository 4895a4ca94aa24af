"""Makes a plan one CUDA graph. Nothing is decided here; `plan` says what stands where.

Not yet run on a GPU: the tests drive it with a stand-in for CUDA that executes what is built.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from ..._info import why_not_gated
from ...ops._arguments import dtype_number
from ...ops._library import kernels
from ..recording import record_into, stream_of
from .decision_memory import DecisionMemory
from .norm import point
from .parts import Parts
from .plan import Captured, Change, Decide, If, Node, Rewind, While


class Recorder:
    """Recording through PyTorch on one device: one stream and one pool of memory, which the parts can share since they
    run one after the other.

    Raises:
        RuntimeError: this installation, driver or allocator cannot serve a gated graph.
    """

    def __init__(self, device: torch.device):
        reason = why_not_gated()
        if reason:
            raise RuntimeError(f'mode="gated" on {device}: {reason}')
        if torch.cuda.get_allocator_backend() != "native":
            raise RuntimeError('mode="gated": the allocator backend cudaMallocAsync records allocations, which cannot '
                               "stand in a conditional node; unset PYTORCH_CUDA_ALLOC_CONF's backend")
        self.device = device
        self._stream = stream_of(self, device)
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: list[torch.cuda.CUDAGraph] = []  # the pool lives as long as they do

    def graph(self):
        """An empty gated graph."""
        return kernels.GatedGraph(self.device.index)

    def stream(self) -> int:
        """The caller's, for launches."""
        return torch.cuda.current_stream(self.device).cuda_stream

    def warm_up(self, call: Callable[[], None]) -> None:
        """Runs what must not happen for the first time in a recording: compiling, tuning, loading of kernels."""
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        before = self._random_state()
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            call()
        if not torch.equal(before, self._random_state()):
            raise RuntimeError('mode="gated": the model draws random numbers, which a graph would repeat')
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()  # memory outside the pool cannot be used inside

    def record(self, name: str, call: Callable[[], None]) -> int:
        """What call() launches as a cudaGraph_t, which is valid as long as this object."""
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        try:
            with torch.cuda.device(self.device), torch.cuda.stream(self._stream), record_into(graph, self._pool):
                call()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise RuntimeError(
                f"{name} cannot be captured: {error}\nIt must not wait for the GPU (.item(), .tolist(), .cpu(), a "
                "tensor in an `if`) or copy from ordinary host memory") from error
        self._graphs.append(graph)
        return graph.raw_cuda_graph()

    def close(self) -> None:
        """Gives the pool back; nothing recorded may run any more."""
        for graph in self._graphs:
            graph.reset()
        self._graphs.clear()

    def wait(self) -> None:
        """Until nothing runs on the device."""
        torch.cuda.synchronize(self.device)

    def _random_state(self) -> Tensor:
        return torch.cat([torch.get_rng_state(), torch.cuda.get_rng_state(self.device)])


class GraphLoop:
    """A plan as one executable graph: `run` is one launch. Keeps alive all that the graph has the addresses of.

    Raises:
        RuntimeError: a part cannot be captured, or holds what a conditional node must not; the message names part and
            node.
    """

    def __init__(self, nodes: Sequence[Node], parts: Parts, memory: DecisionMemory, recorder: Recorder):
        self.parts, self.memory, self._recorder = parts, memory, recorder
        self._fresh = [0] * memory.branches  # where the captured bodies leave their outputs
        self._handles = [0] * (memory.branches + 1)
        recorder.warm_up(lambda: self._once(nodes))
        self._graph = recorder.graph()
        try:
            self._add(0, nodes)
            memory.conditions.copy_(torch.tensor(self._handles, dtype=torch.uint64).view(torch.int64))
            point(parts, self._fresh)
            recorder.wait()
            self._graph.instantiate(recorder.stream())
        except BaseException:
            self.close()
            raise

    def run(self) -> None:
        """Launches the trajectory on the current stream."""
        self._graph.launch(self._recorder.stream())

    def close(self) -> None:
        """Frees the graph and its memory; it must not be run again."""
        self._recorder.wait()
        self._graph = None  # before what it was cloned from
        self._recorder.close()

    def _once(self, nodes: Sequence[Node]) -> None:
        for node in nodes:
            if isinstance(node, Captured):
                self._ops(node)
            elif isinstance(node, (If, While)):
                self._once(node.body)

    def _ops(self, node: Captured) -> None:
        for op in node.ops:
            self.parts.run(op)

    def _add(self, chain: int, nodes: Sequence[Node]) -> None:
        graph, memory, parts = self._graph, self.memory, self.parts
        for node in nodes:
            match node:
                case Captured():
                    graph.child(chain, self._recorder.record(node.name, partial(self._ops, node)), node.name)
                    for op in node.ops:
                        if op.kind == "body":  # the next norm reads it, and nothing is written to the pool before that
                            self._fresh[op.branch] = parts.fresh[op.branch].data_ptr()
                            parts.fresh[op.branch] = None
                case Rewind():
                    graph.fill(chain, memory.step.data_ptr(), 0xFF, memory.step.nbytes, node.name)
                case Decide():
                    graph.decide(chain, memory.addresses(), node.first, node.last, node.rule, node.name)
                case Change():
                    reference = parts.reference
                    graph.change(chain, self._fresh[0], reference.data_ptr(), dtype_number(reference.dtype),
                                 reference[0].numel(), memory.change.data_ptr(), memory.parts,
                                 memory.reference.data_ptr(), node.name)
                case If():
                    self._handles[node.branch] = handle = graph.condition(False)
                    self._add(graph.conditional(chain, handle, False, node.name), node.body)
                case While():
                    self._handles[memory.branches] = handle = graph.condition(True)
                    self._add(graph.conditional(chain, handle, True, node.name), node.body)
