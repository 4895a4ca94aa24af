"""Executors: what a function launches on the GPU, recorded once and replayed without Python.

`compile` is the one front. What decides when to record, what a recording stands for and which memory it reads is plain
bookkeeping, the same on every machine; `_Cuda` alone speaks to CUDA, through `_capture`.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ._capture import recording, stream_of
from .cache import FeatureCache

if TYPE_CHECKING:
    from . import gated


def compile(function: Callable[..., Tensor | tuple[Tensor, ...]], *, mode: str = "captured",
            rule: str = "scores", graphs: int = 64) -> "Captured | gated.Gated":
    """An executor of `function`: called like it, with the same results, but without its Python where there is a GPU.

    With tensors on a GPU, a call that comes a second time is recorded as a CUDA graph and replayed from then on; the
    first runs as it is, which also warms up what must not happen in a recording (compiling, tuning, planning). With
    tensors on the CPU, every call runs as it is.

    Any function of tensors will do: a denoiser's forward (a graph for each row of a schedule), or a whole trajectory
    with the scheduler's steps in it (one graph for a schedule: the fastest, since one launch is all that is left).

    Its arguments, by position or name, are of these kinds:
        tensors: the graph's inputs, copied into buffers of its own. Another shape or dtype is another graph.
        a FeatureCache: read and renewed in place, so it is to be used for trajectory after trajectory: `rewind` between
            them keeps its memory, which the graph has written down. Until it has memory, calls with it run as they are.
        an object with `graph_parts()`, which returns (key, tensors, rebuild): the hashable rest that decides what it
            does, the tensors that it holds, and a function from such tensors to the same object holding those.
        all else has to be hashable (a row: a tuple of bools; a list counts as a tuple) and is a constant of the graph.
            For modules and schedules that means the very object; weights may change in place, and a module whose
            weights were moved or cast is recorded anew.

    Args:
        function: returns a tensor or a tuple of tensors; its only side effects may be those on its caches.
        mode: "captured", or "gated": decided on the device. Then `function(trajectory, noise, schedule)` is a whole
            trajectory (`harmonica_dit.denoise`), and the executor a `harmonica_kernels.gated.Gated`: one graph serves
            every router, schedule and threshold, and changing them is a memory write.
        rule: of "gated", what decides: "scores" (of a router or schedule), or "change", a test of how far the first
            branch's output has moved.
        graphs: how many are kept alive; the one longest unused goes first. They share one pool of memory, which is
            returned when the last of them goes.

    Returns:
        The executor. Its results are the caller's own. It is not for two threads or streams at once.

    Raises:
        ValueError: an argument is out of range.
        When called: RuntimeError with grad enabled, or where the function cannot be captured, since it waits for the
        GPU, copies from the host or draws random numbers (torch.OutOfMemoryError where memory is short); TypeError or
        ValueError for arguments of other kinds or on several devices. The message says what to do.
    """
    if mode not in ("captured", "gated"):
        raise ValueError(f'mode: got {mode!r}, expected "captured" or "gated"')
    if not callable(function):
        raise TypeError(f"function: got {type(function).__name__}, expected something to call")
    if isinstance(graphs, bool) or not isinstance(graphs, int) or graphs < 1:
        raise ValueError(f"graphs: got {graphs!r}, expected a whole number ≥ 1")
    if mode == "gated":
        from .gated import Gated  # which is built on this file

        return Gated(function, rule, graphs)
    return Captured(function, graphs)


class Captured:
    """The executor that replays recorded CUDA graphs, see `compile`."""

    def __init__(self, function: Callable, graphs: int):
        self.function = function
        self._limit = graphs
        self._recordings: OrderedDict[Hashable, _Recording] = OrderedDict()  # the longest unused first
        self._seen: OrderedDict[Hashable, None] = OrderedDict()  # calls that came once; no more of them than graphs
        self._recorder: _Cuda | None = None

    @property
    def graphs(self) -> int:
        """How many are alive."""
        return len(self._recordings)

    def __call__(self, *args, **kwargs) -> Tensor | tuple[Tensor, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("an executor is for inference: call it under torch.no_grad() or inference_mode(); for "
                               "gradients call the function itself")
        call = _Call.of(args, kwargs)
        device = _one_device(call)
        recorder = self._recorder_on(device)
        if recorder is None or None in (cache._state() for cache in call.caches):
            return self._run(call, call.tensors)
        key = (call.key, _weights(self.function), device, torch.is_autocast_enabled(device.type),
               torch.get_autocast_dtype(device.type), tf32())
        if key in self._recordings:
            self._recordings.move_to_end(key)
        elif key in self._seen:
            while len(self._recordings) >= self._limit:
                self._drop()
            self._recordings[key] = self._record(call, recorder)
            del self._seen[key]
        else:
            self._seen[key] = None
            if len(self._seen) > self._limit:
                self._seen.popitem(last=False)
            return self._first(call, recorder)
        return self._recordings[key].replay(call)

    def reset(self) -> None:
        """Frees every graph; the next calls record anew."""
        while self._recordings:
            self._drop()
        self._seen.clear()

    def _recorder_on(self, device: torch.device) -> "_Cuda | None":
        """What records there, or None where calls run as they are."""
        if device.type not in RECORDERS:
            return None
        if self._recorder is None or self._recorder.device != device:
            self.reset()
            self._recorder = RECORDERS[device.type](device)
        return self._recorder

    def _run(self, call: "_Call", tensors: Sequence[Tensor]) -> Tensor | tuple[Tensor, ...]:
        """The function itself, with `tensors` for the call's own."""
        args, kwargs = call.bind(tensors)
        output = self.function(*args, **kwargs)
        _check_output(output)
        return output

    def _first(self, call: "_Call", recorder: "_Cuda") -> Tensor | tuple[Tensor, ...]:
        before = recorder.random_state()
        output = self._run(call, call.tensors)
        if not torch.equal(before, recorder.random_state()):
            raise RuntimeError(f"{_name(self.function)} draws random numbers, which a graph would repeat: pass them as "
                               'tensors, or call it without an executor (executor="eager" of sample, train_router)')
        return output

    def _record(self, call: "_Call", recorder: "_Cuda") -> "_Recording":
        with torch.inference_mode(False):  # such buffers can be written to in any mode
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
                f"{_name(self.function)} cannot be captured: {error}\nWhat is captured must not wait for the GPU "
                "(.item(), .tolist(), .cpu(), a tensor in an `if`), copy from ordinary host memory, or draw random "
                'numbers. Call it without an executor (executor="eager" of sample, train_router), or take that out of '
                "it."
            ) from error
        finally:
            after = [cache._state() for cache in call.caches]
            for cache, state in zip(call.caches, before):
                cache._restore(state)
        return _Recording(graph, buffers, output, after, (call.bind, [cache._arena for cache in call.caches]))

    def _drop(self) -> None:
        _, recording = self._recordings.popitem(last=False)
        self._recorder.free(recording.graph)


class _Recording(NamedTuple):
    """A graph, and the memory that it reads and writes."""

    graph: Any
    buffers: list[Tensor]  # its inputs
    output: Tensor | tuple[Tensor, ...]
    caches: list[tuple]  # the state that the function leaves each cache in
    alive: tuple  # whatever else the graph has the addresses of: arguments and caches' memory

    def replay(self, call: "_Call") -> Tensor | tuple[Tensor, ...]:
        for buffer, tensor in zip(self.buffers, call.tensors, strict=True):
            buffer.copy_(tensor)
        self.graph.replay()
        for cache, state in zip(call.caches, self.caches, strict=True):
            cache._restore(state)
        return self.output.clone() if isinstance(self.output, Tensor) else tuple(o.clone() for o in self.output)


class _Call(NamedTuple):
    """The arguments of one call, taken apart."""

    names: list[str]  # of the tensors
    tensors: list[Tensor]
    caches: list[FeatureCache]
    key: tuple  # all that decides what the call launches, but for the tensors' values
    bind: Callable[[Sequence[Tensor]], tuple[tuple, dict]]  # from tensors to arguments with these in their places

    @classmethod
    def of(cls, args: tuple, kwargs: dict) -> "_Call":
        names, tensors, caches, key, builders = [], [], [], [], []
        for name, value in (*enumerate(args), *kwargs.items()):
            constant, held, build = _taken_apart(value)
            if not _is_constant(constant):
                raise TypeError(f"{_described(name)}: got {type(value).__name__}; an executor takes tensors, each as "
                                "an argument of its own, FeatureCaches, and what can be hashed (a row as a tuple)")
            if isinstance(value, FeatureCache):
                caches.append(value)
            key.append((name, constant, _weights(constant), tuple((t.shape, t.dtype) for t in held)))
            builders.append((name, build, slice(len(tensors), len(tensors) + len(held))))
            names += [_described(name)] * len(held)
            tensors += held

        def bind(tensors: Sequence[Tensor]) -> tuple[tuple, dict]:
            built = {name: build(*tensors[part]) for name, build, part in builders}
            return tuple(built[i] for i in range(len(args))), {name: built[name] for name in kwargs}

        return cls(names, tensors, caches, tuple(key), bind)


class _Cuda:
    """Recording on one device: one stream, and one pool of memory for all graphs that are alive together."""

    def __init__(self, device: torch.device):
        self.device = device
        self._stream = stream_of(self, device)
        self._pool: Any = None

    def random_state(self) -> Tensor:
        """Of the generators that a function might draw from."""
        return torch.cat([torch.get_rng_state(), torch.cuda.get_rng_state(self.device)])

    def record(self, call: Callable[[], Any], alone: bool) -> tuple[torch.cuda.CUDAGraph, Any]:
        """A graph of what call() launches, not run yet, and call's result: the buffers that a replay fills.

        alone: no other graph is alive, so the pool is gone too and a new one begins.
        """
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device):
            if alone:
                self._pool = torch.cuda.graph_pool_handle()
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # memory outside the pool cannot be used inside
            torch.clear_autocast_cache()  # a weight that was cast outside would be gone at the replay
            with torch.cuda.stream(self._stream), recording(graph, self._pool):
                output = call()
            torch.clear_autocast_cache()
        return graph, output

    def free(self, graph: torch.cuda.CUDAGraph) -> None:
        torch.cuda.synchronize(self.device)  # it may be running
        graph.reset()


RECORDERS = {"cuda": _Cuda}  # where calls are recorded; elsewhere they run as they are


def _taken_apart(value: Any) -> tuple[Any, tuple[Tensor, ...], Callable[..., Any]]:
    """An argument's constant part, the tensors that it holds, and what puts it together from such tensors."""
    if isinstance(value, Tensor):
        return None, (value,), lambda tensor: tensor
    if isinstance(value, FeatureCache):
        value.commit()
        return value._state(), (), lambda: value
    if hasattr(value, "graph_parts"):
        return value.graph_parts()
    return tuple(value) if isinstance(value, list) else value, (), lambda: value


def _is_constant(constant: Any) -> bool:
    """Whether it can be hashed and holds no tensors, whose values a graph would keep."""
    if isinstance(constant, tuple):
        return all(map(_is_constant, constant))
    return isinstance(constant, Hashable) and not isinstance(constant, Tensor)


def _one_device(call: _Call) -> torch.device:
    if not call.tensors:
        raise ValueError("an executor needs at least one tensor among its arguments, got none")
    device = call.tensors[0].device
    for name, tensor in zip(call.names, call.tensors):
        if tensor.device != device:
            raise ValueError(f"{name}: is on {tensor.device}, but {call.names[0]} is on {device}; an executor's "
                             "tensors have to be on one device")
    return device


def tf32() -> tuple[bool, bool]:
    """Whether matrix products and convolutions in float32 may use TF32: a graph keeps the kernels chosen by it."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32", torch.backends.cudnn.conv.fp32_precision == "tf32"


def _weights(constant: Any) -> tuple:
    """Where the weights of the modules in `constant` lie, so that a graph is not replayed after they were moved."""
    parts = constant if isinstance(constant, tuple) else (constant,)
    return tuple((p.data_ptr(), p.dtype) for part in parts if isinstance(part, nn.Module) for p in part.parameters())


def _described(argument: int | str) -> str:
    return argument if isinstance(argument, str) else f"argument {argument}"


def _check_output(output: Any) -> None:
    for o in output if isinstance(output, tuple) else (output,):
        if not isinstance(o, Tensor):
            raise TypeError(f"function: returned {type(o).__name__}, expected a tensor or a tuple of tensors")


def _name(function: Callable) -> str:
    return getattr(function, "__name__", type(function).__name__)
