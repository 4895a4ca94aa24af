"""The Triton kernels: the CPU kernels' tests once more, and what only CUDA promises.

Marked gpu, for they need one; but test_triton_interpreted.py runs them on CPU tensors in Triton's interpreter.
"""

import os
import random
import sys
import warnings

import pytest
import torch

from harmonica_kernels.ops import (
    Term,
    bias_gelu,
    blend_residual_norm,
    cache_commit,
    guided_step,
    reference,
    residual_norm,
)
from harmonica_kernels.ops._library import library
from support import blend_residual_norm_checks as training
from support import residual_norm_checks as inference
from support.problems import DTYPES, Problem, random_dtype

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="needs a CUDA device"),
    # exp of a large number is infinite, as on a GPU; the interpreter's NumPy says so
    pytest.mark.filterwarnings(r"ignore:overflow encountered in exp:RuntimeWarning:triton\.runtime\.interpreter"),
]
on_gpu = pytest.mark.skipif(INTERPRETED, reason="is about the device itself, or slow in the interpreter")

# (B, N, D, R): small, for the interpreter and for compute-sanitizer.
SHAPES = [(1, 1, 1, 0), (2, 3, 1, 2), (1, 5, 7, 3), (2, 4, 8, 1), (3, 3, 65, 4), (2, 2, 1152, 1), (1, 2, 1152, 8),
          (9, 1, 96, 1), (1, 2, 4096, 2), (1, 2, 31, 33)]


@pytest.fixture(autouse=True, scope="module")
def triton_in_place_of_cpp():
    """In the interpreter the ops' CUDA implementations serve CPU tensors: this process is for that alone."""
    if not INTERPRETED:
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*also be overridden")  # torch says so once
        ops = sys.modules["harmonica_kernels.ops.blend_residual_norm"]
        library.impl("blend_residual_norm_backward", ops._backward_cuda, "CPU", allow_override=True)
        for op in ("residual_norm", "blend_residual_norm", "cache_commit", "bias_gelu", "guided_step"):
            library.impl(op, sys.modules[f"harmonica_kernels.ops.{op}"]._cuda, "CPU", allow_override=True)


@pytest.fixture(autouse=True)
def device(triton_in_place_of_cpp):
    with torch.device("cpu" if INTERPRETED else "cuda") as device:
        yield device


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_residual_norm(shape):
    inference.check_agreement_with_float64(shape)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 1, 2), (1, 5, 7, 3), (1, 17, 257, 1), (2, 2, 1152, 1),
                                   (5, 1, 96, 1), (2, 9, 129, 1), (2, 5, 33, 0), (1, 1, 31, 9)], ids=str)
def test_blend_residual_norm(shape):
    training.check_agreement_with_float64_autograd(shape)


@on_gpu
@pytest.mark.parametrize("draw", range(6))
def test_gradcheck(draw):
    training.check_gradients(draw)


@pytest.mark.parametrize("dtype", DTYPES)
def test_store_receives_the_first_output(dtype):
    if INTERPRETED and dtype is torch.bfloat16:
        pytest.skip("the interpreter truncates to bfloat16")
    inference.check_store_receives_the_first_output(dtype)


@pytest.mark.parametrize("check", (*inference.ARITHMETIC, *inference.CALLS, training.check_forward_equals_residual_norm,
                                   *training.CALLS), ids=lambda check: check.__name__)
def test_promises(check):
    check()


@pytest.mark.parametrize("shape", inference.NO_ROWS)
def test_no_rows(shape):
    inference.check_no_rows(shape)
    x, row, r = torch.randn(shape, requires_grad=True), torch.randn(1, 8, requires_grad=True), torch.ones(1)
    _, h, _ = blend_residual_norm(x, [Term(x)], row, row, fresh=x, r=r.requires_grad_())
    assert all(not g.any() for g in torch.autograd.grad(h.sum(), (x, row, r)))


def test_inputs_with_strides_and_outputs_with_strides():
    """What is not contiguous is copied, in and out; rows of a chunk are not."""
    B, N, D = 2, 3, 40
    wide = torch.randn(B, N, 2 * D)
    x_out, kept = wide[..., :D], wide[..., D:].clone()
    run = [Term(wide[..., D:], None, torch.randn(B, 6 * D).chunk(6, -1)[2])]
    x = torch.randn(N, B, D).transpose(0, 1)
    expected, h = reference.residual_norm(x, run, [0.0], None, None)
    torch.testing.assert_close(residual_norm(x, run, None, None, x_out=x_out), h)
    torch.testing.assert_close(x_out, expected)
    assert torch.equal(wide[..., D:], kept)


def test_no_value_beyond_the_outputs_is_written():
    """Memory on both sides of every output keeps its values, at widths that are no power of two."""
    for D in (1, 7, 65, 1152):
        B, N = 2, 3
        size, guard = B * N * D, 64
        memory = torch.full((3, size + 2 * guard), 7.0)
        x_out, h, store = (row[guard:guard + size].view(B, N, D) for row in memory)
        residual_norm(torch.randn(B, N, D), [Term(torch.randn(B, N, D), None, torch.randn(1, D))], None, None,
                      x_out=x_out, h_out=h, store=store)
        cache_commit(store, x_out, torch.ones(1), 0.5, previous=h)
        bias_gelu(x_out, torch.randn(D))
        guided_step(h, x_out, store, guidance=2.0, out=h)
        assert (memory[:, :guard] == 7).all() and (memory[:, guard + size:] == 7).all()


@on_gpu
def test_gradients_are_deterministic():
    B, N, D = 3, 37, 65
    x, o, fresh = (torch.randn(B, N, D, requires_grad=True) for _ in range(3))
    gate, shift, scale = torch.randn(B, D, requires_grad=True), *torch.randn(2, 1, D, requires_grad=True)
    r, e = torch.rand(1, requires_grad=True), torch.rand(1, requires_grad=True)
    previous, leaves = torch.randn(B, N, D), (x, o, fresh, gate, shift, scale, r, e)

    def gradients():
        x_new, h, _ = blend_residual_norm(x, [Term(o, previous, gate)], shift, scale, forecast_weights=e, fresh=fresh,
                                          r=r)
        return torch.autograd.grad((x_new * h).sum(), leaves)

    first = gradients()
    assert all(torch.equal(a, b) for _ in range(20) for a, b in zip(first, gradients()))


def test_coefficients_without_a_previous_output_count_as_none():
    x, o, o2 = torch.randn(3, 2, 3, 8)
    e = torch.tensor([0.7, 0.3])
    _, h, _ = blend_residual_norm(x, [Term(o), Term(o2, x)], None, None, forecast_weights=e)
    _, expected, _ = blend_residual_norm(x, [Term(o), Term(o2, x)], None, None, forecast_weights=torch.tensor([0.0,
                                                                                                               0.3]))
    torch.testing.assert_close(h, expected)


@pytest.mark.parametrize("history", [1, 2])
@pytest.mark.parametrize("score, threshold, renewed", [
    (0.1, 0.1, False), (0.1 + 2**-55, 0.1, True), (0.0, 0.0, False), (1e-30, 0.0, True), (0.9, 1.0, False)])
def test_cache_commit(history, score, threshold, renewed):
    for shape in ((1, 1, 1), (2, 3, 65), (1, 5, 1152)):
        dtype = random_dtype()
        latest, before = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
        o = torch.randn(shape).to(random_dtype())
        expected = reference.cache_commit(latest.clone(), before.clone(), o, torch.tensor(score, dtype=torch.float64),
                                          threshold)
        assert (expected[0] is o) == renewed
        cache_commit(latest, o, torch.tensor(score, dtype=torch.float64), threshold,
                     previous=before if history == 2 else None)
        cut_off = torch.finfo(dtype).eps if INTERPRETED and dtype is torch.bfloat16 else 0  # the interpreter truncates
        torch.testing.assert_close(latest, expected[0].to(dtype), rtol=cut_off, atol=0)
        if history == 2 and renewed:
            assert torch.equal(before, expected[1])


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 5, 96), (2, 3, 4608), (0, 8)], ids=str)
def test_bias_gelu(shape, approximate):
    for dtype in (*DTYPES, torch.float64):
        x = (3 * torch.randn(shape)).to(dtype)
        bias = torch.randn(shape[-1]).to(dtype if dtype is torch.float64 else random_dtype())
        expected = reference.bias_gelu(x.double(), bias.double(), approximate == "none")
        assert bias_gelu(x, bias, approximate) is x
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(x.double(), expected, rtol=eps, atol=max(eps * 1e-2, 1e-6))


def test_bias_gelu_far_from_zero():
    x = torch.tensor([[-1e4, -30.0, 30.0, 1e4]])
    for approximate in ("none", "tanh"):
        y = bias_gelu(x.clone(), torch.zeros(4), approximate)
        torch.testing.assert_close(y, torch.tensor([[0.0, 0.0, 30.0, 1e4]]))


def test_guided_step():
    for _ in range(8):
        B, C, extra = random.randint(1, 3), random.randint(1, 5), random.choice((0, 4))
        size = random.choice(((7,), (3, 5), (32, 32)))
        output = torch.randn(2 * B, C + extra, *size).to(random_dtype())
        x = torch.randn(B, C, *size).to(random_dtype())
        conditional, unconditional = output[:B], random.choice((output[B:], None))
        channels, out = random.choice((None, 0, 1, 3, C)), random.choice((None, x))
        a, b, guidance = random.uniform(0, 1), random.uniform(-1, 1), random.uniform(0, 4)
        table = step = None
        if random.random() < 0.5:
            table = torch.randn(6, 2)
            step = random.choice((None, torch.tensor(4), torch.tensor([2], dtype=torch.int32)))
        expected = reference.guided_step(x.double(), conditional[:, :C].double(),
                                         None if unconditional is None else unconditional[:, :C].double(), guidance,
                                         C if channels is None else channels, a, b, table, step)
        given = dict(a=a, b=b) if table is None else dict(table=table, step=step)
        y = guided_step(x, conditional, unconditional, guidance=guidance, channels=channels, out=out, **given)
        assert y.dtype == x.dtype and (out is None or y is x)
        eps = torch.finfo(y.dtype).eps
        torch.testing.assert_close(y.double(), expected, rtol=eps, atol=max(eps * 1e-2, 1e-5))


def test_a_step_out_of_the_table_is_seen():
    x = torch.randn(2, 3, 4)
    for step in (-1, 5):
        assert guided_step(x, x, table=torch.ones(5, 2), step=torch.tensor(step)).isnan().all()


@on_gpu
def test_nothing_waits_for_the_device():
    """No call synchronises, once it has been compiled."""
    p = Problem(2, 3, 65, 3, plain=True)
    x_out, h = torch.empty(2, 3, 65), torch.empty(2, 3, 65)
    o, fresh = torch.randn(2, 3, 65, requires_grad=True), torch.randn(2, 3, 65, requires_grad=True)
    r, e = torch.rand(1, requires_grad=True), torch.rand(1, requires_grad=True)
    table, step, bias, seed = torch.rand(4, 2), torch.tensor(1), torch.randn(65), torch.ones(2, 3, 65)

    def calls():
        residual_norm(p.x, p.run, p.shift, p.scale, x_out=x_out, h_out=h, h_dtype=torch.float32)
        _, y, blended = blend_residual_norm(p.x, [Term(o, x_out, p.run[0].gate)], p.shift, p.scale, forecast_weights=e,
                                            fresh=fresh, r=r, h_dtype=torch.float32)
        torch.autograd.grad(y, (o, fresh, r, e), seed)
        cache_commit(h, blended, r, 0.1, previous=x_out)
        bias_gelu(h, bias)
        guided_step(h, x_out, h.clone(), guidance=1.5, table=table, step=step)

    calls()
    torch.cuda.set_sync_debug_mode("error")
    try:
        calls()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_gpu
def test_addresses_beyond_32_bits():
    """More than 2^31 values: the last row is where it should be."""
    if torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("needs 20 GB of free device memory")
    torch.use_deterministic_algorithms(False)
    x = torch.zeros(1, (1 << 31) // 1024 + 8, 1024, dtype=torch.bfloat16)
    x[0, -1] = torch.randn(1024)
    expected = torch.nn.functional.layer_norm(x[0, -1].float() * 2, (1024,), eps=1e-6)
    h = residual_norm(x, [Term(x)], None, None)
    torch.testing.assert_close(h[0, -1].float(), expected, rtol=1e-2, atol=1e-2)
