"""`cached_forward` against a transformer written out naively in float64, and its promises one by one."""

from itertools import product

import pytest
import torch

import harmonica_kernels as hk
import harmonica_kernels.forward as forward_module
from harmonica_kernels.cache import run_spans
from support.naive_forward import K, Toy, random_rows


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
        e = [-1.0] * K  # every reused branch gives its previous output
        torch.testing.assert_close(toy(x, row=[False] * K, cache=cache, forecast_weights=e),
                                   toy.naive(x, store, [False] * K, e))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("history", [2, 3, 4])
def test_weights_of_all_the_outputs_kept(history, grad):
    """An entry with weights of its own makes Σ w_i·output_i of the branch's outputs, the newest first; no copies."""
    toy, cache = Toy(), hk.FeatureCache(history)
    outputs = [[] for _ in range(K)]  # newest first
    with torch.set_grad_enabled(grad):
        for s, row in enumerate([None] * history + random_rows(12)):
            x = torch.randn_like(toy.x, requires_grad=grad)
            weights, reused = [], []
            for k in range(K):
                n = 1 + (s + k) % history
                w = torch.randn(n).tolist()
                weights.append(w if n > 1 else w[0])
                held = [o for o in outputs[k]]
                e = [1 + w[0], -w[0]] if n == 1 else w
                reused.append(None if row is None or row[k] else sum(w * o for w, o in zip(e, held)))
            y = toy(x, row=row, cache=cache, forecast_weights=None if row is None else weights)
            # the same forward with what is reused put in as fresh outputs
            store = [[o] for o in reused]
            expected = toy.naive(x, store, None if row is None else [o is None for o in reused])
            for k in range(K):
                if row is None or row[k]:
                    outputs[k] = [store[k][-1], *outputs[k]][:history]
                assert all(torch.equal(a, b.to(a)) or torch.allclose(a, b) for a, b in
                           zip(cache.outputs(k), outputs[k], strict=True))
            torch.testing.assert_close(y, expected)
            if grad:
                weigh = torch.randn_like(y)
                torch.testing.assert_close(*(torch.autograd.grad((out * weigh).sum(), x) for out in (y, expected)))
    assert cache.nbytes == history * K * toy.x.nbytes


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("runs", [(2, 1, 1), (1, 3), (4,), (1, 1, 2)])
def test_runs_of_branches_keep_what_they_add(runs, grad):
    """Computed or reused together; a run's offset is that of the computing step, gates and all; forecasts of it too."""
    toy, cache = Toy(), hk.FeatureCache(2, runs)
    spans, kept = run_spans(runs, K), [[] for _ in runs]
    with torch.set_grad_enabled(grad):
        for s in range(10):
            x = torch.randn_like(toy.x, requires_grad=grad)
            row = None if s < 2 else [bool(torch.rand(()) < 0.5) for _ in runs]
            weights = None if s < 2 else [float(torch.randn(())) if s % 2 else 0.0 for _ in runs]
            toy.calls.clear()
            y = toy(x, row=row, cache=cache, forecast_weights=weights)
            called = {k for k, _ in toy.calls}
            # the same by the single branches: a reused run is one branch without gate that adds the offset
            stream = x
            for i, (first, end) in enumerate(spans):
                computed = row is None or row[i]
                assert called & set(range(first, end)) == (set(range(first, end)) if computed else set())
                before = stream
                if computed:
                    stream = toy.through(stream, first, end)
                    kept[i] = [*kept[i], toy.outputs[-1] if end - first == 1 else (stream - before).detach()][-2:]
                else:
                    e = weights[i]
                    o = (1 + e) * kept[i][1] - e * kept[i][0]
                    gate = toy.mod.gate[first] if end - first == 1 else None
                    stream = stream + (o if gate is None else gate.unsqueeze(1) * o)
            expected = torch.nn.functional.layer_norm(stream, x.shape[-1:], eps=1e-6)
            expected = expected * (1 + toy.mod.scale[K].unsqueeze(1)) + toy.mod.shift[K].unsqueeze(1)
            torch.testing.assert_close(y, expected)
            if grad:
                weigh = torch.randn_like(y)
                torch.testing.assert_close(*(torch.autograd.grad((out * weigh).sum(), x) for out in (y, expected)))
    assert cache.nbytes == 2 * len(runs) * toy.x.nbytes


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

    def count(x, run, *args, **kwargs):
        calls.append(len(run))
        return original(x, run, *args, **kwargs)

    monkeypatch.setattr(forward_module, op, count)
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
    """As `test_soft_trajectory_equals_naive`, but a forecast from a single output repeats it."""
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
