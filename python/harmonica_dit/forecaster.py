"""What stands in for a unit that is not computed: forecasters of the branches one by one, and of the trunk."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from harmonica_dit.validate import check_whole, describe, is_number, shorten
from harmonica_kernels import TrunkWeights
from harmonica_kernels.cache import HISTORY

MEAN = (0.5 - 12**-0.5, 0.5 + 12**-0.5)  # of a polynomial up to degree 3 over a step: at these two points (Gauss)


class Rule(NamedTuple):
    """What Taylor's or Adams's weights are made by, for any computed steps: see `taylor`."""

    order: int
    adams: bool = False


@dataclass(frozen=True)
class BranchForecaster:
    """Forecasts every reused branch by Lagrange extrapolation through its own last order + 1 computed outputs.

    They may be unevenly spaced; where fewer have been computed, the order is lower.

    Args:
        order: 1 to 3.

    Raises:
        ValueError: order is out of range.

    Source: TaylorSeer (Liu et al., 2025, arXiv 2503.06923), whose finite differences these are.
    """

    order: int
    unit = "branch"

    def __post_init__(self):
        if self.order == 0:
            raise ValueError("order: got 0, expected 1 to 3; without a forecaster reused outputs are repeated")
        check_order(self.order)

    @property
    def origin(self) -> str:
        return f"Taylor of order {self.order}, branch by branch"

    @property
    def rule(self) -> Rule:
        """What the weights are made by."""
        return Rule(self.order)

    @property
    def history(self) -> int:
        """Outputs of each branch that a cache keeps."""
        return self.order + 1

    def weights(self, compute: Tensor) -> tuple[tuple[tuple[float, ...] | float, ...] | None, ...]:
        """For each step the forecast weights of `cached_forward`; None where nothing is forecast.

        compute: bool [T, K]. An entry that is computed, or whose branch has been computed once, has 0.
        """
        columns = compute.T.tolist()  # branch by branch
        rows = []
        for s in range(len(compute)):
            found = [lagrange(computed, s, self.order) for computed in columns]
            row = tuple(0.0 if computed[s] or len(w) < 2 else tuple(w) for computed, w in zip(columns, found))
            rows.append(row if any(row) else None)
        return tuple(rows)


@dataclass(frozen=True, eq=False)
class TrunkForecaster:
    """Weights of the trunk's cached states, for each of T steps; per channel, or one number for all (D = 1).

        forecast step:  h = Σ_i w_i∘c_i + Σ_i v_i∘(e - e_i)
        computed step:  h = c + a∘c + Σ_i w_i∘(c_i - c)

    h is what the final norm is given; c the step's own state, c_i those of the last computed steps before it, the
    newest first; e and e_i the tokens that entered these forwards. A computed step's forward can be given a condition
    of its own: the embedded timestep and label with a learned vector added, which costs nothing where it is hoisted.

    Args:
        states: w, float32 [T, H, D or 1]; H, the states kept, from 1 to 4.
        tokens: v, like states, or None for 0.
        own: a, float32 [T, D or 1], or None for 0.
        condition: what is added to the embedded timesteps and labels, float32 [T, D], or None.
        size: values of one image's trunk state, N·D, to count FLOPs by.
        origin: the method, in words.
        rule: what `taylor` made the weights by; None if they are others, such as learned ones.

    Raises:
        TypeError, ValueError: an argument is not as above, or not finite; the message names it.
    """

    states: Tensor
    tokens: Tensor | None = None
    own: Tensor | None = None
    condition: Tensor | None = None
    size: int = 0
    origin: str = ""
    rule: Rule | None = None
    unit = "trunk"

    def __post_init__(self):
        if not isinstance(self.states, Tensor) or self.states.dim() != 3:
            raise TypeError(f"forecaster.states: got {describe(self.states)}, expected float32 [T, H, D or 1]")
        T, H, D = self.states.shape
        if not 1 <= H <= HISTORY:
            raise ValueError(f"forecaster.states: weighs {H} states a step, expected 1 to {HISTORY}")
        for name, shape in (("states", (T, H, D)), ("tokens", (T, H, D)), ("own", (T, D)), ("condition", (T, None))):
            table = getattr(self, name)
            if table is None and name != "states":
                continue
            if not isinstance(table, Tensor) or table.dtype != torch.float32 or table.dim() != len(shape) or any(
                    wanted not in (None, found) for wanted, found in zip(shape, table.shape)):
                wanted = str(list(shape)).replace("None", "D")
                raise TypeError(f"forecaster.{name}: got {describe(table)}, expected float32 {wanted}")
            if not table.isfinite().all():
                raise ValueError(f"forecaster.{name}: has entries that are not finite")
            object.__setattr__(self, name, table.detach().cpu())
        check_whole("forecaster.size", self.size, 0)
        if not is_number(self.size) or not isinstance(self.origin, str):
            raise TypeError(f"forecaster.size, forecaster.origin: got {shorten((self.size, self.origin))}, expected a "
                            "number and text")
        if self.rule is not None:
            if not isinstance(self.rule, Rule) or not isinstance(self.rule.adams, bool):
                raise TypeError(f"forecaster.rule: got {self.rule!r:.80}, expected a Rule")
            check_order(self.rule.order)

    def check_width(self, where: str, width: int) -> None:
        """Raises ValueError, which begins with `where`, unless the weights are for states of this width D."""
        for name in ("states", "condition"):
            table = getattr(self, name)
            if table is not None and table.shape[-1] not in (1, width):
                raise ValueError(f"{where}its forecaster has {name} of width {table.shape[-1]}, the model has {width}")

    @property
    def history(self) -> int:
        """States that a cache keeps."""
        return self.states.shape[1]

    @property
    def parameters(self) -> int:
        """Numbers that are not 0."""
        tables = (self.states, self.tokens, self.own, self.condition)
        return sum(int(table.count_nonzero()) for table in tables if table is not None)

    def flops(self, compute: Sequence[bool]) -> float:
        """Of a trajectory of batch 1 whose step s is computed iff compute[s]: a multiply and an add for each term.

        And the additions to the conditions.
        """
        terms = sum(part.shape[:-1].numel() for step in self.weights(compute) if step for part in step
                    if part is not None)
        return 2.0 * self.size * terms + (0 if self.condition is None else self.condition.numel())

    def weights(self, compute: Sequence[bool]) -> tuple[TrunkWeights | None, ...]:
        """For each step what `cached_forward` is given; None where a computed step is not corrected.

        compute: [T], whether a step is computed.
        """
        made, kept = [], 0
        for s, computed in enumerate(compute):
            w = self.states[s, : min(kept, self.history)]
            if computed:
                made.append(correction(w, torch.zeros(w.shape[1]) if self.own is None else self.own[s]))
            else:
                made.append(forecast(w, None if self.tokens is None else self.tokens[s, : len(w)]))
            kept += computed
        return tuple(made)


def correction(w: Tensor, a: Tensor) -> TrunkWeights | None:
    """c + a∘c + Σ_i w_i∘(c_i - c) in the form of `TrunkWeights`. w: [n, D]. a: [D]."""
    if not w.requires_grad and not a.requires_grad and not w.any() and not a.any():
        return None
    return TrunkWeights(w, None, a - w.sum(0))


def forecast(w: Tensor, v: Tensor | None) -> TrunkWeights:
    """Σ_i w_i∘c_i + Σ_i v_i∘(e - e_i) in the form of `TrunkWeights`. w, v: [n, D]."""
    if v is None or not (v.requires_grad or v.any()):
        newest = torch.zeros_like(w)
        newest[0] = 1
        return TrunkWeights(w - newest)
    return TrunkWeights(w, -v, v.sum(0) - 1)


def check_order(order) -> None:
    if type(order) is not int or not 0 <= order < HISTORY:
        raise ValueError(f"order: got {order!r}, expected a whole number from 0 to {HISTORY - 1}")


def reached_order(compute: Sequence[bool], order: int, adams: bool = False) -> int:
    """The highest order that a forecast reaches, at most `order`; that is the result also where nothing is forecast.

    Order p takes p + 1 steps that have been computed. compute: [T], whether a step is computed. adams: computed steps
    are corrected too, each with its own state.
    """
    counts = [count for count, computed in zip(accumulate(compute), compute) if adams or not computed]
    return max((min(order, count - 1) for count in counts), default=order)


def describe_order(compute: Sequence[bool], order: int, adams: bool = False) -> str:
    """The order of the forecasts in words, and the one that was asked for if too few steps are computed for it."""
    reached = reached_order(compute, order, adams)
    return f"order {reached}" + (f" ({order} asked for)" if reached < order else "")


def lowered_order(compute: Tensor, rule: Rule) -> str | None:
    """In words, that no branch is forecast to the order of `rule`; None if one is. compute: bool [T, K]."""
    reached = max((reached_order(column, *rule) for column in compute.T.tolist() if rule.adams or not all(column)),
                  default=rule.order)
    if reached == rule.order:
        return None
    return f"forecasts to order {reached}, not {rule.order}: too few steps are computed before those that are forecast"


def lagrange(compute: Sequence[bool], s: int, order: int, at: Sequence[float] = (0.0,)) -> list[float]:
    """Weights of the last computed steps up to s, at most order + 1, the newest first: Lagrange's at s, or after it.

    at: how many steps after s; of several the mean.
    """
    points = [p for p in range(s + 1) if compute[p]][::-1][: order + 1]
    return [sum(prod((s + u - q) / (p - q) for q in points if q != p) for u in at) / len(at) for p in points]


def taylor(compute: Sequence[bool], order: int, size: int = 0, adams: bool = False) -> TrunkForecaster:
    """Lagrange extrapolation of the trunk through its last order + 1 computed steps; order 0 repeats.

    Args:
        compute: [T], whether a step is computed; the steps may be unevenly spaced. Where fewer have been computed, the
            order is lower.
        size: as in `TrunkForecaster`.
        adams: in place of the extrapolation at a step its mean until the next one, also at computed steps. Where steps
            are even this makes a solver of first order (DDIM, Euler) one of order + 1, Adams and Bashforth's: the
            images are nearer to the exact solution than the uncached trajectory's.

    Raises:
        ValueError: order is out of range.

    Source: TaylorSeer (Liu et al., 2025, arXiv 2503.06923), whose finite differences these are, here of the trunk; the
    methods of Adams and Bashforth (Hairer, Nørsett & Wanner, Solving Ordinary Differential Equations I, III.1).
    """
    check_order(order)
    states = torch.zeros(len(compute), max(1, min(order + 1, sum(compute))), 1)
    for s, computed in enumerate(compute):
        w = lagrange(compute, s, order, MEAN if adams else (0.0,))
        if computed:  # corrected: the others count by what they differ from its own
            w = w[1:]
        states[s, : len(w), 0] = torch.tensor(w)
    origin = f"{'Adams' if adams else 'Taylor'} of {describe_order(compute, order, adams)}"
    return TrunkForecaster(states, size=size, origin=origin, rule=Rule(order, adams))


def forecast_ratios(compute: Tensor) -> Tensor:
    """The ratios in e = a·ratio, from extrapolation coefficient a to forecast weight e, for the step after `compute`.

    A ratio is (steps since the latest computed output) / (steps between the last two computed ones), as in TaylorSeer
    (Liu et al., 2025) of first order.

    Args:
        compute: bool [s, K], the decisions of steps 0..s-1.

    Returns:
        float32 [K], 0 where fewer than two outputs have been computed.
    """
    s = len(compute)
    numbers = torch.arange(1, s + 1, device=compute.device)[:, None]
    computed = torch.nn.functional.pad(torch.where(compute, numbers, 0), (0, 0, 1, 0))  # step number 0 means "never"
    latest = computed.amax(0)
    previous = torch.where(computed < latest, computed, 0).amax(0)
    return torch.where(previous > 0, (s + 1 - latest) / (latest - previous), 0.0)


TABLES = ("states", "tokens", "own", "condition")
FORECASTER_TABLES = tuple(f"forecaster.{name}" for name in TABLES)  # in a schedule's file


def forecaster_content(forecaster: BranchForecaster | TrunkForecaster) -> tuple[dict[str, Tensor], dict]:
    """What a schedule's file holds of its forecaster: tensors and metadata."""
    fields = ("order",) if forecaster.unit == "branch" else ("size", "origin")
    tables = {name: getattr(forecaster, short, None) for name, short in zip(FORECASTER_TABLES, TABLES)}
    about = {name: getattr(forecaster, name) for name in fields}
    if forecaster.unit == "trunk" and forecaster.rule is not None:
        about["taylor"] = forecaster.rule._asdict()  # older files lack it, and older versions pass over it
    return {name: table for name, table in tables.items() if table is not None}, about


def make_forecaster(tables: dict[str, Tensor | None], about: dict) -> BranchForecaster | TrunkForecaster:
    """The forecaster in a schedule's file.

    Raises:
        KeyError, TypeError, ValueError: the file holds none.
    """
    if not isinstance(about, dict):
        raise TypeError(f"forecaster: got {shorten(about)}, expected its settings")
    if "order" in about:
        return BranchForecaster(about["order"])
    rule = about.get("taylor")
    return TrunkForecaster(**{short: tables[name] for name, short in zip(FORECASTER_TABLES, TABLES)},
                           size=about["size"], origin=about["origin"], rule=None if rule is None else Rule(**rule))
