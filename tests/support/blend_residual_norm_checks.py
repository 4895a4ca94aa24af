"""What blend_residual_norm promises on every device; the tests say with which kernels it runs."""

import random

import pytest
import torch

from harmonica_kernels.ops import Term, blend_residual_norm, reference, residual_norm
from support.problems import Problem, assert_within, double, rounding


class Soft(Problem):
    """A problem with, at random, a fresh output that is blended with the first term, and learned coefficients."""

    def __post_init__(self):
        super().__post_init__()
        blends = self.R > 0 and random.random() < 0.7
        self.fresh = self.activation() if blends else None
        self.r = torch.rand(1, dtype=self.dtype) if blends else None
        self.weights = torch.tensor(self.e, dtype=self.dtype or torch.float32) if self.R else None
        self.e = [] if self.weights is None else self.weights.tolist()
        leaves = [self.x, self.fresh, self.r, self.weights, self.shift, self.scale]
        for term in self.run:
            leaves += [term.latest, term.gate]
        self.leaves = [t for t in leaves if t is not None]

    def call(self):
        return blend_residual_norm(self.x, self.run, self.shift, self.scale, forecast_weights=self.weights,
                                   fresh=self.fresh, r=self.r, h_dtype=self.h_dtype, norm=self.norm, eps=self.eps)

    def truth(self):
        """(x', h, o or None) in float64, and the doubled leaves in the order of `leaves`."""
        twins = {id(t): double(t).requires_grad_() for t in self.leaves}
        twin = lambda t: None if t is None else twins[id(t)]
        run = [Term(twin(t.latest), double(t.previous), twin(t.gate)) for t in self.run]
        weights = [] if self.weights is None else list(twin(self.weights))
        rest = (twin(self.shift), twin(self.scale))
        if self.fresh is None:
            result = (*reference.residual_norm(twin(self.x), run, weights, *rest, self.norm, self.eps), None)
        else:
            result = reference.blend_residual_norm(twin(self.x), run, weights, *rest, twin(self.fresh), twin(self.r),
                                                   self.norm, self.eps)
        return result, [twin(t) for t in self.leaves]


def assert_close(actual, expected, tolerance, what, scale=1e-3):
    """Within a tolerance of the largest value, or of `scale`: a sum can be small because its terms cancel."""
    bound = tolerance * expected.abs().max().clamp_min(scale) + rounding(actual.dtype) * expected.abs()
    assert_within(actual, expected, bound, what)


def check_agreement_with_float64_autograd(shape):
    for _ in range(5):
        p = Soft(*shape)
        if shape[2] < 8:
            p.eps = 0.1  # a row of few values can be so even that 1/σ makes any rounding large
        for leaf in p.leaves:
            leaf.requires_grad_()
        x_new, h, o = p.call()
        (x_true, h_true, o_true), twins = p.truth()
        assert x_new.dtype == p.x.dtype and h.dtype == p.h_dtype
        summed = [p.x, p.fresh, *(t for term in p.run for t in (term.latest, term.previous))]
        size = max(t.abs().max().item() for t in summed if t is not None)
        assert_close(x_new, x_true, 1e-5, "x'", size)
        assert_close(h, h_true, 1e-4 if h is not x_new else 1e-5, "h", size)
        if p.fresh is None:
            assert o is None
        else:
            assert o.dtype == p.fresh.dtype and not o.requires_grad
            assert_close(o, o_true, 1e-5, "o", size)

        dx, dh = torch.randn_like(x_new), torch.randn_like(h)
        outputs, grads = ([x_new, h], [dx, dh]) if random.random() < 0.7 else ([h], [dh])
        true_outputs = [x_true, h_true][-len(outputs):]
        found = torch.autograd.grad(outputs, p.leaves, grads, allow_unused=True)
        expected = torch.autograd.grad(true_outputs, twins, [double(g) for g in grads], allow_unused=True,
                                       materialize_grads=True)
        # The backward starts from the stored x', rounded to its dtype; the truth from the exact one.
        tolerance = 2e-4 + 30 * rounding(x_new.dtype) * (x_new.dtype != torch.float32)
        for leaf, mine, truth in zip(p.leaves, found, expected):
            if mine is None:
                assert not truth.any()
            else:
                assert mine.dtype == leaf.dtype and mine.shape == leaf.shape
                terms = p.x.numel() / leaf.numel()  # summed, each about as large as dx
                scale = max(1e-3, terms**0.5 * expected[0].square().mean().sqrt().item())
                assert_close(mine, truth, tolerance, f"gradient of {list(leaf.shape)}", scale)


def check_gradients(draw):
    """Every input, in float64, the score and learned forecast weights among them."""
    p = Soft(2, 3, 5, draw % 4, torch.float64)
    p.eps = 1e-2

    def forward(*leaves):
        own = dict(zip(map(id, p.leaves), leaves))
        get = lambda t: None if t is None else own[id(t)]
        # Coefficients of terms without a previous output must stay 0.
        forecasts = torch.tensor([term.previous is not None for term in p.run])
        weights = None if p.weights is None else get(p.weights) * forecasts
        run = [Term(get(t.latest), t.previous, get(t.gate)) for t in p.run]
        return blend_residual_norm(get(p.x), run, get(p.shift), get(p.scale), forecast_weights=weights,
                                   fresh=get(p.fresh), r=get(p.r), norm=p.norm, eps=p.eps)[:2]

    assert torch.autograd.gradcheck(forward, [leaf.clone().requires_grad_() for leaf in p.leaves])


def check_forward_equals_residual_norm():
    p = Problem(3, 5, 65, 2, torch.float32)
    x_out = torch.empty(3, 5, 65)
    h = residual_norm(p.x, p.run, p.shift, p.scale, forecast_weights=p.e, x_out=x_out)
    x_new, twin, _ = blend_residual_norm(p.x, p.run, p.shift, p.scale, forecast_weights=torch.tensor(p.e))
    assert torch.equal(x_new, x_out) and torch.equal(twin, h)


def check_only_wanted_gradients():
    x, o, gate = torch.randn(2, 3, 8), torch.randn(2, 3, 8), torch.randn(2, 8)
    r = torch.tensor([0.5], requires_grad=True)
    _, h, _ = blend_residual_norm(x, [Term(o, None, gate)], None, None, fresh=o + 1, r=r)
    h.sum().backward()
    assert r.grad.shape == (1,) and x.grad is None


def check_identities():
    x, o = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    x_new, h, none = blend_residual_norm(x, [], None, None, norm=False)
    assert x_new is x and h is x and none is None
    x_new, h, _ = blend_residual_norm(x, [Term(o)], None, None, norm=False)
    assert h is x_new and torch.equal(h, x + o)
    x_new, h, _ = blend_residual_norm(x, [], None, None)
    assert x_new is x


def check_second_derivatives_are_refused():
    x = torch.randn(2, 3, 8, requires_grad=True)
    _, h, _ = blend_residual_norm(x, [], None, None)
    (dx,) = torch.autograd.grad(h.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        dx.sum().backward()


CALLS = (check_only_wanted_gradients, check_identities, check_second_derivatives_are_refused)
