"""blend_residual_norm, forward and backward, against float64 autograd through the reference."""

import pytest
import torch

from harmonica_kernels.ops import Term, blend_residual_norm
from support import blend_residual_norm_checks as checks

SHAPES = [(1, 1, 1, 1), (2, 3, 1, 2), (3, 1, 3, 1), (1, 5, 7, 3), (4, 49, 65, 2), (2, 33, 1152, 1), (1, 1, 1152, 9),
          (64, 1, 96, 1), (1, 70, 40, 4), (2, 5, 33, 0)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_float64_autograd(shape, isa):
    checks.check_agreement_with_float64_autograd(shape)


@pytest.mark.parametrize("draw", range(6))
def test_gradcheck(draw):
    checks.check_gradients(draw)


def test_forward_equals_residual_norm(isa):
    checks.check_forward_equals_residual_norm()


@pytest.mark.parametrize("check", checks.CALLS, ids=lambda check: check.__name__)
def test_calls(check):
    check()


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
