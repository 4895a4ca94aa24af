"""bias_gelu on the CPU against float64, on shapes and dtypes drawn at random, and its promises one by one."""

import pytest
import torch

from harmonica_kernels.ops import bias_gelu, reference
from support.problems import DTYPES

SHAPES = [(1,), (5,), (3, 1), (2, 7, 15), (4, 49, 65), (1, 3, 512), (2, 5, 3, 33), (0, 8), (3, 0, 4)]
ROUNDING = {torch.float32: 3e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float64: 1e-12}  # relative


def values(*shape, dtype):
    return (3 * torch.randn(shape)).to(dtype)


@pytest.mark.parametrize("approximate", ["tanh", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_float64(shape, dtype, approximate, isa):
    x, bias = values(*shape, dtype=dtype), values(shape[-1], dtype=dtype)
    expected = reference.bias_gelu(x.double(), bias.double(), approximate == "none")
    assert bias_gelu(x, bias, approximate) is x and x.dtype == dtype
    # PyTorch's exact form, x/2·(1 + erf), cancels where x is negative; the kernel's tanh form does not
    atol = 1e-5 if approximate == "none" else 1e-7  # float16 has no values between 0 and 6e-8
    torch.testing.assert_close(x.double(), expected, rtol=ROUNDING[dtype], atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_tails(dtype, isa):
    """Where the tanh form's own sum cancels, this one does not; and nothing overflows on the way."""
    x = torch.cat([torch.linspace(-8, -3, 97), torch.tensor([-1e30, -1e4, -20.0, 0.0, 20.0, 1e4, 1e30])]).to(dtype)
    exact = x.double()
    u = (2 / torch.pi) ** 0.5 * (exact + 0.044715 * exact**3)
    found = bias_gelu(x.clone(), torch.zeros_like(x), "tanh").double()
    torch.testing.assert_close(found, exact / (1 + torch.exp(-2 * u)), rtol=2e-5, atol=1e-30)
    odd = torch.tensor([torch.nan, torch.inf] * 20, dtype=dtype)
    found = bias_gelu(odd, torch.zeros_like(odd), "tanh")
    assert found[::2].isnan().all() and (found[1::2] == torch.inf).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_storage_types_mix(dtype):
    """A bias in float32 beside a half-precision x, as under autocast."""
    x, bias = values(2, 5, 33, dtype=dtype), values(33, dtype=torch.float32)
    expected = reference.bias_gelu(x.double(), bias.double(), False)
    torch.testing.assert_close(bias_gelu(x, bias, "tanh").double(), expected, rtol=ROUNDING[dtype], atol=1e-7)


def test_threads_do_not_change_a_bit(threads):
    x, bias = values(3, 200, 257, dtype=torch.float32), values(257, dtype=torch.float32)
    found = []
    for count in (1, 2, 5):
        threads(count)
        found.append(bias_gelu(x.clone(), bias, "tanh"))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_a_write_is_counted_and_memory_around_is_left():
    whole, bias = torch.randn(4, 6, 33), torch.randn(33)
    before, part = whole.clone(), whole[1:3]
    version = part._version
    bias_gelu(part, bias, "tanh")
    assert part._version > version and torch.equal(whole[0], before[0]) and torch.equal(whole[3], before[3])
    assert not torch.isclose(part, before[1:3]).any(-1).all()


@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_memory_that_is_shared_is_refused(approximate):
    x = torch.randn(4, 8)
    with pytest.raises(ValueError, match="bias_gelu: x is written to and shares memory with bias"):
        bias_gelu(x, x[2], approximate)
