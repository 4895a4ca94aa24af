"""The key of a recorded call: its constants, its tensors' shapes, and the settings that chose its kernels."""

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..cache import FeatureCache, Memory

FP32_PRECISION = torch._C._get_fp32_precision_getter  # torch.backends' attributes take six times as long


class Call:
    """The arguments of one call, taken apart into tensors, caches and constants.

    This is all that a replay does to them; what only a recording needs, `check` and `bind`, is asked for then.
    """

    __slots__ = "args", "caches", "constants", "key", "kwargs", "parts", "tensors"

    def __init__(self, args: tuple, kwargs: dict):
        self.args, self.kwargs = args, kwargs
        self.tensors: list[Tensor] = []
        self.caches: list[FeatureCache] = []
        self.constants: dict[int | str, Any] = {}  # by argument
        self.parts: dict[int | str, tuple[Sequence[Tensor], Callable]] = {}  # tensors and rebuilding function
        key: list[Hashable] = []
        device: torch.device | None = None
        for name, value in (*enumerate(args), *kwargs.items()):
            if isinstance(value, Tensor):
                device = value.device
                self.tensors.append(value)
                key.append((name, value.shape, value.dtype, device))
            elif isinstance(value, FeatureCache):
                value.commit()
                self.caches.append(value)
                key.append((name, value._state()))
            elif hasattr(value, "graph_parts"):
                constant, held, rebuild = value.graph_parts()
                self.tensors += held
                self.constants[name], self.parts[name] = constant, (held, rebuild)
                for tensor in held:
                    device = tensor.device
                    key.append((tensor.shape, tensor.dtype, device))
                key.append((name, typed(constant), len(held)))
            else:
                constant = tuple(value) if isinstance(value, list) else value
                self.constants[name] = constant
                key.append((name, typed(constant)))
        if device is not None:
            key.append(settings(device.type))
        self.key = tuple(key)  # everything that decides what the call launches, except the tensors' and weights' values

    def check(self) -> torch.device:
        """The device of the call's tensors.

        Raises:
            TypeError: an argument is none that an executor takes.
            ValueError: there are no tensors, or they are on several devices.
        """
        for name, value in self._arguments():
            if isinstance(value, Memory) and not isinstance(value, FeatureCache):
                raise TypeError(f"cache: got a {type(value).__name__}, of which a graph would replay what it held when "
                                "it was recorded; compile the whole trajectory, which makes the cache inside")
            if not _is_constant(self.constants.get(name)):
                raise TypeError(f"{_name_of(name)}: got {type(value).__name__}; an executor takes tensors, each as an "
                                "argument of its own, FeatureCaches, and what can be hashed (a row as a tuple)")
        if not self.tensors:
            raise ValueError("an executor needs at least one tensor among its arguments, got none")
        first, device = None, self.tensors[0].device
        for name, value in self._arguments():
            held = (value,) if isinstance(value, Tensor) else self.parts.get(name, ((),))[0]
            for tensor in held:
                first = name if first is None else first
                if tensor.device != device:
                    raise ValueError(f"{_name_of(name)}: is on {tensor.device}, but {_name_of(first)} is on {device}; "
                                     "an executor's tensors have to be on one device")
        return device

    def bind(self, tensors: Sequence[Tensor]) -> tuple[tuple, dict]:
        """The arguments, with these tensors in place of the call's own."""
        left, built = iter(tensors), {}
        for name, value in self._arguments():
            if isinstance(value, Tensor):
                built[name] = next(left)
            elif name in self.parts:
                held, rebuild = self.parts[name]
                built[name] = rebuild(*[next(left) for _ in held])
            else:
                built[name] = value
        return tuple(built[i] for i in range(len(self.args))), {name: built[name] for name in self.kwargs}

    def _arguments(self) -> Iterator[tuple[int | str, Any]]:
        yield from enumerate(self.args)
        yield from self.kwargs.items()


def typed(constant: Any) -> Hashable:
    """A constant with its type, or a tuple's types, which tell it from equal ones: True, 1 and 1.0."""
    if not isinstance(constant, tuple):
        return type(constant), constant
    kinds = set(map(type, constant))
    for kind in kinds:
        if issubclass(kind, tuple):
            return type(constant), *map(typed, constant)
    return type(constant), kinds.pop() if len(kinds) == 1 else tuple(map(type, constant)), constant


def _is_constant(constant: Any) -> bool:
    """Whether it can be hashed and holds no tensors: a graph would keep their values."""
    if isinstance(constant, tuple):
        return all(map(_is_constant, constant))
    try:
        hash(constant)
    except TypeError:
        return False
    return not isinstance(constant, Tensor)


def settings(device: str) -> tuple:
    """PyTorch's settings that choose kernels: autocast's dtype if it is on, and whether float32 matrix products and
    convolutions may use TF32."""
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return (autocast and torch.get_autocast_dtype(device),
            FP32_PRECISION("cuda", "matmul") == "tf32", FP32_PRECISION("cuda", "conv") == "tf32")


def _name_of(argument: int | str) -> str:
    return argument if isinstance(argument, str) else f"argument {argument}"
