"""Makes a plan one CUDA graph. Only `plan` decides which nodes there are and where they stand.

Without a GPU the tests use a stand-in for CUDA that executes the graph built here.
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
from .ends import Ends
from .norm import point
from .parts import Parts
from .plan import Capture, Change, Decide, If, Node, Rewind, While


class Recorder:
    """Records through PyTorch on one device, with one stream and one memory pool. The recorded parts can share the pool
    since they run one after the other.

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
        self._graphs: list[torch.cuda.CUDAGraph] = []  # they keep the pool alive

    def graph(self):
        """An empty gated graph."""
        return kernels.GatedGraph(self.device.index)

    def stream(self) -> int:
        """The caller's stream, for launches."""
        return torch.cuda.current_stream(self.device).cuda_stream

    def warm_up(self, call: Callable[[], None]) -> None:
        """Runs call() once before it is recorded: a recording must not compile, tune or load kernels."""
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        before = self._random_state()
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            call()
        if not torch.equal(before, self._random_state()):
            raise RuntimeError('mode="gated": the model draws random numbers, which a graph would repeat')
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()  # a recording allocates from the pool and cannot use other cached memory

    def record(self, name: str, call: Callable[[], None]) -> int:
        """Records what call() launches as a cudaGraph_t, which is valid until `close`."""
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
        """Frees the pool; nothing recorded may run after this."""
        for graph in self._graphs:
            graph.reset()
        self._graphs.clear()

    def wait(self) -> None:
        """Waits until nothing runs on the device."""
        torch.cuda.synchronize(self.device)

    def _random_state(self) -> Tensor:
        return torch.cat([torch.get_rng_state(), torch.cuda.get_rng_state(self.device)])


class GraphLoop:
    """A plan as one executable graph; `run` is one launch. It keeps alive everything whose address the graph holds.

    Raises:
        RuntimeError: a part cannot be captured, or holds a node that may not stand in a conditional node; the message
            names part and node.
    """

    def __init__(self, nodes: Sequence[Node], parts: Ends, memory: DecisionMemory, recorder: Recorder):
        self.parts, self.memory, self._recorder = parts, memory, recorder
        self._fresh = [0] * memory.branches  # addresses of the outputs that the captured bodies leave
        self._handles = [0] * (memory.branches + 1)
        recorder.warm_up(lambda: self._run_once(nodes))
        self._graph = recorder.graph()
        try:
            self._add(0, nodes)
            memory.conditions.copy_(torch.tensor(self._handles, dtype=torch.uint64).view(torch.int64))
            if isinstance(parts, Parts):
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
        self._graph = None  # freed before the graphs that it was cloned from
        self._recorder.close()

    def _run_once(self, nodes: Sequence[Node]) -> None:
        for node in nodes:
            if isinstance(node, Capture):
                self._run_ops(node)
            elif isinstance(node, (If, While)):
                self._run_once(node.body)

    def _run_ops(self, node: Capture) -> None:
        for op in node.ops:
            self.parts.run(op)

    def _add(self, chain: int, nodes: Sequence[Node]) -> None:
        graph, memory, parts = self._graph, self.memory, self.parts
        for node in nodes:
            match node:
                case Capture():
                    graph.child(chain, self._recorder.record(node.name, partial(self._run_ops, node)), node.name)
                    for op in node.ops:
                        if op.kind == "body":
                            # The output's memory goes back to the pool: the next norm reads it before anything is
                            # written to the pool again.
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
