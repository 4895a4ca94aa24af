"""The key of a recorded call: its constants, its tensors' shapes, and the settings that chose its kernels."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..cache import FeatureCache, Memory
from .weights import weights

PLAIN = {bool, int, float, str, type(None)}


class Call(NamedTuple):
    """The arguments of one call, split into tensors, caches and constants."""

    names: list[str]  # of the arguments that the tensors come from
    tensors: list[Tensor]
    caches: list[FeatureCache]
    key: tuple  # everything that decides what the call launches, except the tensors' values
    bind: Callable[[Sequence[Tensor]], tuple[tuple, dict]]  # the arguments, with other tensors

    @classmethod
    def of(cls, args: tuple, kwargs: dict) -> "Call":
        names, tensors, caches, key, builders = [], [], [], [], []
        for name, value in (*enumerate(args), *kwargs.items()):
            constant, held, build = _take_apart(value)
            modules: tuple[int, ...] = ()
            if isinstance(value, FeatureCache):
                caches.append(value)
            elif not _is_plain(constant):
                if not _is_constant(constant):
                    raise TypeError(f"{_name_of(name)}: got {type(value).__name__}; an executor takes tensors, each as "
                                    "an argument of its own, FeatureCaches, and what can be hashed (a row as a tuple)")
                modules = weights(constant)
            key.append((name, constant, modules, tuple([(t.shape, t.dtype) for t in held])))
            builders.append((name, build, slice(len(tensors), len(tensors) + len(held))))
            names += [_name_of(name)] * len(held)
            tensors += held

        def bind(tensors: Sequence[Tensor]) -> tuple[tuple, dict]:
            built = {name: build(*tensors[part]) for name, build, part in builders}
            return tuple(built[i] for i in range(len(args))), {name: built[name] for name in kwargs}

        return cls(names, tensors, caches, tuple(key), bind)


def _take_apart(value: Any) -> tuple[Any, tuple[Tensor, ...], Callable[..., Any]]:
    """An argument's constant part, the tensors that it holds, and a function that rebuilds it from such tensors."""
    if isinstance(value, Tensor):
        return None, (value,), lambda tensor: tensor
    if isinstance(value, FeatureCache):
        value.commit()
        return value._state(), (), lambda: value
    if isinstance(value, Memory):
        raise TypeError(f"cache: got a {type(value).__name__}, of which a graph would replay what it held when it was "
                        "recorded; compile the whole trajectory, which makes the cache inside")
    if hasattr(value, "graph_parts"):
        return value.graph_parts()
    return tuple(value) if isinstance(value, list) else value, (), lambda: value


def _is_plain(constant: Any) -> bool:
    return PLAIN.issuperset(map(type, constant)) if type(constant) is tuple else type(constant) in PLAIN


def _is_constant(constant: Any) -> bool:
    """Whether it can be hashed and holds no tensors: a graph would keep their values."""
    if isinstance(constant, tuple):
        return _is_plain(constant) or all(map(_is_constant, constant))
    return isinstance(constant, Hashable) and not isinstance(constant, Tensor)


def one_device(call: Call) -> torch.device:
    """The device of the call's tensors; ValueError if there are no tensors or several devices."""
    if not call.tensors:
        raise ValueError("an executor needs at least one tensor among its arguments, got none")
    device = call.tensors[0].device
    for name, tensor in zip(call.names, call.tensors):
        if tensor.device != device:
            raise ValueError(f"{name}: is on {tensor.device}, but {call.names[0]} is on {device}; an executor's "
                             "tensors have to be on one device")
    return device


def tf32() -> tuple[bool, bool]:
    """Whether float32 matrix products and convolutions may use TF32: a graph keeps the kernels that this chose."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32", torch.backends.cudnn.conv.fp32_precision == "tf32"


def _name_of(argument: int | str) -> str:
    return argument if isinstance(argument, str) else f"argument {argument}"
