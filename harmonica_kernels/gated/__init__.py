"""Trajectories whose gates are decided on the device: one CUDA graph for every router and every threshold.

    loop.py      what a trajectory is made of
    plan.py      what the graph holds, in which order: data, no tensor and no CUDA
    memory.py    what decides: scores, thresholds, steps, slots, in the memory of the device
    pieces.py    what the plan's captured parts compute, in static buffers
    walk.py      runs a plan node by node: what a machine without a GPU does
    cuda.py      makes a plan one CUDA graph
    executor.py  the front: call it like the function it stands for
"""

from .executor import Gated
from .loop import Loop

__all__ = ["Gated", "Loop"]
