"""Counts what a function launches on a GPU, on a machine without one."""

from collections import Counter

from torch.utils._python_dispatch import TorchDispatchMode

from harmonica_dit.models import feed_forward
from harmonica_kernels import ops

ALLOCATE = ("empty", "empty_strided", "empty_like", "new_empty", "detach", "_unsafe_view")


def name_of(op) -> str:
    return op._schema.name.partition("::")[2]


def starts_a_kernel(op) -> bool:
    """All but views and what only allocates."""
    view = any(r.alias_info is not None and not r.alias_info.is_write for r in op._schema.returns)
    return not view and name_of(op) not in ALLOCATE


class Launches(TorchDispatchMode):
    """The ops in its block that start a kernel, by name."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if starts_a_kernel(op):
            self.found[name_of(op)] += 1
        return op(*args, **(kwargs or {}))

    @property
    def count(self) -> int:
        return sum(self.found.values())


def as_on_a_gpu(monkeypatch):
    """What is chosen by the device is chosen for the CPU as for CUDA."""
    monkeypatch.setattr(ops, "FUSED", ("cpu",))
    monkeypatch.setattr(feed_forward, "EPILOGUE", ("cpu",))


def one_launch(q, k, v):
    """In place of attention, whose parts on a CPU are others than a GPU's one kernel."""
    return q.exp()
