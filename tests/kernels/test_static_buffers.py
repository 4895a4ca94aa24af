"""Bodies and embedders that return the same buffer at every call, as replayed CUDA graphs do: nothing refers to it."""

import pytest
import torch

import harmonica_kernels as hk
from harmonica_kernels import TrunkWeights, checks
from support.naive_forward import K, Toy, random_rows

pytestmark = pytest.mark.parametrize("shared", [False, True], ids=["a buffer each", "one for all"])


def static(toy, shared):
    """The toy's branches with bodies that return a buffer of their own, or one for all, and x as a buffer too."""
    buffers = [torch.empty_like(toy.x)] * K if shared else [torch.empty_like(toy.x) for _ in range(K)]

    def made(k, body):
        return lambda h, context: buffers[k].copy_(body(h, context))

    branches = [hk.Branch(made(k, b.body), None, b.norm, b.gate, b.eps) for k, b in enumerate(toy.branches)]
    entered = torch.empty_like(toy.x)

    def forward(x, **options):
        y = hk.cached_forward(branches, entered.copy_(x), toy.mod, context=toy.context, **options)
        for buffer in (*buffers, entered):
            buffer.fill_(float("nan"))  # what stands there from now on is another call's
        return y

    return forward


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("history", [1, 2, 3])
def test_branches(shared, history, grad):
    toy, caches = Toy(out=False), [hk.FeatureCache(history) for _ in range(2)]
    forward, rows = static(toy, shared), [None] * history + random_rows(8)
    with torch.set_grad_enabled(grad):
        toy.x.requires_grad_(grad)
        for s, row in enumerate(rows):
            weights = None if row is None or s % 2 else [0.5 if history == 2 else (1.0,) * history] * K
            x = toy.x + s
            found, expected = (call(x, row=row, forecast_weights=weights, cache=cache)
                               for call, cache in zip((forward, toy), caches))
            assert torch.equal(found, expected)


@pytest.mark.parametrize("on_host", [False, True])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("history", [1, 2])
def test_soft_rows(shared, history, grad, on_host, monkeypatch):
    """The scores too may be overwritten before what they decide is done."""
    monkeypatch.setattr(checks, "HOST", ("cpu",) if on_host else ())
    toy, caches, scores = Toy(out=False), [hk.FeatureCache(history) for _ in range(2)], torch.empty(K).double()
    forward = static(toy, shared)
    with torch.set_grad_enabled(grad):
        toy.mod.gate[0].requires_grad_(grad)
        for s in range(8):
            row = None if s == 0 else torch.rand(K).double()
            buffer = None if s == 0 else scores.copy_(row)
            found, expected = (call(toy.x + s, row=row, threshold=0.5, cache=cache)
                               for call, row, cache in ((forward, buffer, caches[0]), (toy, row, caches[1])))
            assert torch.equal(found, expected)
            scores.fill_(0.0)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("runs", [(2, 1, 1), (1, 3), (4,)])
def test_runs(shared, runs, grad):
    toy, caches = Toy(out=False), [hk.FeatureCache(2, runs) for _ in range(2)]
    forward = static(toy, shared)
    with torch.set_grad_enabled(grad):
        toy.x.requires_grad_(grad)
        for s in range(8):
            row = None if s < 2 else [bool(torch.rand(()) < 0.5) for _ in runs]
            weights = None if s % 2 else [0.5] * len(runs)
            weights = None if row is None else weights
            found, expected = (call(toy.x + s, row=row, forecast_weights=weights, cache=cache)
                               for call, cache in zip((forward, toy), caches))
            assert torch.equal(found, expected)


@pytest.mark.parametrize("grad", [False, True])
def test_the_trunk(shared, grad):
    """Its states, and the tokens that entered their forwards."""
    toy, caches = Toy(out=False), [hk.TrunkCache(2) for _ in range(2)]
    forward, D = static(toy, shared), toy.x.shape[2]
    with torch.set_grad_enabled(grad):
        toy.x.requires_grad_(grad)
        for s, computed in enumerate((True, True, False, True, False, False)):
            n = min(s, 2)
            weights = TrunkWeights(*(torch.randn(n, D).double() for _ in range(2)), torch.randn(D).double())
            options = dict(row=None if computed else False, forecast_weights=weights if s else None)
            found, expected = (call(toy.x + s, cache=cache, **options) for call, cache in zip((forward, toy), caches))
            assert torch.equal(found, expected)
