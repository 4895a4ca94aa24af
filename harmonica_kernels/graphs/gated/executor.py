"""The executor of trajectories whose steps the device decides."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..keys import settings, typed
from ..weights import Snapshot
from .decision_memory import DecisionMemory, DecisionTables
from .ends import Ends
from .norm import norm_on_cpu, norm_on_cuda
from .on_cpu import walk
from .on_cuda import GraphLoop, Recorder
from .parts import Parts
from .plan import plan
from .trunk_parts import TrunkParts


class Gated:
    """Runs whole trajectories whose steps the device decides; see `harmonica_kernels.compile`.

    Call it as `executor(trajectory, noise, schedule=None)`; it returns what `function` would. The first call with a
    model, batch and number of steps captures a graph. After that a call is one launch, with any router and threshold:
    to change the router, schedule or threshold is a write to the device's memory.

    The trajectory has
        graph_parts() -> (key, tensors, rebuild), see `harmonica_kernels.compile`;
        loop() -> Loop; start(noise) -> x_0; steps, T.
    A router or schedule has
        decision_tables() -> DecisionTables.

    Args:
        function: what the executor stands for. rule: "scores" or "change", see `plan`. graphs: how many graphs are kept
            alive; the least recently used one goes first.
    """

    def __init__(self, function: Callable, rule: str, graphs: int):
        plan(2, rule)  # raises on an unknown rule
        self.function, self.rule = function, rule
        self._limit = graphs
        self._threshold = 0.1
        self._router: Any = None
        self._tables: DecisionTables | None = None
        self._loops: OrderedDict[Hashable, _Loop] = OrderedDict()  # least recently used first
        self._last: _Loop | None = None

    @property
    def graphs(self) -> int:
        """How many graphs are alive."""
        return len(self._loops)

    @property
    def threshold(self) -> float:
        """τ of the rule: branches are computed above this score or relative change. May be set at any time."""
        return self._threshold

    @threshold.setter
    def threshold(self, threshold: float) -> None:
        if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0 <= threshold < float("inf"):
            raise ValueError(f"threshold: got {threshold!r}, expected a finite number ≥ 0")
        self._threshold = float(threshold)
        for loop in self._loops.values():
            loop.memory.threshold.fill_(self._threshold)

    def load(self, router: Any) -> None:
        """Copies the tables of `router` (or a schedule) to the device; later trajectories follow them."""
        tables = router.decision_tables()
        for name, table in (("scores", tables.scores), ("extrapolation", tables.extrapolation)):
            if table is not None and (table.shape != tables.scores.shape or table.dim() != 2
                                      or table.dtype != torch.float32):
                raise ValueError(f"router.decision_tables(): {name} are {table.dtype} of shape {tuple(table.shape)}, "
                                 "expected float32 [T, K]")
        plan(2, self.rule, tables.unit)  # raises if the rule does not decide on such units
        self._router, self._tables = router, tables
        for loop in self._loops.values():
            if loop.unit == tables.unit and loop.memory.scores.shape == tables.scores.shape:
                self._write(loop)

    @property
    def reused(self) -> Tensor:
        """Which entries the last trajectory reused, bool [T, K] on the CPU; the mean is the cache utilization ratio.

        [T, 1] where the trunk is forecast.
        """
        if self._last is None:
            raise RuntimeError("reused: nothing has run yet")
        return self._last.memory.reused.bool().cpu()

    @torch.no_grad()
    def __call__(self, trajectory: Any, noise: Tensor, schedule: Any = None) -> Tensor:
        """Runs a trajectory from its noise [n, C, ...] to images [n, C, ...], which are the caller's own.

        schedule: loaded unless it is the one loaded last. None keeps the loaded one; without one everything is
            computed.

        Raises:
            ValueError: the loaded tables are for another T or K.
            RuntimeError: autocast is on, or a part of the model cannot be captured; the message names part and node.
        """
        if torch.is_autocast_enabled(noise.device.type):
            raise RuntimeError('mode="gated" does not run under autocast: cast the model instead')
        if schedule is not None and schedule is not self._router:
            self.load(schedule)
        key, tensors, rebuild = trajectory.graph_parts()
        unit, history = ("branch", 1) if self._tables is None else (self._tables.unit, self._tables.history)
        snapshot = Snapshot.of(key)
        key = (typed(key), noise.shape, noise.dtype, noise.device, tuple((t.shape, t.dtype) for t in tensors),
               settings(noise.device.type), unit)
        loop = self._loops.get(key)
        if loop is not None and (loop.snapshot != snapshot or loop.history < history):
            self._drop(key)
            loop = None
        if loop is None:
            for stale in [other for other, loop in self._loops.items() if loop.snapshot.is_stale()]:
                self._drop(stale)
            while len(self._loops) >= self._limit:
                self._drop(next(iter(self._loops)))
            loop = self._loops[key] = self._build(trajectory, noise, tensors, rebuild, unit, history, snapshot)
        self._loops.move_to_end(key)
        for buffer, tensor in zip(loop.inputs, tensors, strict=True):
            buffer.copy_(tensor)
        loop.parts.sample.copy_(trajectory.start(noise))
        loop.run()
        self._last = loop
        return loop.parts.sample.clone()

    def reset(self) -> None:
        """Frees every graph; the next calls capture anew."""
        while self._loops:
            self._drop(next(iter(self._loops)))
        self._last = None

    def _build(self, trajectory: Any, noise: Tensor, tensors: tuple[Tensor, ...], rebuild: Callable, unit: str,
               history: int, snapshot: Snapshot) -> "_Loop":
        # Inference tensors cannot be written to outside inference mode. Leaving that mode turns grad on, with which the
        # model would launch other kernels than it does in a captured call.
        with torch.inference_mode(False), torch.no_grad():
            inputs = [t.clone() for t in tensors]
            loop = rebuild(*inputs).loop()
            nodes, start = plan(len(loop.branches), self.rule, unit), trajectory.start(noise)
            if unit == "trunk":
                memory = DecisionMemory(trajectory.steps, 1, 1, noise.device)
                parts: Ends = TrunkParts(loop, memory, start, history)
            else:
                memory = DecisionMemory(trajectory.steps, len(loop.branches), history, noise.device)
                parts = Parts(loop, memory, start, norm_on_cuda if noise.is_cuda else norm_on_cpu)
            memory.threshold.fill_(self._threshold)
            self._write(made := _Loop(inputs, parts, memory, unit, history, snapshot,
                                      run=lambda: walk(nodes, parts, memory), close=lambda: None))
            if builds_graphs(noise.device):
                graph = GraphLoop(nodes, parts, memory, Recorder(noise.device))
                return made._replace(run=graph.run, close=graph.close)
            return made

    def _write(self, loop: "_Loop") -> None:
        """Writes the loaded tables into a loop's memory; without tables everything is computed."""
        memory = loop.memory
        if self._tables is None:
            memory.scores.fill_(float("inf"))
            return
        scores, extrapolation = self._tables.scores, self._tables.extrapolation
        if scores.shape != memory.scores.shape:
            raise ValueError(f"router: is for {list(scores.shape)} steps and branches, the trajectory has "
                             f"{list(memory.scores.shape)}")
        memory.scores.copy_(scores)
        if isinstance(loop.parts, TrunkParts):
            loop.parts.load(self._tables)
        elif extrapolation is None:
            memory.extrapolation.zero_()
        elif memory.history == 2:
            memory.extrapolation.copy_(extrapolation)

    def _drop(self, key: Hashable) -> None:
        loop = self._loops.pop(key)
        if loop is self._last:
            self._last = None
        loop.close()


def builds_graphs(device: torch.device) -> bool:
    """Whether trajectories on this device become CUDA graphs; on others they are run node by node."""
    return device.type == "cuda"


class _Loop(NamedTuple):
    """One captured trajectory: the buffers of its inputs, its parts and memory, and functions to run and free it."""

    inputs: list[Tensor]
    parts: Ends
    memory: DecisionMemory
    unit: str
    history: int
    snapshot: Snapshot  # of the weights that it reads
    run: Callable[[], None]
    close: Callable[[], None]
