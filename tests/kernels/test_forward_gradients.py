"""Gradients through a cached trajectory: of one step they are right, of several they are refused with what to do."""

import pytest
import torch

import harmonica_kernels as hk
from support.naive_forward import K, Toy

ROWS = (None, (True, False, False, True), (False, True, True, False), (True, False, True, False))
REFUSAL = r"has been overwritten\. A cached output is, .* Call backward\(\) after each step, before the next forward"


@pytest.mark.parametrize("runs, rows", [(None, ROWS), ((2, 2), (None, (True, False), (False, True)))])
def test_a_backward_after_the_trajectory_is_refused(runs, rows):
    """Not by torch, whose error names neither cache nor remedy."""
    toy, cache, x = Toy(out=False), hk.FeatureCache(runs=runs), None
    gate = toy.mod.gate[1].requires_grad_()
    x = toy.x.requires_grad_()
    for row in rows:
        x = toy(x, row=row, cache=cache)
    with pytest.raises(RuntimeError, match=REFUSAL) as caught:
        torch.autograd.grad(x.sum(), gate)
    assert "modified by an inplace operation" in str(caught.value.__cause__)


@pytest.mark.parametrize("history", [1, 2])
def test_a_backward_after_each_step(history):
    """What the refusal says to do; what is reused is constant."""
    toy, cache, store = Toy(out=False), hk.FeatureCache(history), [[] for _ in range(K)]
    gate = toy.mod.gate[0].requires_grad_()
    for row in (None, *ROWS):
        x = torch.randn_like(toy.x, requires_grad=True)
        weights = [0.5] * K if history == 2 and row is not None else None
        y = toy(x, row=row, cache=cache, forecast_weights=weights)
        found = torch.autograd.grad(y.square().sum(), (x, gate))
        expected = toy.naive(x, store, row, weights)
        torch.testing.assert_close(found, torch.autograd.grad(expected.square().sum(), (x, gate)))


def test_through_several_steps_without_a_cache():
    toy, x = Toy(out=False), None
    leaf = toy.x.requires_grad_()
    for forward in (toy, lambda x: toy.naive(x, [[] for _ in range(K)])):
        y = forward(forward(leaf))
        [found] = torch.autograd.grad(y.sum(), leaf)
        torch.testing.assert_close(found, found if x is None else x)
        x = found


def test_another_error_of_the_backward_stays_as_it_is():
    toy, cache = Toy(out=False), hk.FeatureCache()
    y = toy(toy.x.requires_grad_(), cache=cache).sum()
    y.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.backward()
