"""Runs a plan node by node: what a machine without a GPU does, and what the graph has to equal."""

from collections.abc import Sequence

from ..ops._library import kernels
from .memory import GateMemory
from .pieces import Pieces
from .plan import Captured, Change, Gate, If, Node, Rewind, While


def walk(nodes: Sequence[Node], pieces: Pieces, memory: GateMemory) -> None:
    """Runs the nodes on `pieces` and `memory`, which lie in the memory of the CPU."""
    for node in nodes:
        match node:
            case Captured():
                for op in node.ops:
                    pieces.run(op)
            case Rewind():
                memory.step.fill_(-1)
                memory.again.fill_(1)
            case Gate():
                kernels.gate(memory.addresses(), node.first, node.last, node.rule)
            case Change():
                pieces.change()
            case If():
                if memory.compute[node.branch]:
                    walk(node.body, pieces, memory)
            case While():
                while memory.again:
                    walk(node.body, pieces, memory)
