"""residual_norm against float64, on shapes, layouts and dtypes drawn at random, and its promises one by one."""

import pytest
import torch

from harmonica_kernels.ops import Term, residual_norm
from support import residual_norm_checks as checks
from support.problems import DTYPES, Problem
from support.residual_norm_checks import ROW, X, call

SHAPES = [(1, 1, 1, 0), (2, 3, 1, 2), (3, 1, 3, 1), (1, 5, 7, 3), (2, 4, 8, 1), (4, 49, 65, 2), (3, 17, 128, 4),
          (2, 33, 1152, 1), (2, 9, 1152, 8), (1, 1, 1152, 28), (64, 1, 96, 1), (1, 3, 4096, 2), (2, 3, 31, 56)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_float64(shape, isa):
    checks.check_agreement_with_float64(shape)


@pytest.mark.parametrize("dtype", DTYPES)
def test_store_receives_the_first_output(dtype, isa):
    checks.check_store_receives_the_first_output(dtype)


@pytest.mark.parametrize("shape", checks.NO_ROWS)
def test_no_rows(shape):
    checks.check_no_rows(shape)


@pytest.mark.parametrize("check", checks.ARITHMETIC, ids=lambda check: check.__name__)
def test_arithmetic(check, isa):
    check()


@pytest.mark.parametrize("check", checks.CALLS, ids=lambda check: check.__name__)
def test_calls(check):
    check()


def test_large(isa, threads):
    """More than the caches hold, in many jobs for the threads."""
    threads(2)
    x, o, rows = torch.randn(4, 1025, 1152), torch.randn(4, 1025, 1152), torch.randn(3, 4, 1, 1152)
    h = residual_norm(x, [Term(o, None, rows[0, :, 0])], rows[1, :, 0], rows[2, :, 0], x_out=torch.empty_like(x))
    expected = torch.nn.functional.layer_norm(x + rows[0] * o, (1152,), eps=1e-6) * (1 + rows[2]) + rows[1]
    torch.testing.assert_close(h, expected, rtol=1e-4, atol=1e-4)


def test_threads_do_not_change_a_bit(threads):
    p = Problem(3, 200, 65, 3, torch.float32)
    results = []
    for count in (1, 2, 5):
        threads(count)
        x_out = torch.empty(3, 200, 65)
        results.append((x_out, residual_norm(p.x, p.run, p.shift, p.scale, forecast_weights=p.e, x_out=x_out)))
    for x_out, h in results[1:]:
        assert torch.equal(x_out, results[0][0]) and torch.equal(h, results[0][1])


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_conversions_are_torchs(dtype, isa):
    """Every 16-bit pattern read, and all exponents with random and tie mantissas written."""
    every = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype).view(2, 256, 128)
    assert torch.equal(residual_norm(every, [], None, None, norm=False, h_dtype=torch.float32).nan_to_num(nan=7.0),
                       every.float().nan_to_num(nan=7.0))
    bits = torch.randint(-(1 << 31), 1 << 31, (2, 512, 129)).to(torch.int32)
    bits[1] &= ~0xFFF  # exactly half way, or nothing to round
    for values in (bits.view(torch.float32), every.float()[..., 1:]):  # odd widths use the scalar tail too
        written = residual_norm(values, [], None, None, norm=False, h_dtype=dtype)
        expected = values.to(dtype)
        assert torch.equal(written.isnan(), expected.isnan())
        number = ~expected.isnan()
        assert torch.equal(written[number].view(torch.int16), expected[number].view(torch.int16))


def test_compiles_into_one_graph():
    def chain(x, o, cached, gate, shift):
        y = torch.empty_like(x)
        h = residual_norm(x, [Term(o, None, gate), Term(cached, o)], shift, None, forecast_weights=[0.0, 0.5], x_out=y,
                          store=torch.empty_like(o))
        h = residual_norm(y, [Term(h.sin())], None, gate, x_out=y)
        return y, h

    arguments = [torch.randn(2, 3, 8) for _ in range(3)] + [torch.randn(2, 8) for _ in range(2)]
    with torch.no_grad():
        for eager, compiled in zip(chain(*arguments), torch.compile(chain, fullgraph=True)(*arguments)):
            torch.testing.assert_close(eager, compiled)


def test_opcheck():
    x, o = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    row = torch.randn(2, 8)
    op = torch.ops.harmonica.residual_norm.default
    torch.library.opcheck(op, (None, x, torch.empty_like(x), None, [o], [None], [0.0], [row], row, row, True, 1e-6))
    torch.library.opcheck(op, (x, torch.empty_like(x), torch.empty_like(x), torch.empty_like(x), [o, o + 1],
                               [None, o + 2], [0.0, 0.5], [row, None], row, None, True, 1e-6))


@pytest.mark.parametrize("error, message, arguments", [
    (ValueError, r"x must be \[B, N, D\].*\[3, 8\]", lambda: dict(x=torch.randn(3, 8))),
    (ValueError, r"run\[0\].latest must be \[B, N, D\] = \[2, 3, 8\].*\[2, 3, 9\]",
     lambda: dict(run=[Term(torch.randn(2, 3, 9))])),
    (ValueError, r"run\[0\].previous must be", lambda: dict(run=[Term(torch.randn(X), torch.randn(2, 1, 8))])),
    (ValueError, r"run\[0\].gate must be \[B or 1, D\]", lambda: dict(run=[Term(torch.randn(X), None, torch.ones(8))])),
    (ValueError, r"shift must be \[B or 1, D\] = \[2 or 1, 8\], got \[3, 8\]", lambda: dict(shift=torch.randn(3, 8))),
    (ValueError, "scale must be", lambda: dict(scale=torch.randn(2, 1, 8))),
    (ValueError, "x_out must be", lambda: dict(x_out=torch.empty(2, 3, 9))),
    (ValueError, "store must be", lambda: dict(store=torch.empty(1, 3, 8))),
    (TypeError, "h_out is torch.float16, expected torch.float32",
     lambda: dict(h_out=torch.empty(X, dtype=torch.float16))),
    (ValueError, "h must be", lambda: dict(h_out=torch.empty(2, 3, 9))),
    (ValueError, "store receives", lambda: dict(run=[], store=torch.empty(X))),
    (ValueError, "store receives", lambda: dict(run=[Term(torch.randn(X), torch.randn(X))], forecast_weights=[0.5],
                                                store=torch.empty(X))),
    (ValueError, "1 terms needs", lambda: dict(forecast_weights=[0.0, 0.0])),
    (ValueError, r"forecast_weights\[0\] is 0.5, but run\[0\].previous", lambda: dict(forecast_weights=[0.5])),
    (ValueError, r"forecast_weights\[0\] must be finite, got nan", lambda: dict(forecast_weights=[float("nan")])),
    (ValueError, r"run\[0\].latest is on meta, expected cpu like x",
     lambda: dict(run=[Term(torch.randn(X, device="meta"))])),
    (TypeError, "shift is torch.float64", lambda: dict(shift=torch.randn(ROW).double())),
    (TypeError, r"run\[0\].latest is torch.float32 beside a float64 x", lambda: dict(x=torch.randn(X).double())),
    (TypeError, "x_out is torch.int32|x is torch.int32", lambda: dict(x=torch.ones(X, dtype=torch.int32))),
    (ValueError, "x_out is written to and needs dense rows", lambda: dict(x_out=torch.empty(2, 3, 16)[..., ::2])),
    (ValueError, "x_out is written to and has rows that overlap", lambda: dict(x_out=torch.empty(1, 3, 8).expand(X))),
])
def test_refuses(error, message, arguments):
    with pytest.raises(error, match=message):
        call(**arguments())


def test_refuses_other_devices():
    from torch._subclasses.fake_tensor import FakeTensorMode
    refused = pytest.raises(NotImplementedError, match="for the CPU and for CUDA.*mps")
    with FakeTensorMode(allow_non_fake_inputs=True), refused:
        call(x=torch.randn(X, device="mps"), run=[], x_out=None)
