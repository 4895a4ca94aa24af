"""Trajectories whose steps the device decides: one CUDA graph for every router and every threshold.

    loop.py             a trajectory, split into functions that can be captured
    plan.py             the nodes of the graph and their order: data without tensors or CUDA
    decision_memory.py  the device memory that holds scores, threshold and decisions
    ends.py             the ops at both ends of a step, in static buffers
    parts.py            the other ops of the plan's captured nodes where the unit is the branch
    trunk_parts.py      the same where it is the trunk
    norm.py             the norm among these ops; only the device's memory says which branches its run holds
    on_cpu.py           runs a plan node by node, on a machine without a GPU
    on_cuda.py          makes a plan one CUDA graph
    executor.py         the executor: call it like the function that it stands for
"""

from .decision_memory import DecisionTables
from .executor import Gated
from .loop import Loop

__all__ = ["DecisionTables", "Gated", "Loop"]
