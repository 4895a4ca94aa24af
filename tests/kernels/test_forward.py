"""`cached_forward` against a transformer written out naively in float64, and its promises one by one."""

from itertools import product

import pytest
import torch
from torch.nn.functional import layer_norm

import harmonica_kernels as hk
import harmonica_kernels.forward as forward_module

EPS = (1e-6, 1e-5)
NORM = (True, True, False, True)  # branch 2 takes x itself, as PixArt's cross-attention does
GATE = (True, True, False, True)
K = 4


class Toy:
    """K branches `tanh(h @ w + context)`, their modulation, and the same forward written out naively."""

    def __init__(self, B=2, N=3, D=8, dtype=torch.float64, out=True):
        self.w = [torch.randn(D, D, dtype=dtype) / D**0.5 for _ in range(K)]
        rows = lambda present: [torch.randn(B, 3 * D, dtype=dtype)[:, D : 2 * D] if p else None for p in present]
        self.mod = hk.Modulation(rows((*NORM, True)), rows((*NORM, True)), rows(GATE))
        self.context = torch.randn(D, dtype=dtype)
        self.x = torch.randn(B, N, D, dtype=dtype)
        self.calls = []
        self.branches = [hk.Branch(self.body(k), self.body_out(k) if out and k % 2 == 0 else None, NORM[k], GATE[k],
                                   EPS[k % 2]) for k in range(K)]

    def body(self, k):
        def body(h, context):
            self.calls.append((k, "body"))
            return torch.tanh(h @ self.w[k] + context)
        return body

    def body_out(self, k):
        def body_out(h, context, out):
            self.calls.append((k, "body_out"))
            out.copy_(torch.tanh(h @ self.w[k] + context))
        return body_out

    def __call__(self, x, **options):
        return hk.cached_forward(self.branches, x, self.mod, context=self.context, **options)

    def naive(self, x, store, row=None, forecast_weights=None, threshold=0.1):
        """`store`: per branch the list of outputs stored so far, newest last; extended here."""
        soft = isinstance(row, torch.Tensor)
        for k in range(K):
            h = layer_norm(x, x.shape[-1:], eps=EPS[k % 2]) if NORM[k] else x
            if NORM[k]:
                h = h * (1 + self.mod.scale[k].unsqueeze(1)) + self.mod.shift[k].unsqueeze(1)
            reuse = None
            if row is not None and (soft or not row[k]):
                reuse = store[k][-1]
                e = 0 if forecast_weights is None else forecast_weights[k]
                if len(store[k]) > 1:
                    reuse = (1 + e) * reuse - e * store[k][-2]
            if reuse is None:
                o = torch.tanh(h @ self.w[k] + self.context)
                store[k].append(o.detach())
            elif soft:
                o = row[k] * torch.tanh(h @ self.w[k] + self.context) + (1 - row[k]) * reuse
                if row[k] > threshold:
                    store[k].append(o.detach())
            else:
                o = reuse
            x = x + (o if self.mod.gate[k] is None else self.mod.gate[k].unsqueeze(1) * o)
        y = layer_norm(x, x.shape[-1:], eps=1e-6)
        return y * (1 + self.mod.scale[K].unsqueeze(1)) + self.mod.shift[K].unsqueeze(1)


@pytest.fixture(autouse=True)
def seeded(request):
    seed = torch.seed() % 2**32
    print(f"seed {seed}")
    torch.manual_seed(seed)


def random_rows(steps):
    return [(torch.rand(K) < 0.5).tolist() for _ in range(steps)]


@pytest.mark.parametrize("out", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 8), (1, 1, 5), (3, 1, 1)])
def test_hard_trajectory_equals_naive(shape, out):
    toy, cache, store = Toy(*shape, out=out), hk.FeatureCache(), [[] for _ in range(K)]
    with torch.no_grad():
        for row in (None, *random_rows(12), (False,) * K, (True,) * K):
            x = torch.randn_like(toy.x)
            torch.testing.assert_close(toy(x, row=row, cache=cache), toy.naive(x, store, row))


@pytest.mark.parametrize("grad", [False, True])
def test_forecast_trajectory_equals_naive(grad):
    toy, cache, store = Toy(), hk.FeatureCache(history=2), [[] for _ in range(K)]
    with torch.set_grad_enabled(grad):
        for row in (None, None, *random_rows(20)):
            x = torch.randn_like(toy.x, requires_grad=grad)
            e = [0.0 if torch.rand(()) < 0.3 else torch.randn(()).item() for _ in range(K)]
            e = None if row is None else e
            torch.testing.assert_close(toy(x, row=row, cache=cache, forecast_weights=e), toy.naive(x, store, row, e))


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("history", [1, 2])
def test_soft_trajectory_equals_naive(history, backward):
    toy, cache, store = Toy(), hk.FeatureCache(history), [[] for _ in range(K)]
    for step in range(8):
        x = torch.randn_like(toy.x)
        row = None if step == 0 else torch.rand(K, dtype=torch.float64, requires_grad=backward)
        e = None if history == 1 or step == 0 else torch.randn(K, dtype=torch.float64, requires_grad=backward)
        with torch.set_grad_enabled(backward):
            y = toy(x, row=row, cache=cache, forecast_weights=e, threshold=0.5)
            expected = toy.naive(x, [s[-history:] for s in store], row, e, threshold=0.5)
        torch.testing.assert_close(y, expected)
        if backward and step > 1:
            weights = torch.randn_like(y)
            leaves = (row,) if e is None else (row, e)
            got = torch.autograd.grad((y * weights).sum(), leaves, allow_unused=True, materialize_grads=True)
            want = torch.autograd.grad((expected * weights).sum(), leaves, allow_unused=True, materialize_grads=True)
            torch.testing.assert_close(got, want)
        toy.naive(x, store, None if row is None else row.detach(), None if e is None else e.detach(), threshold=0.5)


def test_soft_row_gradcheck():
    """gradcheck in x, scores, forecast weights and modulation at once."""
    toy, cache = Toy(B=2, N=2, D=3, out=False), hk.FeatureCache(2)
    with torch.no_grad():
        toy(toy.x, cache=cache)
        toy(torch.randn_like(toy.x), cache=cache)
    row = (torch.rand(K, dtype=torch.float64) * 0.8 + 0.1).requires_grad_()
    e = torch.randn(K, dtype=torch.float64, requires_grad=True)
    x = toy.x.requires_grad_()
    rows = [t.clone().requires_grad_() for part in toy.mod for t in part if t is not None]

    def run(x, row, e, *rows):
        given = iter(rows)
        mod = hk.Modulation(*([None if t is None else next(given) for t in part] for part in toy.mod))
        frozen = hk.FeatureCache(2).copy_(cache)
        return hk.cached_forward(toy.branches, x, mod, row=row, forecast_weights=e, cache=frozen, context=toy.context)

    assert torch.autograd.gradcheck(run, (x, row, e, *rows))


@pytest.mark.parametrize("row", [None, (True, False, False, True), (False,) * K])
def test_hard_row_gradients(row):
    """Also without a soft row the forward is differentiable, in x, modulation and a tensor of forecast weights."""
    toy, cache = Toy(out=False), hk.FeatureCache(2)
    store = [[] for _ in range(K)]
    with torch.no_grad():
        for x in torch.randn(2, *toy.x.shape, dtype=toy.x.dtype):
            toy(x, cache=cache), toy.naive(x, store)
    modulation = [t.requires_grad_() for part in toy.mod for t in part if t is not None]
    e = torch.randn(K, dtype=torch.float64, requires_grad=True)
    leaves = [toy.x.requires_grad_(), e, *modulation]
    weights = torch.randn_like(toy.x)
    got = torch.autograd.grad((toy(toy.x, row=row, cache=cache, forecast_weights=e) * weights).sum(), leaves,
                              materialize_grads=True, allow_unused=True)
    want = torch.autograd.grad((toy.naive(toy.x, store, row, e) * weights).sum(), leaves,
                               materialize_grads=True, allow_unused=True)
    torch.testing.assert_close(got, want)


def test_renewal_waits_for_backward_and_obeys_threshold():
    toy, cache = Toy(), hk.FeatureCache()
    with torch.no_grad():
        toy(toy.x, cache=cache)
    before = [cache.latest(k).clone() for k in range(K)]
    row = torch.tensor([0.05, 0.1, 0.11, 0.9], dtype=torch.float64, requires_grad=True)
    y = toy(toy.x + 1, row=row, cache=cache, threshold=0.1)
    assert all(torch.equal(cache.latest(k), before[k]) for k in range(K))
    y.sum().backward()
    cache.commit()
    assert [torch.equal(cache.latest(k), before[k]) for k in range(K)] == [True, True, False, False]


def test_a_reused_body_is_never_called_and_body_out_writes_the_slot():
    toy, cache = Toy(), hk.FeatureCache()
    with torch.no_grad():
        toy(toy.x, cache=cache)
        assert toy.calls == [(0, "body_out"), (1, "body"), (2, "body_out"), (3, "body")]
        for row in product((True, False), repeat=K):
            toy.calls.clear()
            toy(toy.x, row=row, cache=cache)
            assert [k for k, _ in toy.calls] == [k for k in range(K) if row[k]]


@pytest.mark.parametrize("op", ["residual_norm", "blend_residual_norm"])
def test_fused_calls(monkeypatch, op):
    """m computed branches are joined by m + 1 fused calls, however many reused ones lie between; also with grad."""
    toy, cache, calls = Toy(), hk.FeatureCache(), []
    original = getattr(forward_module, op)

    def counted(x, run, *args, **kwargs):
        calls.append(len(run))
        return original(x, run, *args, **kwargs)

    monkeypatch.setattr(forward_module, op, counted)
    toy.x.requires_grad_(op == "blend_residual_norm")
    with torch.set_grad_enabled(toy.x.requires_grad):
        toy(toy.x, cache=cache)
        for row in product((True, False), repeat=K):
            calls.clear()
            toy(toy.x, row=row, cache=cache)
            assert len(calls) == sum(row) + 1 and sum(calls) == K


@pytest.mark.parametrize("grad", [False, True])
def test_x_is_accumulated_in_one_buffer_and_inference_has_one_h(monkeypatch, grad):
    """Without grad all bodies are given one h, with grad each its own, which it may keep."""
    given, sums, original = [], [], forward_module.residual_norm
    monkeypatch.setattr(forward_module, "residual_norm",
                        lambda *args, x_out, **kwargs: sums.append(x_out) or original(*args, x_out=x_out, **kwargs))
    row = torch.randn(1, 8)
    with torch.set_grad_enabled(grad):
        hk.cached_forward([hk.Branch(lambda h, context: given.append(h) or h.sin())] * K, torch.randn(2, 3, 8),
                          hk.Modulation([row] * (K + 1), [row] * (K + 1), [row] * K))
    assert len({h.data_ptr() for h in given}) == (K if grad else 1)
    assert len(sums) == K + 1 and len({x.data_ptr() for x in sums if x is not None}) == 1


@pytest.mark.parametrize("row", [None, (True, False, True, False), (False,) * K, "soft"])
@pytest.mark.parametrize("first_norm", [False, True])
def test_the_callers_x_is_never_changed(row, first_norm):
    toy, cache = Toy(), hk.FeatureCache()
    if not first_norm:
        toy.branches[0] = hk.Branch(toy.body(0), None, norm=False)
        toy.mod.shift[0] = toy.mod.scale[0] = None
    with torch.no_grad():
        toy(toy.x, cache=cache)
        before, version = toy.x.clone(), toy.x._version
        toy(toy.x, row=torch.rand(K).double() if row == "soft" else row, cache=cache)
    assert torch.equal(toy.x, before) and toy.x._version == version


def test_renewal_decided_by_a_score_on_the_device():
    """The cache's part of a soft row on CUDA: entries are copied where the score says so, and none is waited for."""
    for history in (1, 2):
        cache, scores, outputs = hk.FeatureCache(history), torch.rand(6, K), torch.randn(7, K, 2, 3, 8)
        cache._begin(outputs[0, 0], K)
        stored = [[outputs[0, k]] for k in range(K)]
        for k in range(K):
            cache._push(k, torch.float32).copy_(outputs[0, k])
        for row, fresh in zip(scores, outputs[1:]):
            for k in range(K):
                cache._renew(k, row[k], 0.5, fresh[k])
                if row[k] > 0.5:
                    stored[k].append(fresh[k])
            cache.commit()
            for k in range(K):
                assert torch.equal(cache.latest(k), stored[k][-1]) and cache.filled(k) == history
                if history == 2:  # a lone output counts as two equal ones
                    assert torch.equal(cache.previous(k), stored[k][max(0, len(stored[k]) - 2)])


@pytest.fixture
def on_cuda():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    with torch.device("cuda"):
        yield


@pytest.mark.gpu
@pytest.mark.parametrize("promise", [
    lambda: test_hard_trajectory_equals_naive((2, 3, 8), True), lambda: test_forecast_trajectory_equals_naive(True),
    lambda: test_forecast_trajectory_equals_naive(False), lambda: test_soft_trajectory_equals_naive(1, True),
    lambda: test_soft_row_gradcheck(), lambda: test_storage_dtypes(torch.bfloat16),
    lambda: test_a_reused_body_is_never_called_and_body_out_writes_the_slot(), lambda: test_non_contiguous_x()])
def test_on_cuda(on_cuda, promise):
    promise()


@pytest.mark.gpu
def test_soft_forecasts_on_cuda(on_cuda):
    """As `test_soft_trajectory_equals_naive`, but a lone output counts as two equal ones: forecasts repeat it."""
    toy, cache, store = Toy(), hk.FeatureCache(2), [[] for _ in range(K)]
    with torch.no_grad():
        for step in range(8):
            x, e = torch.randn_like(toy.x), torch.randn(K, dtype=torch.float64)
            row = None if step == 0 else torch.rand(K, dtype=torch.float64)
            y = toy(x, row=row, cache=cache, forecast_weights=None if row is None else e, threshold=0.5)
            torch.testing.assert_close(y, toy.naive(x, store, row, e, threshold=0.5))


@pytest.mark.gpu
@pytest.mark.parametrize("history", [1, 2])
def test_nothing_waits_for_the_device(on_cuda, history):
    toy, cache = Toy(dtype=torch.float32), hk.FeatureCache(history)
    row, e = torch.rand(K, requires_grad=True), torch.rand(K, requires_grad=True) if history == 2 else None
    weights = torch.ones_like(toy.x)

    def trajectory():
        with torch.no_grad():
            toy(toy.x, cache=cache)
            toy(toy.x, cache=cache)
            toy(toy.x, row=(True, False, False, True), cache=cache,
                forecast_weights=(0.5,) * K if history == 2 else None)
            toy(toy.x, row=(True, False, False, True), cache=cache, forecast_weights=e)
        y = toy(toy.x, row=row, cache=cache, forecast_weights=e)
        torch.autograd.grad(y, [row] if e is None else [row, e], weights)
        cache.commit()

    trajectory()
    torch.cuda.set_sync_debug_mode("error")
    try:
        trajectory()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_slots_swap_without_a_copy():
    toy, cache = Toy(), hk.FeatureCache(2)
    with torch.no_grad():
        toy(toy.x, cache=cache)
        first = cache.latest(1).data_ptr()
        toy(toy.x, cache=cache)
        assert cache.latest(1).data_ptr() != first and cache.previous(1).data_ptr() == first
        toy(toy.x, row=(True, False, True, True), cache=cache)
        assert cache.previous(1).data_ptr() == first
        toy(toy.x, cache=cache)
        assert cache.latest(1).data_ptr() == first
    assert cache.nbytes == 2 * K * toy.x.nbytes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_storage_dtypes(dtype):
    exact, store, cache = Toy(B=2, N=5, D=16), [[] for _ in range(K)], hk.FeatureCache()
    toy = Toy(B=2, N=5, D=16, dtype=dtype)
    toy.w, toy.context = [w.to(dtype) for w in exact.w], exact.context.to(dtype)
    toy.mod = hk.Modulation(*([None if t is None else t.to(dtype) for t in part] for part in exact.mod))
    tolerance = dict(rtol=0, atol={torch.bfloat16: 0.15, torch.float16: 0.02, torch.float32: 1e-4}[dtype])
    with torch.inference_mode():
        for row in (None, (True, False, False, True), (False,) * K):
            x = torch.randn_like(exact.x)
            y = toy(x.to(dtype), row=row, cache=cache)
            assert y.dtype == dtype
            torch.testing.assert_close(y.double(), exact.naive(x, store, row), **tolerance)


def test_autocast_and_mixed_dtypes():
    """float32 stream, bfloat16 bodies and modulation under autocast: the cache is bfloat16, the output too."""
    exact, cache = Toy(B=2, N=5, D=16, out=False), hk.FeatureCache()
    toy = Toy(B=2, N=5, D=16, dtype=torch.float32, out=False)
    toy.w, toy.context = [w.float() for w in exact.w], exact.context.float()
    toy.mod = hk.Modulation(*([None if t is None else t.bfloat16() for t in part] for part in exact.mod))
    store = [[] for _ in range(K)]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for row in (None, (False, True, False, False)):
            y = toy(exact.x.float(), row=row, cache=cache)
            torch.testing.assert_close(y.double(), exact.naive(exact.x, store, row), rtol=0, atol=0.15)
    assert y.dtype == torch.bfloat16


def test_non_contiguous_x():
    toy = Toy()
    x = torch.randn(8, 3, 2, dtype=torch.float64).permute(2, 1, 0)
    with torch.no_grad():
        torch.testing.assert_close(toy(x), toy.naive(x, [[] for _ in range(K)]))


def test_compile_one_graph_a_row():
    """20 distinct rows are 20 graphs, and a second trajectory compiles none."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    branches = [hk.Branch(lambda h, c: torch.tanh(h) * c) for _ in range(5)]
    mod = hk.Modulation(*([torch.randn(2, 8) for _ in range(n)] for n in (6, 6, 5)))
    rows = [(True,) * 5, *list(product((True, False), repeat=5))[1:20]]
    counter = CompileCounterWithBackend("aot_eager")

    def model(x, row, cache):
        return hk.cached_forward(branches, x, mod, row=row, cache=cache, context=2.0)

    compiled = torch.compile(model, fullgraph=True, backend=counter, recompile_limit=len(rows))
    x = torch.randn(2, 4, 8)

    def trajectory(call):
        cache, y = hk.FeatureCache(), x
        for row in rows:
            y = call(y, row, cache)
        return y

    with torch.no_grad():
        expected = trajectory(model)
        torch.testing.assert_close(trajectory(compiled), expected)
        assert counter.frame_count == len(rows) == len(set(rows))
        torch.testing.assert_close(trajectory(compiled), expected)
        assert counter.frame_count == len(rows)


def test_compile_with_forecasts():
    """FORA n=2 with forecasts: its first two steps differ, for the cache fills; then two graphs serve every step."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    branches = [hk.Branch(lambda h, c: torch.tanh(h)) for _ in range(3)]
    mod = hk.Modulation(*([torch.randn(2, 8) for _ in range(n)] for n in (4, 4, 3)))
    rows = [((s % 2 == 0,) * 3, (0.5,) * 3 if s % 2 and s > 1 else None) for s in range(10)]
    counter = CompileCounterWithBackend("aot_eager")

    def model(x, row, e, cache):
        return hk.cached_forward(branches, x, mod, row=row, forecast_weights=e, cache=cache)

    compiled = torch.compile(model, fullgraph=True, backend=counter, recompile_limit=10)
    x = torch.randn(2, 4, 8)

    def trajectory(call):
        cache, y = hk.FeatureCache(2), x
        for row, e in rows:
            y = call(y, row, e, cache)
        return y

    with torch.no_grad():
        expected = trajectory(model)
        torch.testing.assert_close(trajectory(compiled), expected)
        graphs = counter.frame_count
        assert graphs <= 5
        torch.testing.assert_close(trajectory(compiled), expected)
        assert counter.frame_count == graphs


def test_what_is_pending_counts():
    """The next forward renews unasked, also where it needs the renewed entry for a forecast."""
    toy, cache, store = Toy(), hk.FeatureCache(2), [[] for _ in range(K)]
    with torch.no_grad():
        toy(toy.x, cache=cache), toy.naive(toy.x, store)
    row = torch.full((K,), 0.5, dtype=torch.float64, requires_grad=True)
    toy(toy.x + 1, row=row, cache=cache).sum().backward()
    with torch.no_grad():
        toy.naive(toy.x + 1, store, row.detach())
        row, e = (True, False, False, False), (0.0, 1.0, 1.0, 0.5)
        torch.testing.assert_close(toy(toy.x, row=row, cache=cache, forecast_weights=e), toy.naive(toy.x, store, row,
                                                                                                   e))


def test_body_out_is_passed_over_where_the_cache_has_another_dtype():
    """An arena filled under autocast goes on in its dtype; the fused call stores and converts."""
    toy, cache = Toy(dtype=torch.float32), hk.FeatureCache()
    toy.context = toy.context.bfloat16()  # so that the bodies' outputs are bfloat16 under autocast
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            toy(toy.x, cache=cache)
        toy.calls.clear()
        toy(toy.x, row=(True, True, True, False), cache=cache)
    assert cache.dtype == torch.bfloat16 and {kind for _, kind in toy.calls} == {"body"}


def test_copies_of_caches():
    toy, cache, other = Toy(), hk.FeatureCache(2), hk.FeatureCache()
    with torch.no_grad():
        toy(toy.x, cache=cache)
        other.copy_(cache)
        toy(toy.x + 1, cache=cache)
        torch.testing.assert_close(toy(toy.x, row=(False,) * K, cache=other), toy(toy.x, cache=None))
        with pytest.raises(ZeroDivisionError):
            hk.cached_forward([hk.Branch(lambda h, c: 1 / 0, None, n, g) for n, g in zip(NORM, GATE)], toy.x, toy.mod,
                              cache=(failed := hk.FeatureCache()))
        failed.copy_(cache)
        assert torch.equal(failed.latest(2), cache.latest(2)) and failed.filled(2) == 2
        assert failed.copy_(hk.FeatureCache()).dtype is None


def test_an_interrupted_forward_asks_for_a_reset():
    toy, cache = Toy(), hk.FeatureCache()

    def broken(h, context):
        raise OSError("a body failed")

    good = toy.branches[3]
    with torch.no_grad():
        toy(toy.x, cache=cache)
        toy.branches[3] = hk.Branch(broken, None)
        with pytest.raises(OSError, match="a body failed"):
            toy(toy.x, cache=cache)
        toy.branches[3] = good
        with pytest.raises(RuntimeError, match="reset"):
            toy(toy.x, row=(True, False, False, False), cache=cache)
        cache.reset()
        toy(toy.x, cache=cache)


def bad(x=None, mod=None, branches=None, fill=True, history=1, **options):
    toy, cache = Toy(), hk.FeatureCache(history)
    with torch.no_grad():
        if fill:
            toy(toy.x, cache=cache)
        changed = [None if fill is False else cache.latest(k).clone() for k in range(K)]
        try:
            hk.cached_forward(branches or toy.branches, toy.x if x is None else x, mod(toy) if mod else toy.mod,
                              context=toy.context, **({"cache": cache} | options))
        finally:
            if fill and not branches:
                assert all(torch.equal(cache.latest(k), changed[k]) for k in range(K)), "touched the cache"


@pytest.mark.parametrize("options, error, words", [
    (dict(x=torch.randn(2, 3)), TypeError, "x: got"),
    (dict(x=torch.zeros(2, 3, 8, dtype=torch.long)), TypeError, "x: got"),
    (dict(x=torch.randn(4, 3, 8).double()), ValueError, r"mod.shift\[0\]"),
    (dict(x=torch.randn(2, 5, 8).double()), ValueError, "cache: holds"),
    (dict(x=torch.randn(2, 3, 8)), TypeError, r"mod.shift\[0\]: got torch.float64"),
    (dict(mod=lambda toy: hk.Modulation([r if r is None else r.float() for r in toy.mod.shift], *toy.mod[1:])),
     TypeError, r"mod.shift\[0\]: got torch.float32"),
    (dict(x=torch.randn(2, 3, 8).to(torch.float8_e5m2)), TypeError, "x: got torch.float8"),
    (dict(x=torch.randn(2, 3, 8, device="meta")), NotImplementedError, "x: is on meta"),
    (dict(row=(True,) * 3), ValueError, "row: got 3 entries, expected 4"),
    (dict(row=(True, 1, True, True)), TypeError, r"row\[1\]"),
    (dict(row=torch.tensor([True] * K)), TypeError, "tolist"),
    (dict(row=torch.rand(3)), ValueError, "row: got shape"),
    (dict(row=torch.tensor([0.1, float("nan"), 0.2, 0.3])), ValueError, "finite"),
    (dict(row=torch.tensor([0.1, float("inf"), 0.2, 0.3])), ValueError, "finite"),
    (dict(row=(True, False, True, True), cache=None), ValueError, "FeatureCache"),
    (dict(row=torch.rand(K), cache=None), ValueError, "FeatureCache"),
    (dict(row=(True, False, True, True), fill=False), ValueError, r"row\[1\]: the cache holds no output"),
    (dict(row=torch.rand(K), fill=False), ValueError, "holds no output"),
    (dict(forecast_weights=(1.0,) * 3), ValueError, "forecast_weights: got 3"),
    (dict(row=(True, False, True, True), forecast_weights=(0.0, float("nan"), 0.0, 0.0)), ValueError,
     r"forecast_weights\[1\]"),
    (dict(row=(True, False, True, True), forecast_weights=(0.0, 1.0, 0.0, 0.0)), ValueError, "history=2"),
    (dict(row=(True, False, True, True), forecast_weights=(0.0, 1.0, 0.0, 0.0), history=2), ValueError, "holds 1"),
    (dict(threshold=float("nan")), ValueError, "threshold"),
    (dict(mod=lambda toy: hk.Modulation(toy.mod.shift[:-1], toy.mod.scale, toy.mod.gate)), ValueError, "mod.shift"),
    (dict(mod=lambda toy: hk.Modulation(toy.mod.shift, toy.mod.scale, [None] * K)), ValueError, r"mod.gate\[0\]"),
    (dict(branches=[hk.Branch(lambda h, c: h)] * 2
          + [hk.Branch(lambda h, c: h, gate=False), hk.Branch(lambda h, c: h)]), ValueError, "returned its input"),
    (dict(branches=[hk.Branch(lambda h, c: h.view_as(h))] * 2
          + [hk.Branch(lambda h, c: h, gate=False), hk.Branch(lambda h, c: h)]), ValueError, "returned its input"),
    (dict(branches=[hk.Branch(lambda h, c: h[:1].clone())] * 2
          + [hk.Branch(lambda h, c: h, gate=False), hk.Branch(lambda h, c: h)]), ValueError, r"branches\[0\].body"),
])
def test_bad_input(options, error, words):
    with pytest.raises(error, match=words):
        bad(**options)


def test_a_cache_of_another_dtype():
    toy, cache = Toy(dtype=torch.float32), hk.FeatureCache()
    with torch.no_grad():
        toy(toy.x, cache=cache)
        with pytest.raises(ValueError, match="cache: holds 4 branches for x of shape .* torch.float32"):
            toy(toy.x.bfloat16(), row=(False,) * K, cache=cache)


def test_a_cache_of_another_model():
    small, cache = Toy(), hk.FeatureCache()
    with torch.no_grad():
        hk.cached_forward(small.branches[:2], small.x, hk.Modulation(small.mod.shift[:3], small.mod.scale[:3],
                                                                     small.mod.gate[:2]), cache=cache, context=0)
        for row in (None, (True, False, True, False), torch.rand(K)):
            with pytest.raises(ValueError, match="cache: holds 2 branches"):
                small(small.x, row=row, cache=cache)


@pytest.mark.parametrize("history", [0, 3, True, "2"])
def test_bad_history(history):
    with pytest.raises(ValueError, match="history"):
        hk.FeatureCache(history)
