"""The memory of one trajectory where a step calls the transformer several times: a cache for each of these calls."""

from collections.abc import Callable, Sequence

from torch import Tensor

from .adapters.generic_cache import GenericCache, GenericTrunkCache


class StepCache:
    """A generic adapter's caches, one for each of a step's calls; trainers and sampler use them as one cache.

    new: makes an empty one, of the branches or of the trunk.
    """

    def __init__(self, new: Callable[[], GenericCache | GenericTrunkCache]):
        self._new = new
        self.calls: list[GenericCache | GenericTrunkCache] = []

    def of_call(self, j: int) -> GenericCache | GenericTrunkCache:
        """The cache of a step's call number j."""
        while len(self.calls) <= j:
            self.calls.append(self._new())
        return self.calls[j]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(cache.nbytes for cache in self.calls)

    def rewind(self) -> None:
        """Forgets everything, for another trajectory."""
        self.calls = []

    def commit(self) -> None:
        """Does nothing: an entry is replaced, never written into, so a backward may still read the old one."""

    def copy_(self, other: "StepCache") -> "StepCache":
        """Becomes equal to `other`. Returns itself."""
        self.calls = [self._new().copy_(cache) for cache in other.calls]
        return self

    # Of the trunk's, see `harmonica_kernels.TrunkCache`.

    def newest(self) -> tuple[Tensor, ...]:
        """What the last computed step stored, of all its calls."""
        return tuple(t for cache in self.calls for t in cache.newest())

    def holding(self, states: Sequence[Sequence[Tensor]]) -> "StepCache":
        """A cache of such a trajectory that holds these, the newest first, each as `newest` gave it."""
        made, begun = StepCache(self._new), 0
        for cache in self.calls:
            end = begun + len(cache.newest())
            made.calls.append(cache.holding([state[begun:end] for state in states]))
            begun = end
        return made
