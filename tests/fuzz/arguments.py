"""Targets that are called with arguments: `cached_forward`, the ops, and the command line up to where its work begins.

Every tensor lies in the midst of NaN, so that what is read beside it is in the result, and what is written beside it is
found afterwards.
"""

import re
from collections.abc import Callable, Sequence
from functools import partial
from math import isfinite
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

import harmonica_kernels as hk
from harmonica_kernels.ops import Term, bias_gelu, blend_residual_norm, cache_commit, guided_step, residual_norm

from .campaign import Outcome
from .command import run_command, words

GUARD = 64  # values before and after a tensor
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "f64": torch.float64,
          "f8": torch.float8_e5m2, "i64": torch.int64, "bool": torch.bool, "c64": torch.complex64}
FLOATS = tuple(DTYPES)[:4]
LAYOUTS = ("dense", "chunk", "transposed", "strided", "expanded", "gaps")
OUT_OF_MEMORY = "can't allocate memory"  # torch's, where a caller's sizes ask for that much
often = lambda usual, *others: st.sampled_from((*[usual] * 6, *others))
some = lambda *values: st.sampled_from(values)


class Guarded:
    """Makes tensors with NaN around them, and finds out whether something was written there."""

    def __init__(self):
        self.made: list[tuple[Tensor, Tensor, Tensor]] = []  # buffer, what it held, view

    def __call__(self, shape: Sequence[int], dtype: torch.dtype = torch.float32, layout: str = "dense",
                 device: str = "cpu") -> Tensor:
        if device == "meta":
            return torch.empty(shape, dtype=dtype, device="meta")
        if not shape:
            return torch.zeros((), dtype=dtype)
        *lead, D = shape
        if layout == "transposed" and len(lead) == 2:
            view = self._view((lead[1], lead[0], D), dtype).transpose(0, 1)
        elif layout == "chunk":
            view = self._view((*lead, 3 * D), dtype)[..., D : 2 * D]
        elif layout == "strided":
            view = self._view((*lead, 2 * D), dtype)[..., ::2]
        elif layout == "expanded" and lead and lead[0] > 1:
            view = self._view((1, *shape[1:]), dtype)
        elif layout == "gaps":
            view = self._view((*lead, D + 3), dtype)[..., :D]
        else:
            view = self._view(shape, dtype)
        view.copy_(torch.randn(view.shape).clamp(-3, 3))
        self.made.append((self.buffer, self.buffer.clone(), view))
        return view.expand(shape)

    def _view(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        n = torch.Size(shape).numel()
        self.buffer = torch.full((n + 2 * GUARD,), float("nan") if dtype.is_floating_point else 1).to(dtype)
        return self.buffer[GUARD : GUARD + n].view(tuple(shape))

    def check(self, written: Sequence[Tensor] = ()) -> None:
        """Nothing has changed but the tensors in `written`."""
        starts = {t.data_ptr() for t in written}
        for buffer, before, view in self.made:
            if view.data_ptr() in starts:
                view.zero_()
                inside = torch.zeros_like(buffer).as_strided(view.shape, view.stride(), view.storage_offset())
                expected = inside._base
                expected.copy_(before)
                inside.zero_()
                before = expected
            assert torch.equal(buffer.view(torch.uint8), before.view(torch.uint8)), "written outside of an output"


def outcome(call: Callable, named: str, first: str) -> tuple[Outcome, Any]:
    """The outcome of a call, whose errors begin with one of the names. first: those of the first check."""
    try:
        return Outcome(True, None), call()
    except (TypeError, ValueError, NotImplementedError, RuntimeError) as error:
        if not re.match(named, str(error)) and OUT_OF_MEMORY not in str(error):
            raise AssertionError(f"the message names no argument: {error!s:.200}") from error
        return Outcome(not re.match(first, str(error)), error), None


# --- cached_forward --------------------------------------------------------------------------------------------------

def scaled(h: Tensor, context) -> Tensor:
    return torch.tanh(h) * 0.5


def scaled_out(h: Tensor, context, out: Tensor) -> None:
    torch.mul(torch.tanh(h), 0.5, out=out)


NUMBERS = (0, 1, -1, 0.5, True, None, "a", float("nan"), float("inf"), 10**400, 1j, 1e7, [], [0.1], (1.0, 2.0, 3.0))
ANY = (None, 5, 0.5, "ab", "", {}, [], (), [None], [[]], {"a": 1}, set(), object(), False, True, 1j)
WRONG = {
    "x": (*ANY, *(lambda shape, dtype=dtype: torch.ones(shape).to(dtype) for dtype in DTYPES.values()),
          lambda shape: torch.zeros(shape[1:]), lambda shape: torch.zeros(1, *shape),
          lambda shape: torch.zeros(*shape[:2], 0), lambda shape: torch.zeros(shape, device="meta"),
          lambda shape: torch.zeros(shape).to_sparse(), lambda shape: torch.zeros(shape, requires_grad=True),
          lambda shape: torch.zeros(1).expand(1 << 20, 1 << 20, shape[2]), lambda shape: torch.zeros(2, 3, 8)),
    "mod": (*ANY, hk.Modulation([], [], []), hk.Modulation(None, None, None), hk.Modulation([None], [None], [None]),
            hk.Modulation("ab", [0], [1])),
    "branches": (*ANY, [hk.Branch(None)], [hk.Branch(lambda h, c: None)], [hk.Branch(lambda h, c: h)],
                 [hk.Branch(lambda h, c: h[:, :1])], [hk.Branch(lambda h, c: h.long())],
                 [hk.Branch(lambda h, c: h.to("meta"))], [hk.Branch(lambda h, c: h.to_sparse())],
                 [hk.Branch(lambda h, c: h.double())], [hk.Branch(scaled, eps="a")], [hk.Branch(scaled, norm=5)]),
    "cache": (*ANY, hk.FeatureCache, lambda shape: hk.FeatureCache(), lambda shape: hk.TrunkCache(),
              lambda shape: hk.FeatureCache(runs=(2, 2))),
    "row": (*ANY, [True], [0, 1], [None] * 4, [1.0] * 4, torch.tensor(0.5), torch.rand(4), torch.rand(2, 2),
            torch.ones(4, dtype=torch.long), torch.full((4,), float("nan")), torch.rand(4, device="meta"),
            torch.rand(4).to_sparse(), torch.rand(4, dtype=torch.float64), torch.rand(4).half(),
            torch.rand(4, dtype=torch.complex64), [torch.tensor(True)] * 4),
    "forecast_weights": (*ANY, *([number] * 4 for number in NUMBERS), torch.rand(4), torch.rand(4, 2), torch.rand(3),
                         torch.full((4,), float("nan")), torch.rand(4, device="meta"), torch.ones(4, dtype=torch.long),
                         torch.rand(4).to_sparse(), hk.TrunkWeights(None), hk.TrunkWeights(torch.ones(1, 1)),
                         hk.TrunkWeights(torch.ones(1, 1), "a", 5), hk.TrunkWeights(torch.ones(3, 8)),
                         hk.TrunkWeights([1.0]), hk.TrunkWeights(torch.ones(1, 1, device="meta"))),
    "threshold": (*NUMBERS, 2, torch.tensor(0.5), torch.rand(2)),
    "eps": (*NUMBERS, torch.tensor(0.5)), "model": ANY, "context": ANY,
}
WRONG_ROWS = (5, "a", torch.ones(3), torch.ones(1, 3), torch.ones(2, 8, dtype=torch.long), torch.ones(1, 8).double(),
              torch.ones(1, 8, device="meta"), torch.ones(1, 8).to_sparse(), torch.ones(7, 8), torch.ones(1, 0), None)

rows = st.one_of(st.none(), st.just("all"), st.just("trunk"), st.just("soft"), st.just("change"),
                 st.lists(st.booleans(), min_size=4, max_size=4))
weights = st.one_of(st.none(), st.none(), st.just("tensor"), st.just("trunk"),
                    st.lists(st.one_of(st.floats(-2, 2), st.just(0.0), st.tuples(st.floats(-2, 2), st.floats(-2, 2))),
                             min_size=4, max_size=4))
forward = st.fixed_dictionaries(dict(
    B=st.integers(0, 3), N=st.integers(0, 5), D=some(1, 2, 7, 8, 16, 17, 33), K=often(4, 0, 1, 2),
    dtype=often("f32", "bf16", "f16", "f64"), other=some(*FLOATS[:3]), layout=some(*LAYOUTS), rows=some(*LAYOUTS),
    one_row=st.booleans(), cache=often("features", "none", "trunk", "runs"), history=st.integers(1, 4),
    grad=st.booleans(), out=st.booleans(),
    steps=st.lists(st.tuples(rows, weights), min_size=1, max_size=3), seed=st.integers(0, 9),
    wrong=st.lists(st.sampled_from([(name, i) for name, values in WRONG.items() for i in range(len(values))]),
                   max_size=2), wrong_row=often(None, *range(len(WRONG_ROWS)))))


def run_forward(given: dict) -> Outcome:
    torch.manual_seed(given["seed"])
    B, N, D, K, guarded = *(given[name] for name in "BNDK"), Guarded()
    dtype, other = DTYPES[given["dtype"]], DTYPES["f64" if given["dtype"] == "f64" else given["other"]]
    x = guarded((B, N, D), dtype, given["layout"])
    row = lambda: guarded((1 if given["one_row"] else B, D), other, given["rows"])
    modulation = [[row() for _ in range(count)] for count in (K + 1, K + 1, K)]
    branches = [hk.Branch(scaled, scaled_out if given["out"] else None) for _ in range(K)]
    cache = {"none": lambda: None, "features": lambda: hk.FeatureCache(given["history"]),
             "trunk": lambda: hk.TrunkCache(given["history"]),
             "runs": lambda: hk.FeatureCache(given["history"], (2, 2))}[given["cache"]]()
    options = dict(cache=cache)
    last, y = Outcome(True, None), None
    with torch.set_grad_enabled(given["grad"]):
        for i, (row, e) in enumerate([(None, None), *given["steps"]]):
            call = dict(branches=branches, x=x, mod=hk.Modulation(*modulation), row=step_row(row, K, given),
                        forecast_weights=step_weights(e, K, D)) | options
            if i == len(given["steps"]):
                for name, number in given["wrong"]:
                    value = WRONG[name][number]
                    call[name] = value((B, N, D)) if callable(value) and "<lambda>" in repr(value) else value
                if given["wrong_row"] is not None and modulation[i % 2]:
                    modulation[i % 2][0] = WRONG_ROWS[given["wrong_row"]]
            last, y = outcome(partial(hk.cached_forward, **call), rf"({'|'.join(WRONG)})\b", "x: ")
            if last.error is not None:
                break
    guarded.check()
    if y is not None and not given["wrong"]:
        assert y.shape == x.shape and not y.isnan().any(), "what lies beside a tensor was read"
    return last


def step_row(row, K: int, given: dict):
    named = {"all": None, "trunk": False, "change": lambda added, reference: given["seed"] % 2 == 0}
    if isinstance(row, str):
        return torch.rand(K) if row == "soft" else named[row]
    return row if row is None else tuple(row[: 2 if given["cache"] == "runs" else K])


def step_weights(e, K: int, D: int):
    if isinstance(e, str):
        return torch.rand(K) if e == "tensor" else hk.TrunkWeights(torch.rand(1, D), torch.rand(1, 1), None)
    return e if e is None else tuple(e[:K])


# --- The ops ---------------------------------------------------------------------------------------------------------

SHAPES = ("right", "short", "longer", "flat", "other batch", "empty", "huge")
tensor = st.fixed_dictionaries(dict(dtype=often("f32", *FLOATS, *DTYPES), layout=some(*LAYOUTS),
                                    shape=often(*SHAPES[:1], *SHAPES), device=often("cpu", "cpu", "cpu", "meta"),
                                    alias=often(None, *range(9)), there=often(True, True, False)))
ops = st.fixed_dictionaries(dict(
    op=some("residual_norm", "blend_residual_norm", "cache_commit", "bias_gelu", "guided_step"),
    B=st.integers(0, 3), N=st.integers(0, 5), D=some(1, 2, 7, 8, 17, 40, 130), R=st.integers(0, 3),
    tensors=st.lists(tensor, min_size=16, max_size=16), usual=st.booleans(), f64=st.booleans(),
    numbers=st.lists(st.floats(-2, 2) | st.sampled_from((0.0, 1e30, float("nan"), float("inf"))), min_size=4,
                     max_size=4),
    norm=st.booleans(), h_dtype=often(None, *DTYPES), seed=st.integers(0, 9), backward=st.booleans()))


class Tensors:
    """The tensors of one call, in turn; of later ones some share memory with earlier ones."""

    def __init__(self, given: dict):
        self.given, self.left, self.made, self.guarded = given, iter(given["tensors"]), [], Guarded()
        self.usual = given["usual"]

    def __call__(self, shape: Sequence[int], optional: bool = False, grad: bool = False) -> Tensor | None:
        one = next(self.left)
        if optional and not one["there"]:
            return None
        if not self.usual and one["alias"] is not None and one["alias"] < len(self.made):
            t = self.made[one["alias"]]
        else:
            dtype = DTYPES[one["dtype"]]
            if self.usual:
                dtype = torch.float64 if self.given["f64"] else dtype if one["dtype"] in FLOATS[:3] else torch.float32
            made = list(shape)
            if not self.usual:
                made = self.other(made, one["shape"])
            if made is None:
                t = torch.zeros(1, dtype=dtype).expand(1 << 30, 1 << 20, shape[-1])
            else:
                t = self.guarded(made, dtype, one["layout"], "cpu" if self.usual else one["device"])
        self.made.append(t)
        return t.detach().requires_grad_() if grad and t.is_floating_point() and self.given["backward"] else t

    @staticmethod
    def other(shape: list[int], kind: str) -> list[int] | None:
        return {"right": shape, "short": [*shape[:-1], max(shape[-1] - 1, 0)], "longer": [*shape[:-1], shape[-1] + 1],
                "flat": shape[1:], "other batch": [shape[0] + 1, *shape[1:]], "empty": [*shape[:-1], 0],
                "huge": None if len(shape) == 3 else shape}[kind]


def run_op(given: dict) -> Outcome:
    torch.manual_seed(given["seed"])
    t, shape, numbers, op = Tensors(given), [given[name] for name in "BND"], given["numbers"], given["op"]
    B, N, D = shape
    training = op == "blend_residual_norm"
    written, h_dtype = [], None if given["h_dtype"] is None or given["usual"] else DTYPES[given["h_dtype"]]
    if op in ("residual_norm", "blend_residual_norm"):
        x = t(shape, grad=training)
        run = [Term(t(shape, grad=training), t(shape, True), t((B, D), True, training)) for _ in range(given["R"])]
        e = [0.0 if given["usual"] and term.previous is None else number for term, number in zip(run, numbers)]
        shift, scale = t((1, D), True, training), t((B, D), True, training)
        options = dict(norm=given["norm"], h_dtype=h_dtype)
    if op == "residual_norm":
        written = [x_out, store, h_out] = [t(shape, True), t(shape, True), t(shape, True)]
        call = lambda: residual_norm(x, run, shift, scale, forecast_weights=e, x_out=x_out, store=store, h_out=h_out,
                                     eps=max(abs(numbers[3]), 1e-6), **options)
    elif training:
        fresh, r = t(shape, True, True), torch.tensor(numbers[3])

        def call():
            made = blend_residual_norm(x, run, shift, scale, forecast_weights=torch.tensor(e), fresh=fresh,
                                       r=None if fresh is None else r, **options)
            wanted = [y for y in made[:2] if y is not None and y.requires_grad]
            if wanted:
                torch.autograd.backward([y.float().sum() for y in wanted])
            return made
    elif op == "cache_commit":
        written = [latest, previous] = [t(shape), t(shape, True)]
        o = t(shape)
        call = lambda: cache_commit(latest, o, torch.tensor(numbers[0]), numbers[1], previous=previous)
    elif op == "bias_gelu":
        written, bias = [t(shape)], t((D,))
        call = lambda: bias_gelu(written[0], bias, "tanh" if given["norm"] else "none")
    else:
        x, conditional, unconditional = t((B, 2, D)), t((B, 3, D)), t((B, 2, D), True)
        table = t((3, 2), True)
        written = [out] = [t((B, 2, D), True)]
        call = lambda: guided_step(x, conditional, unconditional, guidance=numbers[0], channels=given["R"],
                                   a=numbers[1], b=numbers[2], table=table, out=out)
    found, y = outcome(call, rf"{op}\b|harmonica::{op}\b", rf"{op}: x\b|{op}: there are kernels")
    if found.error is None and given["usual"] and all(map(isfinite, numbers)) and max(numbers) < 3:
        results = [one for one in (y if isinstance(y, tuple) else [y]) if one is not None]
        assert not any(one.isnan().any() for one in results if one.device.type == "cpu"), "read beside a tensor"
    t.guarded.check([one for one in written if one is not None and one.device.type == "cpu"])
    return found


TARGETS = {"forward": (run_forward, forward), "ops": (run_op, ops), "command": (run_command, words)}
