"""Whether a module's weights are still those that a graph was recorded with."""

import ctypes
from collections.abc import Iterable, Iterator
from inspect import ismethod
from itertools import chain, count
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from ..ops._library import kernels

LISTS = nn.ModuleList, nn.ModuleDict, nn.Sequential


def stored(tensor: Tensor) -> Iterator[Tensor]:
    """The tensor itself; or, where it is made of others as torchao's quantized ones are, the plain tensors inside."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from stored(getattr(tensor, name))


class Weights:
    """What a module's weights were when they were last looked at. To walk through all its modules at each call would
    take longer than a small step: the walk is made anew only after some module, anywhere, was given another part.

    It lives as long as recordings have it: handles count as owners of their tensors, which others may not swap then.
    """

    known: WeakKeyDictionary[nn.Module, ref["Weights"]] = WeakKeyDictionary()
    versions = count()
    parts_given = -1  # how many modules, parameters and buffers were given to modules, since the first look

    def __init__(self, module: nn.Module):
        self._module = ref(module)
        self._walked_at, self._version = -1, -1
        self._seen: tuple | None = None

    @classmethod
    def of(cls, module: nn.Module) -> "Weights":
        """The one of this module."""
        known = cls.known.get(module)
        found = known and known()
        if found is None:
            if cls.parts_given < 0:
                cls.parts_given = 0
                register_module_module_registration_hook(cls._count)
                register_module_parameter_registration_hook(cls._count)
                register_module_buffer_registration_hook(cls._count)
            found = cls(module)
            cls.known[module] = ref(found)
        return found

    def version(self) -> int:
        """Another number after weights or buffers have been moved, cast or replaced: no graph may be replayed then."""
        if self._walked_at != self.parts_given or self._look() != self._seen:
            self._walk()
        return self._version

    def _look(self) -> tuple:
        """Addresses and dtypes; and the lists' lengths, for these may lose a part without a word.

        A cast gives a module other buffers, and a quantized parameter other tensors inside, without a word too: they
        are looked up anew, and not kept.
        """
        found = self._parameters.places(), *map(len, self._lists)
        if not (self._made_of_others or self._buffers):
            return found
        buffers = [buffer for held in self._buffers for buffer in held.values() if buffer is not None]
        return handles(chain.from_iterable(map(stored, (*self._made_of_others, *buffers)))).places(), *found

    def _walk(self) -> None:
        parts_given, module = self.parts_given, self._module()
        modules, parameters = list(module.modules()), list(module.parameters())
        self._made_of_others = [p for p in parameters if hasattr(p, "__tensor_flatten__")]
        self._parameters = handles(p for p in parameters if not hasattr(p, "__tensor_flatten__"))
        self._buffers = [m._buffers for m in modules if m._buffers]
        self._lists = [m._modules for m in modules if isinstance(m, LISTS)]
        if (seen := self._look()) != self._seen:
            self._seen, self._version = seen, next(self.versions)
        self._walked_at = parts_given

    @classmethod
    def _count(cls, *_) -> None:
        cls.parts_given += 1


class Snapshot(NamedTuple):
    """The weights of the modules inside a constant, and which versions they were."""

    weights: list[Weights]
    versions: list[int]

    @classmethod
    def of(cls, constant: Any) -> "Snapshot":
        weights = weights_in(constant)
        return cls(weights, [w.version() for w in weights])

    def is_stale(self) -> bool:
        """Whether a graph that was recorded then would read weights where they are no longer."""
        return [weights.version() for weights in self.weights] != self.versions


def weights_in(constant: Any) -> list[Weights]:
    """The weights of the module that `constant` is, or is a method of; of a tuple, those of all its parts."""
    if ismethod(constant):
        constant = constant.__self__
    if isinstance(constant, nn.Module):
        return [Weights.of(constant)]
    return [weights for part in constant for weights in weights_in(part)] if isinstance(constant, tuple) else []


def handles(tensors: Iterable[Tensor]) -> Any:
    """By which C++ reads where the tensors lie: their `places()` takes a tenth of the time that Python takes."""
    return kernels.TensorHandles(FUNCTIONS, torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors(list(tensors)))


def _functions() -> tuple[int, ...]:
    """Addresses of what `kernels.TensorHandles` calls in libtorch, which torch._C has loaded."""
    libtorch = ctypes.CDLL(torch._C.__file__)
    names = "get_data_ptr", "get_dtype", "delete_tensor_object"
    found = [ctypes.cast(getattr(libtorch, f"aoti_torch_{name}"), ctypes.c_void_p).value for name in names]
    return tuple(address for address in found if address)


FUNCTIONS = _functions()
