"""The caches for outputs of any kind, which may be tuples: of each branch, and of the trunk."""

from collections.abc import Callable, Sequence
from dataclasses import is_dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from harmonica_kernels.cache import Memory

Output = Tensor | tuple | list | None  # of a module: a tensor, or tensors and None in a tuple or list


class Arguments(NamedTuple):
    """What has to be the same in all forwards of a trajectory: name, shape, dtype and device of each tensor argument.
    """

    tensors: tuple

    @classmethod
    def of(cls, args: tuple, kwargs: dict) -> "Arguments":
        named = [*enumerate(args), *sorted(kwargs.items())]
        return cls(tuple((name, tuple(t.shape), t.dtype, str(t.device)) for name, value in named
                         for t in leaves(value) if isinstance(t, Tensor)))

    def __str__(self) -> str:
        return ", ".join(f"{name} {list(shape)} {dtype} on {device}" for name, shape, dtype, device in self.tensors)


class GenericCache(Memory):
    """The memory of one trajectory: each branch's outputs in the last `history` forwards that computed it.

    Outputs may have any shape, or be tuples. A branch has one for each of its calls in a forward. Copies are kept,
    because a module may write into what it returned, and so may its caller. It is used like
    `harmonica_kernels.FeatureCache`.
    """

    def reset(self) -> None:
        super().reset()
        self._outputs: dict[int, list[list[Output]]] = {}  # per branch and forward, newest first: its calls' outputs
        self._stand_ins: dict[nn.Module, Output] = {}  # for the outputs of modules that do not run
        self._cut = False  # whether a gradient would have had to reach what is kept

    def _held(self) -> list[Tensor]:
        return tensors_of(list(self._outputs.values()))

    @property
    def nbytes(self) -> int:
        """Bytes of the outputs held."""
        return sum(t.nbytes for t in self._held())

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
        self.history, self._of, self._open, self._cut = other.history, other._of, other._open, other._cut
        self._setting = other._setting
        self._outputs, self._stand_ins = dict(other._outputs), dict(other._stand_ins)
        return self

    def commit(self) -> None:
        """Does nothing: an entry is replaced, never written into, so a backward may still read the old one."""

    def _store(self, k: int, o: Output, first: bool) -> None:
        """Stores an output of branch k. first: whether it is the branch's first output in this forward."""
        if first:
            self._outputs[k] = [[], *self._outputs.get(k, ())][: self.history]
        self._outputs[k][0].append(map_tensors(lambda t: t.detach().clone(), o))


class GenericTrunkCache(Memory):
    """The memory of one trajectory whose steps are computed whole or not at all: the trunk's last `history` states.

    A state is what the last block returned, in a copy. A gradient reaches the forwards that made it.
    """

    def reset(self) -> None:
        super().reset()
        self._states: list[Output] = []  # newest first
        self._stand_ins: dict[nn.Module, Output] = {}

    def _held(self) -> list[Tensor]:
        return tensors_of(self._states)

    @property
    def nbytes(self) -> int:
        """Bytes of the states held."""
        return sum(t.nbytes for t in self._held())

    @property
    def filled(self) -> int:
        """How many states the cache holds, 0 to `history`."""
        return len(self._states)

    def newest(self) -> tuple[Tensor, ...]:
        """The tensors of the newest state."""
        return tuple(tensors_of(self._states[0]))

    def holding(self, states: Sequence[Sequence[Tensor]]) -> "GenericTrunkCache":
        """A cache of such a trajectory that holds these states, the newest first, each as `newest` gave it."""
        made = GenericTrunkCache(self.history)
        made._of, made._setting, made._stand_ins = self._of, self._setting, dict(self._stand_ins)
        made._states = [with_tensors(self._states[0], state) for state in states]
        return made

    def _store(self, state: Output) -> None:
        self._states = [map_tensors(Tensor.clone, state), *self._states][: self.history]


def stand_in(t: Tensor, value: float = 0.0) -> Tensor:
    """A tensor of the same kind that nobody's result depends on; it takes no memory."""
    return torch.full((), value, dtype=t.dtype, device=t.device).expand(t.shape)


def map_tensors(f: Callable, *outputs: Output) -> Output:
    """Applies f to the corresponding tensors of outputs of the same structure."""
    first = outputs[0]
    if isinstance(first, (tuple, list)):
        parts = [map_tensors(f, *parts) for parts in zip(*outputs, strict=True)]
        return parts if isinstance(first, list) else tuple(parts)
    return None if first is None else f(*outputs)


def with_tensors(form: Output, tensors: Sequence[Tensor]) -> Output:
    """An output of the same structure as `form` that holds these, in the order of `tensors_of`."""
    left = iter(tensors)
    return map_tensors(lambda _: next(left), form)


def tensors_of(o: Output) -> list[Tensor]:
    if isinstance(o, (tuple, list)):
        return [t for part in o for t in tensors_of(part)]
    return [] if o is None else [o]


def leaves(value: Any) -> list:
    """What there is in a transformer's argument, or in what it returns: tensors and others, but None."""
    if is_dataclass(value) and not isinstance(value, type):
        value = vars(value)
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        return [leaf for part in value for leaf in leaves(part)]
    return [] if value is None else [value]


def is_output(o: Any) -> bool:
    tensors = tensors_of(o)
    return bool(tensors) and all(isinstance(t, Tensor) and t.is_floating_point() for t in tensors)
