"""blend_residual_norm, forward and backward, against float64 autograd through the reference."""

import random

import pytest
import torch

from harmonica_kernels.ops import Term, blend_residual_norm, reference, residual_norm
from support.problems import Problem, assert_within, double, rounding

SHAPES = [(1, 1, 1, 1), (2, 3, 1, 2), (3, 1, 3, 1), (1, 5, 7, 3), (4, 49, 65, 2), (2, 33, 1152, 1), (1, 1, 1152, 9),
          (64, 1, 96, 1), (1, 70, 40, 4), (2, 5, 33, 0)]


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


def close(actual, expected, tolerance, what, scale=1e-3):
    """Within a tolerance of the largest value, or of `scale`: a sum can be small because its terms cancel."""
    bound = tolerance * expected.abs().max().clamp_min(scale) + rounding(actual.dtype) * expected.abs()
    assert_within(actual, expected, bound, what)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_float64_autograd(shape, isa):
    for _ in range(5):
        p = Soft(*shape)
        if shape[2] < 8:
            p.eps = 0.1  # a row of few values can be so even that 1/σ makes any rounding large
        for leaf in p.leaves:
            leaf.requires_grad_()
        x_new, h, o = p.call()
        (x_true, h_true, o_true), twins = p.truth()
        assert x_new.dtype == p.x.dtype and h.dtype == p.h_dtype
        close(x_new, x_true, 1e-5, "x'")
        close(h, h_true, 1e-4 if h is not x_new else 1e-5, "h")
        if p.fresh is None:
            assert o is None
        else:
            assert o.dtype == p.fresh.dtype and not o.requires_grad
            close(o, o_true, 1e-5, "o")

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
                close(mine, truth, tolerance, f"gradient of {list(leaf.shape)}", scale)


@pytest.mark.parametrize("draw", range(6))
def test_gradcheck(draw):
    """Every input, in float64, a soft gate and learned coefficients among them."""
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


def test_forward_equals_residual_norm(isa):
    p = Problem(3, 5, 65, 2, torch.float32)
    x_out = torch.empty(3, 5, 65)
    h = residual_norm(p.x, p.run, p.shift, p.scale, forecast_weights=p.e, x_out=x_out)
    x_new, twin, _ = blend_residual_norm(p.x, p.run, p.shift, p.scale, forecast_weights=torch.tensor(p.e))
    assert torch.equal(x_new, x_out) and torch.equal(twin, h)


def test_threads_do_not_change_a_bit(threads):
    x, o, fresh = (torch.randn(3, 200, 65, requires_grad=True) for _ in range(3))
    gate, shift, scale = torch.randn(3, 65, requires_grad=True), *torch.randn(2, 1, 65, requires_grad=True)
    r, e = torch.rand(1, requires_grad=True), torch.rand(1, requires_grad=True)
    previous = torch.randn(3, 200, 65)
    results = []
    for count in (1, 2, 5):
        threads(count)
        x_new, h, _ = blend_residual_norm(x, [Term(o, previous, gate)], shift, scale, forecast_weights=e, fresh=fresh,
                                          r=r)
        results.append(torch.autograd.grad((x_new * h).sum(), (x, o, fresh, gate, shift, scale, r, e)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_only_wanted_gradients():
    x, o, gate = torch.randn(2, 3, 8), torch.randn(2, 3, 8), torch.randn(2, 8)
    r = torch.tensor([0.5], requires_grad=True)
    _, h, _ = blend_residual_norm(x, [Term(o, None, gate)], None, None, fresh=o + 1, r=r)
    h.sum().backward()
    assert r.grad.shape == (1,) and x.grad is None


def test_identities():
    x, o = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    x_new, h, none = blend_residual_norm(x, [], None, None, norm=False)
    assert x_new is x and h is x and none is None
    x_new, h, _ = blend_residual_norm(x, [Term(o)], None, None, norm=False)
    assert h is x_new and torch.equal(h, x + o)
    x_new, h, _ = blend_residual_norm(x, [], None, None)
    assert x_new is x


def soft(x, o, previous, fresh, gate, shift, scale, r, e):
    x, h, _ = blend_residual_norm(x, [Term(o, previous, gate), Term(fresh)], shift, scale, forecast_weights=e,
                                  fresh=fresh.cos(), r=r)
    return blend_residual_norm(x + h, [Term(o)], None, scale)[:2]


def test_compiles_into_one_graph():
    arguments = [torch.randn(2, 3, 8) for _ in range(4)] + [torch.randn(2, 8) for _ in range(3)]
    arguments += [torch.rand(1), torch.tensor([0.5, 0.0])]
    leaves = [t.requires_grad_() for i, t in enumerate(arguments) if i != 2]
    eager = torch.autograd.grad(sum(t.square().sum() for t in soft(*arguments)), leaves)
    compiled = torch.autograd.grad(sum(t.square().sum() for t in torch.compile(soft, fullgraph=True)(*arguments)),
                                   leaves)
    for mine, theirs in zip(compiled, eager):
        torch.testing.assert_close(mine, theirs)


def test_opcheck():
    t = lambda *shape: torch.randn(shape, requires_grad=True)
    x, o, fresh, row, r, e = t(2, 3, 8), t(2, 3, 8), t(2, 3, 8), t(2, 8), t(1), t(2)
    previous = torch.randn(2, 3, 8)
    op = torch.ops.harmonica.blend_residual_norm.default
    torch.library.opcheck(op, (x, [o, fresh], [previous, previous], [True, True], e, [row], [False, True], fresh, r,
                               row, row, True, 1e-6, None))
    torch.library.opcheck(op, (x, [], [], [], None, [], [], None, None, None, row, True, 1e-6, torch.float32))
    # Its backward has no gradients of its own; it is checked on what autograd hands it.
    x_new, dh = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    torch.library.opcheck(
        torch.ops.harmonica.blend_residual_norm_backward.default,
        (None, dh, x_new, [o.detach()], [previous], [True], torch.rand(1), [row.detach()], [True], fresh.detach(),
         torch.rand(1), None, row.detach(), True, 1e-6, [True] * 4 + [False] + [True] * 3))


def test_second_derivatives_are_refused():
    x = torch.randn(2, 3, 8, requires_grad=True)
    _, h, _ = blend_residual_norm(x, [], None, None)
    (dx,) = torch.autograd.grad(h.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        dx.sum().backward()


@pytest.mark.parametrize("error, message, arguments", [
    (ValueError, "fresh and r go together, got fresh alone", lambda: dict(fresh=torch.randn(2, 3, 8))),
    (ValueError, "got r alone", lambda: dict(r=torch.rand(1))),
    (ValueError, "the run is empty", lambda: dict(run=[], fresh=torch.randn(2, 3, 8), r=torch.rand(1))),
    (ValueError, r"r must be a float tensor of one element, got \[2\]",
     lambda: dict(fresh=torch.randn(2, 3, 8), r=torch.rand(2))),
    (ValueError, r"forecast_weights must be a float tensor \[1\].*got \[2\]",
     lambda: dict(forecast_weights=torch.rand(2))),
    (ValueError, r"forecast_weights\[0\] is 0.5, but run\[0\].previous",
     lambda: dict(forecast_weights=torch.tensor([0.5]))),
    (ValueError, r"forecast_weights\[0\] must be finite", lambda: dict(forecast_weights=torch.tensor([torch.nan]))),
    (ValueError, "fresh must be", lambda: dict(fresh=torch.randn(2, 3, 9), r=torch.rand(1))),
    (ValueError, "previous is a cached output", lambda: dict(
        run=[Term(torch.randn(2, 3, 8), torch.randn(2, 3, 8, requires_grad=True))])),
    (TypeError, "fresh is torch.float64", lambda: dict(fresh=torch.randn(2, 3, 8).double(), r=torch.rand(1))),
])
def test_refuses(error, message, arguments):
    arguments = arguments()
    run = arguments.pop("run", [Term(torch.randn(2, 3, 8))])
    with pytest.raises(error, match=message):
        blend_residual_norm(torch.randn(2, 3, 8), run, None, None, **arguments)
