"""residual_norm against float64, on shapes, layouts and dtypes drawn at random, and its promises one by one."""

import pytest
import torch

from harmonica_kernels.ops import Term, residual_norm
from support.problems import DTYPES, Problem, assert_within, random_dtype

SHAPES = [(1, 1, 1, 0), (2, 3, 1, 2), (3, 1, 3, 1), (1, 5, 7, 3), (2, 4, 8, 1), (4, 49, 65, 2), (3, 17, 128, 4),
          (2, 33, 1152, 1), (2, 9, 1152, 8), (1, 1, 1152, 28), (64, 1, 96, 1), (1, 3, 4096, 2), (2, 3, 31, 56)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_float64(shape, isa):
    for _ in range(6):
        p = Problem(*shape)
        x_dtype = random_dtype()
        x_new, h = p.truth()
        x_bound, h_bound = p.bounds(x_new, h, x_dtype)
        x_out = torch.full(shape[:3], torch.nan, dtype=x_dtype)
        got = residual_norm(p.x, p.run, p.shift, p.scale, forecast_weights=p.e, x_out=x_out, h_dtype=p.h_dtype,
                            norm=p.norm, eps=p.eps)
        assert got.dtype == p.h_dtype
        assert_within(x_out, x_new, x_bound, "x_out")
        assert_within(got, h, h_bound if got is not x_out else x_bound, "h")


def test_in_place_equals_out_of_place(isa):
    for dtype in DTYPES:
        p = Problem(2, 5, 65, 3, dtype)
        x = p.x.clone(memory_format=torch.contiguous_format)
        x_out = torch.full_like(x, torch.nan)
        arguments = dict(forecast_weights=p.e, norm=p.norm, eps=p.eps, h_dtype=torch.float32)
        h = residual_norm(x, p.run, p.shift, p.scale, x_out=x_out, **arguments)
        in_place = residual_norm(x, p.run, p.shift, p.scale, x_out=x, **arguments)
        assert torch.equal(x, x_out) and torch.equal(h, in_place)


@pytest.mark.parametrize("dtype", DTYPES)
def test_store_receives_the_first_output(dtype, isa):
    p = Problem(3, 4, 33, 2, plain=True)
    store = torch.full((3, 4, 33), torch.nan, dtype=dtype)
    arguments = dict(norm=p.norm, eps=p.eps)
    h = residual_norm(p.x, p.run, p.shift, p.scale, x_out=torch.empty(3, 4, 33), store=store, **arguments)
    without = residual_norm(p.x, p.run, p.shift, p.scale, x_out=torch.empty(3, 4, 33), **arguments)
    assert torch.equal(store, p.run[0].latest.to(dtype))
    assert torch.equal(h, without)


def test_the_sum_need_not_be_kept(isa):
    """x_out=None: h is the same, x is only read; h_out receives h."""
    p = Problem(3, 4, 33, 2, plain=True)
    x_out, h_out, before = torch.empty_like(p.x), torch.full_like(p.x, torch.nan), p.x.clone()
    kept = residual_norm(p.x, p.run, p.shift, p.scale, x_out=x_out, eps=p.eps)
    assert residual_norm(p.x, p.run, p.shift, p.scale, h_out=h_out, eps=p.eps) is h_out
    assert torch.equal(h_out, kept) and torch.equal(p.x, before)
    assert torch.equal(residual_norm(p.x, p.run, None, None, norm=False), residual_norm(
        p.x, p.run, None, None, x_out=x_out, norm=False))


def test_nothing_to_do_returns_x_itself():
    x, x_out = torch.randn(2, 3, 8), torch.empty(2, 3, 8)
    before = x.clone()
    assert residual_norm(x, [], None, None, norm=False) is x
    assert residual_norm(x, [], None, None, norm=False, h_dtype=torch.bfloat16).dtype == torch.bfloat16
    assert residual_norm(x, [Term(x.clone())], None, None, x_out=x_out, norm=False) is x_out
    assert torch.equal(x, before)
    assert residual_norm(x, [Term(before)], None, None, x_out=x, norm=False) is x
    assert torch.equal(x, x_out)


def test_an_empty_run_only_reads_x(isa):
    x = torch.randn(2, 3, 8)
    before, version = x.clone(), x._version
    residual_norm(x, [], torch.randn(2, 8), None, x_out=x)
    assert torch.equal(x, before) and x._version == version


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


def test_variance_survives_a_large_mean(isa):
    x = torch.randn(2, 3, 1152) + 1e4
    h = residual_norm(x, [], None, None)
    expected = torch.nn.functional.layer_norm(x.double(), (1152,), eps=1e-6)
    torch.testing.assert_close(h.double(), expected, rtol=0, atol=3e-3)  # the mean itself has a spacing of 1e-3


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


@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 8)])
def test_no_rows(shape):
    x = torch.empty(shape)
    h = residual_norm(x, [Term(x.clone(), None, torch.randn(shape[0], 8))], None, None, x_out=x)
    assert h.shape == shape


def test_float64():
    p = Problem(2, 3, 9, 2, torch.float64)
    x_new, h = p.truth()
    x_out = torch.empty_like(x_new)
    torch.testing.assert_close(residual_norm(p.x, p.run, p.shift, p.scale, forecast_weights=p.e, x_out=x_out,
                                             norm=p.norm, eps=p.eps),
                               h)
    torch.testing.assert_close(x_out, x_new)


def test_halves_of_one_buffer_may_be_input_and_output():
    left, right = torch.randn(2, 3, 16).chunk(2, -1)
    expected = left + right
    residual_norm(left, [Term(right)], None, None, x_out=left)
    assert torch.equal(left, expected)


def test_overwriting_what_a_backward_needs_is_noticed():
    cached = torch.randn(2, 3, 8)
    weight = torch.randn(8, requires_grad=True)
    loss = (cached * weight).sum()
    with torch.no_grad():
        residual_norm(torch.randn(2, 3, 8), [Term(torch.randn(2, 3, 8))], None, None, x_out=torch.empty(2, 3, 8),
                      store=cached)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


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


X, ROW = (2, 3, 8), (2, 8)


def call(x=None, run=None, shift=None, scale=None, **kwargs):
    x = torch.randn(X) if x is None else x
    run = [Term(torch.randn(X))] if run is None else run
    kwargs.setdefault("x_out", torch.empty(X, dtype=x.dtype))
    return residual_norm(x, run, shift, scale, **kwargs)


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


def test_refuses_overlap():
    buffer = torch.randn(5, 3, 8)
    for name, arguments in {
        "x": dict(x=buffer[:2], x_out=buffer[1:3]),
        r"run\[0\].latest": dict(run=[Term(buffer[2:4])], x_out=buffer[1:3]),
        r"run\[1\].previous": dict(run=[Term(torch.randn(X)), Term(torch.randn(X), buffer[:2])], forecast_weights=[0,
                                                                                                                   1],
                                   x_out=buffer[1:3]),
        "shift": dict(shift=buffer[0, :2], x_out=buffer[:2]),
        "store": dict(store=buffer[1:3], x_out=buffer[:2]),
    }.items():
        before = buffer.clone()
        with pytest.raises(ValueError, match=f"x_out is written to and shares memory with {name}"):
            call(**arguments)
        assert torch.equal(buffer, before)


def test_refuses_gradients():
    with pytest.raises(RuntimeError, match="blend_residual_norm"):
        call(x=torch.randn(X, requires_grad=True))


def test_refuses_other_devices():
    from torch._subclasses.fake_tensor import FakeTensorMode
    refused = pytest.raises(NotImplementedError, match="for the CPU and for CUDA.*mps")
    with FakeTensorMode(allow_non_fake_inputs=True), refused:
        call(x=torch.randn(X, device="mps"), run=[], x_out=None)
