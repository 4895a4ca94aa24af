"""Every op checks its arguments here, before memory is touched, and packs them for a device's kernels.

Shapes: batch B, tokens N, width D. Storage types: float32, bfloat16 and float16 in any mix, or float64 throughout
(for gradient checks; it is not fast).
"""

from collections.abc import Callable, Sequence
from math import isfinite
from typing import Any

import torch
from torch import Tensor

DEVICES = ("cpu", "cuda", "meta")  # meta computes shapes only

# In the order of DType in csrc/kernels.h.
_SINGLE = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_DOUBLE = {torch.float64: 3}


def dtype_number(dtype: torch.dtype) -> int:
    """DType of csrc/kernels.h."""
    return (_SINGLE | _DOUBLE)[dtype]


Tensors = Sequence[Tensor | None]


class Arguments:
    """Checks the arguments of one call against its x; every error names the op and the argument.

    This class packs nothing: fake tensors and plain torch need no more. `Pointers` and `Dense` pack for kernels.
    """

    def __init__(self, op: str, x: Tensor):
        if x.dim() != 3 or x.shape[2] == 0:
            raise ValueError(f"{op}: x must be [B, N, D] with D >= 1, got {list(x.shape)}")
        if x.device.type not in DEVICES:
            raise no_kernels(op, x.device)
        self.op, self.shape, self.device, self.copies = op, x.shape, x.device, []
        self.dtypes = _DOUBLE if x.dtype is torch.float64 else _SINGLE

    def activation(self, t: Tensor | None, name: str, term: int | None = None, out: bool = False) -> Any:
        """[B, N, D]. out: the kernel writes to it."""
        if t is None:
            return None
        if t.shape != self.shape:
            self._refuse(t, name, term, f"[B, N, D] = {list(self.shape)} like x")
        if t.dtype not in self.dtypes or t.device != self.device:
            self._refuse_kind(t, name, term)
        if out and t.shape[2] > 1 and t.stride(2) != 1:
            raise ValueError(f"{self.op}: {name} is written to and needs dense rows [D], got strides {t.stride()}")
        return self.pack_activation(t, _full_name(name, term), out)

    def rows(self, t: Tensor | None, name: str, term: int | None = None) -> Any:
        """[B or 1, D]"""
        if t is None:
            return None
        shape, batch = t.shape, self.shape[0]
        if len(shape) != 2 or shape[1] != self.shape[2] or (shape[0] != batch and shape[0] != 1):
            self._refuse(t, name, term, f"[B or 1, D] = [{batch} or 1, {self.shape[2]}]")
        if t.dtype not in self.dtypes or t.device != self.device:
            self._refuse_kind(t, name, term)
        return self.pack_rows(t, _full_name(name, term))

    def scalars(self, t: Tensor | None, name: str, count: int | None = None) -> Any:
        """A float tensor [count], or of one element without count; of any float dtype."""
        if t is None:
            return None
        if not t.is_floating_point() or (t.numel() != 1 if count is None else t.shape != (count,)):
            expected = "of one element" if count is None else f"[{count}], one for each term"
            raise ValueError(f"{self.op}: {name} must be a float tensor {expected}, got {list(t.shape)} of {t.dtype}")
        if t.device != self.device:
            self._refuse_kind(t, name, None)
        return self.pack_scalars(t, count)

    def pack_activation(self, t: Tensor, name: str, out: bool) -> Any:
        return None

    def pack_rows(self, t: Tensor, name: str) -> Any:
        return None

    def pack_scalars(self, t: Tensor, count: int | None) -> Any:
        return None

    def terms(self, latest: Sequence[Tensor], previous: Tensors, weights: Sequence[float], gate: Tensors) -> list:
        """A run: (latest, previous, forecast weight, gate) of each term; previous is kept even if its weight is 0."""
        if not len(latest) == len(previous) == len(weights) == len(gate):
            raise ValueError(f"{self.op}: a run of {len(latest)} terms needs as many previous outputs and gates (or "
                             f"None) and forecast weights, got {len(previous)}, {len(gate)} and {len(weights)}")
        terms = []
        for j, weight in enumerate(weights):
            if type(self) is not Arguments and weight != 0:
                self._check_weight(weight, j, previous[j])
            terms.append((self.activation(latest[j], "latest", j), self.activation(previous[j], "previous", j),
                          weight, self.rows(gate[j], "gate", j)))
        return terms

    def _check_weight(self, weight: float, j: int, previous: Tensor | None) -> None:
        if not isfinite(weight):
            raise ValueError(f"{self.op}: forecast_weights[{j}] must be finite, got {weight}")
        if previous is None:
            raise ValueError(f"{self.op}: forecast_weights[{j}] is {weight}, but run[{j}].previous, which the forecast "
                             "needs, is None")

    def _refuse(self, t: Tensor, name: str, term: int | None, expected: str) -> None:
        raise ValueError(f"{self.op}: {_full_name(name, term)} must be {expected}, got {list(t.shape)}")

    def _refuse_kind(self, t: Tensor, name: str, term: int | None) -> None:
        if t.device != self.device:
            raise ValueError(f"{self.op}: {_full_name(name, term)} is on {t.device}, expected {self.device} like x")
        beside = " beside a float64 x" if self.dtypes is _DOUBLE else ""
        raise TypeError(f"{self.op}: float32, bfloat16 and float16 are supported, in any mix, or float64 for all "
                        f"arguments at once; {_full_name(name, term)} is {t.dtype}{beside}")


class Pointers(Arguments):
    """Packs for the C++ kernels: pointers, dtypes and strides, as csrc/bindings.cpp takes them.

    Inputs without dense rows are copied. This object keeps the copies, so it must outlive the kernel.
    """

    def pack_activation(self, t: Tensor, name: str, out: bool) -> tuple[int, int, int, int]:
        """Pointer, dtype, batch stride, token stride."""
        t = self._dense_rows(t)
        return t.data_ptr(), self.dtypes[t.dtype], *t.stride()[:2]

    def pack_rows(self, t: Tensor, name: str) -> tuple[int, int, int]:
        """Pointer, dtype, stride."""
        t = self._dense_rows(t)
        return t.data_ptr(), self.dtypes[t.dtype], 0 if t.shape[0] == 1 else t.stride(0)

    def pack_scalars(self, t: Tensor, count: int | None) -> float | list[float]:
        return t.item() if count is None else t.tolist()

    def _dense_rows(self, t: Tensor) -> Tensor:
        if t.stride(-1) != 1 and t.shape[-1] > 1:
            t = t.contiguous()
            self.copies.append(t)
        return t


class Dense(Arguments):
    """Packs for the Triton kernels: tensors, activations contiguous.

    An activation that is not contiguous is copied, which costs a pass; `finish` copies the outputs among them back.
    """

    def __init__(self, op: str, x: Tensor):
        super().__init__(op, x)
        self._outputs, self._spans = [], []  # (name, first byte, the byte after the last)

    def pack_activation(self, t: Tensor, name: str, out: bool) -> Tensor:
        if self.is_dense(t):
            (self._outputs if out else self._spans).append(_span(name, t))
            return t
        dense = t.contiguous()
        if out:
            refuse_one_place(self.op, t, name)
            self.copies.append((t, dense))
        return dense

    def is_dense(self, t: Tensor) -> bool:
        return t.is_contiguous()

    def pack_rows(self, t: Tensor, name: str) -> tuple[Tensor, int]:
        """The rows, each dense, and the stride from one to the next."""
        if t.stride(1) != 1 and t.shape[1] > 1:
            t = t.contiguous()
        else:
            self._spans.append(_span(name, t))
        return t, 0 if t.shape[0] == 1 else t.stride(0)

    def pack_scalars(self, t: Tensor, count: int | None) -> Tensor:
        return t.contiguous()

    def refuse_overlap(self) -> None:
        """Raises if an output shares memory with another argument; only x_out may be exactly x."""
        for i, (name, first, last) in enumerate(self._outputs):
            for other, start, end in (*self._outputs[i + 1:], *self._spans):
                exactly_x = name == "x_out" and other == "x" and (first, last) == (start, end)
                if first < end and start < last and not exactly_x:
                    raise ValueError(f"{self.op}: {name} is written to and shares memory with {other}")

    def finish(self) -> None:
        for t, dense in self.copies:
            t.copy_(dense)


def refuse_one_place(op: str, t: Tensor, name: str) -> None:
    """Raises if several values of an output lie at one place, as an expanded tensor's do."""
    if any(size > 1 and stride == 0 for size, stride in zip(t.shape, t.stride())):
        raise ValueError(f"{op}: {name} is written to and has rows that overlap each other")


def _full_name(name: str, term: int | None) -> str:
    return name if term is None else f"run[{term}].{name}"


def _span(name: str, t: Tensor) -> tuple[str, int, int]:
    """Name, first byte and the byte after the last of a tensor of dense rows."""
    first = t.data_ptr()
    if t.is_contiguous():
        return name, first, first + t.nbytes
    values = 1 + sum([(size - 1) * stride for size, stride in zip(t.shape, t.stride())])
    return name, first, first + values * t.element_size()


def no_kernels(op: str, device: torch.device) -> NotImplementedError:
    return NotImplementedError(f"{op}: there are kernels for the CPU and for CUDA, got tensors on {device}")


def refusal(op: str) -> Callable:
    """The implementation of an op on every other device: a refusal."""
    def refuse(*arguments):
        flat = [t for argument in arguments for t in (argument if isinstance(argument, (list, tuple)) else [argument])]
        raise no_kernels(op, next(t.device for t in flat if isinstance(t, Tensor)))
    return refuse
