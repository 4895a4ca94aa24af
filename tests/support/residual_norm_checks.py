"""What residual_norm promises on every device; the tests say with which kernels it runs."""

import pytest
import torch

from harmonica_kernels.ops import Term, residual_norm
from support.problems import DTYPES, Problem, assert_within, random_dtype

X, ROW = (2, 3, 8), (2, 8)


def call(x=None, run=None, shift=None, scale=None, **kwargs):
    x = torch.randn(X) if x is None else x
    run = [Term(torch.randn(X))] if run is None else run
    kwargs.setdefault("x_out", torch.empty(X, dtype=x.dtype))
    return residual_norm(x, run, shift, scale, **kwargs)


def check_agreement_with_float64(shape):
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


def check_store_receives_the_first_output(dtype):
    p = Problem(3, 4, 33, 2, plain=True)
    store = torch.full((3, 4, 33), torch.nan, dtype=dtype)
    arguments = dict(norm=p.norm, eps=p.eps)
    h = residual_norm(p.x, p.run, p.shift, p.scale, x_out=torch.empty(3, 4, 33), store=store, **arguments)
    without = residual_norm(p.x, p.run, p.shift, p.scale, x_out=torch.empty(3, 4, 33), **arguments)
    assert torch.equal(store, p.run[0].latest.to(dtype))
    assert torch.equal(h, without)


def check_no_rows(shape):
    x = torch.empty(shape)
    h = residual_norm(x, [Term(x.clone(), None, torch.randn(shape[0], 8))], None, None, x_out=x)
    assert h.shape == shape


def check_in_place_equals_out_of_place():
    for dtype in DTYPES:
        p = Problem(2, 5, 65, 3, dtype)
        x = p.x.clone(memory_format=torch.contiguous_format)
        x_out = torch.full_like(x, torch.nan)
        arguments = dict(forecast_weights=p.e, norm=p.norm, eps=p.eps, h_dtype=torch.float32)
        h = residual_norm(x, p.run, p.shift, p.scale, x_out=x_out, **arguments)
        in_place = residual_norm(x, p.run, p.shift, p.scale, x_out=x, **arguments)
        assert torch.equal(x, x_out) and torch.equal(h, in_place)


def check_the_sum_need_not_be_kept():
    """x_out=None: h is the same, x is only read; h_out receives h."""
    p = Problem(3, 4, 33, 2, plain=True)
    x_out, h_out, before = torch.empty_like(p.x), torch.full_like(p.x, torch.nan), p.x.clone()
    kept = residual_norm(p.x, p.run, p.shift, p.scale, x_out=x_out, eps=p.eps)
    assert residual_norm(p.x, p.run, p.shift, p.scale, h_out=h_out, eps=p.eps) is h_out
    assert torch.equal(h_out, kept) and torch.equal(p.x, before)
    assert torch.equal(residual_norm(p.x, p.run, None, None, norm=False), residual_norm(
        p.x, p.run, None, None, x_out=x_out, norm=False))


def check_an_empty_run_only_reads_x():
    x = torch.randn(2, 3, 8)
    before, version = x.clone(), x._version
    residual_norm(x, [], torch.randn(2, 8), None, x_out=x)
    assert torch.equal(x, before) and x._version == version


def check_variance_survives_a_large_mean():
    x = torch.randn(2, 3, 1152) + 1e4
    h = residual_norm(x, [], None, None)
    expected = torch.nn.functional.layer_norm(x.double(), (1152,), eps=1e-6)
    torch.testing.assert_close(h.double(), expected, rtol=0, atol=3e-3)  # the mean itself has a spacing of 1e-3


def check_nothing_to_do_returns_x_itself():
    x, x_out = torch.randn(2, 3, 8), torch.empty(2, 3, 8)
    before = x.clone()
    assert residual_norm(x, [], None, None, norm=False) is x
    assert residual_norm(x, [], None, None, norm=False, h_dtype=torch.bfloat16).dtype == torch.bfloat16
    assert residual_norm(x, [Term(x.clone())], None, None, x_out=x_out, norm=False) is x_out
    assert torch.equal(x, before)
    assert residual_norm(x, [Term(before)], None, None, x_out=x, norm=False) is x
    assert torch.equal(x, x_out)


def check_float64():
    p = Problem(2, 3, 9, 2, torch.float64)
    x_new, h = p.truth()
    x_out = torch.empty_like(x_new)
    torch.testing.assert_close(residual_norm(p.x, p.run, p.shift, p.scale, forecast_weights=p.e, x_out=x_out,
                                             norm=p.norm, eps=p.eps),
                               h)
    torch.testing.assert_close(x_out, x_new)


def check_overlap_is_refused():
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


def check_halves_of_one_buffer_may_be_input_and_output():
    left, right = torch.randn(2, 3, 16).chunk(2, -1)
    expected = left + right
    residual_norm(left, [Term(right)], None, None, x_out=left)
    assert torch.equal(left, expected)


def check_gradients_are_refused():
    with pytest.raises(RuntimeError, match="blend_residual_norm"):
        call(x=torch.randn(X, requires_grad=True))


def check_overwriting_what_a_backward_needs_is_noticed():
    cached = torch.randn(2, 3, 8)
    weight = torch.randn(8, requires_grad=True)
    loss = (cached * weight).sum()
    with torch.no_grad():
        residual_norm(torch.randn(2, 3, 8), [Term(torch.randn(2, 3, 8))], None, None, x_out=torch.empty(2, 3, 8),
                      store=cached)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


NO_ROWS = ((0, 3, 8), (2, 0, 8))
ARITHMETIC = (check_in_place_equals_out_of_place, check_the_sum_need_not_be_kept, check_an_empty_run_only_reads_x,
              check_variance_survives_a_large_mean)
CALLS = (check_nothing_to_do_returns_x_itself, check_float64, check_overlap_is_refused,
         check_halves_of_one_buffer_may_be_input_and_output, check_gradients_are_refused,
         check_overwriting_what_a_backward_needs_is_noticed)
