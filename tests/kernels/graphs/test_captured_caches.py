"""Captured executors and feature caches: graphs know a cache's memory and state."""

from itertools import product

import pytest
import torch

import harmonica_kernels as hk
from support.three_branches import ThreeBranches

pytestmark = pytest.mark.usefixtures("no_grad")


ROWS = list(product((True, False), repeat=3))


@pytest.mark.parametrize("history", [1, 2])
def test_caches(recorder, history):
    """Random schedules, trajectory after trajectory in two caches by turns: as eager with a fresh cache each time."""
    net = ThreeBranches()
    executor = hk.compile(net)
    caches = [hk.FeatureCache(history) for _ in range(2)]
    generator = torch.Generator().manual_seed(history)
    schedules = [[(True,) * 3] + [ROWS[int(i)] for i in torch.randint(8, (5,), generator=generator)] for _ in range(3)]
    for n in range(24):
        rows = schedules[n % 3]
        for cache in caches:
            cache.rewind()
        fresh = [hk.FeatureCache(history) for _ in caches]
        xs = [torch.randn(2, 5, 8) for _ in caches]
        for s, row in enumerate(rows):
            for i, x in enumerate(xs):
                filled_twice = history == 2 and all(fresh[i].filled(k) == 2 for k in range(3))
                e = tuple(0.0 if c else 0.5 for c in row) if filled_twice and s % 2 else None
                want = net(x, row=row, forecast_weights=e, cache=fresh[i])
                got = executor(x, row=row, forecast_weights=e, cache=caches[i])
                assert torch.equal(got, want)
                assert [caches[i].filled(k) for k in range(3)] == [fresh[i].filled(k) for k in range(3)]
                for k in range(3):
                    assert torch.equal(caches[i].latest(k), fresh[i].latest(k))
                xs[i] = want
    assert sum(recording.graph.replays for recording in executor._recordings.values()) > 100


@pytest.mark.parametrize("history", [1, 2])
def test_renewals_that_wait_for_a_backward_come_before_the_call(recorder, history):
    net, caches, reuse = ThreeBranches(), [hk.FeatureCache(history) for _ in range(2)], (False,) * 3
    executor = hk.compile(net)
    first = torch.randn(2, 5, 8)
    for cache in caches:
        net(first, cache=cache)
    for _ in range(8):
        x = torch.randn(2, 5, 8)
        for cache in caches:
            with torch.enable_grad():
                net(x, row=torch.tensor([0.9, 0.05, 0.9]), cache=cache)
        assert torch.equal(executor(x, row=reuse, cache=caches[0]), net(x, row=reuse, cache=caches[1]))
    assert sum(recording.graph.replays for recording in executor._recordings.values()) >= 4


def test_a_reset_cache_has_other_memory(recorder):
    """Graphs that know the old memory are not replayed on the new one; the old one stays theirs."""
    net, cache = ThreeBranches(), hk.FeatureCache()
    executor = hk.compile(net)
    x = torch.randn(2, 5, 8)
    for _ in range(3):
        net(x, cache=cache)
        for _ in range(3):
            assert torch.equal(executor(x, row=ROWS[5], cache=cache), net(x, row=ROWS[5], cache=cache))
        cache.reset()
        x = torch.randn(2, 5, 8)
    assert executor.graphs == 3


def test_a_recording_that_fails_changes_nothing(recorder):
    """The message says what to do, and the cache goes on from where it was."""
    cache, net = hk.FeatureCache(2), ThreeBranches()
    x = torch.randn(2, 3, 8)

    def waits(x, cache, row):
        y = net(x, cache=cache, row=row)
        if recorder.recording:
            raise RuntimeError("operation not permitted when stream is capturing")
        return y

    net(x, cache=cache), net(x + 1, cache=cache)
    executor = hk.compile(waits)
    row, before = (True, False, True), cache._state()
    executor(x, cache, row)
    net(x, cache=cache, row=row)  # swaps the slots back
    assert cache._state() == before
    with pytest.raises(RuntimeError, match=r"waits cannot be captured: operation not permitted.*\n.*\.item\(\)"):
        executor(x, cache, row)
    assert cache._state() == before and executor.graphs == 0
    other = hk.FeatureCache(2).copy_(cache)
    assert torch.equal(net(x, cache=cache, row=row), net(x, cache=other, row=row))


def test_a_recorded_call_of_another_model_is_refused(recorder):
    """Neither is the graph of one replayed on the other's features."""
    a, b = ThreeBranches(), ThreeBranches()
    cache, x, row = hk.FeatureCache(), torch.randn(2, 5, 8), (False,) * 3

    def run(model, x, cache, row=None):
        return model(x, cache=cache, row=row, model=model)

    executor = hk.compile(run)
    for model in (a, b):
        for _ in range(3):
            cache.rewind()
            expected = executor(model, x, cache)
            assert torch.equal(executor(model, x, cache, row), expected)
    cache.rewind()
    executor(a, x, cache)
    with pytest.raises(ValueError, match="another model"):
        executor(b, x, cache, row)
    assert torch.equal(executor(a, x, cache, row), a(x))
    assert sum(recording.graph.replays for recording in executor._recordings.values()) >= 4


def test_a_trunk_cache_is_refused():
    """It holds the forwards' own tensors, and a graph would read those of the step that was recorded."""
    executor, cache = hk.compile(ThreeBranches()), hk.TrunkCache()
    with pytest.raises(TypeError, match="cache: got a TrunkCache, .*compile the whole trajectory"):
        executor(torch.randn(2, 5, 8), cache=cache)
    assert not cache.filled
