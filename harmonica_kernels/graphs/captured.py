"""The executor that replays recorded calls as CUDA graphs.

`Captured` does the bookkeeping: when to record, which call a recording stands for, which memory it reads. That is the
same on every machine. Only `_Cuda` speaks to CUDA, through `record_into`.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .keys import Call
from .recording import record_into, stream_of
from .weights import Snapshot


class Captured:
    """The executor that replays recorded CUDA graphs; see `compile`."""

    def __init__(self, function: Callable, graphs: int):
        self.function = function
        self._limit = graphs
        self._recordings: dict[Hashable, _Recording] = {}
        self._uses = 0
        self._seen: OrderedDict[Hashable, Snapshot] = OrderedDict()  # calls that came once, at most as many as graphs
        self._recorder: _Cuda | None = None

    @property
    def graphs(self) -> int:
        """How many graphs are alive."""
        return len(self._recordings)

    def __call__(self, *args, **kwargs) -> Tensor | tuple[Tensor, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("an executor is for inference: call it under torch.no_grad() or inference_mode(); for "
                               "gradients call the function itself")
        call = Call(args, kwargs)
        recording = self._find(call)
        return self._run_or_record(call) if recording is None else self._replay(recording, call)

    def _find(self, call: Call) -> "_Recording | None":
        try:
            recording = self._recordings.get(call.key)
        except TypeError:  # an argument cannot be hashed; `Call.check` says which
            return None
        return None if recording is None or recording.snapshot.is_stale() else recording

    def _run_or_record(self, call: Call) -> Tensor | tuple[Tensor, ...]:
        recorder = self._recorder_on(call.check())
        if recorder is None or any(cache.dtype is None for cache in call.caches):
            return self._run(call, call.tensors)
        for key in [key for key, recording in self._recordings.items() if recording.snapshot.is_stale()]:
            self._drop(key)
        snapshot = Snapshot.of((self.function, *call.constants.values()))
        if self._seen.get(call.key) != snapshot:
            self._seen[call.key] = snapshot
            if len(self._seen) > self._limit:
                self._seen.popitem(last=False)
            return self._run_first(call, recorder)
        while len(self._recordings) >= self._limit:
            self._drop(min(self._recordings, key=lambda key: self._recordings[key].used))
        recording = self._recordings[call.key] = self._record(call, recorder, snapshot)
        del self._seen[call.key]
        return self._replay(recording, call)

    def _replay(self, recording: "_Recording", call: Call) -> Tensor | tuple[Tensor, ...]:
        recording.used = self._uses = self._uses + 1
        return recording.replay(call)

    def reset(self) -> None:
        """Frees every graph; the next calls record anew."""
        while self._recordings:
            self._drop(next(iter(self._recordings)))
        self._seen.clear()

    def _recorder_on(self, device: torch.device) -> "_Cuda | None":
        """The recorder for a device, or None if calls there run as they are."""
        if device.type not in RECORDERS:
            return None
        if self._recorder is None or self._recorder.device != device:
            self.reset()
            self._recorder = RECORDERS[device.type](device)
        return self._recorder

    def _run(self, call: Call, tensors: Sequence[Tensor]) -> Tensor | tuple[Tensor, ...]:
        """Calls the function itself, with `tensors` in place of the call's own."""
        args, kwargs = call.bind(tensors)
        output = self.function(*args, **kwargs)
        _check_output(output)
        return output

    def _run_first(self, call: Call, recorder: "_Cuda") -> Tensor | tuple[Tensor, ...]:
        before = recorder.random_state()
        output = self._run(call, call.tensors)
        if not torch.equal(before, recorder.random_state()):
            raise RuntimeError(f"{_name(self.function)} draws random numbers, which a graph would repeat: pass them as "
                               'tensors, or call it without an executor (executor="eager" of sample, train_router)')
        return output

    def _record(self, call: Call, recorder: "_Cuda", snapshot: Snapshot) -> "_Recording":
        with torch.inference_mode(False):  # inference tensors cannot be written to outside inference mode
            buffers = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in call.tensors]
        for buffer, tensor in zip(buffers, call.tensors):
            buffer.copy_(tensor)
        before = [cache._state() for cache in call.caches]
        try:
            graph, output = recorder.record(lambda: self._run(call, buffers), alone=not self._recordings)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise RuntimeError(
                f"{_name(self.function)} cannot be captured: {error}\nA captured function must not wait for the GPU "
                "(.item(), .tolist(), .cpu(), a tensor in an `if`), copy from ordinary host memory, or draw random "
                'numbers. Call it without an executor (executor="eager" of sample, train_router), or take that out of '
                "it."
            ) from error
        finally:
            after = [cache._state() for cache in call.caches]
            for cache, state in zip(call.caches, before):
                cache._restore(state)
        alive = [rebuild for _, rebuild in call.parts.values()], [cache._arena for cache in call.caches]
        return _Recording(graph, buffers, output, after, alive, snapshot)

    def _drop(self, key: Hashable) -> None:
        self._recorder.free(self._recordings.pop(key).graph)


@dataclass(slots=True)
class _Recording:
    """A graph and the memory that it reads and writes."""

    graph: Any
    buffers: list[Tensor]  # its inputs
    output: Tensor | tuple[Tensor, ...]
    caches: list[tuple]  # the state in which the function leaves each cache
    alive: tuple  # the graph holds addresses of theirs too: other arguments (constants are in the key) and caches
    snapshot: Snapshot  # of what it reads
    used: int = 0  # when it was last used: as a number, since the way to the end of an ordered dictionary takes longer

    def replay(self, call: Call) -> Tensor | tuple[Tensor, ...]:
        for buffer, tensor in zip(self.buffers, call.tensors, strict=True):
            buffer.copy_(tensor)
        self.graph.replay()
        for cache, state in zip(call.caches, self.caches, strict=True):
            cache._restore(state)
        return self.output.clone() if isinstance(self.output, Tensor) else tuple(o.clone() for o in self.output)


class _Cuda:
    """Records on one device, with one stream, and one memory pool for all graphs that are alive at the same time."""

    def __init__(self, device: torch.device):
        self.device = device
        self._stream = stream_of(self, device)
        self._pool: Any = None

    def random_state(self) -> Tensor:
        """The state of the generators that a function might draw from."""
        return torch.cat([torch.get_rng_state(), torch.cuda.get_rng_state(self.device)])

    def record(self, call: Callable[[], Any], alone: bool) -> tuple[torch.cuda.CUDAGraph, Any]:
        """Records what call() launches, without running it.

        Returns the graph and call's result, the buffers that a replay fills.

        alone: no other graph is alive, so the old pool is gone and a new one begins.
        """
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device):
            if alone:
                self._pool = torch.cuda.graph_pool_handle()
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # a recording allocates from the pool and cannot use other cached memory
            torch.clear_autocast_cache()  # a weight cast before the recording would be gone at the replay
            with torch.cuda.stream(self._stream), record_into(graph, self._pool):
                output = call()
            torch.clear_autocast_cache()
        return graph, output

    def free(self, graph: torch.cuda.CUDAGraph) -> None:
        torch.cuda.synchronize(self.device)  # the graph may be running
        graph.reset()


RECORDERS = {"cuda": _Cuda}  # devices on which calls are recorded; on others they run as they are


def _check_output(output: Any) -> None:
    for o in output if isinstance(output, tuple) else (output,):
        if not isinstance(o, Tensor):
            raise TypeError(f"function: returned {type(o).__name__}, expected a tensor or a tuple of tensors")


def _name(function: Callable) -> str:
    return getattr(function, "__name__", type(function).__name__)
