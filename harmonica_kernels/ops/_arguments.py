"""What every op does with its arguments: check them, before memory is touched, and pack them for the kernels.

Shapes: batch B, tokens N, width D. Storage types: float32, bfloat16 and float16 in any mix, or float64 throughout
(which serves gradient checks; it is not fast).
"""

from collections.abc import Callable, Sequence
from math import isfinite

import torch
from torch import Tensor

# In the order of DType in csrc/kernels.h.
_SINGLE = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_DOUBLE = {torch.float64: 3}

Activation = tuple[int, int, int, int]  # pointer, dtype, batch stride, token stride
Rows = tuple[int, int, int]  # pointer, dtype, stride
Tensors = Sequence[Tensor | None]


class Arguments:
    """The arguments of one call, checked against its x and packed; every error names the op and the argument.

    Keeps the contiguous copies that it makes of inputs without dense rows: it must outlive the kernel. Of fake tensors
    it checks the same things and packs nothing.
    """

    def __init__(self, op: str, x: Tensor, fake: bool = False):
        if x.dim() != 3 or x.shape[2] == 0:
            raise ValueError(f"{op}: x must be [B, N, D] with D >= 1, got {list(x.shape)}")
        self.op, self.shape, self.fake, self.copies = op, x.shape, fake, []
        self.dtypes = _DOUBLE if x.dtype is torch.float64 else _SINGLE

    def activation(self, t: Tensor | None, name: str, term: int | None = None, out: bool = False) -> Activation | None:
        """[B, N, D]. `out`: it is written to, so that a copy would not do."""
        if t is None:
            return None
        if t.shape != self.shape:
            self._refuse(t, name, term, f"[B, N, D] = {list(self.shape)} like x")
        if t.dtype not in self.dtypes or not t.is_cpu:
            self._refuse_kind(t, name, term)
        if self.fake:
            return None
        b, n, d = t.stride()
        if d != 1 and t.shape[2] > 1:
            if out:
                raise ValueError(f"{self.op}: {name} is written to and needs dense rows [D], got strides {t.stride()}")
            t = t.contiguous()
            self.copies.append(t)
            b, n, _ = t.stride()
        return t.data_ptr(), self.dtypes[t.dtype], b, n

    def rows(self, t: Tensor | None, name: str, term: int | None = None) -> Rows | None:
        """[B or 1, D]"""
        if t is None:
            return None
        shape, batch = t.shape, self.shape[0]
        if len(shape) != 2 or shape[1] != self.shape[2] or (shape[0] != batch and shape[0] != 1):
            self._refuse(t, name, term, f"[B or 1, D] = [{batch} or 1, {self.shape[2]}]")
        if t.dtype not in self.dtypes or not t.is_cpu:
            self._refuse_kind(t, name, term)
        if self.fake:
            return None
        b, d = t.stride()
        if d != 1 and shape[1] > 1:
            t = t.contiguous()
            self.copies.append(t)
            b, _ = t.stride()
        return t.data_ptr(), self.dtypes[t.dtype], 0 if shape[0] == 1 else b

    def terms(self, latest: Sequence[Tensor], previous: Tensors, e: Sequence[float], gate: Tensors) -> list:
        """A run: (latest, previous, e, gate) of each term. A previous output whose e is 0 is packed all the same."""
        if not len(latest) == len(previous) == len(e) == len(gate):
            raise ValueError(f"{self.op}: a run of {len(latest)} terms needs as many previous outputs and gates (or "
                             f"None) and coefficients e, got {len(previous)}, {len(gate)} and {len(e)}")
        terms = []
        for j, weight in enumerate(e):
            if not self.fake and weight != 0:
                self._check_coefficient(weight, j, previous[j])
            terms.append((self.activation(latest[j], "latest", j), self.activation(previous[j], "previous", j),
                          weight, self.rows(gate[j], "gate", j)))
        return terms

    def _check_coefficient(self, e: float, j: int, previous: Tensor | None) -> None:
        if not isfinite(e):
            raise ValueError(f"{self.op}: e[{j}] must be finite, got {e}")
        if previous is None:
            raise ValueError(f"{self.op}: e[{j}] is {e}, but run[{j}].previous, which it extrapolates from, is None")

    def _refuse(self, t: Tensor, name: str, term: int | None, expected: str) -> None:
        raise ValueError(f"{self.op}: {_full(name, term)} must be {expected}, got {list(t.shape)}")

    def _refuse_kind(self, t: Tensor, name: str, term: int | None) -> None:
        if t.dtype not in self.dtypes:
            beside = " beside a float64 x" if self.dtypes is _DOUBLE else ""
            raise TypeError(f"{self.op}: float32, bfloat16 and float16 are supported, in any mix, or float64 for all "
                            f"arguments at once; {_full(name, term)} is {t.dtype}{beside}")
        if not (self.fake and t.is_meta):
            raise no_kernels(self.op, str(t.device))


def _full(name: str, term: int | None) -> str:
    return name if term is None else f"run[{term}].{name}"


def no_kernels(op: str, device: str) -> NotImplementedError:
    return NotImplementedError(f"{op}: this version has kernels for the CPU only, got tensors on {device}")


def cuda_missing(op: str) -> Callable:
    """The CUDA implementation of an op that has none yet."""
    def missing(*_):
        raise no_kernels(op, "cuda")
    return missing
