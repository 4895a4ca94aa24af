"""Runs a plan node by node, on a machine without a GPU. The CUDA graph must give the same results."""

from collections.abc import Sequence

from ...ops._library import kernels
from .decision_memory import DecisionMemory
from .ends import Ends
from .plan import Capture, Change, Decide, If, Node, Rewind, While


def walk(nodes: Sequence[Node], parts: Ends, memory: DecisionMemory) -> None:
    """Runs the nodes on `parts` and `memory`, both on the CPU."""
    for node in nodes:
        match node:
            case Capture():
                for op in node.ops:
                    parts.run(op)
            case Rewind():
                memory.step.fill_(-1)
                memory.again.fill_(1)
            case Decide():
                kernels.decide(memory.addresses(), node.first, node.last, node.rule)
            case Change():
                parts.change()
            case If():
                if memory.compute[node.branch]:
                    walk(node.body, parts, memory)
            case While():
                while memory.again:
                    walk(node.body, parts, memory)
