"""Whether a module's weights are still those that a graph was recorded with."""

import ctypes
from collections.abc import Iterator, Sequence
from inspect import ismethod
from itertools import chain, count
from operator import is_
from typing import Any
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


def weights_in(constant: Any) -> list["Weights"]:
    """The weights of the module that `constant` is, or is a method of; of a tuple, those of all its parts."""
    if ismethod(constant):
        constant = constant.__self__
    if isinstance(constant, nn.Module):
        return [Weights.of(constant)]
    return [weights for part in constant for weights in weights_in(part)] if isinstance(constant, tuple) else []


def stored(tensor: Tensor) -> Iterator[Tensor]:
    """The tensor itself; or, where it is made of others as torchao's quantized ones are, the plain tensors inside."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from stored(getattr(tensor, name))


class Weights:
    """What a module's weights were when they were last looked at. To walk through all its modules at each call would
    take longer than a small step: the walk is made anew only after some module, anywhere, was given another part."""

    known: WeakKeyDictionary[nn.Module, "Weights"] = WeakKeyDictionary()
    versions = count()
    parts_given = -1  # how many modules, parameters and buffers were given to modules, since the first look

    def __init__(self, module: nn.Module):
        self._module = ref(module)
        self._walked_at, self._version = -1, -1
        self._seen: tuple | None = None
        self._tensors: list[Tensor] = []
        self._buffers: list[dict[str, Tensor | None]] = []
        self._lists: list[dict[str, nn.Module | None]] = []

    @classmethod
    def of(cls, module: nn.Module) -> "Weights":
        """The one of this module."""
        found = cls.known.get(module)
        if found is None:
            if cls.parts_given < 0:
                cls.parts_given = 0
                register_module_module_registration_hook(cls._count)
                register_module_parameter_registration_hook(cls._count)
                register_module_buffer_registration_hook(cls._count)
            found = cls.known[module] = cls(module)
        return found

    def version(self) -> int:
        """Another number after weights or buffers have been moved, cast or replaced: no graph may be replayed then."""
        if self._walked_at != self.parts_given or self._look() != self._seen:
            self._walk()
        return self._version

    def _look(self) -> tuple:
        """Addresses and dtypes; and the lists' lengths, for these may lose a part without a word.

        A cast gives a module other buffers, and a quantized parameter other tensors inside, without a word too: they
        are looked up anew.
        """
        if self._made_of_others or self._buffers:
            buffers = [buffer for held in self._buffers for buffer in held.values() if buffer is not None]
            tensors = [*self._parameters, *chain.from_iterable(map(stored, (*self._made_of_others, *buffers)))]
            if len(tensors) != len(self._tensors) or not all(map(is_, tensors, self._tensors)):
                self._tensors, self._handles = tensors, handles(tensors)
        return self._handles.places(), *map(len, self._lists)

    def _walk(self) -> None:
        module = self._module()
        self._walked_at, modules, parameters = self.parts_given, list(module.modules()), list(module.parameters())
        self._made_of_others = [p for p in parameters if hasattr(p, "__tensor_flatten__")]
        self._parameters = [p for p in parameters if not hasattr(p, "__tensor_flatten__")]
        self._tensors, self._handles = [*self._parameters], handles(self._parameters)
        self._buffers = [m._buffers for m in modules if m._buffers]
        self._lists = [m._modules for m in modules if isinstance(m, LISTS)]
        if (seen := self._look()) != self._seen:
            self._seen, self._version = seen, next(self.versions)

    @classmethod
    def _count(cls, *_) -> None:
        cls.parts_given += 1


def handles(tensors: Sequence[Tensor]) -> Any:
    """By which C++ reads where the tensors lie: their `places()` takes a tenth of the time that Python takes."""
    return kernels.TensorHandles(FUNCTIONS, torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors(list(tensors)))


def _functions() -> tuple[int, ...]:
    """Addresses of what `kernels.TensorHandles` calls in libtorch, which torch._C has loaded."""
    libtorch = ctypes.CDLL(torch._C.__file__)
    names = "get_data_ptr", "get_dtype", "delete_tensor_object"
    found = [ctypes.cast(getattr(libtorch, f"aoti_torch_{name}"), ctypes.c_void_p).value for name in names]
    return tuple(address for address in found if address)


FUNCTIONS = _functions()
