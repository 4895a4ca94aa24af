"""The cache for branches of any kind, and the form of their outputs, which may be tuples."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from harmonica_kernels.cache import Memory

Output = Tensor | tuple | None  # of a branch: a tensor, or tensors and None in a tuple


class GenericCache(Memory):
    """The memory of one trajectory: each branch's outputs in the last `history` forwards that computed it.

    Outputs may have any shape, or be tuples. A branch has one for each of its calls in a forward. They are kept as they
    are, not copied. It is used like `harmonica_kernels.FeatureCache`.
    """

    def reset(self) -> None:
        super().reset()
        self._outputs: dict[int, list[list[Output]]] = {}  # per branch and forward, newest first: its calls' outputs
        self._meta: dict[nn.Module, Output] = {}  # meta tensors in place of the outputs of feeders that do not run

    @property
    def nbytes(self) -> int:
        """Bytes of the outputs held."""
        return sum(t.nbytes for t in tensors_of(list(self._outputs.values())))

    def filled(self, k: int) -> int:
        """From how many forwards the cache holds outputs of branch k, 0 to `history`."""
        return len(self._outputs.get(k, ()))

    def latest(self, k: int) -> list[Output]:
        """Branch k's newest outputs, one for each of its calls in that forward."""
        return self._outputs[k][0]

    def previous(self, k: int) -> list[Output] | None:
        """Branch k's outputs before the newest, or None if there are none yet."""
        return self._outputs[k][1] if self.filled(k) > 1 else None

    def outputs(self, k: int) -> list[list[Output]]:
        """Branch k's outputs that the cache holds, of its last forwards, the newest first."""
        return self._outputs.get(k, [])

    def copy_(self, other: "GenericCache") -> "GenericCache":
        """Becomes equal to `other`. Returns itself."""
        self.history, self._of, self._open = other.history, other._of, other._open
        self._outputs, self._meta = dict(other._outputs), dict(other._meta)
        return self

    def commit(self) -> None:
        """Does nothing: an entry is replaced, never written into, so a backward may still read the old one."""

    def _store(self, k: int, o: Output, first: bool) -> None:
        """Stores an output of branch k. first: whether it is the branch's first output in this forward."""
        if first:
            self._outputs[k] = [[], *self._outputs.get(k, ())][: self.history]
        self._outputs[k][0].append(map_tensors(Tensor.detach, o))


def map_tensors(f: Callable, *outputs: Output) -> Output:
    """Applies f to the corresponding tensors of outputs of the same structure."""
    first = outputs[0]
    if isinstance(first, (tuple, list)):
        return tuple(map_tensors(f, *parts) for parts in zip(*outputs, strict=True))
    return None if first is None else f(*outputs)


def tensors_of(o: Output) -> list[Tensor]:
    if isinstance(o, (tuple, list)):
        return [t for part in o for t in tensors_of(part)]
    return [] if o is None else [o]


def is_output(o: Any) -> bool:
    tensors = tensors_of(o)
    return bool(tensors) and all(isinstance(t, Tensor) and t.is_floating_point() for t in tensors)
