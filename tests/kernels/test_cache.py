"""FeatureCache: what is renewed when, slots, copies, and caches that do not fit."""

import pytest
import torch

import harmonica_kernels as hk
from harmonica_kernels.cache import Forward
from support.naive_forward import GATE, NORM, K, Toy
from support.three_branches import ThreeBranches


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


def test_renewal_decided_by_a_score_on_the_device():
    """The cache's part of a soft row on CUDA: entries are copied where the score says so, and none is waited for."""
    for history in (1, 2):
        cache, scores, outputs = hk.FeatureCache(history), torch.rand(6, K), torch.randn(7, K, 2, 3, 8)
        cache._begin(Forward(outputs[0, 0].shape, torch.float32, outputs.device, K))
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
                if history == 2:  # a forecast from one output repeats it
                    assert torch.equal(cache.previous(k), stored[k][max(0, len(stored[k]) - 2)])


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
    """Memory that was filled under autocast stays in its dtype after a rewind; the fused call stores and converts."""
    toy, cache = Toy(dtype=torch.float32), hk.FeatureCache()
    toy.context = toy.context.bfloat16()  # so that the bodies' outputs are bfloat16 under autocast
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            toy(toy.x, cache=cache)
        toy.calls.clear(), cache.rewind()
        toy(toy.x, cache=cache)
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


def test_a_cache_of_another_dtype():
    toy, cache = Toy(dtype=torch.float32), hk.FeatureCache()
    with torch.no_grad():
        toy(toy.x, cache=cache)
        with pytest.raises(ValueError, match="cache: holds a forward of 4 branches and x of shape .* torch.float32"):
            toy(toy.x.bfloat16(), row=(False,) * K, cache=cache)


def test_a_cache_of_another_model():
    small, cache = Toy(), hk.FeatureCache()
    with torch.no_grad():
        hk.cached_forward(small.branches[:2], small.x, hk.Modulation(small.mod.shift[:3], small.mod.scale[:3],
                                                                     small.mod.gate[:2]), cache=cache, context=0)
        for row in (None, (True, False, True, False), torch.rand(K)):
            with pytest.raises(ValueError, match="cache: holds a forward of 2 branches"):
                small(small.x, row=row, cache=cache)


@pytest.mark.parametrize("runs", [(), (0, 4), (1.0, 3), (True, 3)])
def test_bad_runs(runs):
    with pytest.raises(ValueError, match="runs: got"):
        hk.FeatureCache(runs=runs)


def test_runs_of_another_number_of_branches_or_soft_rows_are_refused():
    toy = Toy()
    with torch.no_grad():
        with pytest.raises(ValueError, match="cache: its runs hold 5 branches, there are 4"):
            toy(toy.x, cache=hk.FeatureCache(runs=(2, 3)))
        cache = hk.FeatureCache(runs=(2, 2))
        toy(toy.x, cache=cache)
        with pytest.raises(ValueError, match="row: got 4 entries, expected 2"):
            toy(toy.x, row=(True,) * K, cache=cache)
        with pytest.raises(ValueError, match="a soft row decides on single ones"):
            toy(toy.x, row=torch.rand(2, dtype=torch.float64), cache=cache)
        other = hk.FeatureCache().copy_(cache)
        toy(toy.x + 1, cache=cache)
        assert other.runs == (2, 2) and other.filled(1) == 1
        assert not torch.equal(other.latest(0), cache.latest(0))


@pytest.mark.parametrize("history", [0, 5, True, "2"])
def test_bad_history(history):
    with pytest.raises(ValueError, match="history"):
        hk.FeatureCache(history)


@torch.no_grad()
def test_rewind_keeps_the_memory():
    net, cache, row = ThreeBranches(), hk.FeatureCache(2), (True, False, False)
    x = torch.randn(2, 5, 8)
    net(x, cache=cache)
    first = cache._state()
    net(x, cache=cache, row=row)
    address = cache._arena.data_ptr()
    cache.rewind()
    assert [cache.filled(k) for k in range(3)] == [0] * 3
    with pytest.raises(ValueError, match="holds no output"):
        net(x, cache=cache, row=row)
    net(x, cache=cache)
    assert cache._arena.data_ptr() == address and cache._state() == first
    hk.FeatureCache().rewind()
