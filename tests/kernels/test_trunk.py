"""The trunk as the unit of reuse, against the same forward written out naively in float64."""

import pytest
import torch
from torch.nn.functional import layer_norm

import harmonica_kernels as hk
from harmonica_kernels import TrunkCache, TrunkWeights

B, N, D, K = 2, 3, 8, 3
NOTHING = hk.Modulation([None] * (K + 1), [None] * (K + 1), [None] * K)


class Toy:
    """K branches `tanh(h @ w)`, their modulation, and naive forwards."""

    def __init__(self, dtype=torch.float64):
        self.w = [torch.randn(D, D, dtype=dtype) / D**0.5 for _ in range(K)]
        rows = lambda count: [torch.randn(B, D, dtype=dtype) for _ in range(count)]
        self.mod, self.calls = hk.Modulation(rows(K + 1), rows(K + 1), rows(K)), 0
        self.final = hk.Modulation([None] * K + [self.mod.shift[K]], [None] * K + [self.mod.scale[K]], [None] * K)
        self.branches = [hk.Branch(self.body(k)) for k in range(K)]

    def body(self, k):
        def body(h, context):
            self.calls += 1
            return torch.tanh(h @ self.w[k])
        return body

    def __call__(self, x, weights=None, *, cache, computed=True):
        return hk.cached_forward(self.branches, x, self.mod if computed else self.final,
                                 row=None if computed else False, forecast_weights=weights, cache=cache)

    def modulated(self, x, k):
        return layer_norm(x, (D,), eps=1e-6) * (1 + self.mod.scale[k][:, None]) + self.mod.shift[k][:, None]

    def state(self, x):
        for k in range(K):
            x = x + self.mod.gate[k][:, None] * torch.tanh(self.modulated(x, k) @ self.w[k])
        return x


def draw(n, dtype=torch.float64, tokens=True, own=True, grad=False):
    make = lambda *shape: torch.randn(*shape, dtype=dtype).requires_grad_(grad)
    return TrunkWeights(make(n, D), make(n, D) if tokens else None, make(D) if own else None)


def naive(weights, base, x, kept):
    h = base if weights.own is None else base + weights.own * x
    for i in range(len(weights.states)):
        h = h + weights.states[i] * kept[i][0]
        if weights.tokens is not None:
            h = h + weights.tokens[i] * kept[i][1]
    return h


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("history", [1, 2, 3, 4])
def test_a_trajectory_equals_its_definition(history, grad):
    toy, cache, kept = Toy(), TrunkCache(history), []
    with torch.set_grad_enabled(grad):
        for step in range(14):
            x = torch.randn(B, N, D, dtype=torch.float64)
            computed, before = step == 0 or torch.rand(()) < 0.5, toy.calls
            n = int(torch.randint(0 if computed else 1, len(kept) + 1, ())) if kept else 0
            tokens, own = bool(torch.rand(()) < 0.5), bool(torch.rand(()) < 0.5)
            weights = draw(n, tokens=tokens, own=own) if kept and (not computed or torch.rand(()) < 0.7) else None
            y = toy(x, weights, cache=cache, computed=computed)
            state = toy.state(x)
            base, x_of = (state, state) if computed else (x if tokens or own else kept[0][0], x)
            h = base if weights is None else naive(weights, base, x_of, kept)
            torch.testing.assert_close(y, toy.modulated(h, K))
            assert toy.calls - before == (K if computed else 0)
            if computed:
                kept = [(state, x), *kept][:history]
            assert cache.filled == len(kept) and cache.nbytes <= 2 * history * x.nbytes
            for i, (state, entered) in enumerate(kept):
                torch.testing.assert_close(cache.state(i), state)
                assert torch.equal(cache.tokens(i), entered)


def test_gradients_reach_the_weights_and_earlier_forwards():
    """Through a trajectory of a computed, a corrected and two forecast steps."""
    toy = Toy()
    x = [torch.randn(B, N, D, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    weights = [draw(1, own=True, tokens=False, grad=True), draw(2, grad=True),
               draw(2, tokens=False, own=False, grad=True)]
    leaves = [*x, *(t for w in weights for t in w if t is not None)]

    def run(*leaves):
        cache, given = TrunkCache(2), iter(leaves[4:])
        w = [TrunkWeights(*(None if t is None else next(given) for t in one)) for one in weights]
        y = [toy(leaves[0], cache=cache), toy(leaves[1], w[0], cache=cache)]
        y += [toy(leaves[2], w[1], cache=cache, computed=False), toy(leaves[3], w[2], cache=cache, computed=False)]
        return sum(t.square().sum() for t in y)

    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_storage_types_agree_with_float64(dtype):
    torch.manual_seed(0)
    toy, exact = Toy(dtype), Toy()
    exact.w, exact.mod = [w.double() for w in toy.w], hk.Modulation(*([t.double() for t in rows] for rows in toy.mod))
    exact.final = hk.Modulation([None] * K + [exact.mod.shift[K]], [None] * K + [exact.mod.scale[K]], [None] * K)
    caches = TrunkCache(2), TrunkCache(2)
    with torch.no_grad():
        for computed, weights in ((True, None), (True, draw(1, dtype, tokens=False)), (False, draw(2, dtype))):
            x = torch.randn(B, N, D, dtype=dtype)
            wide = weights and TrunkWeights(*(None if t is None else t.double() for t in weights))
            found = toy(x, weights, cache=caches[0], computed=computed)
            expected = exact(x.double(), wide, cache=caches[1], computed=computed)
            error = ((found.double() - expected).norm() / expected.norm()).item()
            assert found.dtype == dtype and error < (1e-5 if dtype == torch.float32 else 5e-2)


def test_an_interrupted_forward_leaves_the_cache_unusable():
    toy, cache = Toy(), TrunkCache()
    x = torch.randn(B, N, D, dtype=torch.float64)
    toy(x, cache=cache)
    toy.branches[1] = hk.Branch(lambda h, context: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        toy(x, cache=cache)
    toy.branches[1] = hk.Branch(toy.body(1))
    with pytest.raises(RuntimeError, match="did not finish"):
        toy(x, cache=cache)
    cache.reset()
    toy(x, cache=cache)


@pytest.mark.parametrize("options, kind, message", [
    (dict(row=(True,) * K), TypeError, "computed whole"), (dict(row=torch.rand(K)), TypeError, "computed whole"),
    (dict(row=False), ValueError, "needs TrunkWeights, got None"),
    (dict(row=False, forecast_weights=(0.0,) * K), TypeError, "got tuple, expected TrunkWeights"),
    (dict(row=False, forecast_weights=draw(0)), ValueError, "needs a cached state, the cache holds 1 and 0 have"),
    (dict(row=False, forecast_weights=draw(2)), ValueError, "weighs 2 cached states, the cache holds 1"),
    (dict(forecast_weights=TrunkWeights(torch.zeros(1, D + 1))), ValueError, r"states: got .*\(1, 9\), expected"),
    (dict(forecast_weights=TrunkWeights(torch.zeros(1, D), torch.zeros(2, D))), ValueError, "tokens: got"),
    (dict(forecast_weights=TrunkWeights(torch.zeros(1, D), None, torch.zeros(3))), ValueError, "own: got"),
    (dict(forecast_weights=TrunkWeights(torch.zeros(1, D, device="meta"))), ValueError, "states: is on meta"),
])
def test_bad_arguments_are_named_before_anything_is_touched(options, kind, message):
    toy, cache = Toy(), TrunkCache()
    x = torch.randn(B, N, D, dtype=torch.float64)
    toy(x, cache=cache)
    calls, state = toy.calls, cache.state(0)
    with pytest.raises(kind, match=message):
        hk.cached_forward(toy.branches, x, toy.mod, cache=cache, **options)
    assert toy.calls == calls and cache.state(0) is state and cache.filled == 1


@pytest.mark.parametrize("history", [0, 5, True, 2.5])
def test_a_history_out_of_range_is_refused(history):
    with pytest.raises(ValueError, match="from 1 to 4"):
        TrunkCache(history)


def test_another_shape_is_refused_until_the_cache_is_reset():
    toy, cache = Toy(), TrunkCache()
    toy(torch.randn(B, N, D, dtype=torch.float64), cache=cache)
    with pytest.raises(ValueError, match="holds a forward of 3 branches"):
        toy(torch.randn(B, N + 1, D, dtype=torch.float64), cache=cache)
    cache.rewind()
    toy(torch.randn(B, N + 1, D, dtype=torch.float64), cache=cache)
