"""Whether a module's weights are still those that a graph was recorded with."""

from collections.abc import Iterator
from itertools import count
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from ..ops._library import kernels

LISTS = nn.ModuleList, nn.ModuleDict, nn.Sequential
DLPACK = Tensor.__dlpack_c_exchange_api__  # by which C reads an address and a dtype in half the time of Python


def weights(constant: Any) -> tuple[int, ...]:
    """A number for each module in `constant`: another one after its weights or buffers have been moved, cast or
    replaced, since no graph may be replayed then."""
    parts = constant if isinstance(constant, tuple) else (constant,)
    return tuple([_Weights.of(part) for part in parts if isinstance(part, nn.Module)])


def stored(tensor: Tensor) -> Iterator[Tensor]:
    """The tensor itself; or, where it is made of others as torchao's quantized ones are, the plain tensors inside."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from stored(getattr(tensor, name))


class _Weights:
    """What a module's weights were when they were last looked at. To walk through all its modules at each call would
    take longer than a small step: the walk is made anew only after some module, anywhere, was given another part."""

    known: WeakKeyDictionary[nn.Module, "_Weights"] = WeakKeyDictionary()
    numbers = count()
    parts_given = -1  # how many modules, parameters and buffers were given to modules, since the first look

    def __init__(self):
        self.walked_at, self.seen, self.number = -1, None, -1

    @classmethod
    def of(cls, module: nn.Module) -> int:
        found = cls.known.get(module)
        if found is None:
            if cls.parts_given < 0:
                cls.parts_given = 0
                register_module_module_registration_hook(cls._count)
                register_module_parameter_registration_hook(cls._count)
                register_module_buffer_registration_hook(cls._count)
            found = cls.known[module] = cls()
        if found.walked_at != cls.parts_given or found._look() != found.seen:
            found._walk(module)
        return found.number

    def _look(self) -> tuple:
        """Addresses and dtypes; and the lists' lengths, for these may lose a part without a word.

        A cast gives a module other buffers, and a quantized parameter other tensors inside, without a word too: they
        are looked up anew.
        """
        tensors = self.parameters
        if self.made_of_others or self.buffers:
            found = [buffer for held in self.buffers for buffer in held.values() if buffer is not None]
            tensors = [*tensors, *(part for t in (*self.made_of_others, *found) for part in stored(t))]
        return kernels.memory_of(DLPACK, tensors), *map(len, self.lists)

    def _walk(self, module: nn.Module) -> None:
        self.walked_at, modules, parameters = self.parts_given, list(module.modules()), list(module.parameters())
        self.made_of_others = [p for p in parameters if hasattr(p, "__tensor_flatten__")]
        self.parameters = [p for p in parameters if not hasattr(p, "__tensor_flatten__")]
        self.buffers = [m._buffers for m in modules if m._buffers]
        self.lists = [m._modules for m in modules if isinstance(m, LISTS)]
        if (seen := self._look()) != self.seen:
            self.seen, self.number = seen, next(self.numbers)

    @classmethod
    def _count(cls, *_) -> None:
        cls.parts_given += 1
