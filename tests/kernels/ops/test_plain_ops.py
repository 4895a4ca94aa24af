"""cache_commit and guided_step on the CPU, where they are plain torch; registration and refusals of bias_gelu too."""

import pytest
import torch

from harmonica_kernels.ops import bias_gelu, cache_commit, guided_step

X = (2, 3, 8)


def test_opcheck():
    ops, x = torch.ops.harmonica, torch.randn(X)
    torch.library.opcheck(ops.cache_commit.default, (torch.randn(X), torch.randn(X), x, torch.tensor(0.7), 0.5))
    torch.library.opcheck(ops.bias_gelu.default, (x.clone(), torch.randn(1, 8), False))
    torch.library.opcheck(ops.guided_step.default, (None, x.clone(), torch.randn(X), torch.randn(X), 1.5, 2, 0.9, 0.1,
                                                    None, None))
    torch.library.opcheck(ops.guided_step.default, (x, torch.empty(X), torch.randn(X), None, 1.0, 3, 0.0, 0.0,
                                                    torch.rand(4, 2), torch.tensor(3)))


def test_a_commit():
    latest, previous, o = torch.randn(3, *X)
    before, oldest = latest.clone(), previous.clone()
    cache_commit(latest, o, torch.tensor([0.5]), 0.5, previous=previous)
    assert torch.equal(latest, before) and torch.equal(previous, oldest)
    cache_commit(latest, o, torch.tensor([0.6]), 0.5, previous=previous)
    assert torch.equal(latest, o) and torch.equal(previous, before)


def test_a_guided_ddim_step():
    """The first channels guided, the variance's left out, then a·x + b·ε; in place and by a table too."""
    x, output = torch.randn(2, 4, 5, 5), torch.randn(4, 8, 5, 5)
    conditional, unconditional = output.chunk(2)
    eps = conditional[:, :4].clone()
    eps[:, :3] = unconditional[:, :3] + 1.5 * (conditional - unconditional)[:, :3]
    expected = 0.9 * x - 0.2 * eps
    arguments = dict(guidance=1.5, channels=3)
    torch.testing.assert_close(guided_step(x, *output.chunk(2), a=0.9, b=-0.2, **arguments), expected)
    table = torch.tensor([[0.0, 0.0], [0.9, -0.2]])
    assert guided_step(x, *output.chunk(2), table=table, step=torch.tensor(1), out=x, **arguments) is x
    torch.testing.assert_close(x, expected)


@pytest.mark.parametrize("step", [-1, 2])
def test_a_step_that_is_not_in_the_table_gives_nan(step):
    x = torch.randn(2, 4, 5, 5)
    assert guided_step(x, x, table=torch.rand(2, 2), step=torch.tensor(step)).isnan().all()


x, row = torch.randn(X), torch.randn(8)


@pytest.mark.parametrize("error, message, call", [
    (ValueError, "threshold must be at least 0", lambda: cache_commit(x, x + 1, torch.ones(1), float("nan"))),
    (ValueError, "r must be a float tensor of one element", lambda: cache_commit(x, x + 1, torch.ones(2), 0.1)),
    (ValueError, "o must be", lambda: cache_commit(x, x[:1], torch.ones(1), 0.1)),
    (TypeError, "previous is torch.float16", lambda: cache_commit(x, x, torch.ones(1), 0.1, previous=x.half())),
    (RuntimeError, "detach o", lambda: cache_commit(x, x.clone().requires_grad_(), torch.ones(1), 0.1)),
    (ValueError, "approximate must be", lambda: bias_gelu(x, row, "sigmoid")),
    (ValueError, r"bias must be \[D\]", lambda: bias_gelu(x, row[:4])),
    (ValueError, "must be contiguous", lambda: bias_gelu(torch.randn(8, 3).t(), torch.randn(8))),
    (RuntimeError, "torch.nn.functional.gelu", lambda: bias_gelu(x, row.clone().requires_grad_())),
    (ValueError, "conditional must be", lambda: guided_step(x, x[:, :2])),
    (ValueError, r"table must be a float tensor \[T, 2\]", lambda: guided_step(x, x, table=torch.rand(2))),
    (ValueError, "comes with a table", lambda: guided_step(x, x, step=torch.tensor(1))),
    (ValueError, "table is on meta, expected cpu", lambda: guided_step(x, x, table=torch.rand(2, 2, device="meta"))),
    (ValueError, "step is on meta, expected cpu",
     lambda: guided_step(x, x, table=torch.rand(2, 2), step=torch.ones(1, dtype=torch.int64, device="meta"))),
    (ValueError, "channels must be at least 0", lambda: guided_step(x, x, channels=-1)),
    (ValueError, "out must be contiguous", lambda: guided_step(x, x, out=torch.randn(2, 8, 3).transpose(1, 2))),
    (TypeError, "conditional is torch.int64", lambda: guided_step(x, x.long())),
])
def test_refuses(error, message, call):
    with pytest.raises(error, match=message):
        call()
