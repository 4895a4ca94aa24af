"""Random problems for the residual_norm family, their float64 truth, and how far float32 arithmetic may be from it."""

import random
from dataclasses import dataclass, field

import torch
from torch import Tensor

from harmonica_kernels.ops import Term, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
UNIT = 2.0**-24  # relative error of one float32 rounding


def rounding(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def random_dtype() -> torch.dtype:
    return random.choice(DTYPES)


def double(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.detach().double()


@dataclass
class Problem:
    """x, a run with gates, forecasts and dtypes drawn at random (or one dtype throughout), and modulation rows."""

    B: int
    N: int
    D: int
    R: int
    dtype: torch.dtype | None = None
    plain: bool = False  # every gate there, no forecast
    x: Tensor = field(init=False)

    def __post_init__(self):
        self.x = self.activation()
        self.run = [Term(self.activation(), self.maybe(self.activation), self.maybe(self.rows, True))
                    for _ in range(self.R)]
        self.e = [0.0 if term.previous is None else random.choice((0.0, random.uniform(-1, 1))) for term in self.run]
        self.shift, self.scale = self.maybe(self.rows, True), self.maybe(self.rows, True)
        self.norm, self.eps = random.random() < 0.8, random.choice((1e-6, 1e-5))
        self.h_dtype = self.pick()

    def pick(self) -> torch.dtype:
        return self.dtype or random_dtype()

    def maybe(self, make, wanted_when_plain: bool = False):
        return make() if (wanted_when_plain if self.plain else random.random() < 0.6) else None

    def activation(self) -> Tensor:
        """[B, N, D], contiguous or a view of something larger."""
        B, N, D = self.B, self.N, self.D
        layout = random.choice(("contiguous", "contiguous", "chunk", "transposed", "expanded", "strided"))
        if layout == "chunk":
            t = torch.randn(B, N, 2 * D).to(self.pick()).chunk(2, -1)[1]
        elif layout == "transposed":
            t = torch.randn(N, B, D).to(self.pick()).transpose(0, 1)
        elif layout == "expanded":
            t = torch.randn(1, N, D).to(self.pick()).expand(B, N, D)
        elif layout == "strided":
            t = torch.randn(B, N, 2 * D).to(self.pick())[..., ::2]
        else:
            t = torch.randn(B, N, D).to(self.pick())
        return t

    def rows(self) -> Tensor:
        """[B or 1, D], as adaLN gives it: a chunk of a wider row, or one row for all."""
        layout = random.choice(("chunk", "one", "expanded", "contiguous", "strided"))
        if layout == "chunk":
            return torch.randn(self.B, 6 * self.D).to(self.pick()).chunk(6, -1)[random.randrange(6)]
        if layout == "strided":
            return torch.randn(self.D, self.B).to(self.pick()).t()
        rows = torch.randn(1 if layout != "contiguous" else self.B, self.D).to(self.pick())
        return rows.expand(self.B, self.D) if layout == "expanded" else rows

    def double_run(self) -> list[Term]:
        return [Term(*map(double, term)) for term in self.run]

    def truth(self) -> tuple[Tensor, Tensor]:
        return reference.residual_norm(double(self.x), self.double_run(), self.e, double(self.shift),
                                       double(self.scale), self.norm, self.eps)

    def bounds(self, x_new: Tensor, h: Tensor, x_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Elementwise limits on the errors of x' and h, from the roundings that their computation has."""
        size = double(self.x).abs()
        for term, e in zip(self.double_run(), self.e):
            o = (1 + abs(e)) * term.latest.abs() + (0 if term.previous is None else abs(e) * term.previous.abs())
            size = size + (o if term.gate is None else o * term.gate.abs().unsqueeze(1))
        error = UNIT * (4 * self.R + 4) * size
        return (error + rounding(x_dtype) * x_new.abs() + 2.0**-24,
                self._h_bound(x_new, h, error.amax(-1, keepdim=True)))

    def _h_bound(self, x_new: Tensor, h: Tensor, error: Tensor) -> Tensor:
        centred = x_new - x_new.mean(-1, keepdim=True)
        rstd = (centred.square().mean(-1, keepdim=True) + self.eps).rsqrt() if self.norm else torch.ones(())
        y = (centred if self.norm else x_new) * rstd
        error_y = rstd * 4 * error * (1 + y.abs() if self.norm else 1) + 16 * UNIT * y.abs()
        stretch = 1 if self.scale is None else 1 + double(self.scale).abs().unsqueeze(1)
        offset = 0 if self.shift is None else double(self.shift).abs().unsqueeze(1)
        return stretch * error_y + 4 * UNIT * (stretch * y.abs() + offset) + rounding(self.h_dtype) * h.abs() + 2.0**-24


def assert_within(actual: Tensor, expected: Tensor, bound: Tensor, what: str) -> None:
    excess = (actual.double() - expected).abs() / bound
    assert torch.isfinite(actual).all(), f"{what} has values that are not finite"
    assert excess.numel() == 0 or excess.max() <= 1, f"{what}: error is {excess.max():.3g} times its bound"
