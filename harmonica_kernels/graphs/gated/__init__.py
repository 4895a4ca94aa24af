"""Trajectories whose steps are decided on the device: one CUDA graph for every router and every threshold.

    loop.py             what a trajectory is made of
    plan.py             what the graph holds, in which order: data, no tensor and no CUDA
    decision_memory.py  what decides: scores, thresholds, steps, slots, in the memory of the device
    parts.py            what the plan's captured parts compute, in static buffers
    norm.py             the norm among these parts, whose run of branches is known in the device's memory only
    on_cpu.py           runs a plan node by node: what a machine without a GPU does
    on_cuda.py          makes a plan one CUDA graph
    executor.py         the front: call it like the function it stands for
"""

from .executor import Gated
from .loop import Loop

__all__ = ["Gated", "Loop"]
