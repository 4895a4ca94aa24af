"""A cache goes on with the model, autocast and mode that it was filled with; refusing another, it names both."""

import copy
import gc
import pickle
from itertools import permutations

import pytest
import torch

import harmonica_kernels as hk
from support.naive_forward import K, Toy

REUSED = (False,) * K


class Model(torch.nn.Module):
    """Four branches; `name` is what messages call it by."""

    def __init__(self, name=None, dtype=torch.float32):
        super().__init__()
        self.toy = Toy(dtype=dtype)
        self.x = self.toy.x
        if name is not None:
            self.name = name

    def forward(self, x, **options):
        return self.toy(x, model=self, **options)


def kept(cache):
    return [t.clone() for k in range(K) for t in cache.outputs(k)]


@torch.no_grad()
@pytest.mark.parametrize("row", [None, REUSED, (True, False, True, False), torch.rand(K)])
def test_another_model_is_refused(row):
    a, b, cache = Model("first"), Model(), hk.FeatureCache()
    a(a.x, cache=cache)
    before = kept(cache)
    with pytest.raises(ValueError, match=rf"cache: holds a forward of Model 'first' at {id(a):#x}, got one of Model at "
                                         rf"{id(b):#x}, another model; it needs a cache of its own"):
        b(a.x, row=row, cache=cache)
    assert all(map(torch.equal, kept(cache), before))
    a(a.x, row=row, cache=cache)  # the cache goes on with its own model
    a.toy(a.x, row=REUSED, cache=cache)  # a forward that does not say whose it is, is not compared
    cache.rewind()
    b(b.x, cache=cache)
    with pytest.raises(ValueError, match="cache: holds a forward of Model at .*, got one of Model 'first'"):
        a(a.x, cache=cache)
    cache.reset()
    a(a.x, cache=cache)


@torch.no_grad()
def test_a_model_that_is_said_late_or_is_gone():
    a, b, cache = Model(), Model(), hk.FeatureCache()
    a.toy(a.x, cache=cache)
    a(a.x, row=REUSED, cache=cache)
    with pytest.raises(ValueError, match="another model"):
        b(a.x, cache=cache)
    x = a.x
    del a
    gc.collect()
    with pytest.raises(ValueError, match="cache: holds a forward of a model that is gone, got one of Model at"):
        b(x, cache=cache)


@torch.no_grad()
def test_copies():
    """A copied cache stays with the model, one that is copied with its model goes with the copy."""
    a, cache = Model(), hk.FeatureCache()
    expected = a(a.x, cache=cache)
    alone, (other, with_it) = copy.deepcopy(cache), copy.deepcopy((a, cache))
    for model, own in ((a, alone), (a, hk.FeatureCache().copy_(cache)), (other, with_it)):
        assert torch.equal(model(a.x, row=REUSED, cache=own), expected)
        with pytest.raises(ValueError, match="another model"):
            (other if model is a else a)(a.x, row=REUSED, cache=own)
    read = pickle.loads(pickle.dumps(cache))  # perhaps elsewhere: whose it is, is not known
    assert torch.equal(other(a.x, row=REUSED, cache=read), expected)


@pytest.mark.parametrize("new", [hk.FeatureCache, hk.TrunkCache])
@torch.no_grad()
def test_another_autocast_is_refused(new):
    a, cache = Model(), new()
    a.toy.context = a.toy.context.bfloat16()
    dtypes = None, torch.bfloat16, torch.float16
    under = lambda dtype: torch.autocast("cpu", dtype, enabled=dtype is not None)
    called = lambda dtype: "without autocast" if dtype is None else f"under autocast to {dtype}"
    for first, second in permutations(dtypes, 2):
        cache.reset()
        with under(first):
            a(a.x, cache=cache)
        message = f"cache: holds a forward {called(first)}, got one {called(second)}; run"
        with under(second), pytest.raises(ValueError, match=message):
            a(a.x, cache=cache)
        with under(first):
            a(a.x, cache=cache)


@pytest.mark.parametrize("new", [hk.FeatureCache, hk.TrunkCache])
@pytest.mark.parametrize("row", [None, REUSED])
def test_memory_of_inference_mode_is_refused_outside_it(new, row):
    a, cache = Model(), new()
    options = dict(row=row)
    if new is hk.TrunkCache and row is not None:
        options = dict(row=False, forecast_weights=hk.TrunkWeights(torch.ones(1, 1)))
    with torch.inference_mode():
        a(a.x, cache=cache)
    for mode, name in ((torch.no_grad(), r"under torch\.no_grad\(\)"), (torch.enable_grad(), "with grad enabled")):
        with mode, pytest.raises(ValueError, match=rf"holds a forward under torch\.inference_mode\(\), got one {name}"):
            a(a.x, cache=cache, **options)
    with torch.inference_mode():
        a(a.x, cache=cache, **options)
    if new is hk.FeatureCache:
        cache.rewind()  # keeps the memory, which is what cannot be written to
        with pytest.raises(ValueError, match="inference_mode"):
            a(a.x, cache=cache)
    cache.reset()
    a(a.x, cache=cache)


def test_a_copy_goes_on_in_another_mode():
    a, cache, other = Model(), hk.FeatureCache(), hk.FeatureCache()
    with torch.inference_mode():
        expected = a(a.x, cache=cache)
        other.copy_(cache)
    with torch.no_grad():
        assert torch.equal(a(a.x, row=REUSED, cache=other.copy_(cache)), expected)
        a(a.x + 1, cache=other)


def test_modes_that_go_together():
    """Filled without grad and gone on with it, as training does, and the other way round; then in inference mode."""
    a = Model(dtype=torch.float64)
    for first, second in ((torch.no_grad, torch.enable_grad), (torch.enable_grad, torch.no_grad),
                          (torch.no_grad, torch.inference_mode)):
        cache, store = hk.FeatureCache(), [[] for _ in range(K)]
        for mode, row in ((first, None), (second, (True, False, False, True)), (first, REUSED)):
            with mode():
                torch.testing.assert_close(a(a.x, row=row, cache=cache), a.toy.naive(a.x, store, row))
