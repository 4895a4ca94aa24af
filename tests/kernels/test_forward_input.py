"""`cached_forward` refuses what does not fit, and leaves the cache as it was."""

import pytest
import torch

import harmonica_kernels as hk
from support.naive_forward import K, Toy


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
    (dict(row=(True, False, True, True), forecast_weights=(0.0, (2.0, -1.0), 0.0, 0.0), history=2), ValueError,
     r"forecast_weights\[1\]: weighs 2 outputs of the branch, the cache holds 1"),
    (dict(row=(True, False, True, True), forecast_weights=(0.0, (), 0.0, 0.0)), ValueError, "weighs 0 outputs"),
    (dict(row=(True, False, True, True), forecast_weights=(0.0, (float("inf"),), 0.0, 0.0)), ValueError, "finite"),
    (dict(row=torch.rand(K), forecast_weights=(0.0, (1.0,), 0.0, 0.0)), TypeError, "a soft row takes one number"),
    (dict(row=torch.rand(K), history=3), ValueError, "cache: keeps 3 outputs of a branch, with a soft row at most 2"),
    (dict(threshold=float("nan")), ValueError, "threshold"),
    (dict(mod=lambda toy: hk.Modulation(toy.mod.shift[:-1], toy.mod.scale, toy.mod.gate)), ValueError, "mod.shift"),
    (dict(mod=lambda toy: hk.Modulation(toy.mod.shift, toy.mod.scale, [None] * K)), ValueError, r"mod.gate\[0\]"),
    (dict(branches=[hk.Branch(lambda h, c: h)] * 2
          + [hk.Branch(lambda h, c: h, gate=False), hk.Branch(lambda h, c: h)]), ValueError, "returned its input"),
    (dict(branches=[hk.Branch(lambda h, c: h.view_as(h))] * 2
          + [hk.Branch(lambda h, c: h, gate=False), hk.Branch(lambda h, c: h)]), ValueError, "returned its input"),
    (dict(x=torch.randn(2, 3, 8).double().to_sparse()), TypeError, "x: got .*dense"),
    (dict(branches=5), TypeError, "branches: got 5"), (dict(branches=[5]), TypeError, r"branches: got \[5\]"),
    (dict(mod=lambda toy: 5), TypeError, "mod.shift: got None"),
    (dict(mod=lambda toy: hk.Modulation("abcde", toy.mod.scale, toy.mod.gate)), TypeError, "mod.shift: got 'abcde'"),
    (dict(mod=lambda toy: hk.Modulation(["a"] * (K + 1), toy.mod.scale, toy.mod.gate)), TypeError,
     r"mod.shift\[0\]: got 'a', expected a dense tensor"),
    (dict(threshold="a"), ValueError, "threshold: got 'a'"), (dict(threshold=None), ValueError, "threshold: got None"),
    (dict(eps="a"), ValueError, "eps: got 'a'"), (dict(eps=-1.0), ValueError, "eps: got -1.0"),
    (dict(cache=5), TypeError, "cache: got 5"), (dict(model=5), TypeError, "model: got 5"),
    (dict(cache=hk.FeatureCache(runs=(1, 1))), ValueError, "cache: its runs hold 2 branches, there are 4"),
    (dict(row=5), TypeError, "row: got 5"), (dict(row="abcd"), TypeError, "row: got 'abcd'"),
    (dict(row=torch.rand(K, device="meta")), ValueError, "row: got .* on meta"),
    (dict(row=torch.rand(K).to_sparse()), ValueError, "row: got .*sparse"),
    (dict(forecast_weights=5), TypeError, "forecast_weights: got 5"),
    (dict(forecast_weights=torch.tensor(0.5)), ValueError, "forecast_weights: got torch.float32 of shape"),
    (dict(forecast_weights=torch.ones(K, dtype=torch.long)), ValueError, "forecast_weights: got torch.int64"),
    (dict(forecast_weights=torch.ones(K, device="meta")), ValueError, "forecast_weights: got .* on meta"),
    (dict(forecast_weights=(0.0, "a", None, 1j)), ValueError, r"forecast_weights\[1\]: weighs|forecast_weights\[2\]"),
    (dict(row=(True, True, False, True), forecast_weights=(0.0, 0.0, (None,), 0.0)), ValueError,
     r"forecast_weights\[2\]: got None"),
    (dict(branches=[hk.Branch(lambda h, c: h.long())] * 2
          + [hk.Branch(lambda h, c: h, gate=False), hk.Branch(lambda h, c: h)]), TypeError,
     r"branches\[0\].body: returned torch.int64"),
    (dict(branches=[hk.Branch(lambda h, c: h.to_sparse())] * 2
          + [hk.Branch(lambda h, c: h, gate=False), hk.Branch(lambda h, c: h)]), ValueError,
     r"branches\[0\].body: returned .*sparse"),
    (dict(branches=[hk.Branch(lambda h, c: h[:1].clone())] * 2
          + [hk.Branch(lambda h, c: h, gate=False), hk.Branch(lambda h, c: h)]), ValueError, r"branches\[0\].body"),
])
def test_bad_input(options, error, words):
    with pytest.raises(error, match=words):
        bad(**options)
